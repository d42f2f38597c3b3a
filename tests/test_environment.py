"""The environment of a process: its user, and the variables that launchers set."""

import json
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.config import DataConfig, local_path
from cifar_dist.data.cache import cache_folder
from cifar_dist.errors import UsageError
from cifar_dist.launching.parity import ON_THIS_MACHINE
from cifar_dist.processes import environment, start
from cifar_dist.train import main
from tests import forked
from tests.helpers import TINY, command, run_command, write_folder

# A user without a name and a home folder, as in a container.
NOBODY = [
    *("unshare", "--user", "--map-user=12345", "env"),
    *(word for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME") for word in ("-u", name)),
]


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remove the home folder of this user, and return the folder of temporary files."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_user_without_a_home_has_a_cache_of_its_own(homeless: Path) -> None:
    folder = cache_folder(DataConfig())
    assert folder.parent == homeless
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder(DataConfig()) == folder
    folder.chmod(0o755)
    with pytest.raises(
        UsageError, match=r"is not a private folder of user \d+; name another with --data\.cache"
    ):
        cache_folder(DataConfig())
    folder.rmdir()
    folder.symlink_to("/")
    with pytest.raises(UsageError, match=r"name another with --data\.cache"):
        cache_folder(DataConfig())
    assert cache_folder(DataConfig(cache="mine")) == Path("mine")


def test_a_tilde_means_a_home_or_nothing(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'~/x' begins with ~, but HOME is not set and user "):
        local_path("~/x")
    assert local_path("~new/x") == Path("~new/x")
    monkeypatch.setenv("HOME", "/there")
    assert local_path("~/x") == Path("/there/x")


@pytest.mark.fault(68)
@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*NOBODY, "true"], capture_output=True).returncode != 0,
    reason="no right to make user namespaces; run as root",
)
@pytest.mark.slow
def test_a_user_without_a_name_and_a_home_trains(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 30, "test": 9})
    options = ["--config", "smoke", "--data.name", "imagefolder", "--data.root", str(root)]
    options += ["--train.batch_size", "10", "--train.epochs", "1", "--out", str(tmp_path / "run")]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    train = [*NOBODY, sys.executable, "-m", "cifar_dist.train", *options]
    done = run_command(train, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    assert "finished at step 3" in done.stdout
    assert list((temporary / "cifar-dist-12345").iterdir())
    doctor = [*NOBODY, sys.executable, "-m", "cifar_dist", "doctor", *options, "--resume", "auto"]
    assert run_command(doctor, TMPDIR=str(temporary)).returncode < 2


EMPTY = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "TORCHELASTIC_RESTART_COUNT"),
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "OMP_NUM_THREADS"),
    *("ACCELERATE_USE_CPU", "ACCELERATE_DYNAMO_BACKEND"),
)


@pytest.mark.fault(69)
def test_empty_variables_are_not_set(tmp_path: Path) -> None:
    options = [*TINY, "--train.epochs", "1", "--out", str(tmp_path / "run")]
    with forked.start(options, folder=tmp_path / "out", **dict.fromkeys(EMPTY, "")) as job:
        assert job.wait() == [0], job.text()
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert (facts["world_size"], facts["threads"]) == (1, environment.usable_cores())
    assert facts["dynamo_backend"] is None


