"""The checkpoint store: a saved state loads unchanged, and damage is detected."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch

from cifar_dist.config import Recipe
from cifar_dist.errors import UsageError
from cifar_dist.storage.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    Progress,
    SaveFailed,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    load_newest,
    pack_optimizer,
    prune,
    save_checkpoint,
    unpack_optimizer,
)


def sample(value: float = 1.0) -> Checkpoint:
    tensors = {"w": torch.full((3, 4), value).to(memory_format=torch.contiguous_format)}
    progress = Progress(Recipe(), ["a", "b"], 8, [0.5], [0.1], "digest", step=3, epoch=1.5)
    own = torch.zeros(1, 0), torch.zeros(1, 3)
    return Checkpoint(progress, tensors, {"0.m": torch.ones(2)}, *own)


def test_a_saved_state_loads_unchanged(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 12, sample(2.5))
    assert path.name == "step-00000012"
    back = load_checkpoint(path)
    assert back.progress == sample().progress
    assert torch.equal(back.model["w"], sample(2.5).model["w"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000012"]
    names = {"MANIFEST.json", "state.json"}
    names |= {f"{part}.safetensors" for part in ("model", "optim", "processes")}
    assert {p.name for p in path.iterdir()} == names


def test_a_state_of_an_earlier_version_is_read() -> None:
    """Read a state.json with exactly the keys that the version wrote."""
    totals = {"loss": 2.5, "accuracy": 0.25, "correct": 4, "count": 16}
    metrics = {"val": {"split": "val", "epoch": 0, "step": 3, **totals}}
    state = {
        "step": 3,
        "epoch": 1.5,
        "reported": {"loss_sum": 40.0, "correct": 4, "count": 16},
        "best": {"step": 3, "accuracy": 0.25, "metrics": metrics},
        "metrics": metrics,
        "recipe": {"name": "before", "train": {"batch_size": 16}},
        "classes": ["a", "b"],
        "image_size": 8,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "dataset": "digest",
        "optimizer": {"param_groups": [{"lr": 0.1, "params": [0]}], "state": {}},
        "scaler": {},
    }
    progress = Progress.from_json(state)
    assert (progress.recipe.train.batch_size, progress.best.metrics) == (16, metrics)
    assert progress.code == {}
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    with pytest.raises(ValueError, match="no step, best in it"):
        Progress.from_json({**state, "step": "3", "best": []})


def test_the_mode_of_files_follows_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save_checkpoint(tmp_path, 1, sample())
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


@pytest.mark.parametrize("name", ["MANIFEST.json", "model.safetensors", "optim.safetensors"])
@pytest.mark.parametrize("damage", ["flip at 0", "flip at 12", "flip at -1", "cut", "remove"])
def test_damage_is_found_and_the_previous_checkpoint_is_used(
    name: str, damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path, 1, sample(1.0))
    file = save_checkpoint(tmp_path, 2, sample(2.0)) / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[int(damage.split()[-1])] ^= 1  # in a tensor file: header length, header, data
        file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(file.parent)
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest[0].name == "step-00000001"
    assert "step-00000002" in capfd.readouterr().out


def test_damage_is_found_anywhere_in_a_large_file(tmp_path: Path) -> None:
    large = sample()
    large.model["w"] = torch.zeros(900_001)  # 3.6 MB
    file = save_checkpoint(tmp_path, 1, large) / "model.safetensors"
    whole = file.read_bytes()
    assert len(whole) > 3 << 20
    for place in (*range(0, len(whole), 1 << 19), len(whole) - 1):
        hurt = bytearray(whole)
        hurt[place] ^= 128
        file.write_bytes(hurt)
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(file.parent)
    file.write_bytes(whole)
    load_checkpoint(file.parent)


def test_a_linked_folder_of_checkpoints_is_not_followed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "elsewhere", 1, sample())
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "checkpoints"
    link.symlink_to(tmp_path / "elsewhere")
    for load in (lambda: load_newest(link), lambda: find_checkpoint(str(tmp_path / "run"))):
        with pytest.raises(UsageError, match="is a symbolic link; put the folder itself there"):
            load()
    with pytest.raises(SaveFailed, match="is a symbolic link, which is not followed"):
        save_checkpoint(link, 2, sample())
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["step-00000001"]


def test_if_all_checkpoints_are_damaged_training_does_not_start_from_scratch(
    tmp_path: Path,
) -> None:
    (save_checkpoint(tmp_path, 1, sample()) / "state.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no checkpoint in .* is whole"):
        load_newest(tmp_path)
    assert load_newest(tmp_path / "absent") is None


def test_order_is_by_step_and_leftovers_are_ignored(tmp_path: Path) -> None:
    for step in (100_000_000, 9, 10):
        save_checkpoint(tmp_path, step, sample(step))
    (tmp_path / ".step-00000011.tmp").mkdir()
    (tmp_path / "step-notes").mkdir()
    names = ["step-00000009", "step-00000010", "step-100000000"]
    assert [path.name for path in checkpoints_in(tmp_path)] == names


def test_pruning_keeps_newest_and_best(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, sample())
    prune(tmp_path, keep=2, best=2)
    assert [int(path.name[5:]) for path in checkpoints_in(tmp_path)] == [2, 4, 5]


def test_a_path_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a run folder nor a checkpoint"):
        find_checkpoint(str(tmp_path / "absent"))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="has not saved a checkpoint yet"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_state_survives_packing(kind: type[torch.optim.Optimizer]) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return model, kind(model.parameters(), lr=0.1, **options)  # type: ignore[call-arg]

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    other, restored = make()
    other.load_state_dict(model.state_dict())
    tensors, plain = pack_optimizer(copy.deepcopy(optimizer.state_dict()))
    restored.load_state_dict(unpack_optimizer(tensors, json.loads(json.dumps(plain))))
    for _ in range(3):
        step(model, optimizer)
        step(other, restored)
    assert torch.equal(model.weight, other.weight)  # type: ignore[arg-type]
