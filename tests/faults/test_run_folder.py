"""Damaged and unreadable files of a run folder are rebuilt, or reported in one line."""

import ctypes
import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from cifar_dist import evaluate, predict, train, verify
from cifar_dist.config import parse_recipe
from cifar_dist.errors import UsageError
from cifar_dist.launching import doctor, plan
from cifar_dist.storage.folder import MetricsLog, RunLock, Warned, check_out, claim, read_metrics
from cifar_dist.train import run
from tests.forked import start
from tests.helpers import TINY, digest_of, read_lines, status_of, write_folder

T = TypeVar("T")
FILES = ["recipe.yaml", "run.json", "status.json", "metrics.jsonl"]
OPTIONS = [*TINY, "--train.epochs", "2", "--checkpoint.every_epochs", "1"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def replaced_by(content: str | bytes) -> Callable[[Path], None]:
    return lambda file: void(
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    )


def void(_: object) -> None:
    """Discard a result."""


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": replaced_by(""),
    "cut": cut,
    "one line": replaced_by("\n"),
    "zeros": replaced_by(bytes(300)),
    "not UTF-8": replaced_by(b"\xff\xfe\xe9 caf\xe9\n"),
    "nothing": replaced_by("null\n"),
    "a list": replaced_by("[1, 2]\n"),
    "a number": replaced_by("7\n"),
    "other keys": replaced_by('{"a": 1}\n'),
    "other types": replaced_by(
        '{"starts": 1, "world_size": "x", "train": 5, "optim": null, "step": null, "epoch": [], '
        '"split": {}, "data": {"root": {"a": 1}}}\n'
    ),
    "nested": replaced_by("[" * 20_000 + "\n"),
    "not finite": replaced_by('{"split": "train_window", "epoch": NaN, "step": Infinity}\n'),
    "a folder": folder,
    "a dangling link": dangling,
}


def bound_by_modes(call: Callable[[], T]) -> T:
    """Call a function in a thread in which root obeys file modes, as other users must."""

    def drop_and_call() -> T:
        if sys.platform == "linux":
            libc = ctypes.CDLL(None)
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # linux/capability.h, version 3
            sets = (ctypes.c_uint32 * 6)()
            assert libc.capget(header, sets) == 0
            for kind in (0, 1):  # effective and permitted, without CAP_DAC_*
                sets[kind] &= ~(1 << 1 | 1 << 2)
            assert libc.capset(header, sets) == 0
        return call()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(drop_and_call).result()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has finished the first of two epochs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(parse_recipe([*OPTIONS, "--train.epochs", "1", "--out", str(out)])[0])
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def open_again(out: Path) -> None:
    """Open and write the run folder as a resumed run does, without training."""
    from cifar_dist.training.reporting import describe_run, write_status

    recipe, _ = parse_recipe([*OPTIONS, "--out", str(out)])
    with RunLock() as lock:
        check_out(recipe, lock)
        claim(recipe, lock)
        warned = Warned()
        log = MetricsLog(out, 10, 1, warned)
        log.write({"split": "train_window", "epoch": 1, "step": 11})
        with warned.spare("run.json"):
            describe_run(out, {"world_size": 1}, 10)
        with warned.spare("status.json"):
            write_status(out, "running", 10, 1)


QUICK = ("missing", "cut", "zeros", "not UTF-8", "other types", "a folder")


