"""Decoding: damaged, unsupported and malicious files are reported by name, and run no code."""

import ast
import functools
import importlib
import io
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps, PngImagePlugin

from cifar_dist.config import DataConfig
from cifar_dist.data import decode, load_dataset
from cifar_dist.data.decode import FORMATS, decode_files, decode_image
from cifar_dist.data.synthetic import draw
from cifar_dist.errors import UsageError
from cifar_dist.processes.preemption import Preempted
from tests.helpers import write_folder

Image.init()
Entry = tuple[int, int, int, bytes]  # of an EXIF directory: tag, type, count, value
UPRIGHT: Entry = (0x0112, 3, 1, struct.pack("<H", 6))  # orientation 6: rotate clockwise
REFUSED = {  # formats of Pillow that are not decoded, and the reasons
    "BUFR": "has no decoder",
    "EPS": "a program, which Pillow has Ghostscript run",
    "FPX": "needs another package, olefile",
    "GRIB": "has no decoder",
    "HDF5": "has no decoder",
    "IPTC": "holds another file, which is opened as any format",
    "MIC": "needs another package, olefile",
    "MPEG": "has no decoder",
    "WMF": "drawing commands, which Pillow has Windows carry out",
}
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n"
    b"0 0 32 32 rectfill\nshowpage\n"
)
EPS_BINARY = struct.pack("<4s7i", b"\xc5\xd0\xd3\xc6", 32, len(EPS), 0, 0, 0, 0, 0)[:32] + EPS


