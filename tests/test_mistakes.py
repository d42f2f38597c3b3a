"""docs/mistakes.md: every mistake of its table is made, and gets the answer that stands there."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cifar_dist.__main__ import main
from cifar_dist.train import main as train
from tests.helpers import TINY, TUTORIAL, write_folder

PAGE = Path(__file__).parents[1] / "docs" / "mistakes.md"
ROW = re.compile(r"\| (.+) \| `(.+)` \| `(.+)` \|")
ROWS = [match.groups() for match in map(ROW.fullmatch, PAGE.read_text().splitlines()) if match]
SEVEN = """
from torch import nn

class Seven(nn.Module):
    def __init__(self, width=7):
        super().__init__()
        self.layer = nn.Linear(3072, width)

    def forward(self, images):
        return self.layer(images.flatten(1))
"""
RECIPES = {
    "typo.yaml": "train:\n  epoch: 3\n",
    "twice.yaml": "train: {epochs: 3}\noptim: {lr: 0.05}\ntrain: {seed: 1}\n",
    "unquoted.yaml": "train:\n  precision: no\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a run, a network, recipes and photographs."""
    place = tmp_path_factory.mktemp("mistakes")
    (place / "model.py").write_text(TUTORIAL + SEVEN)
    for name, text in RECIPES.items():
        (place / name).write_text(text)
    write_folder(place / "photos", {".": 60}, classes=2)
    write_folder(place / "one", {".": 4}, classes=1)
    torch.save({"model": {"layer.weight": torch.ones(2)}}, place / "model.pth")
    Image.new("RGB", (32, 32)).save(place / "dog.png")
    assert train([*TINY, "--train.epochs", "1", "--out", str(place / "run")]) == 0
    return place


def answer_of(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Return the exit code and the output of a command on stderr."""
    program, *words = shlex.split(command)
    assert program == "cifar-dist"
    monkeypatch.setattr(sys, "argv", [program, *words])
    capfd.readouterr()
    code = main()
    return code, capfd.readouterr().err


@pytest.mark.parametrize(("mistake", "command", "answer"), ROWS, ids=[row[0] for row in ROWS])
def test_a_mistake_gets_the_answer_of_the_page(
    mistake: str,
    command: str,
    answer: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    code, text = answer_of(command, monkeypatch, capfd)
    *traceback, line = text.splitlines()
    assert (code, line) == (2, answer.replace("FOLDER", str(folder)))
    assert not traceback


def test_the_page_has_40_mistakes_and_no_internals_of_a_parser() -> None:
    assert len(ROWS) >= 40
    assert len({row[0] for row in ROWS}) == len(ROWS)
    for _, _, answer in ROWS:
        assert answer.startswith("error: ")
        assert not re.search(r"argparse|typing|Parser|<class|Traceback|NoneType", answer)
