"""Small or read-only file systems for the tests."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def mounted() -> Iterator[Callable[..., Path]]:
    """Mount a file system on a folder for one test: mounted(folder, "-t", "tmpfs", ...)."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small or read-only file system needs root on Linux")
    folders: list[Path] = []

    def mount(folder: Path, *options: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted in this container: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in reversed(folders):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