@pytest.mark.fault(71)
@pytest.mark.parametrize(
    "damage", [d if d in QUICK else pytest.param(d, marks=pytest.mark.slow) for d in DAMAGES]
)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_rebuilt_or_refused_in_one_line(
    name: str, damage: str, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = read_lines(copy)
    DAMAGES[damage](copy / name)
    capfd.readouterr()
    refusal = ""
    try:
        open_again(copy)
    except UsageError as error:
        refusal = str(error)
    output = capfd.readouterr().out
    if damage == "a folder" and name == "recipe.yaml":  # a folder of that name is not removed
        assert refusal.startswith(f"the run folder '{copy}' cannot be used (Is a directory: ")
        return
    assert refusal == ""
    silent = (
        {"missing", "empty", "cut", "a dangling link"} if name == "metrics.jsonl" else {"missing"}
    )
    silent |= {"a dangling link"} if name == "run.json" else set()
    silent |= set(DAMAGES) - {"a folder"} if name == "status.json" else set()
    assert output.count("\n") == output.count("warning: ") == (damage not in silent), output
    assert name in output or damage in silent
    if damage != "a folder":
        lines = [line["step"] for line in read_metrics(copy)]
        lost = name == "metrics.jsonl"
        assert lines[-1] == 11
        assert lost or lines[:-1] == [line["step"] for line in before]
        assert len(json.loads((copy / "run.json").read_text())["starts"]) == 2 - (
            name == "run.json"
        )
        assert status_of(copy)["state"] == "running"
        recipe = parse_recipe(["--config", str(copy / "recipe.yaml")])[0]
        assert recipe == parse_recipe([*OPTIONS, "--out", str(copy)])[0]


def quiet_commands(run: Path, images: Path) -> dict[str, Callable[[], int]]:
    recipe = [*OPTIONS, "--out", str(run)]
    place = ["--checkpoint", str(run)]
    return {
        "evaluate": lambda: evaluate.main(place),
        "predict": lambda: predict.main([*place, str(images)]),
        "verify": lambda: verify.main([str(run)]),
        "plan": lambda: plan.main([*recipe, "--like", str(run)]),
        "doctor": lambda: doctor.main(recipe),
    }


@pytest.mark.parametrize(
    "damage", [d if d in QUICK else pytest.param(d, marks=pytest.mark.slow) for d in DAMAGES]
)
def test_no_command_fails_because_of_damaged_files(
    damage: str, copy: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in FILES:
        DAMAGES[damage](copy / name)
    commands = quiet_commands(copy, write_folder(tmp_path / "set", {"test": 3}))
    for command, call in commands.items():
        capfd.readouterr()
        code, output = call(), capfd.readouterr()
        assert code == 0 or command in ("plan", "doctor"), output
        assert output.err.count("\n") == output.err.count("error: ") == (command == "plan")
    shutil.copytree(whole, tmp_path / "other")
    DAMAGES[damage](tmp_path / "other" / "run.json")  # its metrics.jsonl is intact
    assert plan.main([*OPTIONS, "--like", str(tmp_path / "other")]) == 2
    assert "is not a run folder with recorded speeds (" in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["cut"])
def test_a_run_continues_past_damaged_files_with_the_same_result(
    damage: str, copy: Path, whole: Path, tmp_path: Path
) -> None:
    for name in FILES:
        DAMAGES[damage](copy / name)
    with start([*OPTIONS, "--out", str(copy)], folder=tmp_path) as job:
        assert job.wait() == [0], job.text()
        assert "continues at step 10" in job.text()
        assert "Traceback" not in job.text()
    shutil.copytree(whole, tmp_path / "other")
    run(parse_recipe([*OPTIONS, "--out", str(tmp_path / "other")])[0])
    assert digest_of(copy) == digest_of(tmp_path / "other")


def test_without_a_checkpoint_a_damaged_recipe_is_refused(
    copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "checkpoints")
    for name, damage in DAMAGES.items():
        if name == "missing":
            continue
        (copy / "recipe.yaml").write_text("a: 1\n")
        damage(copy / "recipe.yaml")
        with pytest.raises(UsageError, match="holds the recipe; name another folder"):
            open_again(copy)
        if (copy / "recipe.yaml").is_dir():
            (copy / "recipe.yaml").rmdir()
        else:
            (copy / "recipe.yaml").unlink()


def test_with_a_damaged_recipe_file_another_recipe_is_still_refused(copy: Path) -> None:
    cut(copy / "recipe.yaml")
    other = parse_recipe([*OPTIONS, "--optim.lr", "0.5", "--out", str(copy)])[0]
    with pytest.raises(UsageError, match="is of another recipe"):
        run(other)


def test_a_run_folder_without_status_and_recipe_is_recognised(copy: Path) -> None:
    (copy / "status.json").unlink()
    (copy / "recipe.yaml").unlink()
    recipe = parse_recipe([*OPTIONS, "--resume", "never", "--out", str(copy)])[0]
    with RunLock() as lock, pytest.raises(UsageError, match="already holds a run"):
        check_out(recipe, lock)


def test_damaged_lines_between_whole_ones_are_counted(
    copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    whole = read_metrics(copy)
    lines[3:3] = [
        "{",
        '{"split": "train", "epoch": 0}',
        "[]",
        '{"split": 1, "epoch": 0, "step": 1}',
    ]
    (copy / "metrics.jsonl").write_text("\n".join([*lines, '{"cut by a ki']))
    assert read_metrics(copy) == whole
    capfd.readouterr()
    MetricsLog(copy, 10, 1, Warned())
    assert "metrics.jsonl': 4 damaged lines are left out\n" in capfd.readouterr().out
    assert read_lines(copy) == whole


@pytest.mark.fault(72)
@pytest.mark.parametrize("name", [".", "checkpoints", *FILES, ".lock"])
def test_unreadable_files_are_reported_in_one_line(
    name: str, copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = write_folder(tmp_path / "set", {"test": 3})
    commands = {
        **quiet_commands(copy, images),
        "resume": lambda: train.main([*OPTIONS, "--out", str(copy)]),
    }
    (copy / name).chmod(0)
    for command, call in commands.items():
        capfd.readouterr()
        code, output = bound_by_modes(call), capfd.readouterr()
        assert "Traceback" not in output.out + output.err, command
        assert output.err.count("\n") == output.err.count("error: ") <= 1, command
        readers = {"plan", "verify"} if name == "checkpoints" else {"verify"}  # verify: 1 or 2
        if name in (".", "checkpoints") and command not in readers:
            assert code == 2, (command, output)


@pytest.mark.parametrize("kind", ["a file", "a dangling link", "unwritable"])
def test_checkpoints_that_could_not_be_saved_are_refused_at_the_start(
    kind: str, copy: Path
) -> None:
    place = copy / "checkpoints"
    shutil.rmtree(place)
    if kind == "a file":
        place.write_text("")
    elif kind == "a dangling link":
        place.symlink_to("nowhere")
    else:
        place.mkdir(mode=0o500)
    recipe = parse_recipe([*OPTIONS, "--out", str(copy)])[0]
    (copy / "status.json").unlink()
    with RunLock() as lock, pytest.raises(UsageError, match=r"checkpoints' (is|cannot be)"):
        bound_by_modes(lambda: check_out(recipe, lock))
