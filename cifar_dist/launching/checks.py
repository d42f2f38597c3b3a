"""Checks of a launch: pure functions from facts to findings. `facts.py` gathers the facts.

docs/launching.md lists the common problems and the checks that detect them.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cifar_dist.config import Recipe, nearest_multiples
from cifar_dist.errors import UsageError
from cifar_dist.launching.accelerate_config import (
    ALONE,
    IGNORED,
    OLD,
    SEVERAL,
    SHARDED,
    AccelerateConfig,
    known_keys,
    unknown_nested,
)
from cifar_dist.launching.findings import Finding, error, note, warning
from cifar_dist.processes.environment import (
    TOO_MUCH,
    chosen_threads,
    is_slurm_job,
    restarts_in_place,
)

LOOPBACK = ("127.", "::1", "localhost")
# Compute capability by GPU name, for a plan; on this machine nvidia-smi reports it.
CAPABILITIES = {
    "K80": 3.7,
    "P100": 6.0,
    "P40": 6.1,
    "GTX 10": 6.1,
    "V100": 7.0,
    "T4": 7.5,
    "RTX 20": 7.5,
    "A100": 8.0,
    "A10": 8.6,
    "A40": 8.6,
    "RTX 30": 8.6,
    "L4": 8.9,
    "RTX 40": 8.9,
    "H100": 9.0,
    "H200": 9.0,
    "B200": 10.0,
    "RTX 50": 12.0,
}
NATIVE_BF16 = 8.0
SMALL_SHARED_MEMORY = 1 << 30  # bytes; NCCL uses some per pair of GPUs, docker's default is 64 MB
PEER_TO_PEER_DRIVER = (550, 40, 7)  # the first version that reports missing peer-to-peer support
CLOCKS_APART = 2.0  # seconds


@dataclass(frozen=True)
class Device:
    """A GPU: index and name as in nvidia-smi, compute capability and driver version."""

    index: int
    name: str
    uuid: str = ""
    capability: float = 0.0
    driver: tuple[int, ...] = ()


@dataclass(frozen=True)
class Endpoint:
    """The rendezvous endpoint of a launch.

    Attributes:
        host, port: as configured.
        is_here: whether the address belongs to this machine.
        error: why the endpoint cannot be reached; "refused" if the host answers but nothing
            listens on the port, as before the first machine has started.
        holder: the process on this machine that uses the port.
    """

    host: str
    port: int
    is_here: bool = False
    error: str = ""
    holder: str = ""


@dataclass(frozen=True)
class Facts:
    """The known facts of a launch on this machine; unknown ones are empty.

    Attributes:
        machines: number of machines.
        per_machine: processes on each machine.
        rank: of this machine.
        config: the Accelerate configuration.
        recipe: the recipe to train.
        environment: variables as the user set them.
        platform: as sys.platform.
        alone: the message of `environment.asked_world_size` if it refuses, else "".
        sharded: the model sharding that the launcher configured, or "".
        devices: GPUs of this machine.
        searched: whether this machine was searched for GPUs, as by the doctor.
        cores: CPU cores of this machine.
        address: the address of the host name, or "".
        nameless: the host name, if it does not resolve, else "".
        interface: the network interface of the route to the endpoint.
        endpoint: None if none is configured.
        batch_script: path and text of a Slurm script.
        dataset: why the dataset is not ready, or "".
        recipe_error: why the recipe cannot be trained on the dataset, or "".
        out: why the run folder cannot be written, or "".
        free, needed: disk space for checkpoints, in bytes.
        shared_memory: size of /dev/shm in bytes.
    """

    machines: int = 1
    per_machine: int = 1
    rank: int = 0
    config: AccelerateConfig = field(default_factory=AccelerateConfig)
    recipe: Recipe = field(default_factory=Recipe)
    environment: Mapping[str, str] = field(default_factory=dict)
    platform: str = "linux"
    alone: str = ""
    sharded: str = ""
    devices: Sequence[Device] = ()
    searched: bool = False
    cores: int = 1
    address: str = ""
    nameless: str = ""
    interface: str = ""
    endpoint: Endpoint | None = None
    batch_script: tuple[str, str] | None = None
    dataset: str = ""
    recipe_error: str = ""
    out: str = ""
    free: int | None = None
    needed: int = 0
    shared_memory: int | None = None

    @property
    def processes(self) -> int:
        """Return the number of processes on all machines."""
        return self.machines * self.per_machine


def alone(facts: Facts) -> Iterator[Finding]:
    """Check that the requested processes train together, not each alone."""
    config = facts.config
    if facts.alone:
        yield error("alone", facts.alone, "see docs/launching.md")
    if not config.path or config.kind not in ALONE or config.by_mpi:
        return
    if config.processes > config.machines:
        yield error(
            "alone",
            f"{config.path} asks for {config.processes} processes, but with distributed_type "
            f"{config.kind} accelerate launch silently starts one on each machine",
            "write distributed_type: MULTI_GPU, also for several processes on CPUs",
        )
    elif config.machines > 1:
        yield error(
            "alone",
            f"{config.path} names {config.machines} machines, but with distributed_type "
            f"{config.kind} each would silently train alone",
            "write distributed_type: MULTI_GPU, also for one GPU per machine",
        )


def endpoint(facts: Facts) -> Iterator[Finding]:
    """Check that the machines can connect to the rendezvous endpoint."""
    place = facts.endpoint
    if facts.machines > 1 and facts.config.path and not facts.config.values.get("main_process_ip"):
        yield error(
            "no-address",
            f"{facts.config.path} names {facts.machines} machines but no main_process_ip",
            "set it to the first machine's address, as seen by the others",
        )
    if place is None:
        return
    where = f"{place.host}:{place.port}"
    if place.holder:
        yield error(
            "port-taken",
            f"port {place.port} is in use by {place.holder}",
            "end that program, or use another port; on one machine port 0 takes a free one",
        )
    if facts.machines == 1:
        return
    if place.port == 0:
        yield error(
            "port-zero",
            f"port 0 on {facts.machines} machines: each would choose its own port, and hang",
            "use the same port on all machines, such as 29500",
        )
    elif place.error and place.error != "refused" and not place.is_here:
        yield error(
            "unreachable",
            f"machine {facts.rank} cannot reach {where} ({place.error})",
            "check the firewall, the address, the interface, and that the first machine is up",
        )
    elif place.error == "refused" and not place.is_here:
        yield note(
            "nobody-listens",
            f"{place.host} answers, but nothing listens on port {place.port} yet",
            "start the first machine",
        )
    if facts.rank == 0 and not place.is_here and not place.error.startswith("unknown"):
        yield error(
            "not-this-machine",
            f"{place.host} is not an address of this machine, which has machine_rank 0",
            "set main_process_ip to this machine's address, or use another machine_rank here",
        )
    elif place.host.startswith(LOOPBACK):
        yield error(
            "loopback-endpoint",
            f"{place.host} is a loopback address: on each of {facts.machines} machines it is the "
            "machine itself",
            "use the first machine's address, as seen by the others",
        )


def interface(facts: Facts) -> Iterator[Finding]:
    """Check that gloo would not publish a loopback address, and that the host name resolves."""
    chosen = facts.environment.get("GLOO_SOCKET_IFNAME")
    if facts.machines > 1 and facts.address.startswith(LOOPBACK) and not chosen:
        yield warning(
            "loopback-address",
            f"this machine's host name resolves to {facts.address}, which gloo would publish to "
            "the other machines",
            f"export GLOO_SOCKET_IFNAME={facts.interface or 'INTERFACE'} if the live doctor fails "
            "(cifar_dist sets it if it finds the interface)",
        )
    if facts.nameless:
        name = facts.nameless
        yield warning(
            "unknown-host-name",
            f"this machine's host name {name} does not resolve, and torchrun would hang on it",
            f"add '127.0.0.1 {name}' to /etc/hosts; or, on one machine, use accelerate launch, "
            "or torchrun --standalone --local_addr 127.0.0.1",
        )


def counts(facts: Facts) -> Iterator[Finding]:
    """Check that processes, machines, GPUs and batch size fit each other."""
    config = facts.config
    if config.path and config.kind in SEVERAL and config.processes % config.machines:
        yield error(
            "total",
            f"num_processes is the total: {config.processes} over {config.machines} machines "
            f"would start {config.per_machine} on each",
            nearest_multiples(config.processes, config.machines),
        )
    if facts.devices and facts.per_machine > len(facts.devices):
        yield error(
            "too-few-devices",
            f"{facts.per_machine} processes per machine, but this one has {len(facts.devices)} "
            "GPUs",
            "num_processes is the total over all machines; use one process per GPU",
        )
    on_cpu = config.values.get("use_cpu") is True
    if facts.searched and not facts.devices and config.kind == "MULTI_GPU" and not on_cpu:
        yield warning(
            "no-devices",
            f"{config.path} is for GPUs, but this machine has none that nvidia-smi shows: "
            f"{facts.per_machine} processes would train on its CPU",
            "install the driver, or set use_cpu: true if the CPU is meant",
        )
    batch = facts.recipe.train.batch_size
    micro_batches = facts.processes * facts.recipe.train.accumulate
    if batch % micro_batches:
        yield error(
            "batch",
            f"train.batch_size {batch} does not divide among {micro_batches} processes or "
            "micro-batches",
            nearest_multiples(batch, micro_batches),
        )


def batch_script(facts: Facts) -> Iterator[Finding]:
    """Check a Slurm script."""
    if facts.batch_script is None:
        return
    place, text = facts.batch_script
    lines = [line for line in text.splitlines() if not re.match(r"\s*#(?!SBATCH)", line)]
    code = "\n".join(lines)
    if "SLURM_PROCID" in re.sub(r"'[^']*'", "", code):
        yield error(
            "rank-expanded",
            f"{place} uses SLURM_PROCID outside single quotes: the batch script expands it, "
            "and every machine becomes rank 0",
            "put srun's command in single quotes: srun bash -c '...'",
        )
    tasks = re.search(r"--ntasks-per-node[= ](\d+)", code)
    if re.search(r"torchrun|torch\.distributed\.run|accelerate launch", code) and (
        tasks is None or tasks[1] != "1"
    ):
        yield error(
            "tasks",
            f"{place} starts {tasks[1] if tasks else 'any number of'} tasks on each node, and each "
            "would start processes for all GPUs",
            "use one task per node: #SBATCH --ntasks-per-node=1",
        )
    if "--cpus-per-task" in code and "SRUN_CPUS_PER_TASK" not in code:
        yield warning(
            "cpus-per-task",
            f"{place}: srun does not inherit --cpus-per-task, and gives each task one core",
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
        )
    signal = re.search(r"--signal[= ](\S+)", code)
    if signal is None or "--requeue" not in code:
        yield warning(
            "not-requeued",
            f"{place} lacks --signal before the time limit, or --requeue: work since the last "
            "checkpoint would be lost",
            "add #SBATCH --signal=TERM@120 and #SBATCH --requeue, as in launch/slurm.sbatch",
        )
    elif signal[1].startswith("B:"):
        yield error(
            "signal-to-the-shell",
            f"{place}: --signal={signal[1]} reaches only the batch shell, not the training",
            "remove the B:",
        )


def devices(facts: Facts) -> Iterator[Finding]:
    """Check that the processes would use the intended GPUs."""
    chosen = facts.config.values.get("gpu_ids")
    visible = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if chosen in (None, "all"):
        return
    if visible is not None:
        yield error(
            "gpu-ids",
            f"gpu_ids {chosen} of {facts.config.path} uses nvidia-smi's numbers, and replaces "
            f"CUDA_VISIBLE_DEVICES={visible}",
            "use only one of the two: set gpu_ids: all, or unset CUDA_VISIBLE_DEVICES",
        )
    if is_slurm_job(facts.environment):
        yield error(
            "gpu-ids",
            f"gpu_ids {chosen} of {facts.config.path} may be GPUs of another job",
            "under Slurm use gpu_ids: all",
        )


def precision(facts: Facts) -> Iterator[Finding]:
    """Check that the hardware supports the precision."""
    launcher = facts.config.precision
    recipe = facts.recipe.train.precision
    asked = launcher if recipe == "auto" else recipe
    on_cpu = facts.config.values.get("use_cpu") is True
    if asked == "fp16" and on_cpu:
        yield error(
            "precision",
            "fp16 on a CPU: Accelerate would train in fp32 and report fp16",
            "use no or bf16",
        )
    for device in facts.devices[:1]:
        if asked == "bf16" and device.capability < NATIVE_BF16:
            yield warning(
                "precision",
                f"bf16 is emulated on {device.name} (compute capability {device.capability})",
                "use fp16, or train.precision auto",
            )
    if asked == "fp8":
        yield error("precision", "fp8 is not supported", "use bf16, or auto")


def peer_to_peer(facts: Facts) -> Iterator[Finding]:
    """Check for GPUs without peer-to-peer access and drivers that claim to support it."""
    affected = [d for d in facts.devices if re.search(r"RTX (40|50)|RTX \w* ?Ada", d.name)]
    if facts.per_machine > 1 and affected and affected[0].driver < PEER_TO_PEER_DRIVER:
        driver = ".".join(map(str, affected[0].driver))
        yield warning(
            "peer-to-peer",
            f"several {affected[0].name} with driver {driver} may hang in the first all-reduce",
            "update the driver to 550.40.07 or later, or export NCCL_P2P_DISABLE=1",
        )


def keys(facts: Facts) -> Iterator[Finding]:
    """Check for configuration keys that are unknown, old or ignored."""
    config = facts.config
    unknown = [key for key in config.values if key not in known_keys() and key not in OLD]
    if unknown:
        yield error(
            "unknown-key",
            f"accelerate launch refuses {config.path}: unknown {', '.join(map(str, unknown))}",
            "remove it, or run `accelerate config`",
        )
    nested = unknown_nested(config.values)
    if nested:
        yield warning(
            "unknown-key",
            f"{', '.join(nested)} in {config.path} is not an option of accelerate launch, which "
            "silently accepts it",
            "remove or correct it",
        )
    for key in OLD:
        if key in config.values:
            new = "mixed_precision" if key == "fp16" else "dynamo_config"
            yield note(
                "old-key",
                f"{key} in {config.path} is an old key, which accelerate launch reads as {new}",
                f"write {new} instead, as `accelerate config` does",
            )
    if config.compiler:
        yield note(
            "compiled",
            f"{config.path} compiles every network with the dynamo backend {config.compiler}, as "
            "train.compile does: a slower start and faster steps",
            "remove dynamo_backend to train without compilation",
        )
    # `accelerate config` itself writes some of them, with the default value.
    defaults = {"rdzv_backend": "static", "same_network": True, "downcast_bf16": "no"}
    for key in IGNORED:
        value = config.values.get(key)
        if value not in (None, False, defaults.get(key)):
            yield warning(
                "ignored-key",
                f"{key} in {config.path} is ignored by accelerate launch",
                f"give it on the command line: --{key}" + (f" {value}" if value != True else ""),  # noqa: E712
            )


def types(facts: Facts) -> Iterator[Finding]:
    """Check for values of the wrong type, and for values that YAML 1.1 reads unexpectedly."""
    path, values, kind = facts.config.path, facts.config.values, facts.config.kind
    for what in facts.config.misread:
        yield warning("misread", f"{path}: {what}", "write the intended value plainly")
    for key in ("distributed_type", "mixed_precision", "dynamo_backend"):
        if values.get(key) is False:
            finding = warning if key == "distributed_type" else error
            yield finding(
                "wrong-type",
                f"{key} in {path} is the unquoted word no, which YAML reads as false",
                f'write {key}: "{"NO" if key == "distributed_type" else "no"}"',
            )
    if "gpu_ids" in values and not isinstance(values["gpu_ids"], str):
        yield error(
            "wrong-type",
            f"gpu_ids in {path} is {values['gpu_ids']!r}, but accelerate launch needs a string",
            'write it as "0,1", with quotes',
        )
    for key in ("num_processes", "num_machines", "machine_rank", "main_process_port"):
        if key in values and type(values[key]) is not int and values[key] is not None:
            yield error("wrong-type", f"{key} in {path} is {values[key]!r}", "write an integer")
    if kind != kind.upper():
        yield error("wrong-type", f"distributed_type in {path} is {kind}", f"write {kind.upper()}")
    elif kind not in (*ALONE, *SEVERAL):
        yield error(
            "wrong-type",
            f"distributed_type in {path} is {kind}, which cifar_dist does not support",
            "write MULTI_GPU, or NO for one process",
        )
    used = "parallelism_config" if values.get("parallelism_config") else ""
    if kind in SHARDED:
        used = kind
    if used or facts.sharded:
        place = f", of {path}," if used else ""
        yield error("sharded", f"{used or facts.sharded}{place} {TOO_MUCH}", "use MULTI_GPU")


def default_config(facts: Facts) -> Iterator[Finding]:
    """Report a configuration file that is used by default."""
    if facts.config.path and not facts.config.chosen:
        yield note(
            "default-config",
            f"every accelerate launch here uses {facts.config.path} ({facts.config.digest}), "
            "unless given another file",
            "use the same file on every machine",
        )


def threads(facts: Facts) -> Iterator[Finding]:
    """Check that OMP_NUM_THREADS leaves no cores idle."""
    try:
        chosen = chosen_threads(facts.environment)
    except UsageError as refusal:
        yield error("threads", str(refusal), "cifar_dist divides the cores automatically")
        return
    share = max(1, facts.cores // facts.per_machine)
    if chosen and chosen < share and not facts.devices:
        yield warning(
            "threads",
            f"OMP_NUM_THREADS is {chosen}, but {facts.cores} cores for {facts.per_machine} "
            f"processes are {share} each",
            "unset it: cifar_dist divides the cores automatically",
        )


def restarts(facts: Facts) -> Iterator[Finding]:
    """Check for torchrun's restarts in place, which usually hang."""
    wanted = restarts_in_place(facts.environment)
    if wanted > 0:
        yield error(
            "restarts",
            f"PET_MAX_RESTARTS is {wanted}: torchrun's restart in place leaves keys of the failed "
            "start in its store, and hangs",
            "unset it and let the scheduler restart the whole job; the run resumes",
        )


