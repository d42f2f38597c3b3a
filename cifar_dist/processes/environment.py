"""Environment variables set by launchers, and the CPU cores this process may use."""

import argparse
import itertools
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.errors import PeersMissing, require

if TYPE_CHECKING:
    import psutil

SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
LOCAL_RANKS = (  # those that Accelerate reads; asking it would import torch
    "LOCAL_RANK",
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
)
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# Prefixes of the variables that launchers set and that torch and Accelerate read.
LAUNCHERS = (
    "ACCELERATE_",
    "FSDP_",
    "GROUP_",
    "LOCAL_",
    "MASTER_",
    "MPI_",
    "MV2_",
    "OMPI_",
    "PET_",
    "PMI_",
    "RANK",
    "ROLE_",
    "SLURM_",
    "TORCHELASTIC_",
    "WORLD_SIZE",
)
LAUNCHER_PROGRAMS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
}
PORTS = 65535


# Set by `cifar-dist train --processes`: file in which one process of this machine reports the
# ending, for its parent to print.
ENDING = "CIFAR_DIST_ENDING"


SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
TOO_MUCH = "is for networks that do not fit on one GPU; these networks do"
TWO_ON_CPU = "accelerate launch --multi_gpu --num_processes 2 -m cifar_dist.train ..."


def usable_cores() -> int:
    """Return the number of cores in this process's affinity, limited by the cgroup's CPU quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text(encoding="utf-8").split()
        if allowed != "max":
            cores = min(cores, max(1, int(allowed) // int(period)))
    return cores


def asked_world_size() -> int:
    """Return the world size that the launcher asked for, from its environment variables.

    Under mpirun, also set the variables that torch needs and mpirun does not set.

    Raises:
        UsageError: the launcher asked for several processes, but this one cannot find the others;
            or a variable has a value that no launcher sets.
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
            f"MASTER_ADDR is not set, and mpirun started {size} processes on several machines; "
            "add -x MASTER_ADDR=HOST -x MASTER_PORT=29500 to mpirun",
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
                f"WORLD_SIZE is {size}, but {name} is not set, so the processes cannot connect; "
                "start them with torchrun or accelerate launch",
            )
        rank = global_rank()
        require(rank < size, f"RANK is {rank}, but WORLD_SIZE is {size}; ranks start at 0")
        port = launcher_number("MASTER_PORT") or 0
        require(port <= PORTS, f"MASTER_PORT is {port}; give a port of {PORTS} or less")
        return size
    # `accelerate launch --num_processes 2` starts a single process if it finds no GPU, or with
    # --cpu.
    require(
        not _several_asked_of_accelerate(),
        "accelerate launch was asked for several processes but started only this one; "
        f"on a CPU use: {TWO_ON_CPU}",
    )
    rank = global_rank()
    require(
        (size, rank) == (1, 0),
        f"WORLD_SIZE is {size} and RANK is {rank}, but LOCAL_RANK is not set, so "
        "Accelerate would train alone; start the processes with torchrun or accelerate launch",
    )
    tasks = launcher_number("SLURM_STEP_NUM_TASKS", least=1) or 1
    require(
        tasks == 1,
        f"srun started {tasks} tasks of plain python, and each would train alone; start one "
        "task per node that runs torchrun or accelerate launch",
    )
    return 1


def _check_variables() -> None:
    """Refuse launcher variables with invalid values, and remove empty ones.

    torch and Accelerate read them too, and their errors do not name the variable.
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
                raise PeersMissing(f"{rank} is {number} and {count} is {size}; ranks start at 0")
    require(
        "LOCAL_RANK" in env or len(set(sizes.values())) < 2,  # torchrun may run within mpirun
        f"{' and '.join(f'{name} is {size}' for name, size in sizes.items())}; unset the one that "
        "the launcher did not set",
    )


def _several_asked_of_accelerate() -> bool:
    """Return whether accelerate launch was asked for several processes but started only this one.

    The only trace is a rendezvous address. The user may have set that too, so the launcher's
    command line and configuration decide.
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
    """Return the accelerate launch or torchrun process that started this one, or None."""
    import psutil

    with suppress(psutil.Error, OSError):
        for process in psutil.Process().parents():
            words = process.cmdline()
            modules = [word for before, word in itertools.pairwise(words) if before == "-m"]
            programs = {Path(word).name for word in words[:4]}  # after python and its options
            if LAUNCHER_PROGRAMS & {*programs, *modules[:1]}:
                return process
    return None


