"""Decode image files to arrays: one here, many in processes of their own, one a core.

Every image ends as RGB of size x size pixels, in this order: turned as its EXIF tag says;
transparent parts laid on white; grey, palette, CMYK and 16-bit pixels converted to 8-bit RGB; the
largest centred square cut out and scaled (bicubic). Of an animation the first frame is used.

Threads would not do: for small images Pillow spends more time in Python than in its decoders.
"""

import json
import selectors
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cifar_dist.preemption import ignore_signals, uninterrupted
from cifar_dist.runtime import usable_cores

CHUNK = 128  # images between two looks at signals
LEAST = 2000  # images for which a process is worth its start
ORIENTATION = 0x0112  # EXIF

# Pillow only warns between its limit and twice that; an image that large is refused outright.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def decode_image(path: str | Path, size: int) -> np.ndarray:
    """Return one image file as uint8 [size, size, 3], converted as this module's docstring says.

    Raises:
        ValueError: the file is no image that can be decoded; the message says why.
    """
    try:
        with Image.open(path) as file:
            file.draft(None, (2 * size, 2 * size))  # JPEG: decode a large one at reduced scale
            file.load()
            turned = file.getexif().get(ORIENTATION, 1) != 1
            image = _to_rgb(ImageOps.exif_transpose(file) if turned else file)
            fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Warning, Image.DecompressionBombError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return np.asarray(fitted)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would clip, not scale
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(levels.astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("pixels are floating-point numbers without a known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_files(paths: Sequence[str], target: Path, title: str) -> dict[int, str]:
    """Fill the array file `target`, uint8 [N, size, size, 3], from as many image files.

    Returns:
        The rows that failed, each with the reason.
    """
    from tqdm import tqdm

    bar = tqdm(desc=title, total=len(paths), unit=" images", disable=not sys.stderr.isatty())
    chunks = [range(at, min(at + CHUNK, len(paths))) for at in range(0, len(paths), CHUNK)]
    processes = min(usable_cores(), len(paths) // LEAST)
    with bar:
        if processes < 2:
            array = np.load(target, mmap_mode="r+")
            failed: dict[int, str] = {}
            for rows in chunks:
                failed |= _decode_chunk(array, rows[0], paths[rows[0] : rows[-1] + 1])
                bar.update(len(rows))
            return failed
        return _decode_in_processes(processes, chunks, paths, target, bar)


def _decode_in_processes(
    processes: int, chunks: list[range], paths: Sequence[str], target: Path, bar: Any
) -> dict[int, str]:
    failed: dict[int, str] = {}
    code = "import sys; from cifar_dist.data.decode import main; main(sys.argv[1])"
    command = [sys.executable, "-c", code, str(target)]
    with uninterrupted():
        workers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
    try:
        waiting = iter(chunks)
        selector = selectors.DefaultSelector()

        def hand_out(worker: "subprocess.Popen[str]") -> bool:
            rows = next(waiting, None)
            if rows is not None:
                job = [rows[0], paths[rows[0] : rows[-1] + 1]]
                print(json.dumps(job), file=worker.stdin, flush=True)
            return rows is not None

        for worker in workers:
            hand_out(worker)
            selector.register(worker.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        while selector.get_map():
            for key, _ in selector.select():
                answer = key.data.stdout.readline()
                if not answer:
                    raise RuntimeError(f"decoding ended with code {key.data.wait()}, see above")
                count, reasons = json.loads(answer)
                bar.update(count)
                failed |= {int(row): reason for row, reason in reasons.items()}
                if not hand_out(key.data):
                    selector.unregister(key.fileobj)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return dict(sorted(failed.items()))


def _decode_chunk(array: np.ndarray, first: int, paths: Sequence[str]) -> dict[int, str]:
    failed = {}
    for row, path in enumerate(paths, first):
        try:
            array[row] = decode_image(path, array.shape[1])
        except ValueError as error:
            failed[row] = str(error)
    return failed


def main(target: str) -> None:
    """Decode what comes on standard input, a chunk a line, until who asked closes it, or ends."""
    ignore_signals()
    array = np.load(target, mmap_mode="r+")
    for line in sys.stdin:
        first, paths = json.loads(line)
        print(json.dumps([len(paths), _decode_chunk(array, first, paths)]), flush=True)
