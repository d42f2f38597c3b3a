"""The recipe: every option of a run, as frozen dataclasses read from YAML and dotted overrides.

Nothing else in the package reads options, and this file imports neither torch nor the models:
a misspelt key is refused in a fraction of a second.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from cifar_dist import user_code
from cifar_dist.errors import UsageError, require, suggest
from cifar_dist.files import local_path

RECIPES = Path(__file__).parent / "recipes"
LARGEST_IMAGE = 2048  # pixels; a checkpoint from elsewhere must not ask for all memory there is


@dataclass(frozen=True)
class DataConfig:
    """What to train and test on.

    Attributes:
        name: cifar10 and cifar100 are downloaded into `root` when absent; imagefolder reads
            `root`/train and `root`/test (or val, valid, validation), or one folder of class folders
            split by `val_fraction`; synthetic draws ten classes of shapes and needs no files.
        root: folder of the dataset.
        image_size: side in pixels of the square images the model sees; null means 32.
        limit_train: use only this many training images, chosen by `seed`.
        limit_test: use only this many test images, chosen by `seed`.
        val_fraction: share of each training class held out to choose the best epoch by.
        seed: chooses the held-out share and the limited subsets; apart from train.seed, so that
            runs with different seeds share one split.
        normalize: subtract the mean and divide by the deviation of each channel; false leaves
            pixels in [0, 1].
        bad_images: imagefolder: stop at a file that cannot be decoded, or skip and report it.
        cache: folder of decoded datasets; null means the user's cache folder.
    """

    name: Literal["cifar10", "cifar100", "imagefolder", "synthetic"] = "cifar10"
    root: str = "data"
    image_size: int | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    val_fraction: float = 0.0
    seed: int = 0
    normalize: bool = True
    bad_images: Literal["stop", "skip"] = "stop"
    cache: str | None = None

    def __post_init__(self) -> None:
        _at_least(self, "data", 1, "image_size", "limit_train", "limit_test")
        require(
            (self.image_size or 1) <= LARGEST_IMAGE,
            f"data.image_size is {self.image_size}; give {LARGEST_IMAGE} or less",
        )
        require(
            0 <= self.val_fraction < 1, f"data.val_fraction is {self.val_fraction}; give 0 to 0.99"
        )

    @property
    def side(self) -> int:
        """Side of the images, in pixels."""
        return self.image_size or 32


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images, each a function of (seed, epoch, sample).

    Attributes:
        flip: mirror left to right: at random, or at random in epoch 0 and the other way round in
            every second epoch (alternating).
        translate: shift by up to this many pixels along each axis.
        padding: what a shift uncovers: the image reflected, or black.
        cutout: side in pixels of one square replaced by the mean colour; 0 is off.
        grayscale: probability of removing the colour.
    """

    flip: Literal["none", "random", "alternating"] = "none"
    translate: int = 0
    padding: Literal["reflect", "zero"] = "reflect"
    cutout: int = 0
    grayscale: float = 0.0

    def __post_init__(self) -> None:
        _at_least(self, "augment", 0, "translate", "cutout")
        require(0 <= self.grayscale <= 1, f"augment.grayscale is {self.grayscale}; give 0 to 1")