def chosen_threads(environment: Mapping[str, str]) -> int | None:
    """Return OMP_NUM_THREADS, or None if it is not set. For a list such as 4,2 return the first.

    Raises:
        UsageError: OMP_NUM_THREADS is not a positive integer.
    """
    text = environment.get("OMP_NUM_THREADS", "").strip()
    first = text.partition(",")[0].strip()
    require(
        not text or (first.isdecimal() and int(first) > 0),
        f"OMP_NUM_THREADS is '{text}'; give a number of threads of 1 or more, or unset it",
    )
    return int(first) if text else None


def user_environment() -> dict[str, str]:
    """Return the environment before the launcher added to it: that of the launcher process."""
    import psutil

    if not is_launched():
        return dict(os.environ)
    try:
        return dict((find_launcher() or psutil.Process(os.getppid())).environ())
    except (psutil.Error, OSError):
        return {}


def sharding() -> str:
    """Return the model sharding that the launcher configured, such as "FSDP", or ""."""
    used = (kind for name, kind in SHARDING.items() if os.environ.get(name, "").lower() == "true")
    return next(used, "")


def launcher_number(*names: str, least: int = 0) -> int | None:
    """Return the first of these variables that is set and not empty, as an integer, or None.

    Raises:
        UsageError: its value is not an integer of at least `least`.
    """
    for name in names:
        text = os.environ.get(name, "").strip()
        if text:
            require(
                text.isdecimal() and int(text) >= least,
                f"{name} is '{text}' in the environment, but launchers set an integer of {least} "
                "or more; unset it, or start with accelerate launch or torchrun",
            )
            return int(text)
    return None


def local_rank() -> int:
    """Return this process's rank on its machine, as set by the launcher or mpirun.

    Return 0 if the variable is not a number: `asked_world_size` refuses it, and local rank 0
    reports the refusal.
    """
    found = next((os.environ[name] for name in LOCAL_RANKS if os.environ.get(name)), "0")
    return int(found) if found.isdecimal() else 0


def is_launched() -> bool:
    """Return whether a launcher started this process."""
    return any(os.environ.get(name) for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"))


def global_rank() -> int:
    """Return this process's rank among all processes, or 0 without a launcher."""
    return launcher_number("RANK") or 0


def restarts_in_place(environment: Mapping[str, str]) -> int:
    """Return torchrun's number of restarts, or 0 if its store is not shared with them."""
    wanted = environment.get("PET_MAX_RESTARTS", "0")
    separate = environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
    return int(wanted) if wanted.isdigit() and not separate else 0


def is_slurm_job(environment: Mapping[str, str]) -> bool:
    """Return whether an environment is that of a Slurm job."""
    return "SLURM_JOB_ID" in environment


def launched_machines() -> int | None:
    """Return the number of machines set by torchrun or Slurm, or None."""
    return _plain_number("PET_NNODES", "SLURM_NNODES")


def launched_per_machine() -> int | None:
    """Return the number of processes on each machine set by torchrun, or None."""
    return _plain_number("PET_NPROC_PER_NODE", "LOCAL_WORLD_SIZE")


def launched_machine_rank() -> int | None:
    """Return the rank of this machine set by torchrun or Slurm, or None."""
    return _plain_number("PET_NODE_RANK", "GROUP_RANK", "SLURM_NODEID")


def rendezvous_endpoint() -> tuple[str, str]:
    """Return host and port at which the processes connect; the host is "" if none is set."""
    env = os.environ
    host = env.get("PET_MASTER_ADDR") or env.get("MASTER_ADDR") or ""
    port = str(launcher_number("PET_MASTER_PORT", "MASTER_PORT") or 29500)
    if not host and env.get("PET_RDZV_ENDPOINT"):
        host, _, port = env["PET_RDZV_ENDPOINT"].partition(":")
    return host, port


def ending_file() -> Path | None:
    """Return the file for the ending, if `cifar-dist train --processes` started this process."""
    name = os.environ.get(ENDING)
    return Path(name) if name else None


def visible_gpus() -> list[str] | None:
    """Return the indices or UUIDs in CUDA_VISIBLE_DEVICES, or None if it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if visible is None else [part.strip() for part in visible.split(",")]


def _plain_number(*names: str) -> int | None:
    """Return the first of these variables that is a number; torchrun also accepts "1:4", "gpu"."""
    words = re.compile(r"\d+:\d+|auto|cpu|gpu|xpu")
    return launcher_number(*(n for n in names if not words.fullmatch(os.environ.get(n, ""))))
