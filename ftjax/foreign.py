"""Reading what others wrote: fields of JSON files by type and range, tensors, and programs that may not end.

A kind is a function of a value that returns what was expected where the value is something else, and otherwise None.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ftjax.errors import FtjaxError

LARGEST = 1 << 28  # bytes of a JSON file; an index of a hundred thousand tensors has 10 MB
MOST_MEMORY = 1 << 32  # bytes that a program of others may take
TICK = 0.1  # seconds between looks at what it takes
SIZE = 2**31 - 1  # the largest size of an array's axis
Kind = Callable[[object], str | None]


def _of_type(kind: type, expected: str) -> Kind:
    return lambda value: None if isinstance(value, kind) else expected


string, flag = _of_type(str, "a text"), _of_type(bool, "true or false")
anything: Kind = lambda value: None  # noqa: E731


def whole(least: int = 0, most: int = SIZE) -> Kind:
    """A whole number in a range, both ends included."""

    def problem(value):
        good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        return None if good else f"a whole number from {least} to {most:,}"

    return problem


def number(least: float | None = None, above: float | None = None) -> Kind:
    """A finite number that float32 holds, at least `least` or greater than `above`."""

    def problem(value):
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38
        good = good and math.isfinite(value) and (above is None or value > above) and (least is None or value >= least)
        bound = f" above {above:g}" if above is not None else f" at least {least:g}" if least is not None else ""
        return None if good else f"a finite number{bound}"

    return problem


def either(*kinds: Kind) -> Kind:
    """Any one of several kinds."""

    def problem(value):
        found = [kind(value) for kind in kinds]
        return " or ".join(found) if all(found) else None

    return problem


null = _of_type(type(None), "null")


def maybe(kind: Kind) -> Kind:
    """A kind, or null."""
    return either(kind, null)


def listed(kind: Kind = anything) -> Kind:
    """A list whose entries are of one kind."""

    def problem(value):
        if not isinstance(value, list | tuple):
            return "a list"
        wrong = next(((i, told) for i, entry in enumerate(value) if (told := kind(entry))), None)
        return wrong and f"a list whose entry {wrong[0]} is {wrong[1]}"

    return problem


def mapped(kind: Kind = anything, **fields: Kind) -> Kind:
    """An object; fields: kinds of some of its fields, where it has them; kind: of all the others."""

    def problem(value):
        if not isinstance(value, dict):
            return "an object"
        wrong = ((key, fields.get(key, kind)(entry)) for key, entry in value.items())
        key, told = next(((key, told) for key, told in wrong if told), (None, None))
        return told and f"an object in which {key!r:.60} is {told}"

    return problem


def check_fields(value: dict, fields: dict[str, Kind], where) -> None:
    """Refuse an object with a field of another type or range than its reader takes.

    Args:
        value: the object.
        fields: key -> kind, for those that are read; a key may be missing.
        where: what the message starts with: the file.

    Raises:
        FtjaxError: naming the field, what was expected and what was found.
    """
    for key, kind in fields.items():
        if key in value and (told := kind(value[key])):
            raise FtjaxError(f"{where}: {key} = {value[key]!r:.100}; expected {told}")


def read_text(file: Path) -> str:
    """The text of a UTF-8 file of others. Raises FtjaxError where there is no such file, or it cannot be read."""
    file = Path(file)
    try:
        if not file.exists():
            raise FtjaxError(f"{file}: no such file")
        if not file.is_file():  # a pipe would be waited for
            raise FtjaxError(f"{file}: expected a file, found a folder or a device")
        if file.stat().st_size > LARGEST:
            raise FtjaxError(f"{file}: {file.stat().st_size:,} bytes; expected at most {LARGEST:,}")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FtjaxError(f"{file}: expected UTF-8: {error}") from None
    except OSError as error:
        raise FtjaxError(f"{file}: cannot be read: {error.strerror}") from None


def parse_json(text: str | bytes, where):
    """The value of a JSON text. Raises FtjaxError for what is none, or none that can be held; where: its file."""
    try:
        return json.loads(text)
    except RecursionError:
        raise FtjaxError(f"{where}: invalid JSON: nested too deeply") from None
    except ValueError as error:  # also numbers of thousands of digits, and bytes that are not UTF-8
        raise FtjaxError(f"{where}: invalid JSON: {error}") from None


def read_json(file: Path, **fields: Kind) -> dict:
    """The object in a JSON file.

    Args:
        file: the file.
        fields: kinds of the fields that the caller reads, see `check_fields`.

    Raises:
        FtjaxError: where there is no file, no JSON, no object, or a field of another kind.
    """
    value = parse_json(read_text(file), file)
    if not isinstance(value, dict):
        raise FtjaxError(f"{file}: expected a JSON object, found {type(value).__name__}")
    check_fields(value, fields, file)
    return value


def read_tensors(file: Path) -> dict:
    """The tensors of a safetensors file as numpy arrays, by name.

    Raises:
        FtjaxError: where it is no whole file, and for a tensor that is not of floating point, or holds NaN or infinity.
    """
    import ml_dtypes  # noqa: F401  gives numpy, and so safetensors, the name `bfloat16`
    import numpy as np
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    try:
        with safe_open(file, "numpy") as f:
            kinds = {name: f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118  not a dict
        for name, kind in kinds.items():
            if kind not in ("F64", "F32", "BF16", "F16"):
                raise FtjaxError(f"{file}: tensor {name} is {kind}, expected one of F64, F32, BF16, F16")
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, FtjaxError):
            raise
        raise FtjaxError(f"{file}: not a whole safetensors file: {error}; fetch it again") from None
    for name, x in tensors.items():
        if not np.isfinite(x).all():
            raise FtjaxError(f"{file}: tensor {name} holds values that are NaN or infinite")
    return tensors


@contextlib.contextmanager
def limited(what: str, seconds: float = 10.0) -> Iterator[None]:
    """Stop a program of others that does not end, or fills the memory; whatever it raises becomes one FtjaxError.

    The limits hold in a process's main thread on POSIX alone, since they need a signal; elsewhere there are none.

    Args:
        what: the program, with which the message starts.
        seconds: the longest time that it may take.

    Raises:
        FtjaxError: for any error in the block, and where it takes longer or MOST_MEMORY more than the process has had.
    """
    try:
        with _watched(seconds):
            yield
    except FtjaxError:
        raise
    except BaseException as error:  # a fault in the Rust code of a tokenizer is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise FtjaxError(f"{what}: {str(error) or type(error).__name__:.500}") from None


@contextlib.contextmanager
def _watched(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    import resource

    def memory():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    end, most = time.monotonic() + seconds, memory() + MOST_MEMORY

    def look(number, frame):
        if time.monotonic() > end:
            raise TimeoutError(f"takes longer than {seconds:g} s")
        if memory() > most:
            raise MemoryError(f"takes more than {MOST_MEMORY:,} bytes of memory")

    before, begin = signal.signal(signal.SIGALRM, look), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, TICK, TICK)  # somebody else's, such as a test runner's
    try:
        yield
    finally:
        left = max(left - (time.monotonic() - begin), 1e-3) if left else 0
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, interval)
