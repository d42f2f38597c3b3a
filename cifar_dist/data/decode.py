"""Decode image files to arrays: a few in this process, many in one process per core.

Every image becomes RGB of size x size pixels in these steps: rotate as the EXIF orientation
requires; composite transparent pixels on white; convert grey, palette, CMYK and 16-bit pixels to
8-bit RGB; crop the largest centred square; resize (bicubic). Of an animation the first frame is
used.

The content of a file selects the decoder, never its suffix.

Processes, not threads: for small images Pillow spends more time in Python than in its decoders.
"""

import functools
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from cifar_dist.errors import UsageError, one_line
from cifar_dist.processes.environment import usable_cores
from cifar_dist.processes.preemption import ignore_signals, uninterrupted
from cifar_dist.processes.streams import progress_bar

LEAST = 2000  # images per process that justify starting it

# The raster formats that Pillow decodes itself. Excluded are those for which it starts a program
# (EPS: Ghostscript), draws with the operating system (WMF), opens any embedded file (IPTC), needs
# another package (FPX, MIC), or has no decoder (BUFR, GRIB, HDF5, MPEG).
# fmt: off
FORMATS = {
    "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF", "ICNS",
    "ICO", "IM", "IMT", "JPEG", "JPEG2000", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM",
    "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB",
}
# fmt: on
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
EPS_BINARY = b"\xc5\xd0\xd3\xc6"  # the header of an EPS file with a preview

