"""Datasets by name: `load_dataset` returns the splits to train and to evaluate on."""

from dataclasses import dataclass

from cifar_dist.config import DataConfig, OptimConfig, local_path
from cifar_dist.data.cifar import load_cifar
from cifar_dist.data.imagefolder import load_imagefolder
from cifar_dist.data.images import Images, Source
from cifar_dist.data.listing import SPLITS, LeftOut, find_splits
from cifar_dist.data.synthetic import load_synthetic
from cifar_dist.errors import UsageError, require

DATASETS = {
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "imagefolder": load_imagefolder,
    "synthetic": load_synthetic,
}


@dataclass(frozen=True)
class Dataset:
    """A dataset ready for use.

    Attributes:
        train: the training images.
        evaluation: the images to evaluate on: "val" if there is a validation split, "test" if
            there is a test split; at least one of them.
        mean, std: per channel, for normalization; 0 and 1 if data.normalize is off.
        digest: SHA-256 of the whole dataset, before it is split and limited.
        skipped: files left out because they could not be decoded, each with the reason.
        left_out: number of files that do not count as images, by reason and suffix.
    """

    train: Images
    evaluation: dict[str, Images]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    skipped: tuple[str, ...]
    left_out: LeftOut

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""
        return self.train.classes

    def require_batch(self, size: int, optim: OptimConfig) -> None:
        """Raise UsageError unless the training images fill a batch of `size` images.

        The message proposes a smaller batch with its learning rates: proportional to the batch with
        SGD (Goyal et al., 2017), to its square root with optimizers that normalise the update.
        """
        images, smaller = len(self.train), size
        while smaller > max(images, 1):
            smaller //= 2
        factor = smaller / size if optim.name == "sgd" else (smaller / size) ** 0.5
        rates = {name: getattr(optim, name) for name in ("lr", "bias_lr", "head_lr")}
        options = "".join(
            f" --optim.{name} {rate * factor:.2g}" for name, rate in rates.items() if rate
        )
        require(
            size <= images,
            f"train.batch_size {size} exceeds the {images} training images; try "
            f"--train.batch_size {smaller}{options}",
        )


def load_dataset(config: DataConfig) -> Dataset:
    """Load, split and limit a dataset as the options data.* require.

    Raises:
        UsageError: the dataset is missing or damaged, or has no split to train or to evaluate on.
    """
    return arrange(DATASETS[config.name](config), config)


def arrange(source: Source, config: DataConfig) -> Dataset:
    """Split and limit a source as the options data.* require.

    Raises:
        UsageError: it has no split to train or to evaluate on.
    """
    if "train" not in source.splits:
        others = [path.name for path in find_splits(local_path(config.root)).values()]
        raise UsageError(
            f"'{config.root}' has no train folder beside its {' and '.join(others)} folder; name "
            "the folder of training images train or training"
        )
    train = source.splits["train"]
    named = _named_splits(source, config)
    evaluation = {name: named[name] for name in ("val", "test") if name in named}
    if config.val_fraction:
        if "val" in evaluation:
            raise UsageError(
                f"'{config.root}' has a validation folder; leave out data.val_fraction"
            )
        train, held_out = train.split(config.val_fraction, config.seed)
        require(
            len(held_out) > 0,
            f"data.val_fraction {config.val_fraction} cannot hold out any image: no class of "
            f"'{config.root}' has more than one",
        )
        evaluation = {"val": held_out, **evaluation}
    if not evaluation:
        raise UsageError(
            f"'{config.root}' has no test, val, valid or validation folder to evaluate on; add "
            "one, or hold out part of the training images with --data.val_fraction 0.1"
        )
    return Dataset(
        train=train.limited(config.limit_train, config.seed),
        evaluation={
            name: images.limited(config.limit_test, config.seed)
            for name, images in evaluation.items()
        },
        mean=source.mean if config.normalize else (0.0, 0.0, 0.0),
        std=source.std if config.normalize else (1.0, 1.0, 1.0),
        digest=source.digest,
        skipped=source.skipped,
        left_out=source.left_out,
    )


def _named_splits(source: Source, config: DataConfig) -> dict[str, Images]:
    """Return the splits by name; a validation folder without a test folder is "val".

    It is listed, cached and hashed as "test", as in earlier versions.
    """
    splits = dict(source.splits)
    if config.name == "imagefolder" and "test" in splits and "val" not in splits:
        folder = find_splits(local_path(config.root)).get("test")
        if folder is not None and SPLITS[folder.name.lower()] == "val":
            splits["val"] = splits.pop("test")
    return splits


def load_evaluation(config: DataConfig, split: str | None) -> tuple[str, Images]:
    """Return the name and the images of `split`, or by default of test, val or train.

    Raises:
        UsageError: the dataset has no such split.
    """
    if config.val_fraction:
        dataset = load_dataset(config)
        parts = {**dataset.evaluation, "train": dataset.train}
    else:
        limits = {"train": config.limit_train}
        parts = {
            name: images.limited(limits.get(name, config.limit_test), config.seed)
            for name, images in _named_splits(DATASETS[config.name](config), config).items()
        }
    names = [split] if split else ["test", "val", "train"]
    found = next((name for name in names if name in parts), None)
    if found is None:
        held = "" if config.val_fraction else ", and data.val_fraction is 0"
        raise UsageError(f"there is no split '{split}': the dataset has {', '.join(parts)}{held}")
    return found, parts[found]
