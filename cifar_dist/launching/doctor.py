"""Check whether these machines can train: `cifar-dist doctor`, or under the training's launcher.

By itself it checks this machine and this configuration, and exits with 0, 1 if there are warnings,
or 2. Under a launcher, `accelerate launch ... -m cifar_dist.launching.doctor`, torchrun or srun,
all processes meet, compare their machines, and measure latency and bandwidth; warnings then exit
with 0. `--explain LOG` reads the log of a failed run.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar_dist.command import run_verb
from cifar_dist.config import OWN_KEYS, Recipe, flatten, local_path
from cifar_dist.errors import UsageError
from cifar_dist.launching.accelerate_config import read_config
from cifar_dist.launching.checks import Facts, check, check_ranks
from cifar_dist.launching.facts import describe_machine, gather
from cifar_dist.launching.findings import Finding, error, show, warning
from cifar_dist.launching.forecast import fit_line
from cifar_dist.launching.known_errors import explain, first_traceback
from cifar_dist.launching.options import Options
from cifar_dist.processes.ending import REFUSED, Ending, agree
from cifar_dist.processes.environment import is_launched
from cifar_dist.processes.peers import Peers
from cifar_dist.processes.start import leave_processes, start_processes

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

STAGE_SECONDS = 20  # for all processes to come to a stage
SIZES = (1 << 10, 1 << 16, 1 << 20, 25 << 20)  # bytes of an all-reduce; 25 MB is DDP's bucket
REPEATS = 5
UNEVEN = 2.0  # slowest process over fastest
WORK = 512  # side of the matrices that measure a process's pace


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, examine, and return 0, 1 with warnings, 2 with errors."""
    return run_verb(_examine, argv)


def _examine(argv: Sequence[str]) -> int:
    options, _, recipe, _ = _parser().read(argv)
    if options.explain:
        return _explain(options.explain, options.json)
    config = read_config(options.accelerate_config)
    facts = gather(config, recipe, options.machines, options.processes_per_machine, options.script)
    if is_launched() and not (facts.alone or facts.sharded):
        return _meet(facts, options.json)
    return show(check(facts), describe_machine(facts), options.json)


def _parser() -> Options:
    parser = Options("doctor", __doc__)
    parser.add_argument("--accelerate-config", metavar="YAML", help="as `accelerate config` writes")
    parser.add_argument("--machines", type=int, metavar="M")
    parser.add_argument("--processes-per-machine", type=int, metavar="P")
    parser.add_argument("--script", metavar="FILE", help="Slurm script to look into as well")
    parser.add_argument("--explain", metavar="LOG", help="log of a failed run, or - for stdin")
    parser.add_argument("--json", action="store_true")
    return parser


def _explain(place: str, as_json: bool) -> int:
    try:
        log = 0 if place == "-" else place
        with open(log, encoding="utf-8", errors="replace", closefd=place != "-") as file:
            text = file.read()
    except OSError as failure:
        raise UsageError(f"'{place}' cannot be read ({failure.strerror}); name a log") from failure
    findings, first = explain(text), first_traceback(text)
    if not findings and not first:
        findings = [
            warning(
                "nothing-known",
                f"{place} holds no error that is known here, and no traceback",
                "look at the logs of all processes, in the run folder's logs/",
            )
        ]
    code = show(findings, {"first_traceback": "\n".join(first)} if as_json else {}, as_json)
    if first and not as_json:
        print("the first failure:\n" + "\n".join(first))
    return code or (2 if first else 0)


def _meet(facts: Facts, as_json: bool) -> int:
    """Examine all processes together; rank 0 tells, and all return the same code."""
    train = dataclasses.replace(
        Recipe().train, precision=facts.recipe.train.precision, timeout=STAGE_SECONDS
    )
    stage = "when they met"
    findings = check(facts)
    told: dict[str, Any] = {}
    try:
        recipe = {key: v for key, v in flatten(facts.recipe).items() if key not in OWN_KEYS}
        accelerator, peers = start_processes(train, told=recipe)
        for where, function in STAGES.items():
            stage = where
            told |= function(accelerator, peers, facts, findings)
    except Exception as failure:
        if Peers.current is None and not isinstance(failure, UsageError):
            raise

        def report(ending: Ending) -> None:
            code, remedy = "lost", "look at their machines, and at what lies between"
            if ending.code == REFUSED:
                code, remedy = "start", "see docs/launching.md"
            show([*findings, error(code, ending.line, remedy)], told, as_json)

        agree(failure, stage, report)
        return 2
    if not as_json and "all_reduce" in told:
        told["all_reduce"] = _in_words(told["all_reduce"])
    code = show(findings, told, as_json) if peers.rank == 0 else 0
    # Launchers make a failed job of any code but 0, which warnings are not.
    code = 2 * (peers.tell("verdict", code, STAGE_SECONDS)[0] == 2)
    peers.leave()
    accelerator.wait_for_everyone()
    leave_processes()
    return code


