"""Read checkpoints while a run saves and removes them, or without permission."""

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_dist import files
from cifar_dist.errors import UsageError
from cifar_dist.storage import checkpoint as store
from cifar_dist.storage.checkpoint import (
    Best,
    Checkpoint,
    checkpoints_in,
    find_checkpoint,
    find_weights,
    load_newest,
    prune,
    save_checkpoint,
    verify,
)
from cifar_dist.verify import main as verify_main
from tests.forked import start
from tests.helpers import TINY, obeying_modes
from tests.test_checkpoint import sample

Read = Callable[[Path], None]


def numbered(step: int) -> Checkpoint:
    """Return a checkpoint of which every file holds its step, and which is its own best."""
    checkpoint = sample(float(step))
    progress = replace(checkpoint.progress, step=step, best=Best(step))
    return replace(checkpoint, progress=progress)


def require_whole(found: tuple[Path, Checkpoint] | None) -> None:
    assert found is not None
    assert (found[1].model["w"] == found[1].progress.step).all()


def read_newest(run: Path) -> None:
    require_whole(find_checkpoint(str(run)))


def read_best(run: Path) -> None:
    require_whole(find_checkpoint(str(run), best=True))


def read_weights(run: Path) -> None:
    progress, weights = find_weights(str(run), best=True)[1]
    assert (weights["w"] == progress.step).all()


def read_all(run: Path) -> None:
    assert verify_main([str(run)]) == 0


READS: list[Read] = [read_newest, read_best, read_weights, read_all]


def save_and_prune(folder: Path, step: int) -> None:
    save_checkpoint(folder, step, numbered(step))
    prune(folder, keep=1, best=step)


def save_again(folder: Path, step: int) -> None:
    save_checkpoint(folder, step - 1, numbered(step - 1))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("write", [save_and_prune, save_again])
def test_a_save_at_any_moment_of_a_read_does_not_disturb_it(
    read: Read,
    write: Callable[[Path, int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, moments = tmp_path / "checkpoints", 0
    originals = {
        (module, name): getattr(module, name)
        for module, name in ((store, "_committed"), (store, "read_tensors"), (files, "sha256_of"))
    }
    save_checkpoint(folder, 1, numbered(1))
    for moment in range(1, 100):
        left = [moment]

        def interrupted(function: Callable[..., Any], left: list[int] = left) -> Any:
            def call(*arguments: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    step = int(checkpoints_in(folder)[-1].name[5:]) + 1
                    write(folder, step)
                return function(*arguments)

            return call

        with monkeypatch.context() as patches:
            for (module, name), function in originals.items():
                patches.setattr(module, name, interrupted(function))
            read(tmp_path)
        moments += left[0] <= 0
    assert moments >= 5  # at least one per file
    printed = capfd.readouterr()
    assert "warning" not in printed.out + printed.err
    assert "damaged" not in printed.out


def save_for_ever(folder: str, keep: int, again: bool) -> None:
    """Save and prune as a run does, without training."""
    torch.set_num_threads(1)
    for step in range(1, 1_000_000):
        for _ in range(2 if again else 1):
            save_checkpoint(Path(folder), step, numbered(step))
        prune(Path(folder), keep, best=step)


@pytest.mark.fault(80)
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("reads", [30, pytest.param(600, marks=pytest.mark.slow)])
def test_no_read_fails_beside_a_process_that_saves(
    reads: int, keep: int, again: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    context = multiprocessing.get_context("forkserver")
    writer = context.Process(target=save_for_ever, args=(str(folder), keep, again))
    writer.start()
    try:
        while not checkpoints_in(folder):
            assert writer.is_alive()
        done, first = 0, checkpoints_in(folder)
        while done < reads or checkpoints_in(folder)[-1] in first:
            for read in READS:
                read(tmp_path)
            done += 1
            assert writer.is_alive()
    finally:
        writer.kill()
        writer.join()
    printed = capfd.readouterr()
    assert "warning" not in printed.out + printed.err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run folder with the checkpoints of steps 1 to 3."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "checkpoints", step, numbered(step))
    return tmp_path


@pytest.mark.fault(79)
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json", "."])
def test_an_unreadable_checkpoint_is_not_reported_as_damaged(
    name: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoints_in(run / "checkpoints")[-1]
    (newest / name).chmod(0)
    named = newest / ("MANIFEST.json" if name == "." else name)
    try:
        with obeying_modes():
            for read in (
                lambda: load_newest(run / "checkpoints"),
                lambda: find_checkpoint(str(run)),
                lambda: find_checkpoint(str(newest)),
            ):
                with pytest.raises(UsageError) as refused:
                    read()
                refusal = str(refused.value)
                assert refusal.startswith(f"'{newest}/" if name == "." else f"'{named}'")
                assert refusal.endswith(
                    "' cannot be read by this user (Permission denied); correct its permissions "
                    "or its owner, and try again"
                )
            with pytest.raises(PermissionError):
                verify(newest)
            assert capfd.readouterr().out == ""
            assert verify_main([str(run)]) == 1
    finally:
        (newest / name).chmod(0o755)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [
        "whole, 4 files",
        "whole, 4 files",
        f"not readable: {named}: Permission denied",
    ]


@pytest.mark.parametrize("name", ["checkpoints", "."])
def test_a_folder_that_may_not_be_listed_is_not_reported_as_empty(
    name: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run / name).chmod(0)
    try:
        with obeying_modes():
            for read in (
                lambda: load_newest(run / "checkpoints"),
                lambda: find_checkpoint(str(run)),
            ):
                with pytest.raises(UsageError, match=r"checkpoints' cannot be read by this user"):
                    read()
            assert verify_main([str(run)]) == 1
    finally:
        (run / name).chmod(0o755)
    assert capfd.readouterr().out == (
        f"{run}: not readable: {run / 'checkpoints'}: Permission denied\n"
    )


def test_a_run_refuses_to_resume_if_the_newest_checkpoint_is_unreadable(tmp_path: Path) -> None:
    options = [*TINY, "--checkpoint.every_epochs", "1", "--out", str(tmp_path / "run")]
    with start(options, folder=tmp_path) as job:
        assert job.wait() == [0], job.text()
    newest = checkpoints_in(tmp_path / "run" / "checkpoints")[-1]
    (newest / "optim.safetensors").chmod(0)
    longer = [*options, "--train.epochs", "3"]
    with start(longer, folder=tmp_path, fault="loses_privileges") as job:
        assert job.wait() == [2]
        assert job.text() == (
            f"error: '{newest / 'optim.safetensors'}' cannot be read by this user (Permission "
            "denied); correct its permissions or its owner, and try again\n"
        )
