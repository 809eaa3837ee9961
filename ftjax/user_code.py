"""Functions of a user's own, named `file.py:function` in the config."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path

from ftjax.errors import FtjaxError, nearest


def load(named: str, key: str) -> Callable:
    """The function that `file.py:function` names. Raises FtjaxError, naming the config's `key`, where there is none."""
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise FtjaxError(f'{key}: {named!r}: expected "file.py:name"; {file or named!r} is not a file')
    spec = importlib.util.spec_from_file_location(f"ftjax_user_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may raise anything
        raise FtjaxError(failed(named, key, error)) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise FtjaxError(f"{key}: {file} has no function {name!r}{nearest(name, vars(module))}")
    return function


def failed(named: str, key: str, error: Exception) -> str:
    """What is said of an error that the user's code raised: which, and at which of its lines."""
    file = str(Path(named.rpartition(":")[0]))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == file else []
    at = f" at line {lines[-1]}" if lines else ""
    kind = "" if isinstance(error, FtjaxError) else f"{type(error).__name__}: "
    return f"{key} {named!r} failed{at}: {kind}{error}"
