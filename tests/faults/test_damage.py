"""Damaged checkpoints are always detected; all ranks use the newest intact one, never none."""

import json
import random
import shutil
from pathlib import Path

import pytest

from cifar_dist.errors import UsageError
from cifar_dist.storage.checkpoint import DamagedCheckpoint, checkpoints_in, load_newest, verify
from cifar_dist.verify import main as verify_main
from tests.forked import start
from tests.helpers import TINY, command, digest_of, run_command

OPTIONS = [*TINY, "--train.epochs", "2", "--checkpoint.every_epochs", "1"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the checkpoints of steps 10 and 20."""
    folder = tmp_path_factory.mktemp("run")
    with start([*OPTIONS, "--out", str(folder / "run")], 2, folder=folder) as job:
        assert job.wait() == [0, 0], job.text()
    return folder / "run"


@pytest.fixture
def copy(run_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path / "run"


def newest_of(run: Path) -> Path:
    return checkpoints_in(run / "checkpoints")[-1]


@pytest.mark.fault(11)
def test_every_flipped_bit_is_found(copy: Path) -> None:
    chance, newest = random.Random(0), newest_of(copy)
    files = sorted(newest.iterdir())
    assert len(files) == 5
    for file in files:
        whole = file.read_bytes()
        for number in range(200):  # half of them in the first bytes, the header
            hurt = bytearray(whole)
            end = len(hurt) if number % 2 else min(len(hurt), 1000)
            hurt[chance.randrange(end)] ^= 1 << chance.randrange(8)
            file.write_bytes(hurt)
            with pytest.raises(DamagedCheckpoint):
                verify(newest)
        file.write_bytes(whole)
    assert len(verify(newest)) == 4


@pytest.mark.fault(10)
def test_every_truncation_is_found(copy: Path) -> None:
    chance, newest = random.Random(1), newest_of(copy)
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        lengths = [0, len(whole) // 100, len(whole) // 2, len(whole) * 99 // 100]
        for length in [*lengths, *(chance.randrange(len(whole)) for _ in range(196))]:
            file.write_bytes(whole[:length])
            with pytest.raises(DamagedCheckpoint):
                verify(newest)
        file.write_bytes(whole)
    assert len(verify(newest)) == 4


@pytest.mark.fault(10, 11)
def test_all_processes_fall_back_to_the_same_checkpoint_and_the_result_is_equal(
    copy: Path, tmp_path: Path
) -> None:
    before = digest_of(copy)
    file = newest_of(copy) / "model.safetensors"
    hurt = bytearray(file.read_bytes())
    hurt[len(hurt) // 3] ^= 16
    file.write_bytes(hurt)
    with start([*OPTIONS, "--out", str(copy)], 2, folder=tmp_path) as job:
        assert job.wait() == [0, 0], job.text()
        warnings = [line for line in job.text().splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: damaged checkpoint step-00000020: the SHA-256 of model.safetensors differs; "
        "using step-00000010"
    ]
    assert "continues at step 10" in job.text(0)
    assert digest_of(copy) == before
    assert verify_main([str(copy)]) == 0


@pytest.mark.fault(10, 11)
@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_after_any_damage_both_processes_load_the_previous_checkpoint(
    times: int, copy: Path
) -> None:
    worker = command(2, "torchrun", "tests.worker")
    done = run_command([*worker, "fall_back", str(copy / "checkpoints"), str(times)])
    assert done.returncode == 0, done.stderr
    count, chosen, agreed, processes = json.loads(done.stdout.splitlines()[-1])
    assert (count, agreed, processes) == (5 * 2 * times, True, 2)
    assert len(chosen) == 1
    assert chosen[0].startswith("step-00000010 ")


@pytest.mark.fault(12)
def test_missing_and_unknown_files(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    newest = newest_of(copy)
    (newest / "notes.txt").write_text("mine")
    found = load_newest(copy / "checkpoints")
    assert found is not None
    assert found[0] == newest
    assert "step-00000020 holds unknown files: notes.txt" in capfd.readouterr().out
    for name in ("MANIFEST.json", "optim.safetensors"):
        (newest / name).rename(copy / name)
        found = load_newest(copy / "checkpoints")
        assert found is not None
        assert found[0].name == "step-00000010"
        (copy / name).rename(newest / name)


@pytest.mark.fault(13)
def test_with_all_checkpoints_damaged_the_run_refuses(copy: Path, tmp_path: Path) -> None:
    for path in checkpoints_in(copy / "checkpoints"):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no checkpoint in .* is whole"):
        load_newest(copy / "checkpoints")
    with start([*OPTIONS, "--out", str(copy)], folder=tmp_path) as job:
        assert job.wait() == [2]
        assert "start a new run with another --out" in job.text()
    assert verify_main([str(copy)]) == 1


@pytest.mark.fault(40)
def test_links_are_not_followed(copy: Path, tmp_path: Path) -> None:
    newest = newest_of(copy)
    target = tmp_path / "elsewhere"
    (newest / "model.safetensors").rename(target)
    (newest / "model.safetensors").symlink_to(target)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors is a link"):
        verify(newest)
    shutil.move(newest, tmp_path / "moved")
    newest.symlink_to(tmp_path / "moved")
    with pytest.raises(DamagedCheckpoint, match="symbolic link"):
        verify(newest)
    for link in (
        copy / "checkpoints" / "step-00000030",
        copy / "checkpoints" / ".step-00000030.tmp",
    ):
        link.symlink_to(tmp_path / "dangling")
    longer = [*OPTIONS, "--out", str(copy), "--train.epochs", "3"]
    with start(longer, folder=tmp_path) as job:
        assert job.wait() == [1]
        assert "warning: the checkpoint of step 30 was not saved" in job.text()
        assert "is a symbolic link, which is not followed" in job.text().splitlines()[-1]
    assert not (tmp_path / "dangling").exists()


@pytest.mark.fault(40)
def test_order_is_by_step_and_not_by_time(copy: Path) -> None:
    import os

    for age, path in enumerate(checkpoints_in(copy / "checkpoints")):
        os.utime(path, (10_000 - age, 10_000 - age))
    found = load_newest(copy / "checkpoints")
    assert found is not None
    assert found[0].name == "step-00000020"


@pytest.mark.fault(2)
def test_a_kill_while_one_checkpoint_replaces_another(copy: Path) -> None:
    newest = newest_of(copy)
    newest.rename(newest.with_name(f".{newest.name}.old"))  # the moment between two renames
    found = load_newest(copy / "checkpoints")
    assert found is not None
    assert found[1].progress.step == 20