def platform(facts: Facts) -> Iterator[Finding]:
    """Check that the operating system supports the launch."""
    if facts.platform.startswith("win"):
        yield error(
            "windows",
            "Windows lacks the file locks and the collectives that a run needs (torch for Windows "
            "lacks libuv)",
            "train in WSL2",
        )
    elif facts.platform == "darwin" and facts.processes > 1:
        yield warning(
            "mps",
            f"MPS supports one process; {facts.processes} would train on the CPU",
            "use one process",
        )


def data(facts: Facts) -> Iterator[Finding]:
    """Check that the dataset is present and the network can be trained on it."""
    if facts.recipe_error not in ("", facts.dataset):
        yield error("recipe", facts.recipe_error, "change the recipe; train would refuse it too")
    if facts.dataset:
        finding = warning if facts.machines > 1 else note
        yield finding(
            "dataset",
            facts.dataset,
            "with several machines, download it first with a short run on one of them, to a folder "
            "that all can read",
        )


def room(facts: Facts) -> Iterator[Finding]:
    """Check the run folder, the free disk space and the shared memory."""
    if facts.out:
        yield error("out", facts.out, "name another run folder with --out")
    if facts.machines > 1 and not facts.recipe.out:
        yield note(
            "no-out",
            f"{facts.machines} machines without --out: the run folder would be named after the "
            "time, so the same command could not resume the run",
            "name a folder that the first machine can write, with --out",
        )
    if facts.free is not None and facts.free < facts.needed:
        yield error(
            "disk",
            f"checkpoints need {facts.needed / 1e6:.0f} MB, but {facts.free / 1e6:.0f} MB are free",
            "free disk space, use another folder with --out, or lower checkpoint.keep",
        )
    small = facts.shared_memory is not None and facts.shared_memory < SMALL_SHARED_MEMORY
    if small and facts.per_machine > 1 and facts.devices:
        yield warning(
            "shared-memory",
            f"/dev/shm has only {(facts.shared_memory or 0) / 1e6:.0f} MB, and NCCL uses it "
            "between GPUs",
            "use docker run --ipc=host or --shm-size 8g, or in Kubernetes an emptyDir with medium "
            "Memory",
        )


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    alone,
    endpoint,
    interface,
    counts,
    batch_script,
    devices,
    precision,
    peer_to_peer,
    keys,
    types,
    default_config,
    threads,
    restarts,
    platform,
    data,
    room,
)


