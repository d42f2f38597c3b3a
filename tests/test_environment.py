"""The environment that a process finds: its user, and the variables that launchers set."""

import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.config import DataConfig, UsageError, cache_folder, local_path
from tests.helpers import run_command, write_folder

# A user without a name and a home folder, as a container has; its files are ours.
NOBODY = [
    *("unshare", "--user", "--map-user=12345", "env"),
    *(word for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME") for word in ("-u", name)),
]


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Take away the home folder of this user, and return the folder of temporary files."""

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
    with pytest.raises(UsageError, match=r"alone may use; name another with --data\.cache"):
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


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*NOBODY, "true"], capture_output=True).returncode != 0,
    reason="no right to make user namespaces; run as root",
)
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
