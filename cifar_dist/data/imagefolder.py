"""A folder of class folders: found, checked, and decoded once into the cache."""

import os
from itertools import chain

from cifar_dist.config import DataConfig, cache_folder, local_path, require
from cifar_dist.data.cache import CacheWriter, is_cached, load_or_build, open_cached
from cifar_dist.data.decode import decode_files
from cifar_dist.data.images import Source
from cifar_dist.listing import find_images, labels_of


def load_imagefolder(config: DataConfig, key: str = "") -> Source:
    """Return the images below data.root, decoded into the cache on the first use.

    Args:
        key: of the folder as it is now, if it has been looked through already.

    Raises:
        UsageError: a folder is missing, a class is empty or missing in one part, or a file cannot
            be decoded and data.bad_images is stop.
    """
    root = local_path(config.root)
    require(root.is_dir(), f"data.root '{config.root}' is not a folder; name one of class folders")
    cache, size = cache_folder(config), config.side
    if key and is_cached(cache, key):
        return open_cached(cache, key)
    listing = find_images(root)

    def build(writer: CacheWriter) -> None:
        writer.classes = listing.classes
        for split, found in listing.files.items():
            labels = labels_of(found)
            target = writer.create(split, labels, size)
            paths = [os.path.join(root, path) for path in chain(*found)]
            failures = decode_files(paths, target, f"decoding {split}")
            if not failures:
                continue
            reasons = [f"{paths[row]}: {why}" for row, why in failures.items()]
            require(
                config.bad_images == "skip",
                f"{len(failures)} of the {split} images cannot be decoded, the first {reasons[0]}; "
                "mend or remove them, or leave them out with --data.bad_images skip",
            )
            left = {label for row, label in enumerate(labels) if row not in failures}
            for label, name in enumerate(listing.classes):
                require(label in left, f"no image of class '{name}' in {split} can be decoded")
            writer.drop(split, list(failures))
            writer.skipped += reasons

    return load_or_build(cache, listing.key(size, config.bad_images), build)
