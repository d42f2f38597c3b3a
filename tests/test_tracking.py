"""Trackers and reports: bounded memory, computed only if tracked, and never fatal."""

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tqdm
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from cifar_dist import evaluate
from cifar_dist.config import Recipe, parse_recipe
from cifar_dist.storage.folder import Warned
from cifar_dist.storage.tracking import Tracker, confusion_picture
from cifar_dist.train import run
from cifar_dist.training import reporting
from cifar_dist.training import run as story
from cifar_dist.training.metrics import Evaluation, Outcome, summarise
from cifar_dist.training.run import Result
from tests.helpers import TINY, digest_of, read_lines

BOARD = [*TINY, "--track.log_with", "[tensorboard]"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the final weights of a TINY run."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(parse_recipe([*TINY, "--out", str(out)])[0])
    return digest_of(out)


def measured(classes: int, images: int = 2000) -> Evaluation:
    """Return the evaluation of random predictions."""
    chance = torch.Generator().manual_seed(0)
    truth, predicted = torch.randint(classes, (2, images), generator=chance)
    confidence = torch.rand(images, generator=chance)
    outcome = Outcome(torch.arange(images), truth, predicted, confidence, confidence)
    return summarise(Accelerator(cpu=True), outcome, classes)


@pytest.mark.fault(63)
def test_the_evaluation_and_its_picture_take_little_memory_for_20000_classes() -> None:
    names = [f"class {number}" for number in range(20_000)]
    tracemalloc.start()
    try:
        result = measured(20_000)
        assert len(result.per_class) == 20_000
        picture = reporting.draw_confusion(result, names)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert picture.shape == (1040, 1040, 3)
    assert peak < 60e6  # the matrix itself has 3.2 GB
    assert result.coarse_confusion(960).sum() == result.totals.count == 2000


def test_neighbouring_classes_share_a_row_if_there_are_too_many() -> None:
    result = measured(6, 500)
    fine = result.confusion
    assert result.coarse_confusion(6).tolist() == fine.tolist()
    assert result.coarse_confusion(3).tolist() == fine.reshape(3, 2, 3, 2).sum((1, 3)).tolist()


@pytest.mark.parametrize("classes", [2, 10, 31, 80, 81, 960])
def test_every_cell_of_the_confusion_picture_shows_its_fraction(classes: int) -> None:
    matrix = np.random.default_rng(0).integers(1, 50, (classes, classes))
    picture = confusion_picture(matrix, ["x"] * classes)
    cell = max(1, min(48, 960 // classes))
    corners = picture[80::cell, 80::cell]
    share = matrix / matrix.sum(axis=1, keepdims=True)
    assert corners[..., 0].tolist() == (255 * (1 - share)).astype(int).tolist()
    assert (corners[..., 2] == 255).all()


def test_evaluate_lists_pairs_if_a_matrix_would_be_too_large(
    trained: Result, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", str(trained.out)]
    capfd.readouterr()
    assert evaluate.main([*options, "--json"]) == 0
    matrix = np.array(json.loads(capfd.readouterr().out)["confusion"])
    monkeypatch.setattr(evaluate, "MATRIX_CLASSES", 9)
    monkeypatch.setattr(evaluate, "TABLE_CLASSES", 9)
    assert evaluate.main([*options, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert "confusion" not in result
    assert {(row, column): n for row, column, n in result["confusion_pairs"]} == {
        (row, column): matrix[row, column] for row, column in np.argwhere(matrix).tolist()
    }
    assert evaluate.main(options) == 0
    rows = capfd.readouterr().out.splitlines()[3:]
    assert [len(row.split()) for row in rows[1:]] == [
        len(name.split()) + 1 for name in result["per_class"]
    ]
    assert "taken for" not in rows[0]


def test_accuracy_by_class_is_tracked_for_some_classes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "CLASS_SCALARS", 9)
    run(parse_recipe([*BOARD, "--out", str(tmp_path)])[0])
    events = EventAccumulator(str(tmp_path), {"images": 0, "scalars": 0})
    tags = events.Reload().Tags()
    assert "accuracy/test" in tags["scalars"]
    assert not any(tag.startswith("per_class/") for tag in tags["scalars"])
    assert "test_confusion" in tags["images"]


def test_a_run_without_trackers_computes_nothing_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*_: Any) -> None:
        pytest.fail("computed without a tracker")  # not an Exception, so nothing catches it

    for name in ("confusion_picture", "draw_confusion", "wrong_images", "image_grid", "augment"):
        monkeypatch.setattr(reporting, name, called)
    monkeypatch.setattr(torch.jit, "trace", called)
    monkeypatch.setattr(Evaluation, "per_class", property(called))
    run(parse_recipe([*TINY, "--out", str(tmp_path)])[0])


@pytest.mark.fault(64)
def test_reports_that_run_out_of_memory_change_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("an observer's own")

    for name in ("draw_confusion", "wrong_images", "image_grid", "_memory_used", "describe_run"):
        monkeypatch.setattr(reporting, name, fail)
    monkeypatch.setattr(torch.jit, "trace", fail)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(tqdm.tqdm, "update", fail)
    monkeypatch.setattr(reporting, "write_status", fail)
    assert run(parse_recipe([*BOARD, "--out", str(tmp_path)])[0]).state == "finished"
    assert digest_of(tmp_path) == undisturbed
    notices = [line["message"] for line in read_lines(tmp_path) if line["split"] == "notice"]
    failed = {"run.json", "status.json", "the graph of the network", "the progress bar"}
    failed |= {f"the picture {name}" for name in ("train_images", "test_confusion", "test_wrong")}
    failed |= {"reading the memory in use"}
    assert sorted(notices) == sorted(
        f"{what} failed: MemoryError: an observer's own" for what in failed
    )


REPORTS = ["announce", "show_inputs", "report_window", "report_epoch"]


@pytest.mark.parametrize("name", [*REPORTS, "_show_epoch", "_show_evaluation"])
def test_a_report_that_fails_changes_no_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: str
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug in a report")

    for module in (reporting, story):
        monkeypatch.setattr(module, name, fail, raising=False)
    assert run(parse_recipe([*BOARD, "--out", str(tmp_path)])[0]).state == "finished"
    assert digest_of(tmp_path) == undisturbed


def test_a_run_without_reports_gives_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TINY, "--data.val_fraction", "0.2", "--checkpoint.every_steps", "3"]
    reported = run(parse_recipe([*options, "--out", str(tmp_path / "reported")])[0])
    for name in REPORTS:
        monkeypatch.setattr(story, name, lambda *_: None)
    silent = run(parse_recipe([*options, "--out", str(tmp_path / "silent")])[0])
    assert (silent.metrics, silent.best) == (reported.metrics, reported.best)
    assert silent.best is not None
    kept = [
        {path.parent.name: path.read_bytes() for path in result.out.rglob("model.safetensors")}
        for result in (reported, silent)
    ]
    assert kept[0] == kept[1]


class Recording(GeneralTracker):
    """A tracker that keeps the project names that it is created with."""

    name = "recording"
    requires_logging_directory = False
    projects: list[str] = []  # noqa: RUF012
    tracker = None

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.projects.append(run_name)


def test_the_project_is_named_after_this_package_and_tensorboard_keeps_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recording", Recording)
    options = ["--train.epochs", "1", "--track.log_with", "[tensorboard, recording]"]
    run(parse_recipe([*TINY, *options, "--out", str(tmp_path)])[0])
    assert Recording.projects == ["cifar-dist"]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "accuracy/test" in events.Tags()["scalars"]
    assert not (tmp_path / "cifar-dist").exists()


class Counting(nn.Module):
    """A network that counts its calls, and may return a type that cannot be traced."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.traceable = traceable

    def forward(self, images: torch.Tensor) -> Any:
        self.calls += 1
        return images.mean(dim=(2, 3)) if self.traceable else {1, 2}


@pytest.mark.parametrize("traceable", [True, False])
def test_drawing_the_graph_does_not_change_the_network(traceable: bool, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    network, warned = Counting(traceable), Warned()
    tracker = Tracker(accelerator, Recipe(), tmp_path, 0, warned)
    tracker.graph(network, torch.zeros(1, 3, 8, 8))
    tracker.scalars({"caf\udce9": 1.0}, 1)
    tracker.finish()
    assert (network.calls, network.training) == (0, True)
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert tags["graph"] == traceable
    assert tags["scalars"] == ["caf\\udce9"]  # although the name is not valid UTF-8
    assert list(warned.reasons) == ([] if traceable else ["the graph of the network"])
