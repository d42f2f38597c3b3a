"""Launch scripts and Accelerate configurations, used as in their first lines; docs and links."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import cifar_dist.__main__
from cifar_dist.launching import plan
from cifar_dist.launching.accelerate_config import IGNORED
from tests.helpers import JOB, TINY, Integers, free_port, run_command, tested

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_key_of_a_configuration(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    relative = path.relative_to(ROOT)
    assert f"accelerate launch --config_file {relative}" in first
    assert "-m cifar_dist.train" in first
    values = yaml.safe_load(path.read_text())
    assert not set(IGNORED) & set(values)
    config = load_config_from_file(str(path))
    for key, value in values.items():
        read = getattr(config, key)
        assert getattr(read, "value", read) == value, key
    assert isinstance(values["mixed_precision"], str)
    assert isinstance(values["distributed_type"], str)


def launch_line(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the variables and words of a configuration's first line, up to the recipe."""
    words = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    environment = dict(word.split("=") for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(environment) : words.index("cifar_dist.train") + 1]
    words[0] = str(Path(sys.executable).with_name("accelerate"))
    return environment, words


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * ("two" not in path.stem))
        for path in CONFIGS
    ],
)
def test_every_configuration_trains(
    path: Path, tmp_path: Path, alone: Callable[..., Integers]
) -> None:
    environment, words = launch_line(path)
    values = yaml.safe_load(path.read_text())
    machines = values["num_machines"]
    # One machine without GPUs simulates all machines, with one process each.
    own = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    own += ["--num_processes", str(machines)]
    starts = []
    for rank in range(machines):
        start = list(words)
        if machines > 1:
            start[start.index("--machine_rank") + 1] = str(rank)
            start[start.index("-m") : start.index("-m")] = own
        starts.append([*start, *JOB, "--out", str(tmp_path)])
    running = [
        subprocess.Popen(
            start, cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
        )
        for start in starts
    ]
    for process in running:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    facts = json.loads((tmp_path / "run.json").read_text())
    expected = machines if machines > 1 else values["num_processes"]
    assert (facts["world_size"], facts["device"]) == (expected, "cpu")
    assert tested(tmp_path) == alone()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_checks_find_no_problem_in_a_configuration(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = plan.main(["--config", "tutorial", "--accelerate-config", str(path)])
    assert code == 0, capsys.readouterr().out


CPU_ONLY = {"on CPU only": "yes"}
TWO_GPUS = {"type of machine": "4", "be used for distributed training": "2"}
TWO_CPUS = {"type of machine": "1", "be used for distributed training": "2"}
BY_MPI = {**TWO_CPUS, "launch mpirun": "yes"}
TWO_MACHINES = {
    "type of machine": "4",
    "How many different machines": "2",
    "IP address": "10.0.0.1",
    "port you will use": "29500",
    "be used for distributed training": "4",
}
MENU, QUESTION = r"\[\?25l", r"\]: ?|process\? "  # a menu hides the cursor when it is drawn


def answer(path: Path, answers: dict[str, str]) -> None:
    """Answer the questions of `accelerate config` at a terminal; Enter for the default.

    Args:
        answers: maps words of a question to the text to type, or to the row number in a menu.
    """
    script = str(Path(sys.executable).with_name("accelerate"))
    dialogue = pexpect.spawn(script, ["config", "--config_file", str(path)], encoding="utf-8")
    left = dict(answers)
    while dialogue.expect([MENU, QUESTION, pexpect.EOF], timeout=60) < 2:
        asked = next((words for words in left if words in dialogue.before), None)
        dialogue.send((left.pop(asked) if asked else "") + "\r")
    dialogue.close()
    assert (dialogue.exitstatus, left) == (0, {}), dialogue.before


def by_default(path: Path) -> None:
    """Write the file of `accelerate config default`."""
    script = str(Path(sys.executable).with_name("accelerate"))
    done = run_command([script, "config", "default", "--config_file", str(path)])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("answers", "processes"), [(None, 1), (CPU_ONLY, 1), (TWO_GPUS, 2)])
def test_the_file_of_accelerate_config_is_used_unchanged(
    answers: dict[str, str] | None,
    processes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "accelerate").mkdir()
    path = tmp_path / "accelerate/default_config.yaml"
    if answers is None:
        by_default(path)
    else:
        answer(path, answers)
    assert plan.main(["--config", "tutorial", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["world_size"] == processes
    assert [finding["code"] for finding in planned["findings"]] == ["default-config"]
    words = shlex.split(planned["on machine 0"])[: -len(["--config", "tutorial"])]
    words[0] = str(Path(sys.executable).with_name("accelerate"))
    done = run_command([*words, *TINY, "--train.epochs", "1", "--out", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["world_size"] == processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answers", "code", "processes", "found"),
    [(TWO_MACHINES, 0, 4, []), (TWO_CPUS, 2, 1, ["alone"]), (BY_MPI, 0, 2, [])],
)
def test_plan_predicts_the_processes_of_a_configuration(
    answers: dict[str, str],
    code: int,
    processes: int,
    found: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "answers.yaml"
    answer(path, answers)
    arguments = ["--config", "tutorial", "--accelerate-config", str(path), "--json"]
    assert plan.main(arguments) == code
    planned = json.loads(capsys.readouterr().out)
    assert planned["world_size"] == processes
    assert [finding["code"] for finding in planned["findings"]] == found


def test_console_script_lists_and_reaches_the_verbs() -> None:
    script = str(Path(sys.executable).with_name("cifar-dist"))
    listed = run_command([script, "--help"])
    assert listed.returncode == 0
    for verb in cifar_dist.__main__.VERBS:
        assert f"  {verb} " in listed.stdout
        assert run_command([script, verb, "--help"]).returncode == 0
    unknown = run_command([script, "trian"])
    assert unknown.returncode == 2
    assert "unknown verb 'trian'" in unknown.stderr


def test_print_config_is_a_recipe(tmp_path: Path) -> None:
    script = str(Path(sys.executable).with_name("cifar-dist"))
    printed = run_command([script, "train", "--config", "tutorial", "--print_config"])
    assert printed.returncode == 0, printed.stderr
    values = yaml.safe_load(printed.stdout)
    assert values["optim"]["lr"] == 0.01
    (tmp_path / "copy.yaml").write_text(printed.stdout)
    again = run_command(
        [script, "train", "--config", str(tmp_path / "copy.yaml"), "--print_config"]
    )
    assert yaml.safe_load(again.stdout) == values


def test_the_architecture_page_lists_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    layout = text[text.index("```\ncifar_dist/") :].split("```")[1]
    listed = re.findall(r"^  ([\w/]+\.py)", layout, re.MULTILINE)
    package = ROOT / "cifar_dist"
    modules = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    assert sorted(listed) == sorted(name for name in modules if not name.endswith("__init__.py"))


def dead_links(page: Path) -> list[str]:
    """Return the links of a page to missing files or headings."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if "://" not in link and not (
            target.exists() and (not anchor or anchor in anchors(target.read_text()))
        ):
            dead.append(link)
    return dead


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, by GitHub's rules."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_docs_have_no_dead_links(page: Path) -> None:
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One two: `three`, four-five\n```\n# no heading\n```\n")
    good = "[a](other.md) [b](other.md#one-two-three-four-five) [c](#here) [d](https://x.org/y#z)"
    bad = ["gone.md", "gone.md#here", "other.md#here", "other.md#no-heading", "#there"]
    (tmp_path / "page.md").write_text(
        f"## Here\n{good}\n" + "\n".join(f"[x]({link})" for link in bad)
    )
    assert dead_links(tmp_path / "page.md") == bad