ORIENTATION = 0x0112  # EXIF
TURNS = {  # the transposition that undoes each EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INTEGER_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # TIFF's number, struct's letter

CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


def decode_image(path: str | Path, size: int) -> np.ndarray:
    """Return one image file as uint8 [size, size, 3]; see the module's docstring for the steps.

    Raises:
        ValueError: the file cannot be decoded; the message gives the reason in one line.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; they do not name the file
            # Between its pixel limit and twice that Pillow only warns; refuse these images too.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ValueError("not a regular file")
            try:
                file = Image.open(stream, formats=_formats())
            except UnidentifiedImageError:
                stream.seek(0)
                raise ValueError(_name_format(stream.read(16))) from None
            return _decode(file, size)
    except Exception as error:  # a damaged file may make a decoder raise anything
        reason = one_line(error, None)
        if not isinstance(error, (OSError, SyntaxError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(reason or type(error).__name__) from error


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file without blocking, even a FIFO that nobody writes to."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # absent on Windows


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow supports, in its own order."""
    Image.init()
    return tuple(name for name in Image.ID if name in FORMATS)


def _name_format(head: bytes) -> str:
    """Return why no decoder accepted a file, from its first 16 bytes."""
    if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS:
        return "HEIC images are not decoded; convert them to JPEG or PNG"
    if head.startswith((b"%!PS", EPS_BINARY)):
        return "PostScript is not decoded; convert it to JPEG or PNG"
    return "cannot identify image file"


def fit_image(image: Image.Image, size: int) -> np.ndarray:
    """Return an open image as `decode_image` returns a file; the image is left as it is.

    Raises:
        ValueError: its pixels have no known range.
    """
    return _decode(image.copy(), size)


def _decode(file: Image.Image, size: int) -> np.ndarray:
    if min(file.size) >= 4 * size:  # JPEG is then decoded at a reduced scale
        file.draft(None, (2 * size, 2 * size))
    bits = 32 if file.mode == "I" and file.format not in ("PNG", "PPM") else 16  # if more than 8
    signed = False
    if isinstance(file, TiffImagePlugin.TiffImageFile):
        bits = file.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0]
        signed = file.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2
        # Pillow would then rotate the image and read all metadata, any of which may be damaged.
        file.load_end = lambda: None  # type: ignore[method-assign]
        with suppress(Exception):
            file.getexif()  # cached by Pillow, which cannot read it after the pixels
    file.load()
    turn = _find_turn(file)
    image: Image.Image = file if turn is None else file.transpose(turn)
    if image.mode == "I" or image.mode.startswith("I;16"):
        if bits > 16 or file.format == "FITS":  # FITS stores its scale in the header
            raise ValueError(f"pixels are {bits}-bit integers without a known range")
        image = Image.fromarray(_scale(np.asarray(image), bits, signed))
    image = _to_rgb(image)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _scale(levels: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Return the 8 most significant bits of each pixel, as uint8; Pillow would clip instead."""
    levels = levels.astype(np.uint16)
    if signed:
        levels ^= 0x8000  # maps the lowest negative number to 0
    return (levels >> (bits - 8)).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers without a known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _find_turn(file: Image.Image) -> Image.Transpose | None:
    """Return the transposition that puts an image upright; None if no orientation is stored."""
    try:
        value = _read_orientation(file.info.get("exif", b""))
        if value is None:
            value = file.getexif().get(ORIENTATION, 1)
        return TURNS.get(value[0] if isinstance(value, (tuple, bytes)) else value)
    except Exception:  # a damaged EXIF block does not affect the pixels
        return None


def _read_orientation(exif: bytes) -> int | None:
    """Return the orientation in an EXIF block if it is an integer; read no other entry.

    Pillow stops at the first entry whose value lies outside the block, as in a truncated block.
    """
    block = exif.removeprefix(b"Exif\0\0")
    order = "<" if block.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (entries,) = struct.unpack_from(f"{order}H", block, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", block, at)
            if tag == ORIENTATION and kind in INTEGER_TYPES:
                letter = INTEGER_TYPES[kind]
                if 1 <= count <= 4 // struct.calcsize(letter):  # else the value is elsewhere
                    return int(struct.unpack_from(order + letter, block, at + 8)[0])
    except struct.error:
        pass
    return None


def decode_files(paths: Sequence[str], target: Path, title: str) -> dict[int, str]:
    """Decode image files into the array file `target`, uint8 [N, size, size, 3].

    Returns:
        The rows that failed, each with the reason.

    Raises:
        UsageError: a decoding process was killed, for example by the OOM killer; names its image.
    """
    processes = min(usable_cores(), len(paths) // LEAST)
    with (
        progress_bar(title, len(paths), " images") as bar,
        ExitStack() as stack,
    ):
        if processes > 1:
            return _decode_in_processes(processes, paths, target, bar, stack)
        array, failed = np.load(target, mmap_mode="r+"), {}
        for row, path in enumerate(paths):
            if reason := _decode_row(array, row, path):
                failed[row] = reason
            bar.update()
        return failed


def _decode_in_processes(
    processes: int, paths: Sequence[str], target: Path, bar: Any, stack: ExitStack
) -> dict[int, str]:
    """Give each process every n-th image; an image that crashes its decoder fails alone."""
    folder = Path(stack.enter_context(TemporaryDirectory(dir=target.parent)))
    code = "import sys; from cifar_dist.data.decode import main; main(*sys.argv[1:])"
    workers: dict[subprocess.Popen[bytes], tuple[range, IO[bytes]]] = {}
    failed: dict[int, str] = {}

    def start_worker(rows: range) -> None:
        job, log = folder / f"{rows[0]}.json", folder / f"{rows[0]}.log"
        text = json.dumps([rows.start, rows.step, [paths[row] for row in rows]])
        job.write_text(text, encoding="utf-8")
        output = stack.enter_context(log.open("w+b"))
        with uninterrupted():
            command = [sys.executable, "-c", code, str(target), str(job), str(log)]
            workers[subprocess.Popen(command)] = rows, output

    try:
        for first in range(processes):
            start_worker(range(first, len(paths), processes))
        while workers:
            time.sleep(0.02)
            for worker, (rows, log) in list(workers.items()):
                ending = worker.poll()
                bar.update(log.read().count(b"\n"))
                if ending is None:
                    continue
                log.seek(0)
                reasons = [json.loads(line) for line in log.read().splitlines()]
                failed |= {row: why for row, why in zip(rows, reasons, strict=False) if why}
                left = rows[len(reasons) :]
                if left and -ending not in CRASHES:
                    raise UsageError(_describe_end(ending, paths[left[0]]))
                if left:
                    failed[left[0]] = f"its decoder crashed, {_name_signal(ending)}"
                    bar.update()
                if left[1:]:
                    start_worker(left[1:])
                del workers[worker]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return dict(sorted(failed.items()))


def _describe_end(code: int, path: str) -> str:
    end = f"was killed by {_name_signal(code)}" if code < 0 else f"exited with code {code}"
    cause = "; probably out of memory (OOM killer)" if code == -9 else ""
    return f"a process {end} while it decoded {path}{cause}"


def _name_signal(code: int) -> str:
    return f"signal {-code} ({signal.strsignal(-code)})"


def _decode_row(array: np.ndarray, row: int, path: str) -> str:
    """Decode one image into its row; return why it failed, or ""."""
    try:
        array[row] = decode_image(path, array.shape[1])
    except ValueError as error:
        return str(error)
    return ""


def main(target: str, job: str, log: str) -> None:
    """Decode the images that the file `job` lists; log one line per image: why it failed, or ""."""
    ignore_signals()
    parent = os.getppid()
    array = np.load(target, mmap_mode="r+")
    start, step, paths = json.loads(Path(job).read_text(encoding="utf-8"))
    with open(log, "wb", buffering=0) as file:
        for number, path in enumerate(paths):
            reason = _decode_row(array, start + number * step, path)
            file.write(json.dumps(reason).encode() + b"\n")
            if os.getppid() != parent:  # nobody waits for the images any more
                return
