"""After a power cut at any moment of a save, the newest saved checkpoint is present and intact."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_dist.storage.checkpoint import checkpoints_in, load_checkpoint, load_newest, prune
from cifar_dist.storage.checkpoint import save_checkpoint as save
from tests.faults.power import recorded, states, write
from tests.test_checkpoint import sample

Saved = tuple[int, float]  # step, and the value of all weights
SAVES: list[Saved] = [(1, 1.0), (2, 2.0), (2, 2.5), (3, 3.0)]  # one is replaced


class Saves:
    """A recorded sequence of saves; `allowed[n]`: checkpoints that may be newest after n events."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.allowed: list[set[Saved | None]] = [set()]
        last: Saved | None = None
        with recorded(folder) as self.recording:
            for step, value in SAVES:
                save(folder, step, sample(value))
                self._allow({last, (step, value)})
                last = step, value
                prune(folder, keep=1, best=None)
                self._allow({last})
        self._allow({last})

    def _allow(self, newest: set[Saved | None]) -> None:
        self.recording.look()
        self.allowed += [newest] * (len(self.recording) + 1 - len(self.allowed))


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Saves:
    return Saves(tmp_path_factory.mktemp("saves") / "checkpoints")


def left(saves: Saves, in_order: bool, folder: Path) -> Iterator[tuple[Path, set[Saved | None]]]:
    """Yield each folder that a power cut may leave, with the checkpoints that may be newest."""
    seen: set[str] = set()
    for end in range(1, len(saves.recording) + 1):
        for tree in states(saves.recording, end, in_order):
            key = repr((tree, sorted(map(str, saves.allowed[end]))))
            if key not in seen:
                seen.add(key)
                place = folder / f"{len(seen)}"
                write(tree, place)
                yield place, saves.allowed[end]


def newest_in(folder: Path) -> Saved | None:
    found = load_newest(folder)
    if found is None:
        return None
    weights = found[1].model["w"]
    assert (weights == weights[0, 0]).all()
    return int(found[0].name.split("-")[-1].removesuffix(".old")), float(weights[0, 0])


@pytest.mark.fault(82)
def test_the_last_save_that_returned_survives_a_power_cut(saves: Saves, tmp_path: Path) -> None:
    met = set()
    for folder, allowed in left(saves, False, tmp_path):
        newest = newest_in(folder)
        assert newest in allowed, (folder.name, sorted(p.name for p in folder.iterdir()))
        met.add(newest)
    assert met == {None, *SAVES}


def test_no_partial_checkpoint_is_found_after_a_power_cut(saves: Saves, tmp_path: Path) -> None:
    for folder, _ in left(saves, True, tmp_path):
        for path in checkpoints_in(folder):
            load_checkpoint(path)


def test_saving_goes_on_after_a_power_cut(saves: Saves, tmp_path: Path) -> None:
    for folder, _ in left(saves, True, tmp_path):
        save(folder, 5, sample(5.0))
        prune(folder, keep=1, best=None)
        assert [path.name for path in folder.iterdir()] == ["step-00000005"]
        assert newest_in(folder) == (5, 5.0)


def test_the_simulation_loses_only_data_that_is_not_synced(tmp_path: Path) -> None:
    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def possible() -> set[tuple[tuple[str, bytes], ...]]:
        recording.look()
        trees = states(recording, len(recording), in_order=False)
        return {tuple(sorted(tree.items())) for tree in trees}

    a, b = tmp_path / "a", tmp_path / "b"
    with recorded(tmp_path) as recording:
        a.write_bytes(b"1")
        assert possible() == {(), (("a", b""),), (("a", b"\0"),), (("a", b"1"),)}
        sync(tmp_path)
        assert possible() == {(("a", b""),), (("a", b"\0"),), (("a", b"1"),)}
        sync(a)
        assert possible() == {(("a", b"1"),)}
        b.write_bytes(b"2")
        sync(b)
        assert possible() == {(("a", b"1"),), (("a", b"1"), ("b", b"2"))}
        os.replace(b, a)
        assert possible() == {(("a", b"1"),), (("a", b"1"), ("b", b"2")), (("a", b"2"),)}
        sync(tmp_path)
        os.remove(a)
        assert possible() == {(), (("a", b"2"),)}
