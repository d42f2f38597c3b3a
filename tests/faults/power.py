"""Simulate power cuts: the states of a folder that POSIX allows after a recorded sequence of calls.

All calls of `os` that change a folder or sync a file are recorded, with the content of all files
before and after each call. Data that was written but not synced may be lost.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

CHANGES = ("mkdir", "rename", "replace", "rmdir", "unlink", "remove", "link", "symlink")
SYNCS = ("fsync", "fdatasync")
ROOT = 0  # number of the recorded folder
Entries = dict[str, int]  # of a folder: the number of each file or folder in it
Snapshot = dict[int, bytes | Entries]  # by number: the content of a file, or a folder's entries
Tree = dict[str, Any]  # by name: the content of a file, or the tree of a folder


class Change(NamedTuple):
    """An atomic change of a folder: an entry was added, removed (`node` is None) or renamed."""

    name: str
    node: int | None
    before: str | None = None


@dataclass
class Recording:
    """The recorded events in a folder.

    Attributes:
        snapshots: the folder as seen by a running process, after each event.
        synced: for each event, the number of the file or folder that it synced, or None.
    """

    folder: Path
    snapshots: list[Snapshot] = field(default_factory=list)
    synced: list[int | None] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)  # by inode
    _count: int = 0

    def __len__(self) -> int:
        return len(self.snapshots)

    def look(self) -> None:
        """Record an event if anything has changed."""
        seen: dict[int, int] = {}
        snapshot: Snapshot = {}
        self._walk(self.folder, seen, snapshot)
        self._numbers = seen  # a freed inode may be reused for another file
        if not self.snapshots or snapshot != self.snapshots[-1]:
            self.snapshots.append(snapshot)
            self.synced.append(None)

    def sync(self, descriptor: int) -> None:
        """Record that a file or folder is now on disk."""
        self.look()
        number = self._numbers.get(os.fstat(descriptor).st_ino)
        if number is not None:
            self.snapshots.append(self.snapshots[-1])
            self.synced.append(number)

    def _walk(self, path: Path, seen: dict[int, int], snapshot: Snapshot) -> int:
        inode = path.lstat().st_ino
        if inode not in self._numbers:
            self._numbers[inode] = self._count
            self._count += 1
        number = seen[inode] = self._numbers[inode]
        if path.is_dir():
            entries = sorted(path.iterdir())
            snapshot[number] = {p.name: self._walk(p, seen, snapshot) for p in entries}
        else:
            snapshot[number] = path.read_bytes()
        return number


@contextmanager
def recorded(folder: Path) -> Iterator[Recording]:
    """Record the events in `folder` within the block. Syncs are recorded but not performed."""
    recording = Recording(folder)
    recording.look()

    def changing(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            recording.look()
            result = function(*arguments, **options)
            recording.look()
            return result

        return call

    with mock.patch.multiple(
        os,
        **{name: changing(getattr(os, name)) for name in CHANGES},
        **dict.fromkeys(SYNCS, recording.sync),
    ):
        yield recording
    recording.look()


def states(recording: Recording, end: int, in_order: bool) -> Iterator[Tree]:
    """Yield the states that a power cut after the first `end` events may leave.

    Data written to a file since its last sync may be lost, zeros, or present.

    Args:
        in_order: whether changes of folders reach the disk in order, and any sync also writes all
            earlier changes, as with the journal of ext4, XFS or Btrfs. Otherwise any change since
            the last sync of the folder may be missing.
    """
    contents, folders, pending = _durable(recording, end)
    now = recording.snapshots[end - 1]
    if in_order:
        last = max((i for i in range(end) if recording.synced[i] is not None), default=0)
        trees: Iterable[Snapshot] = recording.snapshots[last:end]
    else:
        trees = (
            {n: _changed(entries, chosen.get(n, others[n])) for n, entries in folders.items()}
            for others in (pending, {number: [] for number in folders})
            for chosen in (
                {number: kept} for number in folders for kept in _choices(pending[number])
            )
        )
    for tree in trees:
        for how in ("lost", "zeros", "there"):
            files = {number: _content(now, contents, number, how) for number in contents}
            yield _built(ROOT, {k: v for k, v in tree.items() if isinstance(v, dict)}, files)


def write(tree: Tree, folder: Path) -> None:
    """Write a tree to a new folder."""
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def _durable(
    recording: Recording, end: int
) -> tuple[dict[int, bytes], dict[int, Entries], dict[int, list[Change]]]:
    """Return the data that is certainly on disk, and each folder's changes since its last sync."""
    contents: dict[int, bytes] = {}
    folders: dict[int, Entries] = {}
    pending: dict[int, list[Change]] = {}
    before: Snapshot = {}
    for index in range(end):
        snapshot, synced = recording.snapshots[index], recording.synced[index]
        for number, value in snapshot.items():
            if isinstance(value, bytes):
                contents.setdefault(number, b"" if index else value)
            else:
                folders.setdefault(number, {} if index else value)
                old = before.get(number, {}) if index else value
                assert isinstance(old, dict)
                pending.setdefault(number, []).extend(_changes(old, value))
        if synced is not None:
            value = snapshot[synced]
            if isinstance(value, bytes):
                contents[synced] = value
            else:
                folders[synced], pending[synced] = value, []
        before = snapshot
    return contents, folders, pending


def _changes(old: Entries, new: Entries) -> Iterator[Change]:
    gone = {number: name for name, number in old.items() if number not in new.values()}
    moved = {number: name for name, number in old.items() if new.get(name) != number}
    for name, number in new.items():
        if old.get(name) != number:
            yield Change(name, number, moved.get(number))
    for name in gone.values():
        if name not in new:
            yield Change(name, None)


def _choices(changes: list[Change]) -> Iterator[list[Change]]:
    """Yield every prefix of the changes, all changes but one, and each change alone."""
    for count in range(len(changes) + 1):
        yield changes[:count]
    for place in range(len(changes)):
        yield changes[:place] + changes[place + 1 :]
        yield [changes[place]]


def _changed(entries: Entries, changes: Iterable[Change]) -> Entries:
    result = dict(entries)
    for name, node, before in changes:
        if before is not None:
            result.pop(before, None)
        if node is None:
            result.pop(name, None)
        else:
            result[name] = node
    return result


def _content(now: Snapshot, durable: dict[int, bytes], number: int, how: str) -> bytes:
    written = now.get(number, durable[number])
    assert isinstance(written, bytes)
    if how == "lost" or written == durable[number]:
        return durable[number]
    return bytes(len(written)) if how == "zeros" else written


def _built(number: int, folders: dict[int, Any], files: dict[int, bytes]) -> Tree:
    return {
        name: _built(node, folders, files) if node in folders else files[node]
        for name, node in folders[number].items()
    }
