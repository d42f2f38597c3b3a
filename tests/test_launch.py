"""Launch scripts and Accelerate configurations, as their first lines say to use them."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import cifar_dist.__main__
from tests.helpers import TINY, run_command

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
# Keys that `accelerate launch` accepts in YAML and then ignores; see its command line instead.
IGNORED = {"rdzv_backend", "same_network", "enable_cpu_affinity", "downcast_bf16"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_read_as_it_is_meant(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    relative = path.relative_to(ROOT)
    assert f"accelerate launch --config_file {relative}" in first
    assert "-m cifar_dist.train" in first
    values = yaml.safe_load(path.read_text())
    assert not IGNORED & set(values)
    config = load_config_from_file(str(path))
    for key, value in values.items():
        read = getattr(config, key)
        assert getattr(read, "value", read) == value, key
    assert isinstance(values["mixed_precision"], str)
    assert isinstance(values["distributed_type"], str)


@pytest.mark.parametrize("name", ["cpu", "cpu_two_processes"])
def test_the_cpu_configurations_train(name: str, tmp_path: Path) -> None:
    line = (ROOT / "accelerate_configs" / f"{name}.yaml").read_text().splitlines()[0]
    words = shlex.split(line.removeprefix("# "))
    environment = dict(word.split("=") for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(environment) : words.index("--config")]
    words[0] = str(Path(sys.executable).with_name("accelerate"))
    done = subprocess.run(
        [*words, *TINY, "--out", str(tmp_path), "--train.epochs", "1"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run.json").read_text())
    expected = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    assert (facts["world_size"], facts["device"]) == (expected["num_processes"], "cpu")


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


def test_the_readme_names_every_module_and_no_other() -> None:
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("```\ncifar_dist/") :].split("```")[1]
    named = set(re.findall(r"[\w-]+\.(?:py|yaml|sh|md)", tree))
    tracked = {path.name for path in (ROOT / "cifar_dist").rglob("*.py")} - {"__init__.py"}
    assert tracked <= named
    folders = ("cifar_dist", "launch", "tests", "docs", "accelerate_configs")
    existing = {path.name for folder in folders for path in (ROOT / folder).rglob("*.*")}
    assert named <= existing, named - existing


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), (page.name, target)
