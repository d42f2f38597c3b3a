"""Nodes on which a scheduler would start a command, simulated on one machine."""

import os
import sys
import tempfile
import time
from pathlib import Path

import psutil

# The folder of torchrun, which is on the PATH of a container or of an installed machine.
SCRIPTS = str(Path(sys.executable).parent)
SECONDS = 240  # for all nodes to finish


def run_on_nodes(command: list[str], environments: list[dict[str, str]], code: int = 0) -> str:
    """Run a command once in each environment, all in parallel, and return their output.

    All must exit with `code`. All their processes are killed before the call returns.
    """
    nodes = []
    with tempfile.TemporaryFile("w+") as output:
        try:
            for environment in environments:
                path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
                variables = {**os.environ, "PATH": path, **environment}
                nodes.append(psutil.Popen(command, stdout=output, stderr=output, env=variables))
            end = time.monotonic() + SECONDS
            codes = [node.wait(max(0.0, end - time.monotonic())) for node in nodes]
        except psutil.TimeoutExpired:
            codes = ["too late"]
        finally:
            for node in nodes:
                kill_tree(node)
        output.seek(0)
        text = output.read()
    assert codes == [code] * len(environments), (codes, text)
    return text


def kill_tree(process: psutil.Process) -> None:
    """SIGKILL a process and its descendants, if it still runs."""
    if process.is_running():
        for one in [*process.children(recursive=True), process]:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait(10)
