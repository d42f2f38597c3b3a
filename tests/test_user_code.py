"""The user's own networks and losses, and networks of torchvision and timm."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from cifar_dist import evaluate, load, predict, train
from cifar_dist.config import ModelConfig, parse_recipe
from cifar_dist.errors import UsageError, UserCodeError
from cifar_dist.models.catalogue import build_network
from cifar_dist.train import main, run
from cifar_dist.training.trial import try_network
from cifar_dist.user_code import identity
from tests.forked import start
from tests.helpers import TINY, TUTORIAL, command, digest_of, read_lines, run_command

WIDE = """
from torch import nn
from parts import block

class Wide(nn.Module):
    def __init__(self, num_classes, width=4, *, dropout=0.1):
        super().__init__()
        self.features = nn.Sequential(block(3, width), nn.AdaptiveAvgPool2d(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images):
        return self.head(self.dropout(self.features(images).flatten(1)))
"""
PARTS = """
from torch import nn

def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU())
"""
FAULTY = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

class Seven(nn.Module):
    def __init__(self, outputs=7):
        super().__init__()
        self.layer = nn.Linear(3072, outputs)

    def forward(self, images):
        return self.layer(images.flatten(1))

class Undefined(Seven):
    def __init__(self):
        super().__init__(nothing)

class Unflattened(Seven):
    def forward(self, images):
        return self.layer(images)

class Unused(Seven):
    def __init__(self):
        super().__init__(10)
        self.spare = nn.Linear(2, 2)

class Two(Seven):
    def forward(self, images):
        return images, images

class Pixels(Seven):
    def forward(self, images):
        return images

class Detached(Seven):
    def __init__(self):
        super().__init__(10)

    def forward(self, images):
        return super().forward(images).detach()

class Frozen(Seven):
    def __init__(self):
        super().__init__(10)
        self.requires_grad_(False)

class Extra(Seven):
    def __init__(self):
        super().__init__(10)

    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass

def number():
    return 3

answer = 42

def mean_loss(logits, targets):
    return cross_entropy(logits, targets)

def wrong_loss(logits, targets):
    return cross_entropy(logits, targets, reduction=targets)
"""
SOURCES = {"model.py": TUTORIAL, "wide.py": WIDE, "parts.py": PARTS, "faulty.py": FAULTY}
SOURCES |= {"imports.py": "import nothing_there", "syntax.py": "def f(:"}
WIDER = ["--model.name", "wide.py:Wide", "--model.options.width", "6"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, which contains SOURCES."""
    for name, text in SOURCES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def test_the_tutorials_file_trains_like_the_shipped_network(here: Path) -> None:
    assert main([*TINY, "--model.name", "model.py:MyModel", "--out", "own"]) == 0
    assert main([*TINY, "--out", "shipped"]) == 0
    own, shipped = (
        [line for line in read_lines(here / name) if line["split"] != "train_window"]
        for name in ("own", "shipped")
    )
    assert own == shipped
    assert (here / "own" / "code" / "model.py").read_text() == TUTORIAL


def test_a_network_with_options_that_imports_a_file_beside_it(here: Path) -> None:
    whole = [*TINY, *WIDER, "--train.batch_size", "16", "--checkpoint.every_steps", "7"]
    with start([*whole, "--out", "whole"], 2, folder=here / "log") as job:
        assert job.wait() == [0, 0], job.text()
    with start([*whole, "--out", "cut"], 2, folder=here / "log", fault="is_killed 11 1") as job:
        job.wait()
    with start([*whole, "--out", "cut"], 2, folder=here / "log") as job:
        assert job.wait() == [0, 0], job.text()
    assert digest_of(here / "cut") == digest_of(here / "whole")
    assert {path.name for path in (here / "cut" / "code").iterdir()} == {"wide.py", "parts.py"}
    assert load("cut", model="wide.py:Wide").network.head.in_features == 24


def test_a_checkpoint_requires_the_same_code_to_be_named_again(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, *WIDER, "--out", "run"]
    assert main([*options, "--train.epochs", "1"]) == 0
    (here / "wide.py").write_text(WIDE + "open('executed', 'w').close()\n")
    Image.new("RGB", (40, 30)).save("image.png")
    named = ["--model.name", "wide.py:Wide"]
    commands = {
        evaluate.main: ["--checkpoint", "run"],
        predict.main: ["image.png", "--checkpoint", "run"],
    }
    capfd.readouterr()
    for verb, arguments in commands.items():
        assert verb(arguments) == 2
        assert "name the code again: --model.name wide.py:Wide" in capfd.readouterr().err
    assert not Path("executed").exists()  # the name in a checkpoint is not imported
    for verb, arguments in commands.items():
        assert verb([*arguments, *named]) == 2
        assert "other source code: wide.py changed" in capfd.readouterr().err
        assert verb([*arguments, "--model.name", "faulty.py:Seven"]) == 2
    assert main(options) == 2
    assert "other source code: wide.py changed" in capfd.readouterr().err
    (here / "wide.py").write_text(WIDE)
    (here / "parts.py").write_text(PARTS + "#")
    assert main(options) == 2
    assert "other source code: parts.py changed" in capfd.readouterr().err
    (here / "parts.py").write_text(PARTS)
    for verb, arguments in commands.items():
        assert verb([*arguments, *named]) == 0
    (here / "moved").mkdir()
    for name in ("wide.py", "parts.py"):
        (here / name).rename(here / "moved" / name)
    sys.modules.pop("parts")
    moved = [*options, "--model.name", "moved/wide.py:Wide"]
    assert main(moved) == 0  # the folder of the code may differ
    assert read_lines(here / "run")[-1]["epoch"] == 2


def test_a_network_of_a_package(here: Path) -> None:
    (here / "nets" / "parts").mkdir(parents=True)
    (here / "nets" / "__init__.py").write_text("")
    (here / "nets" / "wide.py").write_text(WIDE.replace("from parts", "from .parts.blocks"))
    (here / "nets" / "unused.py").write_text("")
    (here / "nets" / "parts" / "blocks.py").write_text(PARTS)
    options = [*TINY, "--train.epochs", "1", "--data.limit_train", "64", "--out", "run"]
    assert main([*options, "--model.name", "nets.wide:Wide"]) == 0
    copied = [path for path in (here / "run" / "code").rglob("*") if path.is_file()]
    names = {path.relative_to(here / "run" / "code").as_posix() for path in copied}
    assert names == {"__init__.py", "wide.py", "parts/blocks.py"}
    assert evaluate.main(["--checkpoint", "run", "--model.name", "nets.wide:Wide"]) == 0


def test_processes_with_different_code_refuse(here: Path) -> None:
    for name in ("first", "second"):
        (here / name).mkdir()
        (here / name / "model.py").write_text(TUTORIAL + f"# {name}")
    arguments = [
        [*TINY, "--model.name", f"{name}/model.py:MyModel", "--out", "run"]
        for name in ("first", "second")
    ]
    with start(arguments, 2, folder=here / "log") as job:  # type: ignore[arg-type]
        assert job.wait() == [2, 2]
        assert "another source code than rank 0: model.py is" in job.text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("faulty.py:Seven", "returned 7 logits per image, but the dataset has 10 classes"),
        ("faulty.py:Unused", "parameter spare.weight gets no gradient, nor do 1 more"),
        ("faulty.py:Two", "returned tuple in training; expected one tensor"),
        ("faulty.py:Pixels", r"returned \[2, 3, 32, 32\] for 2 images"),
        ("faulty.py:Detached", "returned logits without gradient; remove"),
        ("faulty.py:Frozen", "has no trainable parameters"),
        ("faulty.py:Extra", "state _extra_state is dict, which safetensors cannot store"),
        ("faulty.py:number", "returned int; expected a torch.nn.Module"),
        ("faulty.py:answer", "neither a class nor a function"),
        ("faulty.py:Sevn", "faulty.py defines no Sevn; did you mean 'Seven'"),
        ("missing.py:Net", "there is no file 'missing.py' in "),
        (
            "missing:Net",
            "there is no module 'missing'; a file needs the suffix .py: missing.py:Ne",
        ),
        ("resnet19", "unknown network 'resnet19'; did you mean 'resnet18'"),
        ("torchvision/resnet19", "torchvision has no network 'resnet19'; did you mean 'resnet"),
        ("torchvision/alexnet", "torchvision/alexnet cannot process 32x32 images: .*too small"),
        ("timm/resnet19", "timm has no network 'resnet19'; did you mean"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused(
    name: str, message: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=message):
        run(parse_recipe([*TINY, "--model.name", name, "--out", "run"])[0])
    assert not list((here / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("name", "line", "source"),
    [
        (
            "faulty.py:Undefined",
            "NameError: name 'nothing' is not defined",
            "super().__init__(noth",
        ),
        ("faulty.py:Unflattened", "RuntimeError: mat1 and mat2", "return self.layer(images)"),
        (
            "imports.py:Net",
            "ModuleNotFoundError: No module named 'nothing_there'",
            "import nothing",
        ),
        ("syntax.py:Net", "SyntaxError: invalid syntax", "def f(:"),
    ],
)
def test_an_error_in_the_users_code_is_shown_with_its_line(
    name: str, line: str, source: str, here: Path
) -> None:
    with pytest.raises(UserCodeError, match=f"model.name {name} raised {line}") as caught:
        run(parse_recipe([*TINY, "--model.name", name, "--out", "run"])[0])
    assert source in caught.value.traceback
    assert "cifar_dist" not in caught.value.traceback


def test_the_traceback_is_printed_before_the_error_line(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--model.name", "faulty.py:Undefined", "--out", "run"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: model.name faulty.py:Undefined raised NameError")
    assert lines[-1].endswith(f"({here}/faulty.py, line 16)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widht": 3}, "unknown option model.options.widht of wide.py:Wide; did you mean 'width'"),
        ({"width": "x"}, "raised TypeError"),
    ],
)
def test_options_are_checked_against_the_signature(
    options: dict[str, object], message: str, here: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        build_network(ModelConfig(name="wide.py:Wide", options=options), 10)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/test_resnet"])
def test_options_cannot_load_weights_of_a_library(name: str) -> None:
    for option in ("weights", "pretrained", "checkpoint_path"):
        with pytest.raises(UsageError, match=f"model.options.{option} loads weights"):
            build_network(ModelConfig(name=name, options={option: "x"}), 10)


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/shufflenet_v2_x0_5",
        "timm/test_resnet",
        pytest.param("timm/test_vit", marks=pytest.mark.slow),
    ],
)
def test_networks_of_torchvision_and_timm_are_trained(name: str, here: Path) -> None:
    size = "160" if name == "timm/test_vit" else "32"
    options = [*TINY, "--model.name", name, "--data.image_size", size, "--data.limit_train", "64"]
    assert main([*options, "--train.epochs", "1", "--out", "run"]) == 0
    assert evaluate.main(["--checkpoint", "run"]) == 0


def test_missing_timm_is_reported_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"needs timm; install it: pip install timm"):
        build_network(ModelConfig(name="timm/resnet18"), 10)


def test_dropout_is_set_in_any_network(here: Path) -> None:
    named = build_network(ModelConfig(name="wide.py:Wide", dropout=0.3), 10)
    assert named.dropout.p == 0.3
    with pytest.raises(
        UsageError, match=r"model.dropout is 0.3, but torchvision/resnet18 has no dr"
    ):
        build_network(ModelConfig(name="torchvision/resnet18", dropout=0.3), 10)
    depth = build_network(ModelConfig(name="torchvision/efficientnet_b0", dropout=0.0), 10)
    random = [layer for layer in depth.modules() if hasattr(layer, "p")]
    assert len(random) > 2
    assert all(layer.p == 0 for layer in random)


def test_the_trial_changes_nothing_and_finds_host_synchronisation() -> None:
    class Reads(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values * values.abs().mean().item()

    network = nn.Sequential(nn.Conv2d(3, 4, 32), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout())
    network.append(Reads())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    found = try_network(Accelerator(cpu=True), network, "network", None, 4, 32)
    assert "4" in found  # the index of the layer
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_loss_of_the_users_own(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "losses.py").write_text(
        "from torch import nn\n"
        "def entropy(logits, targets):\n"
        "    return nn.functional.cross_entropy(logits, targets, reduction='none')\n"
        "class Double(nn.Module):\n"
        "    def forward(self, logits, targets):\n"
        "        return 2 * entropy(logits, targets)\n"
    )
    short = [*TINY, "--train.epochs", "1", "--data.limit_train", "64"]
    for name in ("entropy", "Double"):
        assert main([*short, "--train.loss", f"losses.py:{name}", "--out", name]) == 0
    assert main([*short, "--out", "plain"]) == 0
    plain, same, double = (
        [line["loss"] for line in read_lines(here / name) if line["split"] == "train_window"]
        for name in ("plain", "entropy", "Double")
    )
    assert same == pytest.approx(plain, rel=1e-6)
    assert double[0] == pytest.approx(2 * plain[0], rel=1e-6)
    for name, message in {
        "mean_loss": r"returned float32 \[\] for 2 images; expected the loss per image, \[2\]",
        "wrong_loss": "train.loss faulty.py:wrong_loss raised ValueError",
    }.items():
        with pytest.raises(UsageError, match=message):
            run(parse_recipe([*short, "--train.loss", f"faulty.py:{name}", "--out", "no"])[0])


def test_a_file_beside_the_recipe_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "mine.yaml").write_text("model: {name: wide.py:Wide, options: {width: 6}}\n")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    recipe, _ = parse_recipe(["--config", "../mine.yaml"])
    assert build_network(recipe.model, 10).head.in_features == 24  # type: ignore[union-attr]
    assert identity(recipe.model.name) == "wide.py:Wide"


SCRIPT = """
import numpy as np
from PIL import Image
from torch import nn
from cifar_dist import load, train

class MyNet(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 3, 4)
        self.head = nn.Linear(width * 64, num_classes)

    def forward(self, images):
        return self.head(self.convolution(images).relu().flatten(1))

if __name__ == "__main__":
    options = {"train.epochs": 1, "out": "run", "data.limit_train": 128, "data.limit_test": 50}
    result = train("smoke", model=MyNet, **options, **{"model.options.width": 6})
    assert type(result.network) is MyNet and result.network.convolution.out_channels == 6
    classifier = load(result.out, model=MyNet)
    assert len(classifier.classes) == 10 and classifier.history[-1]["split"] == "test"
    picture = Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3))
    picture.save("picture.png")
    answers = classifier.predict(["picture.png", picture, np.asarray(picture)])
    assert answers[0] == answers[1] == answers[2]
    assert classifier.predict(picture).name == answers[0].name
    assert answers[0].probability == max(answers[0].probabilities.values())
