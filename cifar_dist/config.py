"""The recipe: every option of a run, as frozen dataclasses read from YAML and the command line.

Nothing else in the package reads options. This file imports neither torch nor the models, so a
misspelt key is an error within a fraction of a second.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_type_hints

import yaml

from cifar_dist import user_code
from cifar_dist.errors import UsageError, one_line, require, require_known, suggest
from cifar_dist.files import local_path
from cifar_dist.values import (
    CORE,
    RecipeLoader,
    Types,
    check_value,
    describe,
    dump,
    parse_node,
    parse_text,
)

RECIPES = Path(__file__).parent / "recipes"
LARGEST_IMAGE = 2048  # pixels; limits the memory that an untrusted checkpoint can allocate


@dataclass(frozen=True)
class DataConfig:
    """The dataset.

    Attributes:
        name: the dataset. cifar10 and cifar100 are downloaded into `root` if missing. imagefolder
            reads `root`/train and `root`/test (or val, valid, validation), or class folders
            directly in `root`, split by `val_fraction`. synthetic draws ten classes of shapes,
            without files.
        root: folder of the dataset.
        image_size: height and width of the images in pixels; null means 32.
        limit_train: number of training images, a random subset; null means all.
        limit_test: number of test images, a random subset; null means all.
        val_fraction: fraction of each training class held out as validation set. The validation
            accuracy selects the best epoch.
        seed: random seed of the validation split and of the subsets. It is separate from
            train.seed, so that runs with different seeds have the same split.
        normalize: subtract the mean of each channel and divide by its standard deviation; false
            leaves pixels in [0, 1].
        bad_images: at an image that cannot be decoded, stop, or skip and report it (imagefolder).
        cache: folder of the cache of decoded images; null means ~/.cache/cifar-dist, or
            cifar-dist in XDG_CACHE_HOME.
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
        """Height and width of the images, in pixels."""
        return self.image_size or 32


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images. Random choices are functions of (seed, epoch, sample).

    Attributes:
        flip: horizontal flip. random flips with probability 0.5. alternating flips each image in
            every second epoch, a random half of them in even epochs.
        translate: random translation by up to this many pixels along each axis; 0 is off.
        padding: fills pixels that a translation uncovers, by reflection or with zeros (black).
        cutout: height and width in pixels of one square cutout mask, filled with the mean colour;
            0 is off.
        grayscale: probability of converting an image to grayscale.
    """

    flip: Literal["none", "random", "alternating"] = "none"
    translate: int = 0
    padding: Literal["reflect", "zero"] = "reflect"
    cutout: int = 0
    grayscale: float = 0.0

    def __post_init__(self) -> None:
        _at_least(self, "augment", 0, "translate", "cutout")
        require(0 <= self.grayscale <= 1, f"augment.grayscale is {self.grayscale}; give 0 to 1")


OF_ITS_OWN = "start from another recipe, such as --config tutorial, or set both to null"


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Attributes:
        name: a shipped network, torchvision/NAME, timm/NAME, or your own class or function as
            FILE.py:NAME or package.module:NAME.
        options: keyword arguments of the network, such as --model.options.width 64. num_classes is
            passed if the network accepts it.
        dropout: dropout probability; null means the network's own.
        weights: initial weights from a safetensors file (see cifar-dist convert), a run folder or a
            checkpoint. A head for another number of classes keeps its random weights. null means
            random weights.
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
        name: the optimizer. muon orthogonalises the updates of convolution filters and trains
            all other parameters with SGD.
        lr: learning rate for the global batch size; follows the schedule.
        bias_lr: learning rate for biases (Muon with speednet only); null means `lr`. Follows the
            schedule.
        head_lr: learning rate for the head (Muon with speednet only); null means `lr`. Follows the
            schedule.
        momentum: momentum; with muon, that of the convolution filters.
        nesterov: Nesterov momentum for sgd. Muon always uses it.
        weight_decay: L2 penalty with sgd and muon, decoupled weight decay with adamw. With muon,
            convolution filters have none.
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
            f"optim.bias_lr and optim.head_lr need optim.name muon, not {self.name}; {OF_ITS_OWN}",
        )
        require(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}; give 0 to 0.99")
        require(
            0 <= self.weight_decay < math.inf,
            f"optim.weight_decay is {self.weight_decay}; give 0 or more",
        )
        require(
            not self.nesterov or self.momentum > 0, "optim.nesterov needs optim.momentum above 0"
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate as a function of the step.

    Attributes:
        name: shape of the schedule after the warm-up.
        warmup_epochs: length of the linear warm-up from 0, in epochs. one_cycle warms up from
            lr/25; if this is 0, over the first 30 % of the run.
        step_epochs: epochs between two drops of the learning rate (step only).
        gamma: factor of each drop (step only).
        final: final learning rate as a fraction of optim.lr (cosine, linear and one_cycle).
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
    """The training loop. The batch size does not depend on the number of processes.

    Attributes:
        epochs: passes over the training set; 8.5 ends in the middle of the ninth epoch.
        batch_size: global batch size. Images per optimizer step, over all processes and
            micro-batches.
        accumulate: gradient accumulation. Split each batch into this many micro-batches to save
            memory; the result is the same.
        precision: mixed precision. auto means bf16 on GPUs that compute it natively, fp16 on other
            NVIDIA GPUs, else no (float32). A precision set in the launcher replaces auto.
        seed: random seed of initial weights, sample order, augmentation and dropout.
        clip_norm: maximum gradient norm for gradient clipping; 0 is off.
        label_smoothing: fraction of each target that is spread over all classes.
        loss: your own training loss as FILE.py:NAME, a function or a class without arguments. It
            maps logits [N, classes] and targets [N] to the loss per image [N]. null means
            cross-entropy. Evaluation always reports cross-entropy.
        ema: decay of an exponential moving average of the weights, used for evaluation; 0 is off.
        evaluate_every: epochs between evaluations. The last epoch is always evaluated.
        tta: test-time augmentation. Evaluation averages the logits of several views; flip adds the
            mirror image, flip_shift also shifts both by one pixel.
        channels_last: use the channels_last memory format; faster on most devices.
        compile: use torch.compile; faster steps, slower start.
        compress_gradients: all-reduce gradients in bfloat16, half the bytes, for slow networks. The
            result then depends on the number of processes.
        sync_batchnorm: SyncBatchNorm, with statistics over the batches of all processes; GPUs only.
        deterministic: use only deterministic algorithms, for bit-identical results on a GPU too;
            slower.
        timeout: seconds that processes wait for each other. The run then ends with an error that
            names the missing ranks.
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
        require(
            self.loss is None or not self.label_smoothing,
            f"train.label_smoothing is {self.label_smoothing}, but train.loss replaces the "
            "cross-entropy that it changes; set it to 0",
        )
        for name in ("label_smoothing", "ema"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name} is {value}; give 0 or more, and less than 1")
        require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size {self.batch_size} does not divide into train.accumulate "
            f"{self.accumulate} micro-batches; "
            f"{nearest_multiples(self.batch_size, self.accumulate)}",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints, and how many to keep.

    Attributes:
        every_epochs: epochs between checkpoints. One is always saved after the last epoch.
        every_steps: optimizer steps between additional checkpoints within an epoch; 0 is off.
        keep: number of newest checkpoints to keep. The checkpoint with the best validation accuracy
            is kept as well.
    """

    every_epochs: int = 1
    every_steps: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        _at_least(self, "checkpoint", 1, "every_epochs", "keep")
        _at_least(self, "checkpoint", 0, "every_steps")


@dataclass(frozen=True)
class TrackConfig:
    """Experiment tracking, besides metrics.jsonl.

    Attributes:
        log_with: trackers by Accelerate's names (tensorboard, wandb, ...); [] means none.
        every_steps: optimizer steps between records of the training loss; 0 means once per epoch,
            null every 50 steps or more often, so that a run has at least 20 records.
    """

    log_with: list[str] = field(default_factory=lambda: ["tensorboard"])
    every_steps: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, "track", 0, "every_steps")

    def interval(self, steps: int) -> int:
        """Return the steps between two records in a run of `steps`; 0 means once per epoch."""
        return max(1, min(50, steps // 20)) if self.every_steps is None else self.every_steps


@dataclass(frozen=True)
class Recipe:
    """All options of a run.

    Attributes:
        name: name of the recipe, part of the default `out`.
        out: run folder; null means runs/<name>-<time>.
        resume: auto resumes the run in `out`, or starts from scratch if `out` holds none. never
            refuses an `out` that holds a run. A path resumes from that run or checkpoint.
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
            "optim.bias_lr and optim.head_lr are for speednet, whose head divides by its width, "
            f"not for {self.model.name}; {OF_ITS_OWN}",
        )


