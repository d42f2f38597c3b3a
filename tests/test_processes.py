"""Several processes under real launchers: the same results, samples and settings as one process."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_dist.config import TrainConfig
from cifar_dist.errors import UsageError
from cifar_dist.processes import environment as launched
from cifar_dist.processes import start as starting
from cifar_dist.storage.checkpoint import Checkpoint, load_checkpoint
from tests.forked import start
from tests.helpers import (
    TINY,
    by_mpi,
    command,
    digest_of,
    read_lines,
    run_command,
)

RANDOM = [
    *("--model.name", "tutorial-relu", "--augment.flip", "random", "--augment.translate", "2"),
    *("--augment.cutout", "6", "--optim.momentum", "0.9"),
]


def train(processes: int, launcher: str, out: Path, *options: str) -> list[dict[str, Any]]:
    done = run_command([*command(processes, launcher), *TINY, "--out", str(out), *options])
    assert done.returncode == 0, done.stderr
    assert f"{processes} process" in done.stdout
    return read_lines(out)


# At this learning rate rounding errors do not grow. At others they show within 50 steps.
FIFTY = ["--data.limit_train", "800", "--optim.lr", "0.01", "--train.seed", "1"]


def test_the_number_of_processes_does_not_change_the_result(tmp_path: Path) -> None:
    alone = train(1, "torchrun", tmp_path / "1", *FIFTY)
    runs = {
        "accelerate 2": train(2, "accelerate", tmp_path / "2", *FIFTY),
        "torchrun 2 x 2": train(2, "torchrun", tmp_path / "3", *FIFTY, "--train.accumulate", "2"),
    }
    assert sum(line["split"] == "train_window" for line in alone) == 50
    learnt = [line["loss"] for line in alone if line["split"] == "train"]
    assert learnt[-1] < learnt[0]
    for name, lines in runs.items():
        for line, expected in zip(lines, alone, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5), (name, expected)
            if expected["split"] == "test":
                counts = (expected["correct"], expected["count"])
                assert (line["correct"], line["count"]) == counts, name


@pytest.mark.slow
def test_the_launcher_changes_no_bit(tmp_path: Path) -> None:
    train(2, "accelerate", tmp_path / "1", *FIFTY)
    train(2, "torchrun", tmp_path / "2", *FIFTY)
    assert digest_of(tmp_path / "1") == digest_of(tmp_path / "2")


@pytest.mark.slow
def test_gradients_sent_in_bfloat16_differ_in_the_third_digit(tmp_path: Path) -> None:
    options = ["--data.limit_train", "800", "--optim.lr", "0.01", "--train.epochs", "1"]
    compressed = [*options, "--train.compress_gradients", "true"]
    plain = train(2, "torchrun", tmp_path / "plain", *options)
    lines = train(2, "torchrun", tmp_path / "2", *compressed)
    assert digest_of(tmp_path / "2") != digest_of(tmp_path / "plain")
    for line, expected in zip(lines, plain, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-2)
    train(1, "torchrun", tmp_path / "1", *compressed)
    train(1, "torchrun", tmp_path / "alone", *options)
    assert digest_of(tmp_path / "1") == digest_of(
        tmp_path / "alone"
    )  # a single process sends no gradients


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    ("before", "after"), [(1, 2), *(pytest.param(2, n, marks=pytest.mark.slow) for n in (1, 3))]
)
def test_each_sample_is_used_once_when_the_world_size_changes(
    before: int, after: int, tmp_path: Path
) -> None:
    options = [*TINY, *RANDOM, "--out", str(tmp_path / "run"), "--train.epochs", "1"]
    options += ["--train.batch_size", "30", "--checkpoint.every_steps", "4"]
    used = {}
    for processes, stop_at in ((before, 6), (after, 0)):
        folder = tmp_path / f"until {stop_at}"
        folder.mkdir()
        worker = [*command(processes, module="tests.worker"), "record_positions"]
        done = run_command([*worker, str(folder), str(stop_at), *options])
        assert (done.returncode == 0) == (stop_at == 0), done.stderr
        assert len(list(folder.iterdir())) == processes
        lines = "".join(file.read_text() for file in folder.iterdir()).splitlines()
        used[stop_at] = [json.loads(line) for line in lines]
    assert {step for step, _ in used[6]} == set(range(1, 7))
    assert {step for step, _ in used[0]} == set(
        range(5, 11)
    )  # resumed from the checkpoint of step 4
    kept = [*used[0], *(entry for entry in used[6] if entry[0] <= 4)]
    counts = Counter(position for _, positions in kept for position in positions)
    assert set(counts.values()) == {1}
    assert len(counts) == 300  # of 320 images; the last incomplete batch of 20 is dropped


NORMALISED = [
    *(*TINY, "--model.name", "speednet", "--model.widths", "[8, 16]", "--optim.lr", "0.002"),
    *("--data.limit_train", "300", "--train.batch_size", "30", "--train.epochs", "1"),
    *("--checkpoint.every_steps", "4", "--checkpoint.keep", "9"),
]


def saved_at(step: int, out: Path) -> Checkpoint:
    """Return a checkpoint of a run."""
    return load_checkpoint(out / f"checkpoints/step-{step:08d}")


def test_per_rank_state_is_restored_on_any_number_of_processes(tmp_path: Path) -> None:
    """With two processes, then three: averaged BatchNorm statistics and summed metrics."""
    two, three, again = (tmp_path / name for name in ("two", "three", "again"))
    with start([*NORMALISED, "--out", str(two)], 2, folder=tmp_path, fault="raises 6 0") as job:
        assert job.wait() == [1, 1], job.text()
    saved = saved_at(4, two)
    weights, rows = saved.model, saved.statistics
    assert not rows[0].allclose(rows[1])
    statistics = [value.flatten() for name, value in weights.items() if "running" in name]
    torch.testing.assert_close(torch.cat(statistics), rows.mean(dim=0))
    assert saved.tallies[:, 2].tolist() == [60, 60]

    resumed = ["--resume", str(two / "checkpoints/step-00000004"), "--out", str(three)]
    with start([*NORMALISED, *resumed], 3, folder=tmp_path) as job:
        assert job.wait() == [0] * 3, job.text()
    whole = next(line for line in read_lines(three) if line["split"] == "train")
    assert whole["count"] == 300
    images = saved_at(8, three).tallies[:, 2]
    assert images.tolist() == [160, 40, 40]  # rank 0 also has the sum of both ranks before
    statistics = saved_at(10, three).statistics
    assert (statistics == statistics[0]).all()  # averaged for the evaluation

    # With three ranks, the order of the sums in an all-reduce depends on DDP's buckets.
    resumed = ["--resume", str(three / "checkpoints/step-00000008"), "--out", str(again)]
    with start([*NORMALISED, *resumed], 3, folder=tmp_path) as job:
        assert job.wait() == [0] * 3, job.text()
    assert digest_of(again) == digest_of(three)


@pytest.mark.fault(31)
def test_evaluation_counts_every_image_once_on_any_number_of_processes(tmp_path: Path) -> None:
    results = {}
    for processes in (1, 3):
        out = tmp_path / f"{processes}.json"
        worker = command(processes, module="tests.worker")
        done = run_command([*worker, "evaluate_sizes", str(out)])
        assert done.returncode == 0, done.stderr
        results[processes] = json.loads(out.read_text())
    assert [entry[:2] for entry in results[1]] == [[size, size] for size in range(1, 66)]
    assert results[1] == results[3]


def test_a_launcher_that_started_one_of_two_processes_is_refused(tmp_path: Path) -> None:
    launch = command(2, "accelerate")
    launch[launch.index("--multi_gpu")] = "--cpu"
    done = run_command([*launch, *TINY, "--out", str(tmp_path / "out")])
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "accelerate launch --multi_gpu --num_processes 2 -m cifar_dist.train" in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_batch_size_that_does_not_divide_is_refused_with_valid_ones(tmp_path: Path) -> None:
    done = run_command(
        [*command(2), *TINY, "--out", str(tmp_path / "out"), "--train.batch_size", "33"]
    )
    assert done.returncode != 0
    assert "does not divide among 2 processes; the nearest valid sizes: 32, 34" in done.stderr
    assert done.stderr.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_torchrun_with_one_process_uses_all_cores_without_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = command(2, "torchrun", "tests.worker")
    launch[launch.index("--nproc_per_node") + 1] = "1"
    monkeypatch.delenv("OMP_NUM_THREADS")
    done = run_command([*launch, "show_threads"], PYTHONWARNINGS="error")
    assert done.stdout.split() == [f"threads={launched.usable_cores()}"], done.stderr


def test_an_unknown_option_is_reported_once_under_mpirun() -> None:
    done = run_command(by_mpi([*command(), "--nonsense", "1"]))
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("processes", "launcher", "chosen"),
    # accelerate launch sets OMP_NUM_THREADS=1 even for a single process.
    [
        (1, "accelerate", None),
        pytest.param(2, "torchrun", None, marks=pytest.mark.slow),
        pytest.param(2, "accelerate", "3", marks=pytest.mark.slow),
    ],
)
def test_all_cores_are_used_unless_the_user_chose(
    processes: int, launcher: str, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    expected = chosen or max(1, launched.usable_cores() // processes)
    worker = [*command(processes, launcher, "tests.worker"), "show_threads"]
    done = run_command(worker, **({"OMP_NUM_THREADS": chosen} if chosen else {}))
    assert done.stdout.split() == [f"threads={expected}"] * processes, done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            "on several machines; add -x MASTER_ADDR",
        ),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "but RANK is not set, so the processes cannot"),
        (
            {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "RANK": "0"},
            "but MASTER_ADDR is not set, so the processes cannot connect",
        ),
        (
            {"WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            "unset the one that the launcher did not",
        ),
    ],
)
def test_environments_in_which_accelerate_would_train_alone(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        launched.asked_world_size()


def test_accumulation_set_by_the_launcher_is_refused(tmp_path: Path) -> None:
    done = run_command(
        [*command(), *TINY, "--out", str(tmp_path / "out")],
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4",
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set")


@pytest.mark.slow
def test_a_precision_chosen_with_the_launcher_is_used(tmp_path: Path) -> None:
    launch = command(1, "accelerate")
    launch[launch.index("--mixed_precision") + 1] = "bf16"
    short = ["--train.epochs", "1", "--data.limit_train", "64"]
    done = run_command([*launch, *TINY, "--out", str(tmp_path), *short])
    assert "precision bf16" in done.stdout, done.stderr
    assert json.loads((tmp_path / "run.json").read_text())["precision"] == "bf16"


@pytest.mark.parametrize("local", launched.LOCAL_SIZES)
@pytest.mark.parametrize(("cores", "expected"), [(8, 4), (1, 1)])
def test_the_processes_of_a_machine_share_its_cores(
    local: str, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "usable_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv(local, "2")
    threads = torch.get_num_threads()
    try:
        starting.start_processes(TrainConfig())
        assert torch.get_num_threads() == expected
        assert os.environ["OMP_NUM_THREADS"] == str(expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_the_cores_of_this_process_are_those_it_may_use() -> None:
    before = os.sched_getaffinity(0)
    assert launched.usable_cores() <= len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert launched.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1), ("1600000 100000", 8)],
)
def test_cores_are_limited_by_the_quota_of_a_container(
    limit: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(launched, "Path", lambda _: tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert launched.usable_cores() == cores