def _compare(
    accelerator: Accelerator, peers: Peers, facts: Facts, findings: list[Finding]
) -> dict[str, Any]:
    """Compare machines, devices and configurations, and collect what each has found."""
    token = f".doctor-{uuid.uuid4().hex}"
    token = str(peers.tell("token", token, STAGE_SECONDS)[0])
    place = local_path(facts.recipe.out or ".").absolute()
    folder = next(path for path in (place, *place.parents) if path.is_dir())
    if peers.rank == 0:
        (folder / token).touch()
    peers.tell("written", 0, STAGE_SECONDS)
    mine = {
        "host": platform.node(),
        "device": _device_id(accelerator.device),
        "same": {"configuration": facts.config.digest},
        "clock": time.time(),
        "sees_out": (folder / token).exists(),
        "summary": describe_machine(facts),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    ranks = peers.tell("facts", mine, STAGE_SECONDS)
    if peers.rank == 0:
        (folder / token).unlink(missing_ok=True)
    # All come out of the same exchange, so their clocks were read at nearly the same time.
    now = [other["clock"] for other in ranks]
    ranks = [{**other, "clock": other["clock"] - now[0]} for other in ranks]
    known = set(findings)
    for rank, other in enumerate(ranks):
        for entry in other["findings"]:
            finding = Finding(**entry)
            if finding not in known:
                known.add(finding)
                there = dataclasses.replace(finding, message=f"rank {rank}: {finding.message}")
                findings.append(there)
    findings += check_ranks(ranks)
    shown = {
        f"rank_{rank}": f"{other['host']}, {other['device'] or accelerator.device.type}"
        for rank, other in enumerate(ranks)
    }
    return {**describe_machine(facts), **shown}


def _device_id(device: torch.device) -> str:
    """Return what identifies the GPU of a process, "" without one."""
    import torch

    if device.type != "cuda":
        return ""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _reduce_rightly(
    accelerator: Accelerator, peers: Peers, facts: Facts, findings: list[Finding]
) -> dict[str, Any]:
    """Add up vectors whose sum is known, in two precisions."""
    import torch

    if peers.world == 1:
        return {}
    expected = peers.world * (peers.world + 1) // 2
    wrong = []
    for kind, exact in ((torch.float32, 1 << 24), (torch.bfloat16, 1 << 8)):
        numbers = torch.arange(1, 129, device=accelerator.device) % 8
        mine = (numbers * (peers.rank + 1)).to(kind)
        _all_reduce(mine)
        sums = numbers * expected
        if sums.max() <= exact and not torch.equal(mine.long(), sums):
            wrong.append(str(kind))
    # Every process looks at its own result; all must have been right.
    all_wrong = peers.tell("sums", wrong, STAGE_SECONDS)
    for rank, kinds in enumerate(all_wrong):
        if kinds:
            findings.append(
                error(
                    "wrong-sum",
                    f"an all-reduce gave rank {rank} a wrong sum in {', '.join(kinds)}",
                    "update driver and torch; on GPUs try NCCL_P2P_DISABLE=1",
                )
            )
    return {}


def _measure_link(
    accelerator: Accelerator, peers: Peers, facts: Facts, findings: list[Finding]
) -> dict[str, Any]:
    """Time all-reduces of several sizes, and fit latency and bandwidth."""
    import torch

    if peers.world == 1:
        return {}
    seconds = {}
    for size in SIZES:
        tensor = torch.zeros(size // 4, device=accelerator.device)
        times = []
        for _ in range(REPEATS):
            _all_reduce(torch.zeros(1, device=accelerator.device))  # start together
            began = time.perf_counter()
            _all_reduce(tensor)
            times.append(time.perf_counter() - began)
        seconds[size] = min(times)
    whole, per_byte = fit_line(seconds)
    # Undo the ring's shares, so that the figures are those of one link.
    latency = max(0.0, whole) / (peers.world - 1)
    bandwidth = 2 * (peers.world - 1) / peers.world / per_byte
    return {
        "all_reduce": {
            "latency_seconds": latency,
            "bytes_per_second": bandwidth,
            "seconds": {str(size): value for size, value in seconds.items()},
        }
    }


def _measure_pace(
    accelerator: Accelerator, peers: Peers, facts: Facts, findings: list[Finding]
) -> dict[str, Any]:
    """Let every process do the same work: the slowest sets the pace of all."""
    import torch

    matrix = torch.ones(WORK, WORK, device=accelerator.device)
    times = []
    for _ in range(10 * REPEATS):
        began = time.perf_counter()
        torch.mm(matrix, matrix).sum().item()
        times.append(time.perf_counter() - began)
    paces = peers.tell("pace", float(np.median(times)), STAGE_SECONDS)
    slowest = max(paces) / min(paces)
    if slowest > UNEVEN:
        findings.append(
            warning(
                "uneven",
                f"rank {paces.index(max(paces))} takes {slowest:.1f} times as long as rank "
                f"{paces.index(min(paces))} for the same work, and all wait for it",
                "look at what else runs there, at its clock rate and its share of cores",
            )
        )
    return {"slowest_over_fastest": round(slowest, 2)}


def _in_words(found: dict[str, Any]) -> str:
    times = [
        f"{int(size) / 1e6:g} MB {1e3 * each:.2f} ms" for size, each in found["seconds"].items()
    ]
    return (
        f"right; latency {1e6 * found['latency_seconds']:.0f} us, "
        f"{found['bytes_per_second'] / 1e9:.2f} GB/s ({', '.join(times)})"
    )


def _all_reduce(tensor: torch.Tensor) -> None:
    """Add up over all processes and wait for the result, for STAGE_SECONDS at most."""
    import torch

    work = torch.distributed.all_reduce(tensor, async_op=True)
    work.wait(timedelta(seconds=STAGE_SECONDS))
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


Stage = Callable[["Accelerator", "Peers", Facts, list[Finding]], dict[str, Any]]
STAGES: dict[str, Stage] = {
    "when they compared themselves": _compare,
    "in a first all-reduce": _reduce_rightly,
    "in timed all-reduces": _measure_link,
    "in timed work": _measure_pace,
}


if __name__ == "__main__":
    sys.exit(main())