# Keys that may differ when a run is resumed, because they do not change the weights. The dataset is
# compared by its digest instead of its path.
FREE_KEYS = (
    *("name", "out", "resume", "data.root", "data.cache"),
    *("train.accumulate", "train.timeout"),
)
FREE_SECTIONS = ("checkpoint.", "track.")
CODE_KEYS = ("model.name", "train.loss")  # may name the user's own code
OPTIONS = "model.options."  # prefix of keys that the network defines
# Keys of earlier versions, in old recipes and run folders, and their new names.
RENAMED = {f"model.{name}": f"{OPTIONS}{name}" for name in ("widths", "depth", "stride")}
# Paths, which may differ between the machines of a launch.
OWN_KEYS = ("out", "data.root", "data.cache")


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Return one message for each key that would change the result of the run.

    train.epochs may grow, but not from the middle of an epoch, because the incomplete epoch has
    been reported already.
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
        raise UsageError(f"the recipe is of another version of cifar_dist: {error}") from error


def _rename_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a recipe with keys of earlier versions renamed."""
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
    return dict(walk(to_dict(recipe)))


def comparable(recipe: Recipe) -> dict[str, Any]:
    """Return `flatten` without the folders of source files, which are compared by their hashes."""
    values = flatten(recipe)
    for key in CODE_KEYS:
        values[key] = values[key] and user_code.identity(values[key])
    return values


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; `--config PATH` reads it back."""
    return dump(to_dict(recipe))


