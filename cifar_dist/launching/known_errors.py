"""Find known errors, with cause and fix, and the first traceback in the log of a failed run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cifar_dist.launching.findings import Finding


@dataclass(frozen=True)
class KnownError:
    """A regular expression for an error message, with its cause and fix."""

    code: str
    pattern: str
    cause: str
    fix: str


KNOWN = (
    KnownError(
        "port-taken",
        r"EADDRINUSE|[Aa]ddress already in use|port \d+ is (taken|in use)",
        "the port is in use by another program, often by an earlier run that is still exiting",
        "end it, or use another port; on one machine --main_process_port 0 takes a free one",
    ),
    KnownError(
        "libuv",
        r"use_libuv was requested but PyTorch was built without libuv",
        "this build of torch for Windows lacks libuv",
        "train in WSL2, or try USE_LIBUV=0",
    ),
    KnownError(
        "wrong-interface",
        r"connectFullMesh.*(127\.|refused|timed out|Timed out)|gloo.*127\.0\.\d\.1",
        "gloo published an address at which the other machines cannot reach this one",
        "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface of the route to "
        "the first machine (`cifar-dist doctor` names it)",
    ),
    KnownError(
        "download",
        r"could not be downloaded|urlopen error|CERTIFICATE_VERIFY_FAILED",
        "a file could not be downloaded: this machine is offline, behind a proxy, or lacks the "
        "server's certificates",
        "download the file elsewhere and put it where the message says, set https_proxy, or train "
        "on --data.name synthetic or imagefolder",
    ),
    KnownError(
        "late",
        r"[Ww]atchdog caught collective operation timeout|did not arrive within \d+ s|"
        r"Timed out waiting \d+ms for (recv|send)",
        "some ranks did not reach a collective before the others timed out",
        "check the missing ranks: they failed, hang, or do work that the others skip; "
        "train.timeout is how long the others wait",
    ),
    KnownError(
        "device-twice",
        r"Duplicate GPU detected",
        "two processes use the same GPU",
        "use one process per GPU: check CUDA_VISIBLE_DEVICES, and whether two launchers start "
        "processes, such as srun with several tasks around torchrun",
    ),
    KnownError(
        "unknown-key",
        r"had unknown keys|unknown keys \(\[",
        "the configuration has a key that this version of Accelerate does not know",
        "remove it, or run `accelerate config`",
    ),
    KnownError(
        "no-machine-rank",
        r"int\(\) argument must be a string.*'NoneType'",
        "accelerate launch was started without --machine_rank",
        "give --machine_rank 0 on the first machine, 1 on the second, and so on",
    ),
    KnownError(
        "no-address",
        r"None:29500|rdzv_endpoint=None",
        "accelerate launch was started without the address of the first machine",
        "give --main_process_ip and --main_process_port",
    ),
    KnownError(
        "killed",
        r"exitcode\s*:\s*-9\b|Signal 9 \(SIGKILL\)|oom[-_]kill|Out Of Memory|"
        r"ended without a word|exited without an error message",
        "a process was killed with SIGKILL, probably by the OOM killer",
        "check dmesg or the scheduler's events; use fewer processes, or smaller images",
    ),
    KnownError(
        "shared-memory",
        r"exitcode\s*:\s*-7\b|Bus error|unable to (open|write to|mmap).*shm",
        "out of shared memory, as in a container with 64 MB of /dev/shm",
        "use docker run --ipc=host or --shm-size 8g, or in Kubernetes an emptyDir with medium "
        "Memory",
    ),
    KnownError(
        "crashed",
        r"exitcode\s*:\s*-11\b|Segmentation fault",
        "segmentation fault in a library",
        "compare the versions of driver, CUDA and torch; try one process",
    ),
    KnownError(
        "memory",
        r"CUDA out of memory|OutOfMemoryError|MPS backend out of memory",
        "out of memory: the device's memory is too small for this batch",
        "use --train.accumulate 2 or more, which gives the same result with less memory, or bf16",
    ),
    KnownError(
        "disk",
        r"No space left on device|disk full|unexpected pos \d+ vs \d+",
        "the disk is full",
        "free disk space, use another --out, or lower checkpoint.keep",
    ),
    KnownError(
        "no-meeting",
        r"RendezvousTimeoutError|RendezvousConnectionError|client socket has timed out|"
        r"timed out waiting for clients|could not reach rank 0's machine",
        "rendezvous failed: a machine was not started, or cannot reach the first one",
        "run `cifar-dist doctor` on each; check the firewall, and use the same address on all",
    ),
    KnownError(
        "unreachable",
        r"No route to host|Network is unreachable|Connection timed out",
        "the network has no route to the other machine",
        "check the firewall and the address; `cifar-dist doctor` tests the connection",
    ),
    KnownError(
        "unknown-host",
        r"Name or service not known|Temporary failure in name resolution|gaierror",
        "a machine's host name does not resolve here",
        "use its address instead, or add it to /etc/hosts",
    ),
    KnownError(
        "nccl",
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError|unhandled (system|cuda) error",
        "NCCL failed in the communication between GPUs",
        "set NCCL_DEBUG=INFO and find the first WARN; try NCCL_P2P_DISABLE=1 and "
        "NCCL_SOCKET_IFNAME, one at a time",
    ),
    KnownError(
        "too-few-devices",
        r"invalid device ordinal",
        "there are more processes on the machine than GPUs",
        "num_processes is the total over all machines; use one process per GPU",
    ),
    KnownError(
        "driver",
        r"driver version is insufficient|driver on your system is too old",
        "the GPU driver is too old for this torch",
        "update the driver, or install torch for an older CUDA",
    ),
    KnownError(
        "architecture",
        r"no kernel image is available",
        "this build of torch does not support this GPU",
        "install a release of torch that supports it",
    ),
    KnownError(
        "wrong-type",
        r"'bool' object has no attribute 'lower'",
        "mixed_precision: no, without quotes, is read as false in YAML",
        'write mixed_precision: "no"',
    ),
    KnownError(
        "wrong-type",
        r"has no attribute 'split'",
        "gpu_ids in the configuration is not a string",
        'write gpu_ids: "0,1", with quotes',
    ),
    KnownError(
        "wrong-type",
        r"is not a valid DistributedType",
        "distributed_type must be in upper case",
        "write distributed_type: MULTI_GPU",
    ),
    KnownError(
        "alone",
        r"asked for several processes but started only this one|but Accelerate joined",
        "the launcher was asked for several processes but started only one",
        "use accelerate launch --multi_gpu --num_processes 2, also on CPUs",
    ),
    KnownError(
        "peer-to-peer",
        r"RTX 4000 series doesn't support",
        "these GPUs have no peer-to-peer access",
        "export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1, or use accelerate launch, which sets them",
    ),
    KnownError(
        "shapes-differ",
        r"op\.preamble\.length <= op\.nbytes|Mismatch between collective|mismatch across ranks",
        "the ranks used tensors of different shapes in a collective",
        "use the same code, recipe and data on all ranks; `cifar-dist doctor` compares them",
    ),
    KnownError(
        "unused-parameters",
        r"Expected to have finished reduction in the prior iteration",
        "a parameter of the network did not contribute to the loss",
        "freeze it with requires_grad_(False) before training",
    ),
    KnownError(
        "time-limit",
        r"DUE TO TIME LIMIT|DUE TO PREEMPTION",
        "Slurm ended the job",
        "use launch/slurm.sbatch, which saves before the time limit and is requeued",
    ),
    KnownError(
        "preempted",
        r"preempted at step \d+|SignalException|Signal 15 \(SIGTERM\)",
        "the job was stopped by a signal",
        "start the same command again; it resumes from the newest checkpoint",
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
    """Return the known errors in a log, in the order of their first occurrence."""
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

    When one process fails, the others print tracebacks about the lost connection.
    """
    blocks = _tracebacks(text.splitlines())
    consequences = re.compile(r"closed by peer|reset by peer|ChildFailedError|Broken pipe")
    own = [block for block in blocks if not consequences.search(block[-1])]
    return (own or blocks or [[]])[0]


def _tracebacks(lines: Sequence[str]) -> list[list[str]]:
    """Return the tracebacks in a log, each as a list of lines. Ranks may interleave."""
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