OF_ITS_OWN = "begin with another recipe, such as --config tutorial, or set them to null"


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Attributes:
        name: a shipped network, torchvision/NAME, timm/NAME, or a class or function of your own as
            FILE.py:NAME or package.module:NAME.
        options: passed to the network by keyword, such as --model.options.width 64; num_classes is
            passed if the network takes it.
        dropout: probability of dropout; null keeps the network's own.
        weights: safetensors file (see cifar-dist convert), run folder or checkpoint to start from;
            a head for another number of classes keeps its random weights. null starts from random
            weights.
    """

    name: str = "resnet18"
    options: dict[str, Any] = field(default_factory=dict)
    dropout: float | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        require(
            self.dropout is None or 0 <= self.dropout < 1,
            f"model.dropout is {self.dropout}; give 0 to 0.99, or null for the network's own",
        )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer.

    Attributes:
        name: sgd, adamw, or muon, which trains convolution filters by orthogonal updates and all
            else by sgd.
        lr: learning rate for the global batch; the schedule scales it.
        bias_lr: of muon and speednet: for biases; null means lr. The schedule scales it too.
        head_lr: of muon and speednet: for the head; null means lr. The schedule scales it too.
        momentum: of sgd, and of muon for the filters.
        nesterov: look-ahead momentum, of sgd; muon always has it.
        weight_decay: as the optimizer defines it, on every parameter; with muon on all but filters.
    """

    name: Literal["sgd", "adamw", "muon"] = "sgd"
    lr: float = 0.1
    bias_lr: float | None = None
    head_lr: float | None = None
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "bias_lr", "head_lr"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < math.inf,
                f"optim.{name} is {value}; give a number above 0",
            )
        require(
            self.name == "muon" or (self.bias_lr is None and self.head_lr is None),
            f"optim.bias_lr and optim.head_lr are of muon; optim.name is {self.name}: {OF_ITS_OWN}",
        )
        require(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}; give 0 to 0.99")
        require(
            0 <= self.weight_decay < math.inf,
            f"optim.weight_decay is {self.weight_decay}; give >= 0",
        )
        require(
            not self.nesterov or self.momentum > 0, "optim.nesterov needs optim.momentum above 0"
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate as a function of the step.

    Attributes:
        name: shape after the warm-up.
        warmup_epochs: linear rise from 0 over this many epochs; one_cycle rises from lr/25 over
            30 % of the run when it is 0.
        step_epochs: of step: epochs between two drops.
        gamma: of step: factor of each drop.
        final: of cosine, linear and one_cycle: learning rate at the end, as a share of optim.lr.
    """

    name: Literal["constant", "step", "cosine", "linear", "one_cycle"] = "constant"
    warmup_epochs: float = 0.0
    step_epochs: int = 5
    gamma: float = 0.4
    final: float = 0.0

    def __post_init__(self) -> None:
        _at_least(self, "schedule", 0, "warmup_epochs", "gamma", "final")
        _at_least(self, "schedule", 1, "step_epochs")


@dataclass(frozen=True)
class TrainConfig:
    """The loop. Sizes are global: they mean the same on any number of processes.

    Attributes:
        epochs: passes over the training images; 8.5 ends in the middle of the ninth.
        batch_size: images per optimizer step, over all processes and accumulation.
        accumulate: split each batch into this many parts, to save memory; the result is the same.
        precision: auto is bf16 where the GPU has it natively, fp16 on other NVIDIA GPUs, else no;
            a precision chosen with the launcher stands in for auto.
        seed: of initial weights, order, augmentation and dropout.
        clip_norm: largest gradient norm; 0 is off.
        label_smoothing: share of each target spread over all classes.
        loss: training loss of your own as FILE.py:NAME: a function, or a class without arguments,
            that maps logits [N, classes] and targets [N] to the loss per image [N]; null is
            cross-entropy. Evaluation reports cross-entropy.
        ema: decay of a moving average of the weights, used for evaluation; 0 is off.
        evaluate_every: measure the network after every so many epochs, and after the last.
        tta: test-time augmentation: views of an image that are averaged when the network is
            measured: itself alone, its mirror image too, or both also shifted by a pixel.
        channels_last: memory layout of images and filters; faster on most devices.
        compile: have torch.compile fuse operations: faster steps for a slower start.
        compress_gradients: send gradients between processes in bfloat16, half the bytes, where the
            network is slow; with it the number of processes does change the result.
        sync_batchnorm: BatchNorm over the batches of all processes; GPUs only.
        deterministic: only algorithms that give the same bits each time, on a GPU too; slower.
        timeout: seconds that processes wait for each other before the run ends, naming those that
            did not arrive.
    """

    epochs: int | float = 10
    batch_size: int = 64
    accumulate: int = 1
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    seed: int = 0
    clip_norm: float = 0.0
    label_smoothing: float = 0.0
    loss: str | None = None
    ema: float = 0.0
    evaluate_every: int = 1
    tta: Literal["none", "flip", "flip_shift"] = "none"
    channels_last: bool = True
    compile: bool = False
    compress_gradients: bool = False
    sync_batchnorm: bool = False
    deterministic: bool = False
    timeout: int = 120

    def __post_init__(self) -> None:
        _at_least(self, "train", 1, "epochs", "batch_size", "accumulate", "timeout")
        _at_least(self, "train", 1, "evaluate_every")
        _at_least(self, "train", 0, "seed", "clip_norm")
        for name in ("label_smoothing", "ema"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name} is {value}; give 0 up to, not including, 1")
        require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size {self.batch_size} does not divide into train.accumulate "
            f"{self.accumulate} equal parts; {nearest_multiples(self.batch_size, self.accumulate)}",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
        every_epochs: save after every so many epochs, and after the last.
        every_steps: save after every so many steps too, also within an epoch; 0 is off.
        keep: how many of the newest to keep; the best by validation accuracy stays in any case.
    """

    every_epochs: int = 1
    every_steps: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        _at_least(self, "checkpoint", 1, "every_epochs", "keep")
        _at_least(self, "checkpoint", 0, "every_steps")


@dataclass(frozen=True)
class TrackConfig:
    """What is recorded besides metrics.jsonl.

    Attributes:
        log_with: trackers by Accelerate's names (tensorboard, wandb, ...); [] for none.
        every_steps: record the training loss after every so many steps; 0 is per epoch only.
    """

    log_with: list[str] = field(default_factory=lambda: ["tensorboard"])
    every_steps: int = 50

    def __post_init__(self) -> None:
        _at_least(self, "track", 0, "every_steps")


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a run.

    Attributes:
        name: used for the run folder.
        out: run folder; null means runs/<name>-<time>.
        resume: auto continues the run of the same recipe that `out` holds and otherwise starts
            anew; never refuses a folder that holds a run; a path continues from that checkpoint.
    """

    name: str = "custom"
    out: str | None = None
    resume: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        own_rates = self.optim.bias_lr or self.optim.head_lr
        require(
            self.model.name == "speednet" or not own_rates,
            "optim.bias_lr and optim.head_lr are of speednet, whose head divides by its width; "
            f"model.name is {self.model.name}: {OF_ITS_OWN}",
        )


# Keys that may differ between a run and its continuation: they say where files are and what is
# recorded, not what is computed. The dataset's digest is compared instead of its place.
FREE_KEYS = (
    *("name", "out", "resume", "data.root", "data.cache"),
    *("train.accumulate", "train.timeout"),
)
FREE_SECTIONS = ("checkpoint.", "track.")
CODE_KEYS = ("model.name", "train.loss")  # may name the user's own code
OPTIONS = "model.options."  # of keys that the network chooses
# Keys of earlier versions, which recipes and run folders may hold, and what they are now.
RENAMED = {f"model.{name}": f"{OPTIONS}{name}" for name in ("widths", "depth", "stride")}
# Keys that may differ between the machines of a launch: they say where files are.
OWN_KEYS = ("out", "data.root", "data.cache")


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Say what `new` would compute otherwise than `old`, a line a key.

    train.epochs may grow, but not from the middle of an epoch, which has been reported as it was.
    """
    before, after = comparable(old), comparable(new)
    if after["train.epochs"] >= before["train.epochs"] and before["train.epochs"] % 1 == 0:
        before["train.epochs"] = after["train.epochs"]
    return [
        f"{key} is {before.get(key)} there and {after.get(key)} here"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
        and key not in FREE_KEYS
        and not key.startswith(FREE_SECTIONS)
    ]


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as nested plain values, ready for YAML or JSON."""
    return dataclasses.asdict(recipe)


def from_dict(values: dict[str, Any]) -> Recipe:
    """Rebuild a recipe from `to_dict`.

    Raises:
        UsageError: a key is unknown or a value out of range.
    """
    sections = {name: type(value) for name, value in vars(Recipe()).items()}
    values = _rename_keys(values)
    try:
        return Recipe(
            **{
                name: sections[name](**value) if isinstance(value, dict) else value
                for name, value in values.items()
            }
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"a recipe of another version of cifar_dist: {error}") from error


def _rename_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a recipe with the keys of earlier versions under their new names."""
    for old, new in RENAMED.items():
        section, name = old.split(".")
        held = dict(values.get(section) or {})
        if name in held:
            value = held.pop(name)
            if value is not None:
                held["options"] = {**held.get("options", {}), new.rpartition(".")[2]: value}
            values = {**values, section: held}
    return values


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as {"section.key": value}."""
    return dict(_walk(to_dict(recipe)))


def comparable(recipe: Recipe) -> dict[str, Any]:
    """Return `flatten` without the folders of source files, whose hashes are compared instead."""
    values = flatten(recipe)
    for key in CODE_KEYS:
        values[key] = values[key] and user_code.identity(values[key])
    return values


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; `--config PATH` reads it back."""
    return _dump(to_dict(recipe))


def load_recipe(path: Path) -> Recipe:
    """Read a recipe written by `dump_recipe`.

    Raises:
        UsageError: as of `read_recipe`, it is cut short, or a value is out of range.
    """
    values = read_recipe(path)
    sections = [name for name, value in vars(Recipe()).items() if dataclasses.is_dataclass(value)]
    whole = path.read_bytes().endswith(b"\n") and set(sections) <= set(values)
    require(whole, f"'{path}' is not a whole recipe")
    return from_dict(values)


class RecipeLoader(yaml.SafeLoader):
    """Reads YAML in which each key stands once and a number is what it looks like.

    PyYAML's own loader keeps the last of several equal keys, and reads numbers as YAML 1.1 does:
    010 as 8, 1:30 as 90, and 1e-3 as text.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # as PyYAML declares it

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping, and refuse one with a key that is given twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key.value, str):
                require(
                    key.value not in lines,
                    f"{key.value} is given twice in {self.name}, "
                    f"lines {lines.get(key.value)} and {line}",
                )
                lines[key.value] = line
        return node


class RecipeDumper(yaml.SafeDumper):
    """Quotes every text that RecipeLoader would read as something else."""


CORE = "tag:yaml.org,2002:"
FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
WORDS = "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
SCALARS = {  # in the order in which they are tried, with the first letters they may have
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(f"(?:{WORDS})$"), list("yYnNtTfFoO")),
    "int": (re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")),
    "float": (FLOAT, list("-+.0123456789")),
}
for _name, _scalar in SCALARS.items():
    RecipeLoader.add_implicit_resolver(f"{CORE}{_name}", *_scalar)
RecipeDumper.add_implicit_resolver(f"{CORE}float", *SCALARS["float"])


def _load(text: str) -> Any:
    return yaml.load(text, Loader=RecipeLoader)


def _dump(values: Any) -> str:
    return yaml.dump(values, Dumper=RecipeDumper, sort_keys=False)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file into plain values: {key: value} and {section: {key: value}}.

    Raises:
        UsageError: it is not readable, a key is unknown or given twice, or a value is not of the
            kind that its key takes.
    """
    try:
        with path.open("rb") as file:
            loader = RecipeLoader(file)
            root = loader.get_single_node()
        require(
            isinstance(root, yaml.MappingNode),
            f"recipe {path} holds no keys; see the shipped recipes",
        )
        return _read_keys(loader, root, path)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"recipe {path} is not readable as YAML: {reason}") from error


