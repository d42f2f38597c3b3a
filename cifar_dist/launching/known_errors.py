"""What the log of a failed run says: known errors with cause and remedy, and who failed first."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cifar_dist.launching.findings import Finding


@dataclass(frozen=True)
class KnownError:
    """An error as it is printed, and what is behind it."""

    code: str
    pattern: str
    cause: str
    fix: str


KNOWN = (
    KnownError(
        "port-taken",
        r"EADDRINUSE|[Aa]ddress already in use|port \d+ is (taken|in use)",
        "the port is held by another program, often a run before this one that is still ending",
        "end it, or give another port; on one machine --main_process_port 0 takes a free one",
    ),
    KnownError(
        "libuv",
        r"use_libuv was requested but PyTorch was built without libuv",
        "this build of torch for Windows lacks libuv",
        "train in WSL2; USE_LIBUV=0 is said to help sometimes",
    ),
    KnownError(
        "wrong-interface",
        r"connectFullMesh.*(127\.|refused|timed out|Timed out)|gloo.*127\.0\.\d\.1",
        "gloo told the others an address that does not lead to this machine",
        "export GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME, with the interface of the first "
        "machine's address (`cifar-dist doctor` names it)",
    ),
    KnownError(
        "late",
        r"[Ww]atchdog caught collective operation timeout|did not arrive within \d+ s|"
        r"Timed out waiting \d+ms for (recv|send)",
        "some processes did not come to an exchange that the others waited for",
        "look at the ranks that are missing: they failed, hang, or work on something alone; "
        "train.timeout is how long the others wait",
    ),
    KnownError(
        "device-twice",
        r"Duplicate GPU detected",
        "two processes use the same GPU",
        "one process a GPU: look at CUDA_VISIBLE_DEVICES, and whether two launchers start "
        "processes, as srun with several tasks around torchrun",
    ),
    KnownError(
        "unknown-key",
        r"had unknown keys|unknown keys \(\[",
        "the configuration holds a key that this version of Accelerate does not know",
        "remove it, or run `accelerate config`",
    ),
    KnownError(
        "no-machine-rank",
        r"int\(\) argument must be a string.*'NoneType'",
        "accelerate launch was not told which machine this is",
        "give --machine_rank 0 on the first, 1 on the second, and so on",
    ),
    KnownError(
        "no-address",
        r"None:29500|rdzv_endpoint=None",
        "accelerate launch was not told where the first machine is",
        "give --main_process_ip and --main_process_port",
    ),
    KnownError(
        "killed",
        r"exitcode\s*:\s*-9\b|Signal 9 \(SIGKILL\)|oom[-_]kill|Out Of Memory|"
        r"ended without a word|exited without an error message",
        "a process was killed from outside, most often because the machine ran out of memory",
        "look at dmesg or the engine's events; use fewer processes, or smaller images",
    ),
    KnownError(
        "shared-memory",
        r"exitcode\s*:\s*-7\b|Bus error|unable to (open|write to|mmap).*shm",
        "shared memory ran out, as in a container with 64 MB of it",
        "docker run --ipc=host or --shm-size 8g; in Kubernetes an emptyDir of medium Memory",
    ),
    KnownError(
        "crashed",
        r"exitcode\s*:\s*-11\b|Segmentation fault",
        "a library crashed",
        "compare the versions of driver, CUDA and torch; try one process",
    ),
    KnownError(
        "memory",
        r"CUDA out of memory|OutOfMemoryError|MPS backend out of memory",
        "the device's memory is too small for this batch",
        "--train.accumulate 2, or more, gives the same result with less memory; bf16 halves it",
    ),
    KnownError(
        "disk",
        r"No space left on device|disk full|unexpected pos \d+ vs \d+",
        "the disk is full",
        "make room, name another --out, or lower checkpoint.keep",
    ),
    KnownError(
        "no-meeting",
        r"RendezvousTimeoutError|RendezvousConnectionError|client socket has timed out|"
        r"timed out waiting for clients|could not reach rank 0's machine",
        "the machines did not meet: one was not started, or cannot reach the first",
        "run `cifar-dist doctor` on each; look for a firewall, and give all the same address",
    ),
    KnownError(
        "unreachable",
        r"No route to host|Network is unreachable|Connection timed out",
        "there is no way through the network to the other machine",
        "look for a firewall or a wrong address; `cifar-dist doctor` tries it",
    ),
    KnownError(
        "unknown-host",
        r"Name or service not known|Temporary failure in name resolution|gaierror",
        "a machine's name is not known here",
        "give its address instead, or add it to /etc/hosts",
    ),
    KnownError(
        "nccl",
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError|unhandled (system|cuda) error",
        "NCCL failed between GPUs",
        "set NCCL_DEBUG=INFO and look for its first WARN; try NCCL_P2P_DISABLE=1 and "
        "NCCL_SOCKET_IFNAME, one at a time",
    ),
    KnownError(
        "too-few-devices",
        r"invalid device ordinal",
        "there are more processes on the machine than GPUs",
        "num_processes is the total over all machines; give one process a GPU",
    ),
    KnownError(
        "driver",
        r"driver version is insufficient|driver on your system is too old",
        "the GPU's driver is older than this torch needs",
        "update the driver, or install torch for an older CUDA",
    ),
    KnownError(
        "architecture",
        r"no kernel image is available",
        "this torch was not built for this GPU",
        "install a torch whose release supports it",
    ),
    KnownError(
        "wrong-type",
        r"'bool' object has no attribute 'lower'",
        "mixed_precision: no, without quotes, is false in YAML",
        'write mixed_precision: "no"',
    ),
    KnownError(
        "wrong-type",
        r"has no attribute 'split'",
        "gpu_ids in the configuration is not text",
        'write gpu_ids: "0,1", with quotes',
    ),
    KnownError(
        "wrong-type",
        r"is not a valid DistributedType",
        "distributed_type must be in capitals",
        "write distributed_type: MULTI_GPU",
    ),
    KnownError(
        "alone",
        r"asked for several processes but started only this one|but Accelerate joined",
        "several processes were asked for, and this one is alone",
        "accelerate launch --multi_gpu --num_processes 2, also on CPUs",
    ),
    KnownError(
        "peer-to-peer",
        r"RTX 4000 series doesn't support",
        "these GPUs cannot speak to each other directly",
        "export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1, or use accelerate launch, which does",
    ),
    KnownError(
        "shapes-differ",
        r"op\.preamble\.length <= op\.nbytes|Mismatch between collective|mismatch across ranks",
        "processes sent each other tensors of different sizes",
        "all must have the same code, recipe and data; `cifar-dist doctor` compares them",
    ),
    KnownError(
        "unused-parameters",
        r"Expected to have finished reduction in the prior iteration",
        "a weight of the network took no part in the loss",
        "freeze it with requires_grad_(False) before training",
    ),
    KnownError(
        "time-limit",
        r"DUE TO TIME LIMIT|DUE TO PREEMPTION",
        "Slurm ended the job",
        "launch/slurm.sbatch asks for a signal ahead of it, saves, and is requeued",
    ),
    KnownError(
        "preempted",
        r"preempted at step \d+|SignalException|Signal 15 \(SIGTERM\)",
        "the job was asked to stop",
        "start the same command again: it continues from its checkpoint",
    ),
    KnownError(
        "files",
        r"Too many open files",
        "the limit on open files is too low",
        "ulimit -n 65536",
    ),
)
RANK = re.compile(r"^(?:\[(?:rank|default)(\d+)\]:\s?)?")


def explain(text: str) -> list[Finding]:
    """Return the known errors in a log, in the order in which they first appear."""
    found: dict[tuple[str, str], tuple[int, Finding]] = {}
    for known in KNOWN:
        match = re.search(known.pattern, text)
        if match:
            line = text.count("\n", 0, match.start()) + 1
            finding = Finding(known.code, "error", f"line {line}: {known.cause}", known.fix)
            found[known.code, known.cause] = match.start(), finding
    return [finding for _, finding in sorted(found.values(), key=lambda entry: entry[0])]


def first_traceback(text: str) -> list[str]:
    """Return the lines of the first traceback in a log that is not about a lost connection.

    Where one process fails, the others print tracebacks of their own about losing it.
    """
    blocks = _tracebacks(text.splitlines())
    consequences = re.compile(r"closed by peer|reset by peer|ChildFailedError|Broken pipe")
    own = [block for block in blocks if not consequences.search(block[-1])]
    return (own or blocks or [[]])[0]


def _tracebacks(lines: Sequence[str]) -> list[list[str]]:
    """Return the tracebacks in a log, each as its lines; those of several ranks may interleave."""
    open_blocks: dict[str, list[str]] = {}
    blocks = []
    for line in lines:
        rank = RANK.match(line)
        prefix = rank[0] if rank else ""
        rest = line[len(prefix) :]
        if rest.startswith("Traceback (most recent call last)"):
            open_blocks[prefix] = [line]
            blocks.append(open_blocks[prefix])
        elif prefix in open_blocks:
            open_blocks[prefix].append(line)
            if rest and not rest.startswith((" ", "\t")):
                del open_blocks[prefix]
    return blocks
