"""A user's own functions, named `file.py:function` in the config.

Only the user may name code: in a Python config, on the command line, or as an argument. A run folder may come from
anyone, and so may every other JSON file; a function that only such a file names is not run.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ftjax.errors import FtjaxError, nearest

ERRORS = (Exception, SystemExit)  # what a user's own code may raise: anything, but a stop from outside


def named(values, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, `file.py:function`) of each function in `config.to_dict()`, in whatever field it stands, including
    entries of a mixture, a comparison or stages."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from named(value, f"{key}.{name}".lstrip("."))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from named(value, key)
    elif isinstance(values, str) and Path(values.rpartition(":")[0]).suffix == ".py":
        yield key, values


def not_named_by(overrides, values) -> list[tuple[str, str]]:
    """The functions that a config names and that no override `dotted.key=value` of the command line names too."""
    return [(key, function) for key, function in named(values) if not any(function in text for text in overrides)]


def listed(functions: list[tuple[str, str]]) -> str:
    """These functions and their keys, as text for a person."""
    return ", ".join(f"{key} {function!r}" for key, function in functions)


def load(named: str, key: str) -> Callable:
    """The function that `file.py:function` names. Raises FtjaxError, naming the config's `key`, if there is none."""
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise FtjaxError(f'{key}: {named!r}: expected "file.py:name"; {file or named!r} is not a file')
    if path.suffix != ".py":
        raise FtjaxError(f'{key}: {named!r}: expected "file.py:name"; {file} is no Python source')
    spec = importlib.util.spec_from_file_location(f"ftjax_user_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ERRORS as error:
        raise FtjaxError(failed(named, key, error)) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [known for known, value in vars(module).items() if callable(value)]
        raise FtjaxError(f"{key}: {file} has no function {name!r}{nearest(name, functions)}")
    return function


def files(source: Path) -> list[Path]:
    """A file of code, and the modules beside it that it imports, also through each other. Other modules, such as those
    of installed packages, are left out. No code is run."""
    found, todo = [], [source]
    while todo:
        found.append(file := todo.pop())
        tree = None
        with contextlib.suppress(OSError, SyntaxError, ValueError):  # it is refused where it is loaded
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree) if tree else ():
            folder, names = source.parent, [alias.name for alias in getattr(node, "names", ())]
            if isinstance(node, ast.ImportFrom):
                folder = file.parents[node.level - 1] if node.level else folder
                names = [".".join(filter(None, (node.module, name))) for name in names]
            elif not isinstance(node, ast.Import):
                continue
            parts = [name.split(".") for name in names]
            places = {folder.joinpath(*one[: n + 1]) for one in parts for n in range(len(one))}
            able = [path for at in places for path in (at.with_suffix(".py"), at / "__init__.py") if path.is_file()]
            todo += [path for path in sorted(able) if path not in (*found, *todo)]
    return found


_runs: list[dict] = []  # what `once` keeps, for each block of `held` that is running


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within the block, `once` and `loaded` read everything once, and anew in each block: a file that is edited during
    a run does not change what the run computes, and no run begins with what an earlier one has read, or has left in
    the variables of a module."""
    _runs.append({})
    try:
        yield
    finally:
        _runs.pop()


def once(make: Callable, *given) -> Any:
    """What `make(*given)` returns. Within a block of `held` it is called once for the same arguments."""
    kept = _runs[-1] if _runs else {}
    if (make, *given) not in kept:
        kept[make, *given] = make(*given)
    return kept[make, *given]


def loaded(named: str, key: str) -> Callable:
    """As `load`, but a file is run once for each time of its modification; see also `held`."""
    file = Path(named.rpartition(":")[0])
    if _runs:
        return once(load, named, key)
    return _loaded(named, key, file.stat().st_mtime_ns if file.is_file() else None)


@functools.lru_cache
def _loaded(named: str, key: str, state: Any) -> Callable:
    return load(named, key)


def failed(named: str, key: str, error: BaseException) -> str:
    """The error message for an error in the user's code: which error, and at which line."""
    file = os.path.abspath(named.rpartition(":")[0])  # as frames name it, also where `named` is a relative path
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == file else []
    at = f" at line {lines[-1]}" if lines else ""
    kind = "" if isinstance(error, FtjaxError) else f"{type(error).__name__}: "
    return f"{key} {named!r} failed{at}: {kind}{error}"