def _read_keys(loader: RecipeLoader, root: Any, path: Path) -> dict[str, Any]:
    """Return what a recipe file holds, from the node of its mapping."""
    types = _types()
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, line, node in _leaves(root):
        place = f"{path}, line {line}"
        if any(known.startswith(f"{key}.") for known in types):  # a section
            require(
                node.tag == f"{CORE}null",
                f"{key} is a section with no keys of its own in {place}; write them below it",
            )
            continue
        key = RENAMED.get(key, key)
        require(
            key in types or key.startswith(OPTIONS),
            f"unknown key '{key}' in {path}{suggest(key, sorted(types))}",
        )
        # One of the two may be the key `train.epochs` outside of the section `train`.
        require(
            key not in lines, f"{key} is given twice in {path}, lines {lines.get(key)} and {line}"
        )
        lines[key] = line
        holder, (*sections, name) = values, key.split(".")
        for section in sections:
            holder = holder.setdefault(section, {})
        if key in types:
            holder[name] = _read_value(loader, node, types[key], key, place)
        elif node.tag != f"{CORE}null":
            holder[name] = loader.construct_object(node, deep=True)
    return values


def _leaves(root: Any) -> Iterator[tuple[str, int, Any]]:
    """Yield key, line and node of everything in a recipe but sections that hold something."""
    for name, node in root.value:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                place = f"{name.value}.{key.value}"
                if f"{place}." == OPTIONS and isinstance(value, yaml.MappingNode):
                    for option, held in value.value:
                        yield f"{OPTIONS}{option.value}", option.start_mark.line + 1, held
                else:
                    yield place, key.start_mark.line + 1, value
        else:
            yield str(name.value), name.start_mark.line + 1, node


