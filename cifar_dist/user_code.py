"""The user's own networks and losses: `FILE.py:NAME` or `package.module:NAME`.

Code is imported only from a name that the command line, the recipe or a Python caller gives, never
from a name that a checkpoint holds.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cifar_dist.errors import UsageError, UserCodeError, one_line, require, suggest
from cifar_dist.files import local_path, replace_file

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class UserCode:
    """A class or function of the user's own.

    Attributes:
        place: `FILE.py:NAME` or `package.module:NAME`.
        object: the class or function.
        root: folder of the user's files; their names are relative to it.
    """

    place: str
    object: Callable[..., Any]
    root: Path

    def files(self) -> list[Path]:
        """Return the file that defines the object and the files of `root` imported with it."""
        defining = sys.modules.get(self.object.__module__)
        modules = [m for m in sys.modules.values() if m.__name__ != "__main__" or m is defining]
        files = {getattr(module, "__file__", None) or "" for module in modules}
        return sorted(path for path in map(Path, files) if self._is_own(path))

    def _is_own(self, path: Path) -> bool:
        # torch has modules with names of files that do not exist.
        if path.suffix != ".py" or not path.is_absolute() or not path.is_file():
            return False
        if not path.is_relative_to(self.root) or path.is_relative_to(PACKAGE):
            return False
        installed = Path(sys.prefix).resolve()  # a virtual environment may lie in the folder
        inside = installed.is_relative_to(self.root) and path.is_relative_to(installed)
        return not inside and "site-packages" not in path.relative_to(self.root).parts

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file by its name below `root`.

        A class or function that was typed into a notebook or a terminal has no file: its own source
        is hashed, if Python still has it.
        """
        hashes = {
            path.relative_to(self.root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.files()
        }
        if not hashes:
            try:
                source = inspect.getsource(self.object)
            except (OSError, TypeError):
                source = ""
            hashes[self.place] = hashlib.sha256(source.encode()).hexdigest()
        return hashes

    def fail(self, option: str, error: BaseException) -> UserCodeError:
        """Return an error of this code as the exception that shows it."""
        return own_error(option, self.place, self.root, error)


def is_user_code(name: str) -> bool:
    """Return whether the name of a network means code of the user's own."""
    return ":" in name


def identity(name: str) -> str:
    """Return the name without the folder of its file, which may differ from start to start."""
    file, colon, attribute = name.rpartition(":")
    return f"{Path(file).name}{colon}{attribute}" if file.endswith(".py") else name


def from_object(found: Callable[..., Any]) -> UserCode:
    """Return a class or function of the calling Python program."""
    module = sys.modules.get(found.__module__)
    file = getattr(module, "__file__", None)
    name = getattr(found, "__qualname__", type(found).__qualname__)
    if file is None:
        return UserCode(f"{found.__module__}:{name}", found, Path("/nowhere"))
    return UserCode(f"{file}:{name}", found, Path(file).resolve().parent)


def load(place: str, option: str) -> UserCode:
    """Import `FILE.py:NAME` or `package.module:NAME`.

    Args:
        place: FILE is relative to the working directory; its folder is added to sys.path, as if
            Python had been started with it.
        option: the recipe key that names it, for messages.

    Raises:
        UserCodeError: the import raised an exception.
        UsageError: there is no such file, module or name.
    """
    file, _, name = place.rpartition(":")
    if file.endswith(".py"):
        path = local_path(file).resolve()
        require(
            path.is_file(),
            f"{option} is {place}, but there is no file '{file}' in {os.getcwd()}",
        )
        module, root = _import_file(path, option, place), path.parent
    else:
        module, root = _import_module(file, option, place)
    found: Any = module
    for part in name.split("."):
        known = [key for key, value in vars(found).items() if callable(value)]
        if not hasattr(found, part):
            raise UsageError(
                f"{option} is {place}, but {file} defines no {part}{suggest(part, known)}"
            )
        found = getattr(found, part)
    require(callable(found), f"{option} is {place}, which is neither a class nor a function")
    return UserCode(place, found, root)


def _import_file(path: Path, option: str, place: str) -> ModuleType:
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    loaded = getattr(sys.modules.get(path.stem), "__file__", None)
    # A file may have the name of a module that is loaded, such as types.py.
    free = path.stem not in sys.modules or (loaded and Path(loaded).resolve() == path)
    name = path.stem if free else f"{path.stem}_of_user"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise own_error(option, place, path.parent, error) from error
    return module


def _import_module(name: str, option: str, place: str) -> tuple[ModuleType, Path]:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    top = name.partition(".")[0]
    try:
        package = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        package = None
    if package is None:
        raise UsageError(
            f"{option} is {place}, but there is no module '{top}'; write a file's name with .py: "
            f"{top}.py:{place.rpartition(':')[2]}"
        )
    root = Path(package.origin or next(iter(package.submodule_search_locations or ["."]))).resolve()
    root = root if root.is_dir() else root.parent
    try:
        return importlib.import_module(name), root
    except Exception as error:
        raise own_error(option, place, root, error) from error


def own_error(option: str, place: str, root: Path, error: BaseException) -> UserCodeError:
    """Return an exception of the user's code with its traceback, cut to the user's files."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve().is_relative_to(root)
        and not Path(frame.filename).resolve().is_relative_to(PACKAGE)
    ]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)]
    lines += traceback.format_exception_only(error)
    return UserCodeError(
        f"{option} {place} raised {type(error).__name__}: {one_line(error)}{where}",
        "".join(lines),
    )


def load_all(places: Mapping[str, str | None]) -> dict[str, UserCode]:
    """Import the user's code among the values of recipe keys: {key: value} to {key: code}."""
    return {
        option: load(place, option) for option, place in places.items() if place and ":" in place
    }


def hashes_of(codes: Mapping[str, UserCode]) -> dict[str, dict[str, str]]:
    """Return {key: {file: SHA-256}} of the user's code."""
    return {option: code.hashes() for option, code in codes.items()}


def copy_files(codes: Mapping[str, UserCode], target: Path) -> None:
    """Copy the user's files below `target`, for reading; nothing executes the copies."""
    for code in codes.values():
        for path in code.files():
            copy = target / path.relative_to(code.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            replace_file(copy, path.read_bytes())


def require_same(
    recorded: Mapping[str, Mapping[str, str]], codes: Mapping[str, UserCode], place: str
) -> None:
    """Refuse code that differs from that of a checkpoint.

    Args:
        recorded: `hashes_of` when the checkpoint was saved.
        place: the checkpoint, for the message.

    Raises:
        UsageError: naming the first file that differs.
    """
    for option, code in codes.items():
        before, now = recorded.get(option, {}), code.hashes()
        for name in sorted({*before, *now}):
            what = (
                "is missing" if name not in now else "is new" if name not in before else "changed"
            )
            require(
                before.get(name) == now.get(name),
                f"the checkpoint {place} was trained with other source code: {name} {what}; "
                "restore it from code/ in the run folder, or start a new run with another --out",
            )