@pytest.mark.fault(70)
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2' in the environment"),
        ({"RANK": "first"}, "RANK is 'first' in the environment"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x' in the environment"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x' in the environment"),
        ({"PMI_RANK": "x"}, "PMI_RANK is 'x' in the environment"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS is 'x' in the environment"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT is 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 3 and LOCAL_WORLD_SIZE is 2"),
        ({"LOCAL_RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT is 'x' in the environment"),
        ({"LOCAL_RANK": "0", "MASTER_PORT": "70000"}, "MASTER_PORT is 70000; give a port of 65535"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS is '0'; give a number of threads of 1 or more"),
        ({"OMP_NUM_THREADS": "all"}, "OMP_NUM_THREADS is 'all'; give a number of threads"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "x"}, "ACCUMULATION_STEPS is 'x' in the"),
        ({"ACCELERATE_MIXED_PRECISION": "fp17"}, "ACCELERATE_MIXED_PRECISION is 'fp17'; give no,"),
        ({"ACCELERATE_DYNAMO_BACKEND": "x"}, "(ACCELERATE_DYNAMO_BACKEND=x)"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP is for networks that do not fit on one GPU; these"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config is for networks that"),
    ],
)
def test_a_wrong_variable_is_named(
    environment: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(start, "user_environment", lambda: environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_compiler_chosen_with_the_launcher_is_reported(tmp_path: Path) -> None:
    options = [*TINY, "--train.epochs", "1", "--out", str(tmp_path / "run")]
    with forked.start(options, folder=tmp_path / "out", ACCELERATE_DYNAMO_BACKEND="EAGER") as job:
        assert job.wait() == [0], job.text()
        assert "precision fp32, compiled by the launcher's dynamo_backend eager, " in job.text()
    assert json.loads((tmp_path / "run/run.json").read_text())["dynamo_backend"] == "eager"


def test_the_first_of_a_list_of_threads_counts() -> None:
    assert environment.chosen_threads({"OMP_NUM_THREADS": "4,2"}) == 4
    assert environment.chosen_threads({"OMP_NUM_THREADS": " "}) is None


@pytest.mark.fault(78)
def test_a_network_is_not_divided_on_several_processes_either(tmp_path: Path) -> None:
    options = [*TINY, "--out", str(tmp_path / "run")]
    with forked.start(options, 2, folder=tmp_path / "out", ACCELERATE_USE_FSDP="true") as job:
        assert job.wait() == [2, 2]
        assert job.text(1) == ""
        assert job.text(0).startswith("error: FSDP is for networks that do not fit on one GPU")
    assert not (tmp_path / "run").exists()


KUBEFLOW = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "1", "RANK": "0"}
SAME = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.fault(77)
@pytest.mark.parametrize(
    ("options", "environment", "asked"),
    [
        pytest.param(["--num_processes", "1"], KUBEFLOW, 1, marks=pytest.mark.slow),
        pytest.param(["--cpu", "--num_processes", "2"], KUBEFLOW, None, marks=pytest.mark.slow),
        (["--cpu", "--num_processes=2"], SAME, None),
        pytest.param(["--num_processes", "1"], SAME, 1, marks=pytest.mark.slow),
        pytest.param(["--config_file", "two.yaml"], SAME, None, marks=pytest.mark.slow),
        pytest.param([], SAME, 1, marks=pytest.mark.slow),
    ],
)
def test_an_address_that_the_user_has_set_asks_for_no_processes(
    options: list[str],
    environment: dict[str, str],
    asked: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text("distributed_type: 'NO'\nnum_processes: 2\n")
    (tmp_path / "ask.py").write_text(
        "from cifar_dist.processes.environment import asked_world_size\n"
        "print('asked', asked_world_size())\n"
    )
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    root = str(Path(__file__).parent.parent)
    done = run_command([accelerate, "launch", *options, "ask.py"], PYTHONPATH=root, **environment)
    assert done.stdout == (f"asked {asked}\n" if asked else ""), done.stderr
    assert ("UsageError: accelerate launch was asked for several" in done.stderr) == (not asked)


NAMELESS = ["unshare", "--uts", "sh", "-c", 'hostname nohost.invalid && exec "$@"', "sh"]
nameless = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*NAMELESS, "true"], capture_output=True).returncode != 0,
    reason="no right to name this machine; run as root",
)


@pytest.mark.fault(81)
@nameless
def test_a_machine_whose_name_means_no_address_is_found(tmp_path: Path) -> None:
    for verb in ("doctor", "plan"):
        done = run_command([*NAMELESS, sys.executable, "-m", "cifar_dist", verb, *TINY])
        assert "warning: this machine's host name nohost.invalid does not resolve" in done.stdout
    # The command of parity; without the address torchrun would hang for a minute.
    script = tmp_path / "meet.py"
    script.write_text("import os\nprint(os.environ['MASTER_ADDR'])\n")
    done = run_command([*NAMELESS, "timeout", "40", sys.executable, *ON_THIS_MACHINE, str(script)])
    assert (done.returncode, done.stdout) == (0, "127.0.0.1\n"), done.stderr


@nameless
@pytest.mark.slow
def test_a_machine_whose_name_means_no_address_trains(tmp_path: Path) -> None:
    launch = [*NAMELESS, "timeout", "100", *command(2, "accelerate")]
    done = run_command([*launch, *TINY, "--out", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    parity = [*NAMELESS, "timeout", "200", sys.executable, "-m", "cifar_dist", "parity", *TINY]
    assert run_command(parity).returncode == 0
