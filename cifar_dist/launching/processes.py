"""Start the processes of `cifar-dist train --processes N` with accelerate launch.

The launcher runs in this process, so its own messages go to `logs/launcher.log` in the run folder
and its exceptions do not reach the console. The processes inherit the console. One of them leaves
the cause of a failure in a file, and it is printed after all of them have exited.
"""

import io
import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from cifar_dist.config import Recipe, local_path
from cifar_dist.errors import UsageError, one_line, require
from cifar_dist.launching.checks import Facts, counts
from cifar_dist.launching.facts import find_devices
from cifar_dist.launching.options import Launch
from cifar_dist.processes.ending import (
    FAILED,
    STOPPED,
    VANISHED,
    Ending,
    print_ending,
    read_ending,
)
from cifar_dist.processes.environment import ENDING
from cifar_dist.processes.preemption import EXIT_CODE, Preempted
from cifar_dist.storage.folder import default_out


def launch(launched: Launch, recipe: Recipe, argv: Sequence[str]) -> int:
    """Start the processes, wait for them, print why they failed, and return the exit code.

    Args:
        recipe: the parsed recipe.
        argv: command line of `cifar_dist.train`, from which each process parses it again.

    Raises:
        UsageError: the launcher refuses its configuration.
    """
    facts = Facts(launched.machines, launched.processes, recipe=recipe, devices=find_devices())
    for finding in counts(facts):
        require(finding.level != "error", f"{finding.message}; {finding.fix}")
    out = recipe.out or ""
    if not out:
        require(
            launched.machines == 1,
            "several machines need --out: each must name the same run folder",
        )
        out = str(default_out(recipe))
        argv = [*argv, "--out", out]
    messages = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "ending.json")
        os.environ[ENDING] = str(report)
        try:
            failure = _start(launched, argv, messages)
        finally:
            del os.environ[ENDING]
        ending = read_ending(report) or failure
    logs = local_path(out) / "logs"
    if logs.is_dir() and messages.getvalue():
        with suppress(OSError), (logs / "launcher.log").open("a", encoding="utf-8") as file:
            file.write(messages.getvalue())
    if ending.line:
        print_ending(ending)
    return ending.code


def _start(launched: Launch, argv: Sequence[str], messages: TextIO) -> Ending:
    """Run accelerate launch, and return the ending that its exit codes imply.

    Args:
        messages: receives the messages of the launcher.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _redirect_logging(messages)
    host, _, port = launched.address.partition(":")
    flags = ["--multi_gpu", "--num_processes", str(launched.processes * launched.machines)]
    flags += ["--num_machines", str(launched.machines), "--machine_rank", str(launched.rank)]
    flags += ["--same_network", "--main_process_ip", host] if host else []
    flags += ["--main_process_port", port or "0"]
    parsed = launch_command_parser().parse_args([*flags, "-m", "cifar_dist.train", *argv])
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if FAILED not in codes and max(codes) > 0:
            return Ending(max(codes), "")
        rank, first = min(error.failures.items(), key=lambda entry: entry[1].timestamp)
        return Ending(FAILED, f"rank {rank} {VANISHED}; {first.message}")
    except SignalException as error:
        return Ending(128 + error.sigval, f"stopped by {signal.Signals(error.sigval).name}")
    except Preempted:  # a signal that the launcher does not handle, or that came before it did
        return Ending(EXIT_CODE, STOPPED)
    except (ValueError, ConnectionError) as error:
        raise UsageError(
            f"accelerate launch refuses this configuration: {one_line(error)}"
        ) from error
    return Ending(0, "")


def _redirect_logging(stream: TextIO) -> None:
    """Write all log messages and warnings of this process to a stream."""
    logging.captureWarnings(True)
    for name in list(logging.root.manager.loggerDict):  # torch gives many a handler of their own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.basicConfig(
        stream=stream, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
