"""The user's own networks and losses: `FILE.py:NAME` or `package.module:NAME`.

Code is imported only if the command line, the recipe or a Python caller names it, never because a
checkpoint names it.
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
from contextlib import suppress
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
        module: name of its module in `sys.modules`.
        root: folder of its file or top-level package.
        package: name of the top-level package; "" for a file.
    """

    place: str
    object: Callable[..., Any]
    module: str
    root: Path
    package: str = ""

    def files(self) -> list[Path]:
        """Return the source file and all files of `root` that it imports, also indirectly."""
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
        """Return {path relative to `root`: SHA-256} of the files.

        A class or function defined in a notebook or an interactive session has no file. Its source
        is hashed instead, if Python has it.
        """
        sources = {p.relative_to(self.root).as_posix(): p.read_bytes() for p in self.files()}
        if not sources:
            sources[self.place] = b""
            with suppress(OSError, TypeError):
                sources[self.place] = inspect.getsource(self.object).encode()
        return {name: hashlib.sha256(source).hexdigest() for name, source in sources.items()}

    def fail(self, option: str, error: BaseException) -> UserCodeError:
        """Return a UserCodeError for an exception that this code raised."""
        return own_error(option, self.place, self.root, error)


def _imported_names(path: Path, base: Path) -> set[str]:
    """Return the absolute names of all modules that a source file imports, and of their packages.

    In `from a import b`, b may be a module or an attribute, so both a and a.b are returned.

    Args:
        path: the source file, below `base`.
        base: folder of the top-level modules.
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
    """Return whether `model.name` names the user's own code."""
    return ":" in name


def identity(name: str) -> str:
    """Return the name without the folder of its file, which may change between starts."""
    file, colon, attribute = name.rpartition(":")
    return f"{Path(file).name}{colon}{attribute}" if file.endswith(".py") else name


def from_object(found: Callable[..., Any]) -> UserCode:
    """Return the UserCode of a class or function that a Python caller passes."""
    name = getattr(found, "__qualname__", type(found).__qualname__)
    module = found.__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not (inspect.isclass(found) or inspect.isfunction(found)):
        return UserCode(f"{module}:{name}", found, "", Path("/nowhere"))
    if "." in module:
        package = module.partition(".")[0]
        root = Path(file).resolve().parents[module.count(".") - 1]
        return UserCode(f"{module}:{name}", found, module, root, package)
    return UserCode(f"{file}:{name}", found, module, Path(file).resolve().parent)


def load(place: str, option: str) -> UserCode:
    """Import `FILE.py:NAME` or `package.module:NAME`.

    Args:
        place: FILE is relative to the working directory. Its folder is added to sys.path, as
            `python FILE` does.
        option: the recipe key, for messages.

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
    # The file may have the name of a loaded module, such as types.py.
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
    """Return the folder of a top-level package, or the folder of a top-level module's file."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UsageError(
            f"{option} is {place}, but there is no module '{name}'; a file needs the suffix .py: "
            f"{name}.py:{place.rpartition(':')[2]}"
        )
    folders = list(spec.submodule_search_locations or [])
    return Path(folders[0]).resolve() if folders else Path(spec.origin or "").resolve().parent


def own_error(option: str, place: str, root: Path, error: BaseException) -> UserCodeError:
    """Return a UserCodeError for an exception, with its traceback cut to the user's files."""
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
    """Import the values of recipe keys that name the user's code; return {key: code}."""
    return {
        option: load(place, option) for option, place in places.items() if place and ":" in place
    }


def hashes_of(codes: Mapping[str, UserCode]) -> dict[str, dict[str, str]]:
    """Return {key: {file: SHA-256}} of the user's code."""
    return {option: code.hashes() for option, code in codes.items()}


def copy_files(codes: Mapping[str, UserCode], target: Path) -> None:
    """Copy the user's files into `target` as a record. The copies are never executed."""
    for code in codes.values():
        for path in code.files():
            copy = target / path.relative_to(code.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            replace_file(copy, path.read_bytes())


def require_same(
    recorded: Mapping[str, Mapping[str, str]], codes: Mapping[str, UserCode], place: str
) -> None:
    """Refuse source code that differs from the code of a checkpoint.

    Args:
        recorded: result of `hashes_of` when the checkpoint was saved.
        codes: the code now.
        place: path of the checkpoint, for the message.

    Raises:
        UsageError: names the first file that differs.
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