def check(facts: Facts) -> list[Finding]:
    """Return the findings of all checks."""
    return [finding for function in CHECKS for finding in function(facts)]


def check_ranks(ranks: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Compare facts that all processes of a launch report about themselves.

    Args:
        ranks: by rank: "host", "device" (its UUID, or ""), "same" (values that must be equal, by
            name), "clock" (seconds ahead of rank 0) and "sees_out" (whether it sees rank 0's run
            folder).
    """
    first = ranks[0]
    for rank, other in enumerate(ranks):
        for key, value in other["same"].items():
            if value != first["same"].get(key):
                yield error(
                    f"{key}-differs",
                    f"{key} is {value} on rank {rank} ({other['host']}) and "
                    f"{first['same'].get(key)} on rank 0 ({first['host']})",
                    "use the same on all machines",
                )
        if abs(other["clock"]) > CLOCKS_APART:
            yield warning(
                "clock",
                f"the clock of rank {rank} ({other['host']}) is off by {other['clock']:+.1f} s",
                "synchronise the clocks with NTP; logs and cached files are compared by time",
            )
    holders: dict[tuple[str, str], list[int]] = {}
    for rank, other in enumerate(ranks):
        if other["device"]:
            holders.setdefault((other["host"], other["device"]), []).append(rank)
    for (host, device), twice in holders.items():
        if len(twice) > 1:
            yield error(
                "device-twice",
                f"ranks {', '.join(map(str, twice))} use the same GPU {device} on {host}",
                "use one process per GPU: check CUDA_VISIBLE_DEVICES, and whether two launchers "
                "start processes",
            )
    blind = [rank for rank, other in enumerate(ranks) if not other["sees_out"]]
    if blind:
        yield note(
            "out-not-shared",
            f"ranks {', '.join(map(str, blind))} do not see rank 0's run folder",
            "only rank 0 writes there; to resume, rank 0 must run on the same machine again",
        )
