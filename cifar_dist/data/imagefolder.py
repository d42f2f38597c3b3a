"""Load a folder of class folders: list its images, check them, decode them into the cache."""

import os
from dataclasses import replace
from itertools import chain
from pathlib import Path

from cifar_dist.config import DataConfig, local_path
from cifar_dist.data.cache import CacheWriter, cache_folder, load_or_build
from cifar_dist.data.decode import decode_files
from cifar_dist.data.images import Source
from cifar_dist.data.listing import Listing, find_images, labels_of, shown
from cifar_dist.errors import RunError, require

ATTEMPTS = 3  # to decode a folder that changes in the meantime


class _Changed(Exception):
    """The folder has changed since it was listed."""


def load_imagefolder(config: DataConfig) -> Source:
    """Return the images below data.root, decoded into the cache on first use.

    Raises:
        UsageError: a folder is missing, a class is empty or missing in one split, or a file cannot
            be decoded and data.bad_images is stop.
    """
    cache = cache_folder(config)
    root = local_path(config.root)
    for _ in range(ATTEMPTS):
        try:
            return _load_as_listed(config, root, cache)
        except _Changed:
            print(f"{shown(root)} changed while it was decoded; decoding it again", flush=True)
    raise RunError(f"{shown(root)} changes while it is decoded; start again when it is complete")


def _load_as_listed(config: DataConfig, root: Path, cache: Path) -> Source:
    listing = find_images(root, config.bad_images)
    key = listing.key(config.side, config.bad_images)

    def build(writer: CacheWriter) -> None:
        _decode(writer, config, root, listing)
        if find_images(root, config.bad_images).key(config.side, config.bad_images) != key:
            raise _Changed

    return replace(load_or_build(cache, key, build), left_out=listing.left_out)


def _decode(writer: CacheWriter, config: DataConfig, root: Path, listing: Listing) -> None:
    writer.classes = listing.classes
    for split, found in listing.files.items():
        labels = labels_of(found)
        target = writer.create(split, labels, config.side)
        paths = [os.path.join(root, path) for path in chain(*found)]
        failures = decode_files(paths, target, f"decoding {split}")
        if not failures:
            continue
        reasons = [f"{shown(paths[row])}: {why}" for row, why in failures.items()]
        require(
            config.bad_images == "skip",
            f"{len(failures)} of the {split} images cannot be decoded, the first {reasons[0]}; "
            "fix or remove them, or leave them out with --data.bad_images skip",
        )
        left = {label for row, label in enumerate(labels) if row not in failures}
        for label, name in enumerate(listing.classes):
            require(label in left, f"no image of class '{shown(name)}' in {split} can be decoded")
        writer.drop(split, list(failures))
        writer.skipped += reasons
