"""Check whether machines and configuration can run a training.

`cifar-dist doctor` checks this machine and this configuration. The exit code is 0, 1 with warnings,
or 2 with errors. Started by a launcher, as in `accelerate launch ... -m
cifar_dist.launching.doctor`, torchrun or srun, all processes connect, compare their facts, and
measure the network; warnings then exit with 0. `--explain LOG` reads the log of a failed run.
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

from cifar_dist.command import command
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

STAGE_SECONDS = 20  # for all processes to reach a stage
SIZES = (1 << 10, 1 << 16, 1 << 20, 25 << 20)  # bytes of an all-reduce; 25 MB is DDP's bucket
REPEATS = 5
UNEVEN = 2.0  # ratio of the slowest to the fastest process
WORK = 512  # side of the matrices with which the speed of a process is measured


@command
def main(argv: Sequence[str]) -> int:
    """Parse the command line, run the checks, and return 0, 1 with warnings, 2 with errors."""
    options, _, recipe, _ = _parser().read_recipe(argv)
    if options.explain:
        return _explain(options.explain, options.json)
    config = read_config(options.accelerate_config)
    facts = gather(config, recipe, options.machines, options.processes_per_machine, options.script)
    if is_launched() and not (facts.alone or facts.sharded):
        return _check_together(facts, options.json)
    return show(check(facts), describe_machine(facts), options.json)


def _parser() -> Options:
    parser = Options("doctor", __doc__)
    parser.add_argument("--accelerate-config", metavar="YAML", help="configuration of Accelerate")
    parser.add_argument("--machines", type=int, metavar="M")
    parser.add_argument("--processes-per-machine", "--processes", type=int, metavar="P")
    parser.add_argument("--script", metavar="FILE", help="Slurm script to check as well")
    parser.add_argument("--explain", metavar="LOG", help="log of a failed run, or - for stdin")
    parser.add_argument("--json", action="store_true")
    return parser


def _explain(place: str, as_json: bool) -> int:
    try:
        log = 0 if place == "-" else place
        with open(log, encoding="utf-8", errors="replace", closefd=place != "-") as file:
            text = file.read()
    except OSError as failure:
        raise UsageError(f"'{place}' cannot be read ({failure.strerror}); give a log") from failure
    findings, first = explain(text), first_traceback(text)
    if not findings and not first:
        findings = [
            warning(
                "nothing-known",
                f"{place} contains no known error and no traceback",
                "check the logs of all processes, in logs/ of the run folder",
            )
        ]
    code = show(findings, {"first_traceback": "\n".join(first)} if as_json else {}, as_json)
    if first and not as_json:
        print("the first failure:\n" + "\n".join(first))
    return code or (2 if first else 0)


def _check_together(facts: Facts, as_json: bool) -> int:
    """Check all processes together; rank 0 prints the report, and all return the same code."""
    train = dataclasses.replace(
        Recipe().train, precision=facts.recipe.train.precision, timeout=STAGE_SECONDS
    )
    stage = "while the processes connected"
    findings = check(facts)
    results: dict[str, Any] = {}
    try:
        recipe = {key: v for key, v in flatten(facts.recipe).items() if key not in OWN_KEYS}
        accelerator, peers = start_processes(train, shared=recipe)
        for where, function in STAGES.items():
            stage = where
            results |= function(accelerator, peers, facts, findings)
    except Exception as failure:
        if Peers.current is None and not isinstance(failure, UsageError):
            raise

        def report(ending: Ending) -> None:
            code, remedy = "lost", "check their machines, and the network between them"
            if ending.code == REFUSED:
                code, remedy = "start", "see docs/launching.md"
            show([*findings, error(code, ending.line, remedy)], results, as_json)

        agree(failure, stage, report)
        return 2
    if not as_json and "all_reduce" in results:
        results["all_reduce"] = _format_link(results["all_reduce"])
    code = show(findings, results, as_json) if peers.rank == 0 else 0
    # Launchers report any exit code but 0 as a failed job, so warnings must exit with 0.
    verdict = peers.exchange("verdict", code, STAGE_SECONDS)[0]
    code = 2 if verdict == 2 else 0
    peers.leave()
    accelerator.wait_for_everyone()
    leave_processes()
    return code


def _compare(
    accelerator: Accelerator, peers: Peers, facts: Facts, findings: list[Finding]
) -> dict[str, Any]:
    """Compare machines, devices and configurations, and collect the findings of all ranks."""
    import torch

    device = accelerator.device
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    token = str(peers.exchange("token", f".doctor-{uuid.uuid4().hex}", STAGE_SECONDS)[0])
    place = local_path(facts.recipe.out or ".").absolute()
    folder = next(path for path in (place, *place.parents) if path.is_dir())
    if peers.rank == 0:
        (folder / token).touch()
    peers.exchange("written", 0, STAGE_SECONDS)
    mine = {
        "host": platform.node(),
        "device": f"GPU-{properties.uuid}" if properties else "",
        "same": {"configuration": facts.config.digest},
        "clock": time.time(),
        "sees_out": (folder / token).exists(),
        "summary": describe_machine(facts),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    ranks = peers.exchange("facts", mine, STAGE_SECONDS)
    if peers.rank == 0:
        (folder / token).unlink(missing_ok=True)
    # All ranks read their clocks just after the same exchange, at nearly the same time.
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
        f"rank_{rank}": f"{other['host']}, {other['device'] or device.type}"
        for rank, other in enumerate(ranks)
    }
    return {**describe_machine(facts), **shown}


def _check_all_reduce(
    accelerator: Accelerator, peers: Peers, facts: Facts, findings: list[Finding]
) -> dict[str, Any]:
    """Check all-reduced sums of known vectors, in float32 and bfloat16."""
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
    # Each process checks its own result; all results must be correct.
    all_wrong = peers.exchange("sums", wrong, STAGE_SECONDS)
    for rank, kinds in enumerate(all_wrong):
        if kinds:
            findings.append(
                error(
                    "wrong-sum",
                    f"all-reduce returned a wrong sum on rank {rank} in {', '.join(kinds)}",
                    "update the driver and torch; on GPUs try NCCL_P2P_DISABLE=1",
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
            _all_reduce(torch.zeros(1, device=accelerator.device))  # synchronise the start
            began = time.perf_counter()
            _all_reduce(tensor)
            times.append(time.perf_counter() - began)
        seconds[size] = min(times)
    whole, per_byte = fit_line(seconds)
    # Divide out the factors of the ring algorithm, to get latency and bandwidth of one link.
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
    """Time the same work on every process: the slowest one determines the speed of all."""
    import torch

    matrix = torch.ones(WORK, WORK, device=accelerator.device)
    times = []
    for _ in range(10 * REPEATS):
        began = time.perf_counter()
        torch.mm(matrix, matrix).sum().item()
        times.append(time.perf_counter() - began)
    paces = peers.exchange("pace", float(np.median(times)), STAGE_SECONDS)
    slowest = max(paces) / min(paces)
    if slowest > UNEVEN:
        findings.append(
            warning(
                "uneven",
                f"rank {paces.index(max(paces))} takes {slowest:.1f} times as long as rank "
                f"{paces.index(min(paces))} for the same work, and all wait for it",
                "check that machine for other processes, its clock rate and its number of cores",
            )
        )
    return {"slowest_over_fastest": round(slowest, 2)}


def _format_link(found: dict[str, Any]) -> str:
    times = [
        f"{int(size) / 1e6:g} MB {1e3 * each:.2f} ms" for size, each in found["seconds"].items()
    ]
    return (
        f"correct; latency {1e6 * found['latency_seconds']:.0f} us, "
        f"{found['bytes_per_second'] / 1e9:.2f} GB/s ({', '.join(times)})"
    )


def _all_reduce(tensor: torch.Tensor) -> None:
    """All-reduce a tensor in place, and wait at most STAGE_SECONDS for the result."""
    import torch

    work = torch.distributed.all_reduce(tensor, async_op=True)
    work.wait(timedelta(seconds=STAGE_SECONDS))
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


Stage = Callable[["Accelerator", "Peers", Facts, list[Finding]], dict[str, Any]]
STAGES: dict[str, Stage] = {
    "in the comparison of the ranks": _compare,
    "in the first all-reduce": _check_all_reduce,
    "in the timed all-reduces": _measure_link,
    "in the timed work": _measure_pace,
}


if __name__ == "__main__":
    sys.exit(main())
