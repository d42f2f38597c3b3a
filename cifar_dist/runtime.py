"""The processes: builds the Accelerator and proves that it is the one that was asked for.

Launchers start processes and speak through environment variables; what they cannot do they often
skip without a word. Each such case is refused here, before anything else happens.
"""

import argparse
import ctypes
import ipaddress
import itertools
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cifar_dist.config import TrainConfig, UsageError, require
from cifar_dist.console import complain, is_lost, open_streams
from cifar_dist.ending import RunFailed, describe_refusal, end_command
from cifar_dist.peers import Peers, PeersMissing, describe_process
from cifar_dist.preemption import (
    LOCAL_RANKS,
    Preempted,
    is_launched,
    launcher_number,
)

if TYPE_CHECKING:
    import psutil
    import torch
    from accelerate import Accelerator

T = TypeVar("T")

SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_SIZES = (
    *("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# Beginnings of the names of variables that launchers set, and that torch and Accelerate read.
LAUNCHERS = (
    *("ACCELERATE_", "FSDP_", "GROUP_", "LOCAL_", "MASTER_", "MPI_", "MV2_", "OMPI_", "PET_"),
    *("PMI_", "RANK", "ROLE_", "SLURM_", "TORCHELASTIC_", "WORLD_SIZE"),
)
LAUNCHER_PROGRAMS = {
    *("accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun"),
    *("accelerate.commands.accelerate_cli", "torch.distributed.run", "torch.distributed.launch"),
}
PORTS = 65535
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
TOO_MUCH = "is for networks that do not fit on one GPU, and all of these do"
NOBODY_READS = 128 + signal.SIGPIPE  # as a shell counts it
TWO_ON_CPU = "accelerate launch --multi_gpu --num_processes 2 -m cifar_dist.train ..."


def run_verb(verb: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Run a command and return its exit code; a UsageError becomes one line and code 2.

    So does a file that this user may not read or write. Where the reader of its output has seen
    enough, as `head` has, it ends without a word.
    """
    open_streams()
    try:
        try:
            return verb(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except (UsageError, RunFailed, Preempted) as error:
        return end_command(error)
    except OSError as error:
        if isinstance(error, PermissionError) and error.filename is not None:
            return end_command(error)
        if error.filename is not None or not is_lost(sys.stdout):
            raise
        if isinstance(error, BrokenPipeError):
            return NOBODY_READS
        complain(f"error: the standard output cannot be written ({error.strerror})")
        return 1


def start_processes(
    train: TrainConfig, log_with: Sequence[str] = (), told: Mapping[str, Any] | None = None
) -> "tuple[Accelerator, Peers]":
    """Join the processes that the launcher started and return the Accelerator for them.

    Args:
        train: says the precision, the time-out and whether BatchNorm is synchronised.
        log_with: names of trackers.
        told: what this process was told to do, plain values; all must have been told the same.

    Raises:
        UsageError: the world size, the precision or a tracker is not to be had here, or the
            processes differ in what they were told or in their code.
    """
    asked = asked_world_size()
    require(not sharding(), f"{sharding()} {TOO_MUCH}; use MULTI_GPU")
    threads = chosen_threads(user_environment())
    parts = launcher_number("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", least=1)
    require(
        parts in (None, 1),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set; unset it and use train.accumulate",
    )
    from accelerate import (
        Accelerator,
        DataLoaderConfiguration,
        DistributedDataParallelKwargs,
        InitProcessGroupKwargs,
    )
    from accelerate.state import AcceleratorState
    from accelerate.utils import DDPCommunicationHookType, ProjectConfiguration

    # A second run in one Python, as in a notebook, may ask for another precision.
    AcceleratorState._reset_state()
    use_cpu = _cpu_is_meant(asked)
    _use_all_cores(threads)
    if use_cpu:
        keep_memory()
    _choose_algorithms(train.deterministic)
    peers = Peers(launcher_number("RANK") or 0, asked, train.timeout)
    peers.compare("code", describe_process())
    peers.compare("recipe", told or {})
    if asked > 1:
        choose_interface(peers)
    # NCCL would end the process itself: the exchange on the CPU is to notice first, and say it.
    timeout = timedelta(seconds=train.timeout + (0 if use_cpu else 60))
    hooks = DDPCommunicationHookType
    hook = hooks.BF16 if train.compress_gradients else hooks.NO
    try:
        accelerator = Accelerator(
            cpu=use_cpu,
            mixed_precision=_choose_precision(train.precision, use_cpu),
            # Slices of global batches, never padded: no sample is trained or counted twice.
            dataloader_config=DataLoaderConfiguration(split_batches=True, even_batches=False),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook),
                InitProcessGroupKwargs(timeout=timeout),
            ],
            log_with=list(log_with) or None,
            project_config=ProjectConfiguration(project_dir="."),  # the run folder is set later
        )
    except ValueError as error:
        given = ", ".join(f"{n}={v}" for n, v in os.environ.items() if n.startswith("ACCELERATE_"))
        raise UsageError(f"Accelerate refuses this configuration: {error} ({given})") from error
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        # gloo cannot connect the processes, though all reached the store of the launch.
        raise PeersMissing(
            f"the processes lost each other at the start: {' '.join(str(error).split())[:200]}; "
            "the machines must reach each other through the network interface "
            f"{os.environ.get('GLOO_SOCKET_IFNAME')} (GLOO_SOCKET_IFNAME)"
        ) from error
    _check(accelerator, asked, log_with, train)
    return accelerator, peers


def choose_interface(peers: Peers) -> None:
    """Have gloo use the network interface through which the machines reach each other.

    Its own choice is the address of the host's name, which may not resolve, and which Debian puts
    on 127.0.1.1. GPUs use gloo too, for agreeing on signals.
    """
    # The first machine may reach itself through its loopback: then the others know the way.
    told = peers.tell("address", address_towards(os.environ["MASTER_ADDR"]))
    outside = [address for address in told if not ipaddress.ip_address(address).is_loopback]
    interface = interface_of(address_towards((*outside, "127.0.0.1")[0]))
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def address_towards(host: str) -> str:
    """Return the address from which this machine would reach `host`; nothing is sent."""
    family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has the address, if one does."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if address in [entry.address for entry in addresses]:
            return name
    return None


def keep_memory() -> None:
    """Have glibc keep freed memory for the next step instead of handing it back to the kernel.

    It maps each large tensor anew otherwise, and the kernel clears every page again: up to a third
    of a step on a CPU. Other C libraries do without.
    """
    with suppress(OSError, AttributeError):
        allocator = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        allocator.mallopt(m_mmap_max, 0)
        allocator.mallopt(m_trim_threshold, -1)


def _choose_algorithms(deterministic: bool) -> None:
    """Let CUDA measure which algorithms are fastest, or have it use only repeatable ones."""
    import torch

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    # The same as torch.use_deterministic_algorithms, which imports the compiler: two seconds.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic


def leave_processes() -> None:
    """Close the process group, at the end of a command that succeeded."""
    from accelerate import PartialState

    PartialState().destroy_process_group()


def precision_in_force(accelerator: "Accelerator") -> str:
    """Return the precision the forward pass really runs in."""
    return str(accelerator.mixed_precision) if accelerator.native_amp else "fp32"


def on_main_process(accelerator: "Accelerator", function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and give its result, or its UsageError, to every process.

    Every process must call it. Nobody is left waiting for a rank 0 that has given up.
    """
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except UsageError as error:
            outcome[1] = str(error)
        except PermissionError as error:
            outcome[1] = describe_refusal(error)
    result, refusal = broadcast_object_list(outcome)
    if refusal is not None:
        raise UsageError(refusal)
    return result


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity, within the container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text(encoding="utf-8").split()
        if allowed != "max":
            cores = min(cores, max(1, int(allowed) // int(period)))
    return cores


def asked_world_size() -> int:
    """Return the number of processes the launcher meant, from what it left in the environment.

    Raises:
        UsageError: several were meant, but this process cannot find the others; or a variable has
            a value that no launcher gives it.
    """
    env = os.environ
    _check_variables()
    size = launcher_number(*SIZE_VARIABLES, least=1) or 1
    by_mpi = any(name in env for name in SIZE_VARIABLES[1:])
    if by_mpi and size > 1:
        from accelerate.utils import get_cpu_distributed_information

        found = get_cpu_distributed_information()
        require(
            "MASTER_ADDR" in env or found.local_world_size == size,
            f"mpirun started {size} processes on several machines, and none knows where the first "
            "one is; add -x MASTER_ADDR=HOST -x MASTER_PORT=29500 to mpirun",
        )
        missing = {
            "RANK": found.rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": found.local_rank,
            "LOCAL_WORLD_SIZE": found.local_world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 29500,
        }
        for name, value in missing.items():
            env.setdefault(name, str(value))
    if "LOCAL_RANK" in env or by_mpi:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 else ():
            require(
                name in env,
                f"WORLD_SIZE is {size}, but {name} is not set, so the processes cannot meet; start "
                "them with torchrun or accelerate launch",
            )
        rank = launcher_number("RANK") or 0
        require(rank < size, f"RANK is {rank}, but WORLD_SIZE is {size}; ranks begin with 0")
        port = launcher_number("MASTER_PORT") or 0
        require(port <= PORTS, f"MASTER_PORT is {port}; give a port of {PORTS} or less")
        return size
    # `accelerate launch --num_processes 2` starts a single process where it finds no GPUs, or
    # with --cpu.
    require(
        not _several_asked_of_accelerate(),
        "accelerate launch was asked for several processes but started only this one; "
        f"on a CPU use: {TWO_ON_CPU}",
    )
    rank = launcher_number("RANK") or 0
    require(
        (size, rank) == (1, 0),
        f"WORLD_SIZE is {size} and RANK is {rank}, but LOCAL_RANK is not set, so "
        "Accelerate would train alone; start the processes with torchrun or accelerate launch",
    )
    tasks = launcher_number("SLURM_STEP_NUM_TASKS", least=1) or 1
    require(
        tasks == 1,
        f"srun started {tasks} tasks of plain python, which would each train alone; start one "
        "task per node and in it torchrun or accelerate launch",
    )
    return 1


def _check_variables() -> None:
    """Refuse variables of launchers with values that none sets, and remove the empty ones.

    torch and Accelerate read them too, and would fail of them without their names.
    """
    env = os.environ
    for name, value in list(env.items()):
        if name.startswith(LAUNCHERS) and not value.strip():
            del env[name]
    sizes = {name: launcher_number(name, least=1) for name in SIZE_VARIABLES if name in env}
    for name in (*RANKS, *LOCAL_RANKS, "TORCHELASTIC_RESTART_COUNT"):
        launcher_number(name)
    for ranks, counts in ((RANKS, SIZE_VARIABLES), (LOCAL_RANKS, LOCAL_SIZES)):
        for rank, count in zip(ranks, counts, strict=True):
            size, number = launcher_number(count, least=1), launcher_number(rank) or 0
            if size is not None and number >= size:
                raise PeersMissing(f"{rank} is {number} and {count} is {size}; ranks begin with 0")
    require(
        "LOCAL_RANK" in env or len(set(sizes.values())) < 2,  # torchrun may run within mpirun
        f"{' and '.join(f'{name} is {size}' for name, size in sizes.items())}; unset the one that "
        "is not the launcher's",
    )


def _several_asked_of_accelerate() -> bool:
    """Say whether accelerate launch, which has started this process alone, was asked for several.

    The only trace is a rendezvous address, which the user may have set, too.
    """
    launcher = find_launcher()
    if launcher is None or "MASTER_ADDR" not in os.environ:
        return False
    user = user_environment()
    if any(user.get(name) != os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")):
        return True
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("num_processes", "num_machines"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--config_file", "--config-file")
    asked = parser.parse_known_args(launcher.cmdline())[0]
    config: Any = None
    if asked.config_file or Path(default_config_file).is_file():
        config = load_config_from_file(asked.config_file)
    return any(
        (getattr(asked, name) or getattr(config, name, None) or 1) > 1
        for name in ("num_processes", "num_machines")
    )


def find_launcher() -> "psutil.Process | None":
    """Return the process of accelerate launch or torchrun that started this one."""
    import psutil

    with suppress(psutil.Error, OSError):
        for process in psutil.Process().parents():
            words = process.cmdline()
            modules = [word for before, word in itertools.pairwise(words) if before == "-m"]
            programs = {Path(word).name for word in words[:4]}  # after python and its options
            if LAUNCHER_PROGRAMS & {*programs, *modules[:1]}:
                return process
    return None


def _cpu_is_meant(processes: int) -> bool:
    """Say whether to train on the CPU: as the launcher was told, or for want of anything else."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return True
    device = torch.accelerator.current_accelerator(check_available=True)
    # Without being told, Accelerate would let each of several processes train alone.
    return device is None or (device.type == "mps" and processes > 1)


def _choose_precision(asked: str, use_cpu: bool) -> str:
    import torch

    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    require(
        asked != "auto" or launcher in ("no", "fp16", "bf16"),
        f"ACCELERATE_MIXED_PRECISION is '{launcher}'; give no, fp16 or bf16",
    )
    precision = launcher if asked == "auto" else asked
    require(
        not (precision == "fp16" and use_cpu),
        "fp16 is not available on a CPU (Accelerate would train in fp32 without saying so); "
        "use --train.precision no or bf16",
    )
    if asked != "auto" or launcher != "no":
        return precision
    if use_cpu or not torch.cuda.is_available():
        return "no"
    # Older GPUs report bf16 as supported but emulate it.
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def _check(
    accelerator: "Accelerator", asked: int, log_with: Sequence[str], train: TrainConfig
) -> None:
    world = accelerator.num_processes
    require(
        world == asked,
        f"the launcher asked for {asked} processes, but Accelerate joined {world}; "
        f"on a CPU use: {TWO_ON_CPU}",
    )
    kind = accelerator.distributed_type.value
    require(
        kind in ("NO", "MULTI_CPU", "MULTI_GPU"),
        f"Accelerate found {kind}, and several processes train on CPUs or CUDA GPUs only",
    )
    require(
        len(accelerator.log_with) == len(log_with),
        f"of the trackers {', '.join(log_with)} not all are installed",
    )
    require(
        not train.sync_batchnorm or accelerator.device.type == "cuda",
        f"train.sync_batchnorm works on CUDA GPUs only, not on {accelerator.device.type}",
    )
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    require(
        not (train.compile or compiler_of_launcher(accelerator))
        or accelerator.device.type == "cuda"
        or any(name and shutil.which(name) for name in compilers),
        "train.compile needs a C++ compiler on a CPU, and neither g++ nor clang++ was found; "
        "install one, or leave train.compile, and the launcher's dynamo_backend, out",
    )


def _use_all_cores(chosen: int | None) -> None:
    """Share the cores among the processes of this machine, unless the user chose a number.

    accelerate launch and torchrun set OMP_NUM_THREADS to 1, which would leave cores idle.
    """
    import torch

    local = launcher_number(*LOCAL_SIZES, least=1) or 1
    threads = chosen or max(1, usable_cores() // local)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # else Accelerate chooses again
    torch.set_num_threads(threads)


def chosen_threads(environment: Mapping[str, str]) -> int | None:
    """Return the number of threads that the user chose; of a list, such as 4,2, the first.

    Raises:
        UsageError: OMP_NUM_THREADS is no number of threads.
    """
    text = environment.get("OMP_NUM_THREADS", "").strip()
    first = text.partition(",")[0].strip()
    require(
        not text or (first.isdecimal() and int(first) > 0),
        f"OMP_NUM_THREADS is '{text}'; give a number of threads of 1 or more, or unset it",
    )
    return int(first) if text else None


def user_environment() -> dict[str, str]:
    """Return the environment as the user set it: that which a launcher was itself started with."""
    import psutil

    if not is_launched():
        return dict(os.environ)
    try:
        return dict((find_launcher() or psutil.Process(os.getppid())).environ())
    except (psutil.Error, OSError):
        return {}


def sharding() -> str:
    """Return what the launcher was told to divide networks with, or ""."""
    used = (kind for name, kind in SHARDING.items() if os.environ.get(name, "").lower() == "true")
    return next(used, "")


def compiler_of_launcher(accelerator: "Accelerator") -> str | None:
    """Return the dynamo backend with which Accelerate compiles each network, as configured."""
    backend = accelerator.state.dynamo_plugin.backend.value
    return None if backend == "NO" else backend.lower()


def describe_device(device: "torch.device") -> str:
    """Return the device's type with the name of the hardware where it is known."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