def shape(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Return an image without any symmetry."""
    return Image.fromarray(draw(10, 48, seed=(3,)).images[7]).crop((0, 0, *size))


def encode(image: Image.Image, name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pillow will remove IM
        image.save(stream, name, **options)
    return stream.getvalue()


def exif_block(entries: list[Entry], order: str = "<") -> bytes:
    """Return an EXIF block with one directory. The values may be invalid."""
    places = 10 + 12 * len(entries) + 4
    head, values = b"", b""
    for tag, kind, count, raw in entries:
        field = raw.ljust(4, b"\0")
        if len(raw) > 4:
            field = struct.pack(f"{order}I", places + len(values))
            values += raw + b"\0" * (len(raw) % 2)
        head += struct.pack(f"{order}HHI", tag, kind, count) + field
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return b"Exif\0\0" + start + head + bytes(4) + values


@functools.cache
def plain_and_turned() -> tuple[bytes, np.ndarray, np.ndarray]:
    """Return a JPEG file without EXIF, its pixels, and its pixels rotated clockwise."""
    content = encode(shape(), "JPEG")
    upright = Image.open(io.BytesIO(content))
    both = upright, upright.transpose(Image.Transpose.ROTATE_270)
    fitted = [ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC) for image in both]
    return content, np.asarray(fitted[0]), np.asarray(fitted[1])


def turned(path: Path, exif: bytes) -> bool:
    """Decode a JPEG file with this EXIF block; return whether its pixels are rotated clockwise."""
    content, upright, clockwise = plain_and_turned()
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    path.write_bytes(content[:2] + segment + content[2:])
    found = decode_image(path, 32)
    is_turned = np.array_equal(found, clockwise)
    assert is_turned != np.array_equal(found, upright)
    return is_turned


def damages(entries: int) -> Iterator[list[Entry]]:
    """Yield EXIF directories with a valid orientation and an arbitrary, mostly invalid, entry."""
    tags = [0x010E, 0x010F, 0x011A, 0x0128, 0x0132, 0x013B, 0x0213, 0x8298, 0x8769, 0x8825, 0xA005]
    tags += [0x9C9B, 0x829A, 0x927C, 0xC4A5, 0x02BC, 0x8649, 0x0111, 0x0100, 0xFE58]
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
    fills = [b"\0", b"\xff", struct.pack("<ii", -1, 0), struct.pack("<I", 1), b"abc\xe9"]
    fills.append(struct.pack("<I", 2**31 - 1))
    every = [
        [UPRIGHT, (tag, kind, count, (fill * 800)[: sizes.get(kind, 1) * count])]
        for tag in tags
        for kind in (*sizes, 0, 14, 99)
        for count in (0, 1, 2, 3, 9, 100)
        for fill in fills
    ]
    for chosen in random.Random(0).sample(every, entries):
        yield sorted(chosen)


def check_exif(folder: Path, entries: int) -> None:
    for directory in damages(entries):
        assert turned(folder / "x.jpg", exif_block(directory)), directory


@pytest.mark.fault(60)
def test_a_damaged_exif_block_loses_neither_pixels_nor_orientation(tmp_path: Path) -> None:
    file = tmp_path / "x.jpg"
    assert not turned(file, exif_block([]))
    assert turned(file, exif_block([UPRIGHT, (0x0128, 1, 1, b"\2")]))  # ResolutionUnit of type BYTE
    whole = exif_block([(0x010F, 2, 40, b"m" * 40), UPRIGHT, (0x011A, 5, 1, b"\1" * 8)])
    for end in range(6, len(whole)):  # the orientation is the second entry
        assert turned(file, whole[:end]) == (end >= 6 + 10 + 2 * 12 - 2), end
    check_exif(tmp_path, 300)


@pytest.mark.slow
def test_every_damaged_exif_block(tmp_path: Path) -> None:
    check_exif(tmp_path, 20 * 16 * 6 * 6)


@pytest.mark.parametrize(
    ("entry", "is_turned"),
    [
        ((0x0112, 3, 1, b"\6\0"), True),
        ((0x0112, 1, 1, b"\6"), True),
        ((0x0112, 4, 1, b"\6\0\0\0"), True),
        ((0x0112, 9, 1, b"\6\0\0\0"), True),
        ((0x0112, 3, 2, b"\6\0\6\0"), True),
        ((0x0112, 3, 3, b"\6\0\6\0\6\0"), True),
        ((0x0112, 5, 1, struct.pack("<II", 6, 1)), True),
        ((0x0112, 3, 1, b"\0\0"), False),
        ((0x0112, 3, 1, b"\x09\0"), False),
        ((0x0112, 3, 1, b"\xff\xff"), False),
        ((0x0112, 3, 0, b""), False),
        ((0x0112, 2, 2, b"6\0"), False),
        ((0x0112, 12, 1, struct.pack("<d", float("nan"))), False),
    ],
)
def test_each_way_to_store_an_orientation(entry: Entry, is_turned: bool, tmp_path: Path) -> None:
    assert turned(tmp_path / "x.jpg", exif_block([entry])) == is_turned


def test_other_places_of_an_orientation(tmp_path: Path) -> None:
    file = tmp_path / "x.jpg"
    big = exif_block([(0x0112, 3, 1, b"\0\6")], ">")
    assert turned(file, big)
    assert not turned(file, b"Exif\0\0" + b"garbage" * 9)
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"/>')
    shape().save(tmp_path / "x.png", pnginfo=xmp)
    upright = shape().transpose(Image.Transpose.ROTATE_270)
    fitted = ImageOps.fit(upright, (32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(decode_image(tmp_path / "x.png", 32), fitted)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_of_every_format_that_has_one(
    name: str, orientation: int, tmp_path: Path
) -> None:
    if name not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = (
        shape() if name != "TIFF" else Image.fromarray(np.asarray(shape())[..., 0] * np.uint16(257))
    )
    image.save(tmp_path / "x", name, exif=exif)
    # Not opened by name: Pillow would then memory-map raw pixels as if they were already rotated.
    with Image.open(io.BytesIO((tmp_path / "x").read_bytes())) as file:
        upright = ImageOps.exif_transpose(file)
    if name == "TIFF":
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    fitted = ImageOps.fit(upright.convert("RGB"), (32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(decode_image(tmp_path / "x", 32), fitted)


def tiff(
    pixels: bytes, bits: int, sample_format: int = 1, order: str = "<", *extra: Entry
) -> bytes:
    """Return a grey TIFF file of 8 x 8 pixels."""
    values = [(256, 8), (257, 8), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8)]
    values += [(279, len(pixels)), (339, sample_format)]
    tags = [(tag, 3, 1, struct.pack(f"{order}H", value)) for tag, value in values]
    entries = b"".join(
        struct.pack(f"{order}HHI", *entry) + raw.ljust(4, b"\0")
        for *entry, raw in sorted([*tags, *extra])
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(pixels))
    return head + pixels + struct.pack(f"{order}H", len(entries) // 12) + entries + bytes(4)


@pytest.mark.parametrize(
    "entry",
    [
        (0x8769, 4, 1, struct.pack("<I", 2)),  # an offset without a directory
        (0x8769, 2, 4, b"abc"),
        (0x8825, 9, 1, struct.pack("<i", -5)),
        (0x8769, 11, 1, struct.pack("<f", 1e30)),
        (0x02BC, 2, 4, b"xmp"),
        (0xFE58, 4, 1000, b"\xff" * 4),
    ],
)
def test_damaged_metadata_of_a_tiff_file(entry: Entry, tmp_path: Path) -> None:
    file, pixels = tmp_path / "x.tif", np.arange(64, dtype=np.uint8).reshape(8, 8)
    upright = np.stack([np.rot90(pixels, -1)] * 3, axis=-1)
    for more in ([], [entry]):
        file.write_bytes(tiff(pixels.tobytes(), 8, 1, "<", UPRIGHT, *more))
        assert np.array_equal(decode_image(file, 8), upright)


def fits(bits: int, pixels: bytes) -> bytes:
    """Return a FITS file of 8 x 8 pixels."""
    cards = ["SIMPLE  = T", f"BITPIX  = {bits}", "NAXIS   = 2", "NAXIS1  = 8", "NAXIS2  = 8", "END"]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + pixels.ljust(2880)


GREY16 = Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16))


@pytest.mark.parametrize(
    ("content", "level"),
    [
        (encode(GREY16, "PNG"), 0x80),
        (tiff(b"\xff\x80" * 64, 16, 1), 0x80),
        (tiff(b"\x80\xff" * 64, 16, 1, ">"), 0x80),
        (tiff(b"\x80\x88\x08" * 32, 12, 1), 0x80),
        (tiff(struct.pack("<h", -0x8000) * 64, 16, 2), 0),
        (tiff(struct.pack("<h", 0x7FFF) * 64, 16, 2), 255),
        (tiff(struct.pack(">h", 0x100) * 64, 16, 2, ">"), 0x81),
        (encode(GREY16, "TIFF", compression="tiff_lzw"), 0x80),
        (encode(GREY16, "PPM"), 0x80),
        (b"P5 8 8 1023 " + struct.pack(">H", 512) * 64, 0x80),
        (b"P2 8 8 65535 " + b"33023 " * 64, 0x80),
        (encode(GREY16, "JPEG2000"), 0x80),
        (encode(GREY16, "IM"), 0x80),
    ],
)
def test_integers_of_up_to_16_bits_are_scaled(content: bytes, level: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    assert np.unique(decode_image(tmp_path / "x", 8)).tolist() == [level]


@pytest.mark.fault(58)
@pytest.mark.parametrize("value", [0, 200, 2**20])
@pytest.mark.parametrize(
    "build",
    [
        lambda value: encode(Image.new("I", (8, 8), value), "TIFF"),
        lambda value: encode(Image.new("I", (8, 8), value), "TIFF", compression="tiff_lzw"),
        lambda value: encode(Image.new("I", (8, 8), value), "IM"),
        lambda value: tiff(struct.pack("<I", value) * 64, 32, 1),
        lambda value: tiff(struct.pack(">i", value) * 64, 32, 2, ">"),
        lambda value: fits(32, struct.pack(">i", value) * 64),
    ],
)
def test_integers_of_more_than_16_bits_are_refused(
    build: Callable[[int], bytes], value: int, tmp_path: Path
) -> None:
    (tmp_path / "x.tif").write_bytes(build(value))
    with pytest.raises(ValueError, match="32-bit integers without a known range"):
        decode_image(tmp_path / "x.tif", 8)


def test_fits_integers_whose_scale_is_in_the_header_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.fits").write_bytes(fits(16, bytes(128)))
    with pytest.raises(ValueError, match="16-bit integers without a known range"):
        decode_image(tmp_path / "x.fits", 8)


def test_every_format_of_pillow_is_decoded_or_refused_for_a_reason() -> None:
    assert not FORMATS & set(REFUSED)
    assert set(Image.OPEN) - FORMATS - set(REFUSED) == set()


def test_no_enabled_decoder_starts_a_program_or_opens_another_file() -> None:
    """Search the source of each decoder for functions that start programs or open other images."""
    modules = {Image.OPEN[name][0].__module__ for name in FORMATS & set(Image.OPEN)}
    found = set()
    for module in modules:
        tree = ast.parse(Path(str(importlib.import_module(module).__file__)).read_text())
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            names = {ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.expr)}
            if names & {"subprocess", "os.system", "os.popen", "Image.open", "eval", "exec"}:
                found.add(f"{module.removeprefix('PIL.')}.{function.name}")
    # Decoding does not call these: a method for users, and functions that save images.
    assert found <= {
        "JpegImagePlugin.load_djpeg",
        "JpegImagePlugin._save_cjpeg",
        "GifImagePlugin._save_netpbm",
        "SpiderImagePlugin.loadImageSeries",
    }


def sun(pixels: bytes) -> bytes:
    return struct.pack(">8I", 0x59A66A95, 8, 8, 24, len(pixels), 1, 0, 0) + pixels


def psd(pixels: bytes) -> bytes:
    return struct.pack(">4sH6xHIIHHIIIH", b"8BPS", 1, 3, 8, 8, 8, 3, 0, 0, 0, 0) + pixels


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.eps", "x.txt", "x"])
def test_the_content_decides_the_format_under_any_suffix(name: str, tmp_path: Path) -> None:
    orange = Image.new("RGB", (16, 16), (255, 128, 0))
    others = {"BLP", "MSP", "SPIDER", "XBM"}  # not RGB; SPIDER holds floats
    contents = {key: encode(orange, key) for key in FORMATS & set(Image.SAVE) - others}
    contents["BLP"] = encode(orange.quantize(4), "BLP")
    contents["SUN"] = sun(bytes((0, 128, 255)) * 64)
    contents["PSD"] = psd(b"\xff" * 64 + b"\x80" * 64 + b"\0" * 64)
    contents["CUR"] = b"\0\0\2\0" + encode(orange, "ICO", bitmap_format="bmp")[4:]
    contents["FITS"] = fits(8, b"\x80" * 64)
    assert len(contents) >= 16
    for key, content in contents.items():
        (tmp_path / name).write_bytes(content)
        level = 128 if key == "FITS" else 255
        found = decode_image(tmp_path / name, 16).astype(int)
        assert np.abs(found - (level, 128, 128 if key == "FITS" else 0)).max() <= 8, key
    for key in ("MSP", "XBM"):
        (tmp_path / name).write_bytes(encode(Image.new("1", (16, 16), 1), key))
        assert len(np.unique(decode_image(tmp_path / name, 16))) == 1, key


def iptc(content: bytes) -> bytes:
    """Return an IPTC file that contains another file."""
    fields = [(60, b"\1\0"), (20, b"\0\x20"), (30, b"\0\x20"), (120, b"\0\5")]
    head = b"".join(struct.pack(">BBBH", 0x1C, 3, tag, len(value)) + value for tag, value in fields)
    return head + struct.pack(">BBBH", 0x1C, 8, 10, len(content)) + content + bytes(5)


@pytest.mark.fault(61)
@pytest.mark.parametrize("content", [EPS, EPS_BINARY, iptc(EPS)], ids=["eps", "binary", "iptc"])
def test_postscript_never_reaches_ghostscript(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    script = tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\necho $* >> {started}\n[ $1 = --version ]\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    names = [root / "train" / "disc" / f"x{suffix}" for suffix in (".jpg", ".png", ".tif")]
    for path in names:
        path.write_bytes(content)
    config = DataConfig(name="imagefolder", root=str(root), bad_images="skip")
    skipped = load_dataset(config).skipped
    assert [line.split(": ")[0] for line in skipped] == [str(path) for path in names]
    for path in (*names, tmp_path / "x.eps"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"PostScript is not decoded|cannot identify"):
            decode_image(path, 32)
    assert not started.exists()
    with pytest.raises((subprocess.CalledProcessError, OSError)), Image.open(names[0]) as file:
        file.load()
    assert started.exists()  # Pillow itself does start it


def test_heic_is_refused_with_the_remedy(tmp_path: Path) -> None:
    for brand in (b"heic", b"mif1"):
        (tmp_path / "x.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(60))
        with pytest.raises(ValueError, match="HEIC images are not decoded; convert them to JPEG"):
            decode_image(tmp_path / "x.jpg", 8)


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a Unix socket must be short
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        for name in ("fifo.png", "folder.png", "socket.png", "loop.png", "absent.png", "nul\0.png"):
            with pytest.raises(ValueError):
                decode_image(tmp_path / name, 8)
    for device in ("/dev/zero", "/dev/tty"):
        with pytest.raises(ValueError):
            decode_image(device, 8)
    with pytest.raises(ValueError, match=r"^not a regular file$"):
        decode_image(tmp_path / "fifo.png", 8)


RAISED = [
    struct.error("argument"),
    TypeError("two\nlines"),
    AttributeError("x"),
    RuntimeError("x"),
    IndexError("x"),
    KeyError((3, 16)),
    EOFError(),
    OverflowError("x"),
    ZeroDivisionError("x"),
    AssertionError(),
    subprocess.CalledProcessError(1, ["gs"]),
    zlib.error("x"),
    MemoryError(),
    RecursionError("x"),
    UserWarning("x"),
]


@pytest.mark.fault(59)
@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_a_decoder_raises_the_file_is_named_and_skipped(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path, {"train": 12, "test": 6}, size=16)
    victim = root / "train" / "disc" / "x.png"
    shape((20, 20)).save(victim)
    original = PngImagePlugin.PngImageFile.load_prepare

    def load_prepare(self: PngImagePlugin.PngImageFile) -> None:
        if self.width == 20:
            raise error
        original(self)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", load_prepare)
    config = DataConfig(name="imagefolder", root=str(root), image_size=16)
    with pytest.raises(UsageError, match="1 of the train images cannot be decoded") as refused:
        load_dataset(config)
    assert f"{victim}: {type(error).__name__}" in str(refused.value)
    assert "\n" not in str(refused.value)
    dataset = load_dataset(replace(config, bad_images="skip"))
    assert len(dataset.train) == 12
    assert dataset.skipped[0].startswith(str(victim))


@pytest.mark.parametrize("error", [KeyboardInterrupt, Preempted])
def test_a_signal_while_decoding_is_not_reported_as_a_bad_image(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape().save(tmp_path / "x.png")

    def load_prepare(self: PngImagePlugin.PngImageFile) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", load_prepare)
    with pytest.raises(error):
        decode_image(tmp_path / "x.png", 8)


def test_the_size_limit_applies_to_embedded_images(tmp_path: Path) -> None:
    huge = encode(Image.new("1", (12000, 12000)), "PNG")
    icns = b"icns" + struct.pack(">I4sI", 16 + len(huge), b"ic07", 8 + len(huge)) + huge
    ico = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(huge), 22) + huge
    for content in (huge, icns, ico):
        (tmp_path / "x.png").write_bytes(content)
        start = time.process_time()
        with pytest.raises(ValueError, match="exceeds limit"):
            decode_image(tmp_path / "x.png", 8)
        assert time.process_time() - start < 0.5


def seeds() -> dict[str, bytes]:
    """Return files of all common formats and of many rare ones, by name."""
    image, exif = shape((32, 32)), Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    palette, more = image.quantize(16), {"save_all": True}
    found = {
        "jpeg": encode(image, "JPEG", exif=exif),
        "mpo": encode(image, "MPO", append_images=[image], **more),
        "png": encode(image, "PNG", exif=exif),
        "palette": encode(palette, "PNG", transparency=1),
        "png16": encode(GREY16, "PNG"),
        "gif": encode(palette, "GIF", append_images=[image.quantize(8)], **more),
        "webp": encode(image, "WEBP", exif=exif),
        "animation": encode(image, "WEBP", append_images=[image.rotate(90)], **more),
        "psd": psd(b"\x80" * 192),
        "sun": sun(b"\x80" * 192),
        "fits": fits(8, bytes(64)),
        "qoi": b"qoif" + bytes(10) + random.Random(1).randbytes(300),
        "fli": b"abcd\x11\xaf" + random.Random(2).randbytes(300),
        "icns": encode(image.resize((128, 128)), "ICNS"),
        "spider": encode(image.convert("F"), "SPIDER"),
        "pgm": encode(image.convert("L"), "PPM"),
    }
    for name in ("BMP", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "IM", "JPEG2000"):
        found[name.lower()] = encode(image, name)
    for compression in ("raw", "tiff_lzw", "jpeg", "tiff_deflate"):
        found[f"tiff-{compression}"] = encode(image, "TIFF", compression=compression)
    if "AVIF" in Image.SAVE:
        found["avif"] = encode(image, "AVIF")
    return found


def check_damages(file: Path, each: int) -> None:
    """Check that damaged files are decoded or refused, within 2 s of CPU time and in one line."""
    chance, refused = random.Random(0), 0
    for name, whole in seeds().items():
        for _ in range(each):
            content = bytearray(whole)
            place = chance.randrange(len(content))
            match chance.choice(("flip", "flip", "head", "cut", "insert")):
                case "cut":
                    del content[place:]
                case "insert":
                    content[place:place] = chance.randbytes(chance.randrange(1, 20))
                case region:
                    for _ in range(chance.choice((1, 1, 2, 4, 8))):
                        end = min(len(content), 400 if region == "head" else len(content))
                        value = chance.choice((0, 255, 127, 128, chance.randrange(256)))
                        content[chance.randrange(end)] = value
            file.write_bytes(content)
            start, reason = time.process_time(), None
            try:
                assert decode_image(file, 32).shape == (32, 32, 3)
            except ValueError as error:
                refused, reason = refused + 1, str(error)
            assert reason is None or reason.split() == reason.strip().split(" "), name
            assert time.process_time() - start < 2, name
    assert refused > each


def test_damaged_files_of_each_format(tmp_path: Path) -> None:
    check_damages(tmp_path / "x.bin", 20)


@pytest.mark.slow
def test_many_damaged_files_of_each_format(tmp_path: Path) -> None:
    check_damages(tmp_path / "x.bin", 400)


# Simulates a decoder that crashes: opening a file that begins with CRASH kills the process.
CRASHING = """
import os
from PIL import Image
original = Image.open

def crash(stream, *arguments, **options):
    if hasattr(stream, "read"):
        head = stream.read(6)
        if head.startswith(b"CRASH"):
            os.kill(os.getpid(), head[5])
    return original(stream, *arguments, **options)

Image.open = crash
"""


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Path]:
    """Return the paths of 300 images, decoded by two processes, and an array file for them."""
    (tmp_path / "sitecustomize.py").write_text(CRASHING)
    paths = os.environ.get("PYTHONPATH", ""), *sys.path
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, paths)]))
    monkeypatch.setattr(decode, "usable_cores", lambda: 2)
    monkeypatch.setattr(decode, "LEAST", 1)
    files = [tmp_path / f"{number:03d}.png" for number in range(300)]
    for number, file in enumerate(files):
        Image.new("L", (4, 4), number % 256).save(file)
    target = tmp_path / "images.npy"
    np.save(target, np.zeros((300, 4, 4, 3), dtype=np.uint8))
    return [str(file) for file in files], target


@pytest.mark.fault(62)
def test_an_image_that_crashes_its_decoder_is_named_and_the_others_are_decoded(
    many: tuple[list[str], Path],
) -> None:
    paths, target = many
    bad = {77: signal.SIGSEGV, 299: signal.SIGABRT}
    for row, number in bad.items():
        Path(paths[row]).write_bytes(b"CRASH" + bytes([number]))
    failed = decode_files(paths, target, "decoding")
    assert failed == {
        row: f"its decoder crashed, signal {int(number)} ({signal.strsignal(number)})"
        for row, number in bad.items()
    }
    levels = np.load(target)[:, 0, 0, 0]
    assert all(levels[row] == row % 256 for row in range(300) if row not in bad)


def test_a_killed_decoding_process_is_reported_as_one_error(
    many: tuple[list[str], Path],
) -> None:
    paths, target = many
    Path(paths[130]).write_bytes(b"CRASH" + bytes([signal.SIGKILL]))
    with pytest.raises(UsageError, match=r"signal 9 .*130\.png; probably out of memory"):
        decode_files(paths, target, "decoding")


def test_names_that_are_not_utf8_reach_the_processes(many: tuple[list[str], Path]) -> None:
    paths, target = many
    name = os.fsdecode(os.path.join(os.fsencode(os.path.dirname(paths[5])), b"\xff\xfe.png"))
    try:
        os.rename(paths[5], name)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    paths[5] = name
    Path(paths[6]).unlink()
    paths[6] = name + ".absent"
    failed = decode_files(paths, target, "decoding")
    assert list(failed) == [6]
    assert failed[6].endswith("\\udcff\\udcfe.png.absent'")
    assert np.load(target)[5].max() == 5
