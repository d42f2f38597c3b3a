"""Every command of the README is run, and prints what stands there."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_dist.config import parse_recipe
from tests.helpers import TUTORIAL, run_command, write_folder

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```bash\n(.*?)```\n(?:```text\n(.*?)```)?", README.read_text(), re.S)
STARTED = ("cifar-dist", "accelerate", "torchrun")
SHOWN = {command.strip(): output for command, output in BLOCKS if output}


def commands() -> Iterator[str]:
    """Yield the commands of the README without comments."""
    for block, _ in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            yield " ".join(shlex.split(line, comments=True))


def masked(text: str) -> list[str]:
    """Return the lines of an output without numbers and times."""
    return [" ".join(re.sub(r"[\d.:]+( s)?", "N", line).split()) for line in text.splitlines()]


def shortened(words: list[str]) -> list[str]:
    """Return a command with its recipe cut to one step of synthetic images."""
    verb = words.index("train") if "train" in words else words.index("cifar_dist.train")
    launch = ("--processes", "--machines", "--processes-per-machine")
    options, skip = [], False
    for word in words[verb + 1 :]:
        if not skip and word not in launch:
            options.append(word)
        skip = word in launch
    recipe = parse_recipe(options)[0]
    few = ["--train.epochs", "1", "--data.limit_test", "50"]
    few += ["--data.limit_train", str(recipe.train.batch_size)]
    return [*words, *few, *(["--data.name", "synthetic"] if "--data.name" not in words else [])]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a network and photographs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    Path("model.py").write_text(TUTORIAL)
    write_folder(Path("photos"), {".": 120}, classes=2, size=80)
    Path("more_photos").mkdir()
    for name in ("dog.png", "more_photos/cat.png"):
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(name)
    return tmp_path


def test_every_command_is_known() -> None:
    programs = {line.split()[0] for line in commands()}
    assert programs <= {*STARTED, "pip", "tensorboard"}
    assert shutil.which("tensorboard", path=str(Path(sys.executable).parent))


TRAINED = [line for line in commands() if re.search(r"\btrain\b", line) and "--help" not in line]
OTHERS = [line for line in commands() if line.startswith("cifar-dist") and line not in TRAINED]
FEW = [pytest.param(line, marks=pytest.mark.slow) for line in TRAINED]


@pytest.mark.parametrize("command", FEW, ids=TRAINED)
def test_a_command_trains(command: str, here: Path) -> None:
    words = shortened(shlex.split(command))
    if words[0] == "accelerate":
        words[2:2] = ["--main_process_port", "0"]
    if words[0] == "torchrun":
        words.insert(1, "--standalone")
    done = run_command(words)
    assert done.returncode == 0, done.stderr
    assert "finished at step 1: " in done.stdout


@pytest.mark.slow
def test_the_outputs_are_those_of_the_commands(here: Path) -> None:
    for command, output in SHOWN.items():
        done = run_command(shlex.split(command))
        assert done.returncode == 0, done.stderr
        assert masked(done.stdout) == masked(output), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", OTHERS)
def test_a_command_reads_a_run_or_checks_a_launch(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command)
    if words[1] == "doctor":
        monkeypatch.delenv("OMP_NUM_THREADS")  # of the tests; the doctor warns of it
    if "runs/first" in words:
        first = shortened(shlex.split(next(iter(SHOWN))))
        assert run_command(first).returncode == 0
    if words[1] == "parity":
        words += ["--data.limit_train", "64", "--steps", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout, done.stderr)