def load_recipe(path: Path) -> Recipe:
    """Read a recipe written by `dump_recipe`.

    Raises:
        UsageError: as `read_recipe`; also if the file is truncated or a value is out of range.
    """
    values = read_recipe(path)
    sections = [name for name, value in vars(Recipe()).items() if dataclasses.is_dataclass(value)]
    whole = path.read_bytes().endswith(b"\n") and set(sections) <= set(values)
    require(whole, f"recipe '{path}' is incomplete")
    return from_dict(values)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file into plain values: {key: value} and {section: {key: value}}.

    Raises:
        UsageError: the file is not readable, a key is unknown or duplicate, or a value has the
            wrong type.
    """
    try:
        with path.open("rb") as file:
            loader = RecipeLoader(file)
            root = loader.get_single_node()
        require(
            isinstance(root, yaml.MappingNode),
            f"recipe {path} contains no keys; see the shipped recipes",
        )
        return _read_keys(loader, root, path)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        reason = one_line(error, None)
        raise UsageError(f"recipe {path} is not readable as YAML: {reason}") from error


def _read_keys(loader: RecipeLoader, root: Any, path: Path) -> dict[str, Any]:
    """Return the values of a recipe file from its root node, a mapping."""
    types = _types()
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, line, node in _leaves(root):
        place = f"{path}, line {line}"
        if any(known.startswith(f"{key}.") for known in types):  # a section
            require(
                node.tag == f"{CORE}null",
                f"{key} is a section, but has a value in {place}; write its keys below it",
            )
            continue
        key = RENAMED.get(key, key)
        if not key.startswith(OPTIONS):
            require_known(key, types, f"unknown key '{key}' in {path}")
        # `train.epochs` may also be written outside of the section `train`.
        require(
            key not in lines, f"{key} is given twice in {path}, lines {lines.get(key)} and {line}"
        )
        lines[key] = line
        if key in types:
            _set(values, key, parse_node(loader, node, types[key], key, place))
        elif node.tag != f"{CORE}null":
            _set(values, key, loader.construct_object(node, deep=True))
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set values[section][key], or values[key] for a key without section."""
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def _leaves(root: Any) -> Iterator[tuple[str, int, Any]]:
    """Yield (key, line, node) for each value in a recipe, and for each section without keys."""
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


def types_of(key: str) -> Types:
    """Return the types of a key; a value has one of them."""
    return _types()[key]


@cache
def _types() -> dict[str, Types]:
    """Return {"section.key": types}."""
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
        argv: `[RECIPE] [--section.key value ...]`, or `--config RECIPE`; RECIPE is a file or a
            shipped name.

    Returns:
        The recipe, and a description of its origin for the banner.

    Raises:
        UsageError: the recipe or a key is unknown, or a value has the wrong type.
    """
    options, path = _take_recipe(argv)
    overrides, others = parse_overrides(options)
    require(
        not others,
        f"unexpected argument '{' '.join(others[:1])}'; the recipe comes first, and options begin "
        "with --",
    )
    values = read_recipe(path)
    for key, value in overrides.items():
        _set(values, key, value)
    shown = path.stem if path.parent == RECIPES else str(path)
    count = f" with {len(overrides)} option{'s' * (len(overrides) > 1)}" if overrides else ""
    return _build(values, path.parent), f"recipe {shown}{count}"


def make_recipe(recipe: "str | Path | Recipe", options: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some keys changed.

    Args:
        recipe: a shipped name, a file or a Recipe.
        options: {"section.key": value}.

    Raises:
        UsageError: the recipe or a key is unknown, or a value has the wrong type.
    """
    if isinstance(recipe, Recipe):
        values, folder = to_dict(recipe), Path()
    else:
        path = _find_recipe(str(recipe))
        values, folder = read_recipe(path), path.parent
    types = _types()
    for key, value in options.items():
        key = RENAMED.get(key, key)
        if not key.startswith(OPTIONS):
            require_known(key, types, f"unknown option '{key}'")
            value = str(value) if isinstance(value, Path) else value
            value = check_value(value, types[key], key)
        _set(values, key, value)
    return _build(values, folder)


