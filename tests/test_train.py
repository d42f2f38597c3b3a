"""Training through the public commands, in this process: files, resuming and refusals."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar_dist.config import parse_recipe
from cifar_dist.errors import RunFailed, UsageError
from cifar_dist.storage.checkpoint import checkpoints_in, load_checkpoint, load_newest
from cifar_dist.train import main, run
from cifar_dist.training.run import Result
from tests.helpers import TINY, command, digest_of, read_lines, run_command, write_folder

# All random features, and all state that a checkpoint must hold: averaged weights, BatchNorm.
RANDOM = [
    *("--model.name", "tutorial-relu", "--augment.flip", "alternating"),
    *("--augment.translate", "2", "--augment.cutout", "6", "--augment.grayscale", "0.2"),
    *("--train.ema", "0.9", "--optim.momentum", "0.9", "--train.label_smoothing", "0.1"),
]

SMALL = ["--data.image_size", "8", "--data.limit_train", "64", "--data.limit_test", "10"]


def train(out: Path, *options: str) -> Result:
    return run(parse_recipe([*TINY, "--out", str(out), *options])[0])


class Stopped(Exception):
    """Interrupts a run in the middle of training."""


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next run raise Stopped after the optimizer step `step`."""
    from cifar_dist.training import run as story

    original = story.train_epoch

    def train_epoch(accelerator: Any, state: Any, *others: Any) -> Any:
        for result in original(accelerator, state, *others):
            yield result
            if state.step == step:
                raise Stopped

    monkeypatch.setattr(story, "train_epoch", train_epoch)


def test_a_finished_run_writes_its_files(trained: Result) -> None:
    out = trained.out
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["data"]["limit_train"] == 1600
    facts = json.loads((out / "run.json").read_text())
    assert (facts["world_size"], facts["device"], facts["precision"]) == (1, "cpu", "fp32")
    assert len(facts["dataset_sha256"]) == 64
    assert set(facts["versions"]) == {"cifar_dist", "torch", "torchvision", "accelerate"}
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"], status["epoch"]) == ("finished", 200, 4)
    lines = read_lines(out)
    splits = [line["split"] for line in lines if line["split"] != "train_window"]
    assert splits == ["train", "val", "test"] * 4
    for line in lines:
        assert line["accuracy"] == line["correct"] / line["count"]
    windows = [line for line in lines if line["split"] == "train_window"]
    assert [line["step"] for line in windows] == list(range(20, 201, 20))
    assert windows[0].keys() >= {"learning_rate", "gradient_norm", "images_per_second"}
    counts = {line["split"]: line["count"] for line in lines if line["split"] != "train_window"}
    assert counts == {"train": 1600, "val": 100, "test": 100}
    assert trained.metrics["test"] == lines[-1]
    assert trained.metrics["test"]["accuracy"] > 0.3
    checkpoint = out / "checkpoints" / "step-00000200"
    files = {path.name for path in checkpoint.iterdir()}
    assert files == {
        *("model.safetensors", "optim.safetensors", "processes.safetensors"),
        *("state.json", "MANIFEST.json"),
    }