def _read_value(loader: RecipeLoader, node: Any, types: Sequence[Any], key: str, place: str) -> Any:
    """Return the value of a key, which takes any of `types`, from its node."""
    items = next((get_args(kind) for kind in types if get_origin(kind) is list), None)
    if items and isinstance(node, yaml.SequenceNode):
        return [_read_value(loader, item, items, key, place) for item in node.value]
    require(isinstance(node, yaml.ScalarNode), f"{key} is not a single value in {place}")
    text, plain = node.value, node.style is None
    require(
        node.tag in (f"{CORE}str", loader.resolve(yaml.ScalarNode, text, (plain, not plain))),
        f"{key} has the tag {node.tag} in {place}; leave the tag out",
    )
    value = loader.construct_object(node)
    if value is None:
        require(NoneType in types, f"{key} has no value in {place}; give one, or remove the key")
    elif plain:
        words = [word for kind in types if get_origin(kind) is Literal for word in get_args(kind)]
        if words or str in types:
            require(
                not words or text in words,
                f"{key} is {text} in {place}; give one of {', '.join(words)}",
            )
            require(
                isinstance(value, str),
                f'{key}: write "{text}" in quotes in {place}; without them YAML reads {value}',
            )
        elif dict in [get_origin(kind) for kind in types]:
            require(
                False, f"{key} is {text} in {place}; give options by name, such as {{width: 64}}"
            )
        elif items:
            require(False, f"{key} is {text} in {place}; give a list, such as [] or [{text}]")
    if value is not None:
        _require_number(text, types, f"{key} in {place}")
    return value


