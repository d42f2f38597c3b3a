"""Gather the facts of this machine and this launch for the checks."""

import errno
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil

from cifar_dist.config import Recipe, local_path
from cifar_dist.data.cache import cache_folder
from cifar_dist.data.cifar import ARCHIVES
from cifar_dist.data.counts import count_images
from cifar_dist.errors import UsageError
from cifar_dist.launching.accelerate_config import AccelerateConfig
from cifar_dist.launching.checks import Device, Endpoint, Facts
from cifar_dist.launching.forecast import predict
from cifar_dist.processes.environment import (
    asked_world_size,
    is_launched,
    launched_machine_rank,
    launched_machines,
    launched_per_machine,
    rendezvous_endpoint,
    sharding,
    usable_cores,
    user_environment,
    visible_gpus,
)
from cifar_dist.processes.network import address_towards, interface_of
from cifar_dist.storage.folder import RunLock, check_out

PATIENCE = 5.0  # seconds to wait for another machine or for nvidia-smi


def gather(
    config: AccelerateConfig,
    recipe: Recipe,
    machines: int | None = None,
    per_machine: int | None = None,
    script: str | None = None,
) -> Facts:
    """Return the facts of a launch, as seen from this machine.

    Args:
        machines, per_machine: override the environment and `config`.
        script: path of a Slurm script to check.

    Raises:
        UsageError: the script cannot be read.
    """
    machines = machines or launched_machines() or config.machines
    per_machine = per_machine or launched_per_machine() or max(1, config.per_machine)
    rank = launched_machine_rank()
    place = _endpoint(config)
    out = local_path(recipe.out or "runs").absolute()
    existing = next(path for path in (out, *out.parents) if path.exists())
    needed, recipe_error = _predict(recipe, machines * per_machine)
    return Facts(
        machines=machines,
        per_machine=per_machine,
        rank=config.machine_rank if rank is None else rank,
        config=config,
        recipe=recipe,
        environment=user_environment(),
        platform=sys.platform,
        alone=_refusal(asked_world_size),
        sharded=sharding(),
        devices=find_devices(),
        searched=True,
        cores=usable_cores(),
        address=own_address(),
        nameless="" if own_address() else platform.node(),
        interface=_interface(place.host) if place else "",
        endpoint=place,
        batch_script=_read_script(script),
        dataset=_dataset(recipe),
        recipe_error=recipe_error,
        out=_refusal(lambda: _try_out(recipe)),
        free=shutil.disk_usage(existing).free,
        needed=needed,
        shared_memory=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
    )


def describe_machine(facts: Facts) -> dict[str, str]:
    """Return the facts to show to a person, by name."""
    config = facts.config
    names = [f"{device.index} {device.name}" for device in facts.devices]
    has_mps = sys.platform == "darwin" and platform.machine() == "arm64"
    launch = f"{facts.machines} machines x " if facts.machines > 1 else ""
    noun = "processes" if facts.per_machine > 1 else "process"
    return {
        "machine": f"{platform.node()} ({facts.address or 'no address'}), {platform.platform()}, "
        f"{facts.cores} cores, {psutil.virtual_memory().total / 1e9:.0f} GB",
        "devices": ", ".join(names) or ("MPS" if has_mps else "CPU"),
        "versions": ", ".join(
            f"{name} {version(name)}" for name in ("cifar_dist", "torch", "accelerate")
        )
        + f", python {platform.python_version()}",
        "configuration": f"{config.path} ({config.digest})" if config.path else "none",
        "launch": f"{launch}{facts.per_machine} {noun}"
        + (f", meeting at {facts.endpoint.host}:{facts.endpoint.port}" if facts.endpoint else ""),
    }


def find_devices() -> list[Device]:
    """Return the NVIDIA GPUs that are visible to processes here, in nvidia-smi's order."""
    query = "index,name,uuid,compute_cap,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        listed = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    devices = []
    for line in listed.stdout.splitlines() if listed.returncode == 0 else []:
        index, name, uuid, capability, driver = (part.strip() for part in line.split(","))
        numbers = tuple(int(part) for part in driver.split(".") if part.isdigit())
        devices.append(Device(int(index), name, uuid, float(capability), numbers))
    visible = visible_gpus()
    if visible is None:
        return devices
    return [device for device in devices if {str(device.index), device.uuid} & set(visible)]


def _endpoint(config: AccelerateConfig) -> Endpoint | None:
    """Return the rendezvous endpoint, and whether this machine can reach it."""
    host, port = rendezvous_endpoint()
    if not host:
        values = config.values
        if not (values.get("main_process_ip") or values.get("main_process_port")):
            return None
        host = str(values.get("main_process_ip") or "127.0.0.1")
        port = str(values.get("main_process_port", "29500"))
    number = int(port) if port.isdigit() else 29500
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        return Endpoint(host, number, error=f"unknown host: {error.strerror or error}")
    mine = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    if address in mine:
        # In a running launch the launcher itself listens on the port.
        free = is_launched() or number == 0
        return Endpoint(host, number, True, holder="" if free else _holder(address, number))
    return Endpoint(host, number, error=_reach(address, number) if number else "")


def _holder(address: str, port: int) -> str:
    """Return the process of this machine that uses a port, or "" if the port is free."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((address, port))
            return ""
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return ""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN
            if listens and getattr(connection.laddr, "port", 0) == port and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"process {connection.pid} ({command[:100]})"
    return "another program"


def _reach(address: str, port: int) -> str:
    """Return why a connection fails, or ""."""
    try:
        socket.create_connection((address, port), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _interface(host: str) -> str:
    """Return the network interface of the route to a host, or ""."""
    with suppress(OSError):
        return interface_of(address_towards(host)) or ""
    return ""


def own_address() -> str:
    """Return the address to which this machine's host name resolves, or ""."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _dataset(recipe: Recipe) -> str:
    """Return why the dataset is not ready, or ""."""
    config = recipe.data
    if config.name not in ARCHIVES:
        return _refusal(lambda: count_images(config))
    archive, root = ARCHIVES[config.name], local_path(config.root)
    places = (
        cache_folder(config) / f"{config.name}-{config.side}",
        root / archive.name,
        root / archive.folder,
    )
    if any(place.exists() for place in places):
        return ""
    return f"{config.name} is not in '{config.root}', and would be downloaded at the start"


def _predict(recipe: Recipe, processes: int) -> tuple[int, str]:
    """Return the bytes of all checkpoints, and why the recipe cannot be trained, or ""."""
    try:
        return predict(recipe, processes).disk, ""
    except UsageError as error:
        return 0, str(error)


def _try_out(recipe: Recipe) -> None:
    with RunLock() as lock:
        check_out(recipe, lock)


def _refusal(function: Callable[[], object]) -> str:
    """Return the message of the UsageError that a function raises, or ""."""
    try:
        function()
    except UsageError as error:
        return str(error)
    return ""


def _read_script(place: str | None) -> tuple[str, str] | None:
    if place is None:
        return None
    try:
        return place, local_path(place).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{place}' cannot be read ({error}); name a Slurm script") from error
