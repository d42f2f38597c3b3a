"""The user's own networks and losses: `FILE.py:NAME` or `package.module:NAME`.

Code is imported only from a name that the command line, the recipe or a Python caller gives, never
from a name that a checkpoint holds.
"""

import ast
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
        module: name of its module, in `sys.modules`.
        root: folder of the file, or of the package, that holds it.
        package: name of the top-level package; "" for a file.
    """

    place: str
    object: Callable[..., Any]
    module: str
    root: Path
    package: str = ""

    def files(self) -> list[Path]:
        """Return the source file and every file of `root` that it imports, directly or not."""
        file = getattr(sys.modules.get(self.module), "__file__", None)
        base = self.root.parent if self.package else self.root
        waiting, found = [Path(file).resolve()] if file else [], set[Path]()
        while waiting:
            path = waiting.pop()
            if path not in found:
                found.add(path)
                for name in _imported_names(path, base):
                    stem = base.joinpath(*name.split("."))
                    sources = [stem.with_suffix(".py"), stem / "__init__.py"]
                    waiting += [s for s in sources if s.is_relative_to(self.root) and s.is_file()]
        return sorted(path for path in found if not path.is_relative_to(PACKAGE))

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file by its name below `root`.

        A class or function that was typed into a notebook or a terminal has no file: its own source
        is hashed, if Python still has it.
        """
        files = self.files()
        if files:
            return {
                path.relative_to(self.root).as_posix(): hashlib.sha256(
                    path.read_bytes()
                ).hexdigest()
                for path in files
            }
        try:
            source = inspect.getsource(self.object)
        except (OSError, TypeError):
            source = ""
        return {self.place: hashlib.sha256(source.encode()).hexdigest()}

    def fail(self, option: str, error: BaseException) -> UserCodeError:
        """Return an error of this code as the exception that shows it."""
        return own_error(option, self.place, self.root, error)


def _imported_names(path: Path, base: Path) -> set[str]:
    """Return the absolute names of everything that a source file imports, and of its packages.

    Of `from a import b`, b may be a module or a name in one, so both a and a.b are returned.

    Args:
        base: folder in which top-level names are found.
    """
    here = path.relative_to(base).with_suffix("").parts
    names = {".".join(here)}
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = here[: len(here) - node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in names]
    return {".".join(name[:end]) for name in parts for end in range(1, len(name) + 1)}


def is_user_code(name: str) -> bool:
    """Return whether the name of a network means code of the user's own."""
    return ":" in name


def identity(name: str) -> str:
    """Return the name without the folder of its file, which may differ from start to start."""
    file, colon, attribute = name.rpartition(":")
    return f"{Path(file).name}{colon}{attribute}" if file.endswith(".py") else name


def from_object(found: Callable[..., Any]) -> UserCode:
    """Return a class or function of the calling Python program."""
    name = getattr(found, "__qualname__", type(found).__qualname__)
    module = found.__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return UserCode(f"{module}:{name}", found, module, Path("/nowhere"))
    if "." in module:
        package = module.partition(".")[0]
        root = Path(file).resolve().parents[module.count(".") - 1]
        return UserCode(f"{module}:{name}", found, module, root, package)
    return UserCode(f"{file}:{name}", found, module, Path(file).resolve().parent)


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
    package = ""
    if file.endswith(".py"):
        path = local_path(file).resolve()
        require(
            path.is_file(),
            f"{option} is {place}, but there is no file '{file}' in {os.getcwd()}",
        )
        root = path.parent
        module = _import_file(path, option, place)
    else:
        package, _, inner = file.partition(".")
        root = _find_package(package, option, place)
        package = package if inner or (root / "__init__.py").exists() else ""
        try:
            module = importlib.import_module(file)
        except Exception as error:
            raise own_error(option, place, root, error) from error
    found: Any = module
    for part in name.split("."):
        known = [key for key, value in vars(found).items() if callable(value)]
        if not hasattr(found, part):
            raise UsageError(
                f"{option} is {place}, but {file} defines no {part}{suggest(part, known)}"
            )
        found = getattr(found, part)
    require(callable(found), f"{option} is {place}, which is neither a class nor a function")
    return UserCode(place, found, module.__name__, root, package)


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


def _find_package(name: str, option: str, place: str) -> Path:
    """Return the folder of a top-level package, or that of a module which is a single file."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UsageError(
            f"{option} is {place}, but there is no module '{name}'; write a file's name with .py: "
            f"{name}.py:{place.rpartition(':')[2]}"
        )
    folders = list(spec.submodule_search_locations or [])
    return Path(folders[0]).resolve() if folders else Path(spec.origin or "").resolve().parent


def own_error(option: str, place: str, root: Path, error: BaseException) -> UserCodeError:
    """Return an exception of the user's code with its traceback, cut to the user's files."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(root)
        and not Path(frame.filename).is_relative_to(PACKAGE)
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