def _require_number(text: str, types: Sequence[Any], name: str) -> None:
    """Refuse a value that is not a decimal number; jsonargparse would read it by YAML 1.1."""
    if {int, float} & set(types):
        tag = RecipeLoader("").resolve(yaml.ScalarNode, text.strip(), (True, False))
        allowed = ("int", "float", *["null"] * (NoneType in types))
        require(
            tag in [f"{CORE}{kind}" for kind in allowed],
            f"{name}: '{text}' is not a decimal number; give one such as 10 or 0.5",
        )


def _require_numbers(argv: Sequence[str]) -> None:
    """Do the same for the numbers on a command line."""
    types = _types()
    for arg, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = arg.partition("=")
        kinds = types.get(name.removeprefix("--").rstrip("+"), ())
        text = value if equals else following
        _require_number(text, kinds, name)
        for kind in kinds:
            if get_origin(kind) is list:
                for item in re.findall(r"[^][, ]+", text):
                    _require_number(item.strip("'\""), get_args(kind), name)


@cache
def _types() -> dict[str, tuple[Any, ...]]:
    """Return {"section.key": types}, of which a value has any one."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(Recipe).items():
        if dataclasses.is_dataclass(kind):
            inner = get_type_hints(kind)
            found |= {f"{name}.{key}": inner[key] for key in inner}
        else:
            found[name] = kind
    return {key: get_args(k) if isinstance(k, UnionType) else (k,) for key, k in found.items()}


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse_recipe(argv: Sequence[str]) -> tuple[Recipe, str]:
    """Read the command line of `train`.

    Args:
        argv: `[--config RECIPE] [--section.key value ...]`; RECIPE is a file or a shipped name.

    Returns:
        The recipe, and where it came from, for the banner.

    Raises:
        UsageError: an unknown recipe or key, or a value of the wrong type.
    """
    argv, path = _resolve_config([_rename_option(arg) for arg in argv])
    content = read_recipe(path)
    parser = new_parser("cifar_dist.train")
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file or shipped recipe ({', '.join(recipe_names())}); default: cifar10",
    )
    parser.add_class_arguments(Recipe)
    refuse_unknown_options(parser, argv)
    values = parse_strictly(parser, argv, content)
    recipe = Recipe(**{f.name: getattr(values, f.name) for f in dataclasses.fields(Recipe)})
    recipe = _find_code(recipe, path.parent)
    overrides = sum(arg.startswith("--") for arg in argv)
    shown = path.stem if path.parent == RECIPES else str(path)
    return recipe, f"recipe {shown}" + (f" with {overrides} overrides" if overrides else "")


def _find_code(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with source files that lie beside the recipe file instead of here."""

    def find(place: str) -> str:
        file, _, name = place.rpartition(":")
        beside = file.endswith(".py") and not local_path(file).exists() and folder / file
        return f"{beside}:{name}" if beside and beside.is_file() else place

    model = dataclasses.replace(recipe.model, name=find(recipe.model.name))
    train = dataclasses.replace(recipe.train, loss=recipe.train.loss and find(recipe.train.loss))
    return dataclasses.replace(recipe, model=model, train=train)


