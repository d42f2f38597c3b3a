"""A process that raises, is killed, hangs, drifts or differs ends the job and is named."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cifar_dist.errors import UsageError
from cifar_dist.processes import peers
from cifar_dist.storage.checkpoint import load_newest
from cifar_dist.training.guard import weight_sums
from tests.faults.inject import inject
from tests.forked import start
from tests.helpers import TINY, command, run_command, status_of

LONG = [*TINY, "--train.epochs", "3", "--checkpoint.every_steps", "5"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(
            "raises 7 1",
            "error: rank 1 failed at step 7: ValueError: injected (inject.py:",
            marks=pytest.mark.fault(26),
            id="raises",
        ),
        pytest.param(
            "is_killed 7 1",
            "error: rank 1 exited without an error message (probably killed by the OOM killer) at "
            "step 7",
            marks=pytest.mark.fault(27),
            id="is killed",
        ),
        pytest.param(
            "is_killed 7 0",
            "error: rank 0 exited without an error message (probably killed by the OOM killer",
            marks=pytest.mark.fault(27),
            id="rank 0 is killed",
        ),
        pytest.param(
            "hangs 7 1",
            "error: rank 1 did not arrive within 3 s at step 7 (rank 1 is in inject.py:",
            marks=pytest.mark.fault(28),
            id="hangs",
        ),
        pytest.param(
            "drifts 7 1",
            "error: the weights of rank 1 are no longer those of rank 0 at step 10 (first in ",
            marks=pytest.mark.fault(29),
            id="drifts",
        ),
        pytest.param(
            "misses_a_step 7 1",
            "error: the weights of rank 1 are no longer those of rank 0 at step 10 (first in ",
            marks=pytest.mark.fault(29),
            id="misses a step",
        ),
    ],
)
def test_one_process_fails_and_the_job_ends_with_its_name(
    fault: str, message: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = [*LONG, "--out", str(out), "--train.timeout", "3"]
    began = time.monotonic()
    with start(options, 2, folder=tmp_path, fault=fault) as job:
        if fault.startswith("hangs"):  # only a launcher could end the process that hangs
            job.wait_until(lambda: "error: " in job.text(0), 30)
            job.processes[0].join(5)
        else:
            codes = job.wait(30)
            assert all(codes)
            assert 0 not in codes
        assert time.monotonic() - began < 25
        speaker = 1 if fault == "is_killed 7 0" else 0
        last = job.text(speaker).splitlines()[-1]
        assert last.startswith(message), last
        assert job.text().count("error: ") == 1
        assert ("Traceback" in job.text()) == fault.startswith("raises")
    if "misses" not in fault and "drifts" not in fault:
        assert "step 7" in last
    status = status_of(out)
    assert status["state"] == "failed"
    assert f"error: {status['message']}" == last
    newest = load_newest(out / "checkpoints")
    assert newest is not None
    assert newest[1].progress.step == 5


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_one_bit_of_any_weight_changes_the_sum_of_its_tensor(kind: torch.dtype) -> None:
    network = torch.nn.Linear(4, 3).to(kind)
    width = network.weight.element_size()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    before = weight_sums(network)
    for number, weights in enumerate(network.parameters()):
        bits = weights.data.view(integers).flatten()
        for element in range(len(bits)):
            for place in (0, 3, 8 * width - 2):
                bits[element] ^= 1 << place
                changed = weight_sums(network) != before
                assert changed.tolist() == [tensor == number for tensor in range(2)]
                bits[element] ^= 1 << place


@pytest.mark.fault(26)
def test_the_error_line_is_printed_under_a_launcher_too(tmp_path: Path) -> None:
    out = tmp_path / "run"
    module = command(2, "torchrun", "tests.faults.inject")
    done = run_command([*module, "raises 7 1", *LONG, "--out", str(out)])
    assert done.returncode == 1
    line = str(status_of(out)["message"])
    assert line.startswith("rank 1 failed at step 7: ValueError: injected")
    assert f"error: {line}" in done.stderr


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("other", "fault", "message"),
    [
        (
            ["--optim.lr", "0.5"],
            "",
            "rank 1 was started with another recipe than rank 0: optim.lr is 0.02 there and 0.5 on "
            "rank 1; use the same on all ranks",
        ),
        (
            ["--data.limit_train", "640"],
            "",
            "data.limit_train is 320 there and 640 on rank 1",
        ),
        ([], "other_code FOLDER", "rank 1 was started with another code than rank 0: code is "),
    ],
    ids=["recipe", "data", "code"],
)
def test_processes_with_another_recipe_or_code_are_refused(
    other: list[str], fault: str, message: str, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "run")]
    fault = fault.replace("FOLDER", str(tmp_path / "copy"))
    with start([[*TINY, *out], [*TINY, *out, *other]], 2, folder=tmp_path, fault=fault) as job:
        assert job.wait(30) == [2, 2]
        assert message in job.text(0)
        assert job.text().count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda package: (package / "b/c.py").write_text("x = 2"), False),
        (lambda package: (package / "a.py").rename(package / "d.py"), False),
        (lambda package: (package / "e.py").touch(), False),
        (lambda package: (package / "notes.txt").touch(), True),
    ],
    ids=["content", "name", "one more", "no code"],
)
def test_the_digest_of_the_code_covers_every_name_and_byte(
    change: Callable[[Path], object], same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.py", "b/c.py", "peers.py"):
        (tmp_path / name).write_text("x = 1")
    monkeypatch.setattr(peers, "PACKAGE", tmp_path)
    before = peers.describe_process()
    change(tmp_path)
    assert (peers.describe_process() == before) == same


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        ({"a": 1}, {"a": 2}, "a is 1 there and 2 on rank 1"),
        ({"a": 1, "b": 2}, {"a": 1}, "b is 2 there and None on rank 1"),
        ({"a": 1}, {"a": 1, "b": 2}, "b is None there and 2 on rank 1"),
    ],
)
def test_every_fact_of_either_process_is_compared(
    first: dict[str, int], other: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = peers.Peers(0, 1, timeout=1)
    monkeypatch.setattr(process, "exchange", lambda *_: [first, other])
    with pytest.raises(UsageError, match=f"another recipe than rank 0: {message};"):
        process.compare("recipe", first)
    monkeypatch.setattr(process, "exchange", lambda *_: [first, dict(first)])
    process.compare("recipe", first)


@pytest.mark.fault(30)
def test_processes_that_see_other_images_are_refused(tmp_path: Path) -> None:
    from tests.helpers import write_folder

    recipes = []
    for rank in (0, 1):
        root = write_folder(tmp_path / f"machine {rank}", {"train": 36, "test": 9 + 3 * rank})
        recipes.append(
            [
                *(*TINY, "--data.name", "imagefolder", "--data.root", str(root)),
                *("--data.cache", str(tmp_path / f"cache {rank}"), "--out", str(tmp_path / "run")),
            ]
        )
    with start(recipes, 2, folder=tmp_path) as job:
        assert job.wait(30) == [2, 2]
        assert "rank 1 was started with another dataset than rank 0: digest is" in job.text(0)
        assert "test images is 9 there and 12 on rank 1" in job.text(0)


@pytest.mark.fault(28)
def test_a_process_that_never_starts_is_named(tmp_path: Path) -> None:
    with start([*TINY], 2, folder=tmp_path, fault="short_meeting 2 and never_comes 1") as job:
        job.wait_until(lambda: "error: " in job.text(0), 30)
        assert job.processes[0].join(5) is None
        assert job.processes[0].exitcode == 2
        message = "of 2 processes, ranks 1 did not arrive within 2 s"
        assert message in job.text(0)


def test_processes_that_accelerate_did_not_join_are_refused(tmp_path: Path) -> None:
    options = [*TINY, "--out", str(tmp_path / "run")]
    with start(options, 2, folder=tmp_path, fault="joins_alone") as job:
        assert job.wait(30) == [2, 2], job.text()
        message = "error: the launcher asked for 2 processes, but Accelerate joined 1; on a CPU use"
        assert message in job.text()
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(25)
def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with start([*TINY], 2, folder=tmp_path, MASTER_PORT=port) as job:
            job.processes[0].join(30)
            assert job.processes[0].exitcode == 2
            assert f"port {port} is in use by another program" in job.text(0)
            assert "--main_process_port" in job.text(0)


def test_faults_are_known_by_name() -> None:
    with pytest.raises(KeyError):
        inject("no_such_fault 1")
