"""Platforms without POSIX, such as Windows: every module can be imported, and a run works."""

import subprocess
import sys
from pathlib import Path

from tests.helpers import tested, write_folder

# Imports the libraries, removes what only POSIX has, and then uses the package.
WITHOUT_POSIX = """
import os, pkgutil, shutil, signal, sys
import accelerate, filelock, numpy, PIL.Image, psutil, safetensors.torch, torch
import torch.utils.tensorboard, torchvision, tqdm, yaml

usage = shutil.disk_usage(".")
assert "cifar_dist" not in sys.modules
for name in ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
NAMES = (
    *("chown", "fchmod", "fork", "getegid", "geteuid", "getgid", "getpgid", "getuid", "killpg"),
    *("mkfifo", "pipe2", "posix_fadvise", "posix_fallocate", "posix_spawn", "pread", "pwrite"),
    *("register_at_fork", "sched_getaffinity", "setsid", "statvfs", "sync", "sysconf", "uname"),
    *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "WNOHANG"),
)
SIGNALS = (
    *("SIGALRM", "SIGBUS", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT"),
    *("SIGSTOP", "SIGTSTP", "SIGUSR1", "SIGUSR2", "pthread_kill", "pthread_sigmask", "setitimer"),
)
for module, names in ((os, NAMES), (signal, SIGNALS)):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
original = os.open

def open_file(path, flags, mode=0o777, *, dir_fd=None):
    if dir_fd is not None or os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return original(path, flags, mode)

os.open = open_file
os.supports_dir_fd.clear()
os.supports_fd.clear()
shutil._use_fd_functions = False  # has read these sets
shutil.disk_usage = lambda path: usage  # calls os.statvfs where there is one

import cifar_dist
for module in pkgutil.walk_packages(cifar_dist.__path__, "cifar_dist."):
    try:
        __import__(module.name)
    except ModuleNotFoundError as error:
        if error.name != "triton":  # absent on macOS and Windows; imported only for GPUs
            raise

from cifar_dist import evaluate, train
from cifar_dist.config import DataConfig
from cifar_dist.data import load_dataset

out, folder = sys.argv[1:]
few = ["--data.limit_train", "640", "--data.limit_test", "64", "--train.epochs", "1"]
assert train.main(["--config", "smoke", *few, "--out", out]) == 0
assert evaluate.main(["--checkpoint", out]) == 0
assert len(load_dataset(DataConfig(name="imagefolder", root=folder)).train) == 12
"""


def test_nothing_needs_posix(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", {"train": 12, "test": 6})
    command = [sys.executable, "-c", WITHOUT_POSIX, tmp_path / "run", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ((step, correct, count),) = tested(tmp_path / "run")
    assert (step, count) == (10, 64)
    for accuracy in (f"({correct} of 64)", f"({correct}/64)"):  # of train, and of evaluate
        assert f"accuracy {correct / count:.4f} {accuracy}" in done.stdout