def _rename_option(arg: str) -> str:
    key, equals, value = arg.partition("=")
    new = RENAMED.get(key.removeprefix("--"))
    return f"--{new}{equals}{value}" if new and key.startswith("--") else arg


def make_recipe(recipe: "str | Path | Recipe", options: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some keys changed.

    Args:
        recipe: a shipped name, a file or a recipe.
        options: {"section.key": value}.

    Raises:
        UsageError: an unknown recipe or key, or a value of the wrong type.
    """
    if isinstance(recipe, Recipe):
        content = to_dict(recipe)
    else:
        content = read_recipe(_resolve_config(["--config", str(recipe)])[1])
    types = _types()
    for key, value in options.items():
        key = RENAMED.get(key, key)
        known = key in types or key.startswith(OPTIONS)
        require(known, f"unknown option '{key}'{suggest(key, sorted(types))}")
        holder, (*sections, name) = content, key.split(".")
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[name] = str(value) if isinstance(value, Path) else value
    parser = new_parser("cifar_dist.train")
    parser.add_class_arguments(Recipe)
    values = parse_strictly(parser, [], content)
    return Recipe(**{f.name: getattr(values, f.name) for f in dataclasses.fields(Recipe)})


def new_parser(prog: str) -> Any:
    """Return a jsonargparse parser that reads values as RecipeLoader does."""
    import jsonargparse

    jsonargparse.set_loader("recipe", _load, exceptions=(yaml.YAMLError,))
    jsonargparse.set_dumper("recipe", _dump)
    return jsonargparse.ArgumentParser(
        prog=prog, exit_on_error=False, allow_abbrev=False, parser_mode="recipe"
    )


def parse_strictly(parser: Any, argv: Sequence[str], content: dict[str, Any] | None = None) -> Any:
    """Parse with a jsonargparse parser and return its instantiated values.

    Args:
        parser: as of `new_parser`.
        argv: the command line.
        content: what a file holds, which the command line overrides.

    Raises:
        UsageError: with jsonargparse's several lines folded into one.
    """
    import argparse

    _require_numbers(argv)
    try:
        namespace = parser.parse_object(content) if content else None
        return parser.instantiate(parser.parse_args(list(argv), namespace=namespace))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UsageError("; ".join(line for line in lines if line)) from error


def refuse_unknown_options(parser: Any, argv: Sequence[str]) -> None:
    """Refuse the first option that a jsonargparse parser does not have, naming the nearest.

    Raises:
        UsageError: there is one.
    """
    known = {
        option[2:].rstrip("+")
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    # A section, such as --train, would read another file, past the checks of `read_recipe`.
    known -= {key.partition(".")[0] for key in known if "." in key}
    for arg in argv:
        key = arg[2:].partition("=")[0].rstrip("+")
        if arg.startswith("--") and not (f"{OPTIONS[:-1]}" in known and key.startswith(OPTIONS)):
            require(key in known, f"unknown option '--{key}'{suggest(key, sorted(known))}")


def nearest_multiples(value: int, step: int) -> str:
    """Name the positive multiples of `step` around `value`: "the nearest that work: 60, 66"."""
    below, above = value // step * step, -(-value // step) * step
    near = sorted({size for size in (below, above) if size > 0})
    return f"the nearest that work: {', '.join(map(str, near))}"


def _at_least(section: Any, prefix: str, least: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(
            value is None or least <= value < math.inf,
            f"{prefix}.{name} is {value}; give {least} or more",
        )


def _resolve_config(argv: list[str]) -> tuple[list[str], Path]:
    """Return the command line without `--config RECIPE`, and the path of the recipe."""
    asked, own = "cifar10", list(argv)
    places = [n for n, arg in enumerate(argv) if arg.partition("=")[0] == "--config"]
    require(len(places) < 2, "--config is given twice; give one recipe, and override single keys")
    for place in places:
        end = place + 1 if "=" in argv[place] else place + 2
        require(end <= len(argv), "--config names no recipe; give a file or a shipped name")
        asked = argv[end - 1].removeprefix("--config=")
        del own[place:end]
    path = RECIPES / f"{asked}.yaml"
    if not path.is_file():
        path = local_path(asked)
    require(
        path.is_file(),
        f"recipe '{asked}' is neither a file nor a shipped recipe{suggest(asked, recipe_names())}",
    )
    return own, path


def _walk(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
