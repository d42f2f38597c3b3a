"""Read a configuration file as `accelerate launch` would, without importing accelerate.

The known keys and options are parsed from the source of the installed version, so they are never
out of date.
"""

import ast
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.config import local_path, walk
from cifar_dist.errors import UsageError, one_line, require
from cifar_dist.values import RecipeLoader

# Keys that `accelerate launch` reads and ignores: a key is used only if the command line option has
# no value, and these options have default values.
IGNORED = ("downcast_bf16", "enable_cpu_affinity", "rdzv_backend", "same_network")
# Keys of older versions, which it reads as others.
OLD = ("dynamo_backend", "fp16")
# Distributed types with model sharding, which train refuses.
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
# Distributed types for which it starts several processes. With NO and MULTI_CPU it starts one per
# machine.
SEVERAL = (
    "MULTI_GPU",
    "MULTI_XPU",
    "MULTI_NPU",
    "MULTI_MLU",
    "MULTI_HPU",
    "MULTI_MUSA",
    *SHARDED,
)
ALONE = ("NO", "MULTI_CPU")


@dataclass(frozen=True)
class AccelerateConfig:
    """A configuration file of Accelerate.

    Attributes:
        path: the file, or None.
        chosen: whether the path was given, rather than the default path used.
        values: the content as Accelerate reads it, by YAML 1.1.
        digest: the first 16 hexadecimal digits of its SHA-256.
        misread: values that YAML 1.1 reads differently from how they look.
    """

    path: Path | None = None
    chosen: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    misread: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The distributed type; YAML reads an unquoted NO as false."""
        found = self.values.get("distributed_type", "NO")
        return "NO" if found in (False, None) else str(found)

    @property
    def machines(self) -> int:
        """The number of machines."""
        return self._number("num_machines", 1)

    @property
    def machine_rank(self) -> int:
        """The rank of this machine."""
        return self._number("machine_rank", 0)

    @property
    def precision(self) -> str:
        """The mixed precision; `fp16: true` is the old key for one of them."""
        old = "fp16" if self.values.get("fp16") else "no"
        return str(self.values.get("mixed_precision", old) or "no")

    @property
    def compiler(self) -> str:
        """The dynamo backend that compiles every network, or ""."""
        section = self.values.get("dynamo_config")
        inner = section if isinstance(section, dict) else {}
        found = inner.get("dynamo_backend", inner.get("backend"))
        found = str(self.values.get("dynamo_backend", found) or "no")
        return "" if found.lower() == "no" else found.lower()

    @property
    def processes(self) -> int:
        """The number of processes on all machines."""
        return max(1, self._number("num_processes", 1))

    @property
    def per_machine(self) -> int:
        """The number of processes that accelerate launch starts on each machine, possibly 0."""
        several = self.kind in SEVERAL or self.by_mpi
        return self.processes // max(1, self.machines) if several else 1

    @property
    def by_mpi(self) -> bool:
        """Whether accelerate launch on the first machine starts all processes through mpirun."""
        section = self.values.get("mpirun_config")
        named = isinstance(section, dict) and section.get("mpirun_hostfile")
        return bool(named) and self.kind not in SEVERAL

    def _number(self, key: str, default: int) -> int:
        found = self.values.get(key, default)
        return found if isinstance(found, int) and not isinstance(found, bool) else default


def read_config(path: str | None) -> AccelerateConfig:
    """Read the file at `path`, or by default the one that accelerate launch would use.

    Raises:
        UsageError: the file is missing, or not a YAML mapping.
    """
    place = local_path(path) if path else default_place()
    if not place.is_file():
        require(path is None, f"'{path}' is not a file; `accelerate config` writes one")
        return AccelerateConfig()
    try:
        content = place.read_bytes()
        values = yaml.safe_load(content)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        reason = one_line(error, None)
        raise UsageError(f"'{place}' is not readable as YAML: {reason}") from error
    require(
        isinstance(values, dict),
        f"'{place}' has no keys, and accelerate launch would fail on it; write a new one with "
        "`accelerate config`",
    )
    digest = hashlib.sha256(content).hexdigest()[:16]
    misread = tuple(_find_misread(place, content, values))
    return AccelerateConfig(place, path is not None, values, digest, misread)


def _find_misread(place: Path, content: bytes, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each value that YAML 1.1 reads differently from how it looks."""
    loader = RecipeLoader(content)
    loader.name = str(place)
    try:
        looks = loader.get_single_data()
    except UsageError as error:  # a key is given twice
        yield f"{error}, and the last one counts"
        return
    shown = dict(walk(looks))
    for key, reads in walk(values):
        seen = shown.get(key, reads)
        if seen != reads:
            yield f"{key} is {seen}, and is read as {reads!r}"


def default_place() -> Path:
    """Return the path to which `accelerate config` writes and which every launch reads."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.path.expanduser(
        os.environ.get("HF_HOME", f"{caches}/huggingface")
    )  # as in accelerate
    return Path(home, "accelerate", "default_config.yaml")


@cache
def known_keys() -> frozenset[str]:
    """Return the valid keys, from the dataclasses of the installed accelerate."""
    tree = ast.parse(_source("commands/config/config_args.py"))
    return frozenset(
        line.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in ("BaseConfig", "ClusterConfig")
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    )


@cache
def known_options() -> frozenset[str]:
    """Return the names of all command line options of the installed `accelerate launch`."""
    return frozenset(re.findall(r'"--(\w+)"', _source("commands/launch.py")))


def unknown_nested(values: Mapping[str, Any]) -> list[str]:
    """Return the keys in sections for which `accelerate launch` has no option."""
    return [
        f"{section}.{key}"
        for section, content in values.items()
        if section.endswith("_config") and isinstance(content, dict)
        for key in content
        if not {key, f"{section.removesuffix('config')}{key}", f"{section}_{key}"} & known_options()
    ]


def _source(place: str) -> str:
    spec = importlib.util.find_spec("accelerate")
    if spec is None or spec.origin is None:
        raise UsageError("Accelerate is not installed; pip install accelerate")
    return (Path(spec.origin).parent / place).read_text(encoding="utf-8")
