"""Runs of earlier versions resume, and their checkpoints evaluate and predict.

fixtures/earlier-run was interrupted at step 14 of 18. earlier-run-metrics.jsonl is metrics.jsonl
of the finished run, by the version that wrote it.
"""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from cifar_dist import evaluate, load, predict, verify
from cifar_dist.train import main
from tests.helpers import read_lines

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Copy the run folder of an earlier version."""
    return shutil.copytree(FIXTURES / "earlier-run", tmp_path / "run")


def test_an_earlier_run_resumes_with_the_same_metrics(run: Path) -> None:
    assert main(["--config", str(run / "recipe.yaml"), "--out", str(run)]) == 0
    lines = (FIXTURES / "earlier-run-metrics.jsonl").read_text().splitlines()
    for found, line in zip(read_lines(run), lines, strict=True):
        expected = json.loads(line)
        # Other processors may round differently.
        assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-4)
        assert found == {**expected, "epoch": expected["epoch"] + 1}  # counted from 0 then
    assert verify.main([str(run)]) == 0


def test_an_earlier_checkpoint_is_evaluated(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = str(run / "checkpoints" / "step-00000012")
    assert evaluate.main(["--checkpoint", place, "--split", "val", "--tta", "flip", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    expected = read_lines(run)[4]
    assert (result["correct"], result["count"]) == (expected["correct"], expected["count"])
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_an_earlier_checkpoint_predicts(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "image.png")
    assert predict.main(["--checkpoint", str(run), str(tmp_path / "image.png")]) == 0
    classifier = load(run)
    assert len(classifier.classes) == 10
    assert classifier.predict(tmp_path / "image.png").probability > 0.1
