"""Untrusted checkpoints: malformed content is refused, and no code in it runs."""

import hashlib
import json
import pickle
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cifar_dist.config import parse_recipe
from cifar_dist.errors import UsageError
from cifar_dist.evaluate import evaluate_checkpoint
from cifar_dist.predict import predict
from cifar_dist.storage.checkpoint import DamagedCheckpoint, load_checkpoint
from cifar_dist.train import run
from cifar_dist.training.run import Result
from tests.forked import start
from tests.helpers import TINY, Bomb, write_folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return the folder of a checkpoint of a short run."""
    recipe, _ = parse_recipe([*TINY, "--train.epochs", "1", "--out", str(tmp_path / "run")])
    result: Result = run(recipe)
    return next((result.out / "checkpoints").iterdir())


def sign(checkpoint: Path) -> None:
    """Write a manifest that matches the files, as an attacker would."""
    listed = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in checkpoint.iterdir()
        if path.name != "MANIFEST.json"
    }
    (checkpoint / "MANIFEST.json").write_text(json.dumps({"files": listed}))


def refuse(checkpoint: Path, tmp_path: Path, damaged: str = "") -> str:
    """Check that train, evaluate and predict refuse the checkpoint; return their message.

    The last two do not read the optimizer: if that is all that is `damaged`, they succeed.
    """
    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    recipe, _ = parse_recipe(
        [*TINY, "--train.epochs", "1", "--out", str(tmp_path / "new"), "--resume", str(checkpoint)]
    )
    reasons, uses = [], [lambda: run(recipe)]
    for use in (
        lambda: evaluate_checkpoint(str(checkpoint)),
        lambda: predict(str(checkpoint), [image]),
    ):
        if damaged == "optim.safetensors":
            use()
        else:
            uses.append(use)
    for use in uses:
        with pytest.raises(UsageError) as refused:
            use()
        reasons.append(str(refused.value))
        assert "\n" not in reasons[-1]
    return reasons[0]


@pytest.mark.fault(34)
@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json"])
def test_a_pickle_in_a_checkpoint_is_never_unpickled(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(mark)))
    sign(checkpoint)
    assert "damaged" in refuse(checkpoint, tmp_path, damaged=name)
    (checkpoint / "data.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    (checkpoint / "MANIFEST.json").write_bytes(pickle.dumps(Bomb(mark)))
    assert "damaged" in refuse(checkpoint, tmp_path)
    assert not mark.exists()


@pytest.mark.fault(34)
def test_nothing_is_unpickled_on_the_way_from_images_and_checkpoint_to_weights(
    tmp_path: Path,
) -> None:
    root = write_folder(tmp_path / "set", {"train": 36, "test": 9})
    options = [*TINY, "--data.name", "imagefolder", "--data.root", str(root)]
    options += ["--data.cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    for epochs in ("1", "2"):  # the second resumes the first
        with start(
            [*options, "--train.epochs", epochs], folder=tmp_path, fault="dies_of_pickles"
        ) as job:
            assert job.wait() == [0], job.text()
    assert "continues at step" in job.text()


def write_header(path: Path, header: dict[str, Any] | None, length: int | None = None) -> None:
    """Write a safetensors file with the given header and 64 bytes of data."""
    text = json.dumps(header).encode() if header is not None else b""
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(64))


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    "kind", ["huge header", "overlapping", "beyond the end", "huge shape", "wrong shape"]
)
def test_crafted_safetensors(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensor = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
    if kind == "huge header":
        write_header(file, None, length=2**63)
    elif kind == "overlapping":
        write_header(file, {"a": tensor, "b": {**tensor, "data_offsets": [16, 48]}})
    elif kind == "beyond the end":
        write_header(file, {"a": {**tensor, "shape": [2**40], "data_offsets": [0, 2**42]}})
    elif kind == "huge shape":
        write_header(file, {"a": {**tensor, "shape": [2**62, 4]}})
    else:
        write_header(file, {"a": {**tensor, "shape": [16], "data_offsets": [0, 64]}})
    sign(checkpoint)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reason = refuse(checkpoint, tmp_path)
    assert "damaged" in reason or "does not fit the recipe's model" in reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    "change",
    [
        {"recipe": []},
        {"recipe": {"model": {"name": "tutorial", "surprise": 1}}},
        {"step": "many"},
        {"classes": None},
        {"optimizer": {}},
        {"best": []},
    ],
)
def test_crafted_states(change: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | change))
    sign(checkpoint)
    recipe, _ = parse_recipe(
        [*TINY, "--train.epochs", "1", "--out", str(tmp_path / "new"), "--resume", str(checkpoint)]
    )
    with pytest.raises(UsageError):
        run(recipe)


@pytest.mark.fault(35)
@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", ""])
def test_a_manifest_names_no_file_elsewhere(name: str, checkpoint: Path) -> None:
    (checkpoint.parent / "outside").write_text("")
    empty = hashlib.sha256(b"").hexdigest()
    (checkpoint / "MANIFEST.json").write_text(
        json.dumps({"files": {name: {"size": 0, "sha256": empty}}})
    )
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(checkpoint)


@pytest.mark.fault(35)
def test_deeply_nested_json_is_refused(checkpoint: Path) -> None:
    (checkpoint / "MANIFEST.json").write_text("[" * 100_000)
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(checkpoint)


@pytest.mark.fault(23)
@pytest.mark.parametrize("side", [12_000, 20_000])
def test_a_decompression_bomb_costs_no_memory(side: int, tmp_path: Path) -> None:
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    code = (
        "import resource, sys; from pathlib import Path; "
        "from cifar_dist.data.decode import decode_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode_image(Path(sys.argv[1]), 32)\n"
        "except ValueError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bomb.png")], capture_output=True, text=True
    )
    reason, grown = done.stdout.splitlines()
    assert "exceeds limit" in reason
    assert int(grown) < 50_000  # kilobytes
