"""Build the Accelerator, and check that it matches what the launcher and the recipe asked for.

Launchers pass their settings through environment variables, and often ignore silently a request
that they cannot fulfil. Each such case is refused here, before training begins.
"""

import ctypes
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from cifar_dist.config import TrainConfig
from cifar_dist.errors import PeersMissing, UsageError, one_line, require, require_known
from cifar_dist.processes.ending import describe_refusal
from cifar_dist.processes.environment import (
    LOCAL_SIZES,
    TOO_MUCH,
    TWO_ON_CPU,
    asked_world_size,
    chosen_threads,
    global_rank,
    launcher_number,
    sharding,
    usable_cores,
    user_environment,
)
from cifar_dist.processes.network import choose_interface
from cifar_dist.processes.peers import Peers, describe_process

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

T = TypeVar("T")


def start_processes(
    train: TrainConfig, log_with: Sequence[str] = (), shared: Mapping[str, Any] | None = None
) -> "tuple[Accelerator, Peers]":
    """Join the processes that the launcher started, and return the Accelerator and the peers.

    Args:
        train: precision, timeout, determinism and gradient compression.
        log_with: names of trackers.
        shared: options that must be equal on all ranks, as plain values.

    Raises:
        UsageError: the world size, the precision or a tracker is unavailable on this machine, or
            the ranks differ in their options or code.
    """
    asked = asked_world_size()
    require(not sharding(), f"{sharding()} {TOO_MUCH}; use MULTI_GPU")
    threads = chosen_threads(user_environment())
    require(
        launcher_number("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", least=1) in (None, 1),
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

    _check_trackers(log_with)
    # A second run in the same Python process, as in a notebook, may use another precision.
    AcceleratorState._reset_state()
    use_cpu = _cpu_is_meant(asked)
    _use_all_cores(threads)
    if use_cpu:
        keep_memory()
    _choose_algorithms(train.deterministic)
    peers = Peers(global_rank(), asked, train.timeout)
    peers.compare("code", describe_process())
    peers.compare("recipe", shared or {})
    if asked > 1:
        choose_interface(peers)
    # NCCL aborts the process on a timeout; the shorter one of the gloo group raises an error first.
    timeout = timedelta(seconds=train.timeout + (0 if use_cpu else 60))
    hooks = DDPCommunicationHookType
    hook = hooks.BF16 if train.compress_gradients else hooks.NO
    try:
        accelerator = Accelerator(
            cpu=use_cpu,
            mixed_precision=_choose_precision(train.precision, use_cpu),
            # Each rank gets a slice of the global batch. No padding: no sample is used twice.
            dataloader_config=DataLoaderConfiguration(split_batches=True, even_batches=False),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook),
                InitProcessGroupKwargs(timeout=timeout),
            ],
            log_with=list(log_with) or None,
            project_config=ProjectConfiguration(project_dir="."),  # the run folder is set later
        )
    except ValueError as error:
        names = [name for name in os.environ if name.startswith("ACCELERATE_")]
        settings = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise UsageError(f"Accelerate refuses this configuration: {error} ({settings})") from error
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        # All processes reached the store, but gloo cannot connect them with each other.
        raise PeersMissing(
            f"gloo could not connect the processes: {one_line(error)}; "
            "the machines must reach each other through the network interface "
            f"{os.environ.get('GLOO_SOCKET_IFNAME')} (GLOO_SOCKET_IFNAME)"
        ) from error
    _check(accelerator, asked, train)
    return accelerator, peers


def keep_memory() -> None:
    """Make glibc keep freed memory for the next step instead of returning it to the kernel.

    By default each large tensor is a new mapping whose pages the kernel must zero: up to a third
    of a step on a CPU. Does nothing with other C libraries.
    """
    with suppress(OSError, AttributeError, TypeError):  # Windows raises TypeError
        allocator = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        allocator.mallopt(m_mmap_max, 0)
        allocator.mallopt(m_trim_threshold, -1)


def _choose_algorithms(deterministic: bool) -> None:
    """Let cuDNN benchmark its algorithms, or use only deterministic ones."""
    import torch

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    # torch.use_deterministic_algorithms does the same, but imports the compiler (two seconds).
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic


def leave_processes() -> None:
    """Destroy the process group, at the end of a command that succeeded."""
    from accelerate import PartialState

    PartialState().destroy_process_group()


def precision_in_force(accelerator: "Accelerator") -> str:
    """Return the precision in which the forward pass runs: "fp32", "fp16" or "bf16"."""
    return str(accelerator.mixed_precision) if accelerator.native_amp else "fp32"


def on_main_process(accelerator: "Accelerator", function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and broadcast its result, or its UsageError, to all ranks.

    Every process must call it.
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


def _cpu_is_meant(processes: int) -> bool:
    """Return whether to train on the CPU: the launcher asked for it, or no GPU is usable."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return True
    device = torch.accelerator.current_accelerator(check_available=True)
    # With several processes on MPS, Accelerate would train in each of them separately.
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
        "fp16 is unavailable on a CPU (Accelerate would silently train in fp32); "
        "use --train.precision no or bf16",
    )
    if asked != "auto" or launcher != "no":
        return precision
    if use_cpu or not torch.cuda.is_available():
        return "no"
    # Older GPUs report bf16 as supported but emulate it.
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def _check(accelerator: "Accelerator", asked: int, train: TrainConfig) -> None:
    world = accelerator.num_processes
    require(
        world == asked,
        f"the launcher asked for {asked} processes, but Accelerate joined {world}; "
        f"on a CPU use: {TWO_ON_CPU}",
    )
    kind = accelerator.distributed_type.value
    require(
        kind in ("NO", "MULTI_CPU", "MULTI_GPU"),
        f"Accelerate found {kind}, but several processes can train on CPUs or CUDA GPUs only",
    )
    require(
        not train.sync_batchnorm or accelerator.device.type == "cuda",
        f"train.sync_batchnorm needs CUDA GPUs, but the device is {accelerator.device.type}; set "
        "it to false",
    )
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    require(
        not (train.compile or compiler_of_launcher(accelerator))
        or accelerator.device.type == "cuda"
        or any(name and shutil.which(name) for name in compilers),
        "train.compile needs a C++ compiler on a CPU, but neither g++ nor clang++ was found; "
        "install one, or remove train.compile and the launcher's dynamo_backend",
    )


def _check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Accelerate does not know, or whose package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    available = [str(name) for name in get_available_trackers()]
    available += set(LOGGER_TYPE_TO_CLASS) - {kind.value for kind in LoggerType}  # registered
    for name in names:
        require_known(name, LOGGER_TYPE_TO_CLASS, f"unknown tracker '{name}' in track.log_with")
        require(
            name in available,
            f"the tracker {name} is not installed; install it: pip install {name}, or set "
            "--track.log_with [tensorboard]",
        )


def _use_all_cores(chosen: int | None) -> None:
    """Divide the cores among this machine's processes, unless the user chose a thread count.

    accelerate launch and torchrun set OMP_NUM_THREADS to 1, which would leave cores idle.
    """
    import torch

    processes = launcher_number(*LOCAL_SIZES, least=1) or 1
    threads = chosen or max(1, usable_cores() // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # otherwise Accelerate sets its own number
    torch.set_num_threads(threads)


def compiler_of_launcher(accelerator: "Accelerator") -> str | None:
    """Return the dynamo backend that Accelerate compiles networks with, or None."""
    backend = accelerator.state.dynamo_plugin.backend.value
    return None if backend == "NO" else backend.lower()


def describe_device(device: "torch.device") -> str:
    """Return the name of a CUDA GPU, or the device type."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