def parse_overrides(argv: Sequence[str], section: str = "") -> tuple[dict[str, Any], list[str]]:
    """Read `--section.key value` and `--section.key=value`.

    Args:
        section: prefix of the keys to read, such as "data."; "" means all.

    Returns:
        {"section.key": value}, in the order of the command line, and the other words.

    Raises:
        UsageError: a key is unknown, or a value is missing or has the wrong type.
    """
    types = {key: kinds for key, kinds in _types().items() if key.startswith(section)}
    found: dict[str, Any] = {}
    others: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith(f"--{section}"):
            others.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        key = RENAMED.get(name, name)
        free = key.startswith(OPTIONS)
        require(free or key in types, f"unknown option '--{name}'{_hint(name, types)}")
        if not equals:
            require(
                bool(words) and not words[0].startswith("--"),
                f"--{name} has no value" + ("" if free else f"; give {describe(types[key])}"),
            )
            text = words.pop(0)
        found[key] = parse_text(text, (Any,) if free else types[key], f"--{name}")
    return found, others


def _hint(name: str, known: Collection[str]) -> str:
    """Return the end of a message about an unknown option: the nearest known ones."""
    keys = [key for key in known if key.startswith(f"{name}.") or key.endswith(f".{name}")]
    if not keys:
        last = {key.rpartition(".")[2]: key for key in known}
        near = difflib.get_close_matches(name, [*known, *last], n=1, cutoff=0.6)
        keys = [last.get(match, match) for match in near]
    if not keys:
        return "; --help lists the options"
    return f"; did you mean {' or '.join(f'--{key}' for key in keys[:4])}?"


def _take_recipe(argv: Sequence[str]) -> tuple[list[str], Path]:
    """Return the command line without the recipe, and the path of the recipe."""
    named, rest = [], []
    words = list(argv)
    if words and not words[0].startswith("-"):
        named.append(words.pop(0))
    while words:
        word = words.pop(0)
        if word.partition("=")[0] != "--config":
            rest.append(word)
        elif "=" in word:
            named.append(word.partition("=")[2])
        else:
            require(bool(words), "--config has no value; give a file or a shipped recipe")
            named.append(words.pop(0))
    require(
        len(named) < 2,
        f"two recipes are given, {' and '.join(named[:2])}; give one, and override its keys",
    )
    return rest, _find_recipe(*named)


def _find_recipe(name: str = "cifar10") -> Path:
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        path = local_path(name)
    require(
        path.is_file(),
        f"recipe '{name}' is neither a file nor a shipped recipe{suggest(name, recipe_names())}",
    )
    return path


def _build(values: dict[str, Any], folder: Path) -> Recipe:
    """Return a recipe; source files are looked up in `folder` if the working directory has none."""
    recipe = from_dict(values)

    def find(place: str) -> str:
        file, _, name = place.rpartition(":")
        beside = file.endswith(".py") and not local_path(file).exists() and folder / file
        return f"{beside}:{name}" if beside and beside.is_file() else place

    model = dataclasses.replace(recipe.model, name=find(recipe.model.name))
    train = dataclasses.replace(recipe.train, loss=recipe.train.loss and find(recipe.train.loss))
    return dataclasses.replace(recipe, model=model, train=train)


def nearest_multiples(value: int, step: int) -> str:
    """Name the nearest positive multiples of `step`: "the nearest valid sizes: 60, 66"."""
    below, above = value // step * step, -(-value // step) * step
    near = sorted({size for size in (below, above) if size > 0})
    return f"the nearest valid sizes: {', '.join(map(str, near))}"


def _at_least(section: Any, prefix: str, least: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(
            value is None or least <= value < math.inf,
            f"{prefix}.{name} is {value}; give {least} or more",
        )


def walk(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("section.key", value) for each value of nested sections."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