def test_tensorboard_holds_the_tutorials_scalars_and_pictures(trained: Result) -> None:
    events = EventAccumulator(str(trained.out), {"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    groups = dict.fromkeys(("train", "val", "test"), 0)
    assert {f"{what}/{split}" for what in ("accuracy", "loss") for split in groups} | {
        *("loss/train_window", "optim/learning_rate", "optim/gradient_norm", "progress/epoch"),
        *(
            "speed/images_per_second",
            "speed/memory_mb",
            "per_class/test_disc",
            "per_class/val_ring",
        ),
    } <= set(tags["scalars"])
    assert sorted(tags["scalars"])[0].startswith("accuracy/")
    assert "custom_scalars__config__" in tags["tensors"]
    assert {"train_images", "test_wrong", "test_confusion"} <= set(tags["images"])
    assert tags["graph"]
    losses = {event.step: event.value for event in events.Scalars("loss/test")}
    lines = [line for line in read_lines(trained.out) if line["split"] == "test"]
    assert losses == {line["step"]: pytest.approx(line["loss"]) for line in lines}


def test_the_best_epoch_is_chosen_by_validation_accuracy(trained: Result) -> None:
    lines = [line for line in read_lines(trained.out) if line["split"] == "val"]
    best = max(lines, key=lambda line: line["accuracy"])
    assert trained.best is not None
    assert trained.best["val"] == best
    assert trained.best["test"]["step"] == best["step"]


@pytest.mark.parametrize(
    ("step", "accumulate"),
    [(1, 1), *(pytest.param(n, 1, marks=pytest.mark.slow) for n in (4, 7, 10)), (7, 2), (13, 1)],
)
def test_a_resumed_run_equals_an_uninterrupted_run(
    step: int, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*RANDOM, "--checkpoint.every_steps", "3", "--train.accumulate", str(accumulate)]
    whole = train(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(RunFailed, match="Stopped"):
            train(tmp_path / "stopped", *options)
    status = json.loads((tmp_path / "stopped" / "status.json").read_text())
    assert status["state"] == "failed"
    resumed = train(tmp_path / "stopped", *options)
    assert digest_of(tmp_path / "stopped") == digest_of(tmp_path / "whole")

    def without_times(result: Result) -> list[dict[str, Any]]:
        return [
            {
                key: value
                for key, value in line.items()
                if key not in ("images_per_second", "memory_mb")
            }
            for line in read_lines(result.out)
        ]

    assert without_times(resumed) == without_times(whole)
    assert resumed.metrics == whole.metrics
    starts = json.loads((tmp_path / "stopped" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, step // 3 * 3]


def test_averaged_weights_have_averaged_batchnorm_statistics(tmp_path: Path) -> None:
    options = ["--model.name", "speednet", "--model.widths", "[4, 8]", "--train.ema", "0.8"]
    options += ["--checkpoint.every_steps", "1", "--checkpoint.keep", "9", "--train.epochs", "1"]
    train(tmp_path, *options, *SMALL[:2], "--data.limit_train", "128")
    saved = [load_checkpoint(path) for path in checkpoints_in(tmp_path / "checkpoints")]
    assert len(saved) == 4
    expected = {name: t for name, t in saved[0].model.items() if t.is_floating_point()}
    assert sum("running" in name for name in expected) > 2
    for found in saved:
        assert found.ema is not None
        expected = {name: value.lerp(found.model[name], 0.2) for name, value in expected.items()}
        for name, value in expected.items():
            torch.testing.assert_close(found.ema[name], value, msg=name)


def test_curves_are_continuous_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--track.log_with", "[tensorboard]", "--checkpoint.every_steps", "4"]
    for step in (6, 11):
        with monkeypatch.context() as patch:
            stop_at(step, patch)
            with pytest.raises(RunFailed, match="Stopped"):
                train(tmp_path, *options)
        time.sleep(1)  # TensorBoard sorts its files by name, in whole seconds
    train(tmp_path, *options)
    events = EventAccumulator(str(tmp_path), {"scalars": 0})
    events.Reload()
    steps = [event.step for event in events.Scalars("loss/train_window")]
    assert steps == list(range(1, 21))
    assert [e.step for e in events.Scalars("accuracy/test")] == [10, 20]


def test_a_finished_run_is_unchanged_and_more_epochs_resume_it(tmp_path: Path) -> None:
    first = train(tmp_path / "a", "--train.epochs", "2")
    before = digest_of(first.out)
    again = train(tmp_path / "a", "--train.epochs", "2")
    assert digest_of(again.out) == before
    assert again.metrics == first.metrics
    longer = train(tmp_path / "a", "--train.epochs", "3")
    assert longer.metrics["test"]["epoch"] == 3
    straight = train(tmp_path / "b", "--train.epochs", "3")
    assert digest_of(straight.out) == digest_of(longer.out)  # the schedule is constant


def test_a_run_may_end_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--train.epochs", "1.5", "--schedule.name", "linear", *RANDOM]
    options += ["--checkpoint.every_steps", "6"]
    straight = train(tmp_path / "a", *options)
    lines, digest = read_lines(straight.out), digest_of(straight.out)
    assert [(x["step"], x["count"]) for x in lines if x["split"] == "train"] == [
        (10, 320),
        (15, 160),
    ]
    assert [line["step"] for line in lines if line["split"] == "test"] == [10, 15]
    windows = [line for line in lines if line["split"] == "train_window"]
    for epoch in (1, 2):  # the windows of an epoch add up to the epoch
        parts = [line for line in windows if line["epoch"] == epoch]
        whole = next(x for x in lines if x["split"] == "train" and x["epoch"] == epoch)
        for what in ("correct", "count"):
            assert sum(line[what] for line in parts) == whole[what]
        losses = [line["loss"] * line["count"] for line in parts]
        assert sum(losses) == pytest.approx(whole["loss"] * whole["count"])
    rates = [line["learning_rate"] for line in windows]
    assert rates == pytest.approx([0.02 * (1 - step / 15) for step in range(15)])
    with monkeypatch.context() as patch:
        stop_at(12, patch)
        with pytest.raises(RunFailed, match="Stopped"):
            train(tmp_path / "b", *options)
    stopped = train(tmp_path / "b", *options)
    assert "continues at step 12" in capfd.readouterr().out
    assert digest_of(stopped.out) == digest
    assert stopped.metrics["test"]["correct"] == straight.metrics["test"]["correct"]
    train(tmp_path / "a", *options)
    assert (read_lines(straight.out), digest_of(straight.out)) == (lines, digest)  # unchanged
    assert main([*TINY, "--out", str(tmp_path / "a"), *options, "--train.epochs", "2"]) == 2
    assert "train.epochs is 1.5 there and 2 here" in capfd.readouterr().err


def test_resume_from_a_named_checkpoint(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "--checkpoint.keep", "9", *RANDOM)
    middle = whole.out / "checkpoints" / "step-00000010"
    other = train(tmp_path / "other", "--resume", str(middle), *RANDOM)
    assert digest_of(other.out) == digest_of(whole.out)
    assert [line["split"] for line in read_lines(other.out)].count("test") == 1


def test_after_damage_a_run_resumes_from_the_previous_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path / "whole", *RANDOM)
    shutil.copytree(tmp_path / "whole", tmp_path / "hurt")
    newest = tmp_path / "hurt" / "checkpoints" / "step-00000020" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    train(tmp_path / "hurt", *RANDOM)
    assert "step-00000020" in capfd.readouterr().out
    assert digest_of(tmp_path / "hurt") == digest_of(whole.out)


def test_the_best_checkpoint_survives_pruning(tmp_path: Path) -> None:
    result = train(
        *(tmp_path, "--data.val_fraction", "0.2", "--train.epochs", "6", "--checkpoint.keep", "1"),
        *("--schedule.name", "step", "--schedule.step_epochs", "3", "--schedule.gamma", "0"),
    )
    assert result.best is not None
    assert result.best["val"]["step"] <= 30  # afterwards the learning rate is 0
    kept = {int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {60, result.best["val"]["step"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--train.batch_size", "400"],
            "exceeds the 320 training images; try --train.batch_size 200 --optim.lr 0.01",
        ),
        (["--train.precision", "fp16"], "fp16 is unavailable on a CPU"),
        (["--train.sync_batchnorm", "true"], "needs CUDA GPUs, but the device is cpu"),
        (["--track.log_with", "[nonsense]"], "nonsense"),
        (["--data.name", "imagefolder", "--data.root", "/absent"], "'/absent' is not a folder"),
        (["--resume", "/absent"], "neither a run folder nor a checkpoint"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(
    options: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main([*TINY, "--out", str(tmp_path / "out"), *options])
    errors = capfd.readouterr().err.splitlines()
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_corrupt_image_is_refused_before_anything_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "set", {"train": 36, "test": 9})
    victim = sorted((root / "test" / "disc").iterdir())[0]
    victim.write_bytes(b"GIF89a")
    options = ["--data.name", "imagefolder", "--data.root", str(root), "--out", str(tmp_path / "o")]
    assert main([*TINY, *options]) == 2
    error = capfd.readouterr().err
    assert str(victim) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()
    assert main([*TINY, *options, "--data.bad_images", "skip"]) == 0
    assert f"left out, cannot be decoded: {victim}" in capfd.readouterr().out
    facts = json.loads((tmp_path / "o" / "run.json").read_text())
    assert facts["evaluation_images"] == {"test": 8}
    assert len(facts["skipped_images"]) == 1


@pytest.mark.fault(33)
def test_a_folder_of_another_recipe_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", "--train.epochs", "1")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    out = ["--out", str(tmp_path / "run"), "--train.epochs", "1"]
    for options, message in [
        (["--optim.lr", "0.5"], "optim.lr is 0.02 there and 0.5 here"),
        (["--model.name", "deep"], "model.name is tutorial there and deep here"),
        (["--resume", "never"], "already holds a run"),
        (["--data.seed", "9"], "data.seed is 0 there and 9 here"),
    ]:
        assert main([*TINY, *out, *options]) == 2
        assert message in capfd.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.fault(33)
def test_a_checkpoint_of_another_model_or_dataset_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", "--train.epochs", "1")
    resume = ["--resume", str(tmp_path / "run"), "--train.epochs", "1"]
    with pytest.raises(UsageError, match=r"model\.name is tutorial there and tutorial-wide here"):
        train(tmp_path / "new", *resume, "--model.name", "tutorial-wide")
    root = write_folder(tmp_path / "set", {"train": 36, "test": 9})
    folder = ["--data.name", "imagefolder", "--data.root", str(root), "--train.epochs", "1"]
    train(tmp_path / "folder", *folder)
    sorted((root / "train" / "disc").iterdir())[0].unlink()
    with pytest.raises(UsageError, match="trained on other images"):
        train(tmp_path / "folder", *folder)


def test_an_unusable_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"the run folder .* cannot be used"):
        train(tmp_path / "file" / "below")


def test_a_non_finite_loss_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="not finite at step 2 on rank 0, training images"):
        train(tmp_path, "--optim.lr", "1e30")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed"
    assert "optim.lr" in status["message"]


def test_deterministic_applies_to_one_run_and_changes_nothing_on_a_cpu(tmp_path: Path) -> None:
    usual = train(tmp_path / "a", "--train.epochs", "1", "--model.name", "resnet18", *SMALL)
    assert not torch.are_deterministic_algorithms_enabled()
    other = train(
        *(tmp_path / "b", "--train.epochs", "1", "--model.name", "resnet18", *SMALL),
        *("--train.deterministic", "true"),
    )
    assert torch.are_deterministic_algorithms_enabled()
    assert digest_of(usual.out) == digest_of(other.out)
    train(tmp_path / "c", "--train.epochs", "1")
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_console_shows_one_line_per_epoch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    output = capfd.readouterr()
    lines = output.out.splitlines()
    start = lines.index("epoch        loss accuracy     loss accuracy    time     left")
    assert re.fullmatch(r" {21}train {14}test", lines[start - 1])
    for number, line in enumerate(lines[start + 1 : start + 3], 1):
        assert re.fullmatch(rf"{number}/2  ( +\d\.\d{{4}}){{4}} +[\d.]+ s +[\d.]+ s", line), line
        assert len(line) <= 80
    assert re.fullmatch(r"test accuracy 0\.\d{4} \(\d+ of 100\)", lines[start + 3])
    assert lines[start + 4 :] == [
        f"finished at step 20: {tmp_path}",
        f"  cifar-dist evaluate {tmp_path}",
        f"  cifar-dist predict {tmp_path} IMAGE",
        f"  tensorboard --logdir {tmp_path.parent}",
    ]
    assert "1 process on cpu, backend none, precision fp32" in output.out
    assert "batch 32, 32 per process; 10 steps per epoch (0 images dropped)" in output.out
    assert output.err == ""


def test_misclassified_images_are_shown_with_both_class_names(trained: Result) -> None:
    from cifar_dist.data.synthetic import draw
    from cifar_dist.storage.tracking import confusion_picture, image_grid, wrong_images

    images = draw(20, 32, seed=(3,))
    picture = wrong_images(images, [(4, 1), (7, 2)])
    assert picture is not None
    assert picture.shape == (76, 512, 3)
    assert np.array_equal(picture[0:64:2, 0:64:2], images.images[4])
    assert picture[64:, :64].min() < 100  # the caption
    assert wrong_images(images, []) is None
    assert image_grid(images.images).shape == (192, 512, 3)
    matrix = confusion_picture(np.diag([5] * 10), images.classes)
    assert matrix[90, 85].tolist() == [0, 0, 255]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on a CPU")
@pytest.mark.parametrize("model", ["tutorial-relu", "speednet"])
def test_a_compiled_network_gives_the_same_losses_and_checkpoint_keys(
    tmp_path: Path, model: str
) -> None:
    small = ["--model.name", model, "--train.epochs", "1", "--data.limit_train", "96"]
    runs = {}
    for compiled in ("true", "false"):
        own = ["--out", str(tmp_path / compiled), "--train.compile", compiled]
        done = run_command(
            [*command(), *TINY, *small, *own],
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
        )
        assert done.returncode == 0, done.stderr
        runs[compiled] = read_lines(tmp_path / compiled)
    assert any((tmp_path / "cache").rglob("*.so"))  # something was compiled
    for line, expected in zip(runs["true"], runs["false"], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3), expected
    saved = [load_newest(tmp_path / run / "checkpoints")[1].model for run in runs]
    assert saved[0].keys() == saved[1].keys()


def test_a_missing_compiler_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match="needs a C\\+\\+ compiler on a CPU"):
        train(tmp_path / "run", "--train.compile", "true")
    assert not (tmp_path / "run").exists()