"""


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_python_script_trains_its_own_network(processes: int, here: Path) -> None:
    (here / "script.py").write_text(SCRIPT)
    launch = [word for word in command(processes) if word not in ("-m", "cifar_dist.train")]
    done = run_command([*launch, "script.py"])
    assert done.returncode == 0, done.stderr
    assert evaluate.main(["--checkpoint", "run", "--model.name", "script.py:MyNet"]) == 0


def test_a_network_without_a_file_is_trained_from_python(here: Path) -> None:
    class Typed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(3072, 10))

    Typed.__module__ = "__console__"
    options = {"train.epochs": 1, "data.limit_train": 128, "data.limit_test": 50, "out": "run"}
    result = train("smoke", model=Typed, **options)  # type: ignore[operator]
    assert isinstance(result.network, Typed)
    assert result.history[-1]["split"] == "test"
    assert load("run", model=Typed).predict(np.zeros((8, 8, 3), np.uint8)).name
    made = train("smoke", model=partial(Typed), **{**options, "out": "made"})  # type: ignore[operator]
    assert not (here / "made" / "code").exists()  # nothing of functools.py
    assert torch.equal(made.network[1].weight, result.network[1].weight)
    with pytest.raises(
        UsageError, match=r"unknown option 'train.epoch'; did you mean 'train.epochs"
    ):
        train("smoke", **{"train.epoch": 1})  # type: ignore[operator]


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys; from cifar_dist import load, train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.slow
def test_own_network_under_accelerate_launch_from_another_folder(here: Path) -> None:
    (here / "elsewhere").mkdir()
    os.chdir("elsewhere")
    launch = [*command(2, "accelerate"), *TINY, *WIDER[2:], "--model.name", "../wide.py:Wide"]
    done = run_command([*launch, "--out", "run"])
    assert done.returncode == 0, done.stderr
    shutil.copytree("run", "copy")
    named = ["--checkpoint", "copy", "--model.name", f"{here}/wide.py:Wide"]
    assert evaluate.main(named) == 0


CONSTANT = """
import torch
from torch import nn

class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(10))

    def forward(self, images):
        return self.bias.expand(len(images), -1)
"""


@pytest.mark.parametrize(("lr", "warned"), [("1e-12", True), ("100", False)])
def test_a_network_that_gives_one_class_is_reported(
    lr: str, warned: bool, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "constant.py").write_text(CONSTANT)
    options = ["--model.name", "constant.py:Constant", "--optim.lr", lr, "--out", "run"]
    assert main([*TINY, *options]) == 0
    text = "warning: the network gives one class for all test images, and its loss 2.3026 is"
    assert (text in capfd.readouterr().out) == warned
