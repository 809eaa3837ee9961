"""Read files of others and limit their programs: fields of JSON files by type and range, tensors, and code that may not
end.

A kind is a function of a value. It returns None if the value is of the kind, and otherwise a description of what was
expected.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ftjax.errors import FtjaxError
from ftjax.files import mode

LARGEST = 1 << 28  # most bytes of a JSON file; an index of a hundred thousand tensors has 10 MB
MOST_MEMORY = 1 << 32  # bytes that foreign code may take
TICK = 0.1  # seconds between checks of its time and memory
SIZE = 2**31 - 1  # the largest size of an array's axis
Kind = Callable[[object], str | None]


def _that(good: Callable[[object], bool], expected: str) -> Kind:
    return lambda value: None if good(value) else expected


string, flag = _that(lambda x: isinstance(x, str), "a text"), _that(lambda x: isinstance(x, bool), "true or false")
null, anything = _that(lambda x: x is None, "null"), _that(lambda x: True, "")


def whole(least: int = 0, most: int = SIZE) -> Kind:
    """A whole number in a range, both ends included."""
    good = lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most  # noqa: E731
    return _that(good, f"a whole number from {least} to {most:,}")


def number(least: float = -math.inf, above: float = -math.inf) -> Kind:
    """A finite number that float32 holds, at least `least` and greater than `above`."""
    bound = f" above {above:g}" if above > -math.inf else f" at least {least:g}" if least > -math.inf else ""

    def good(x):
        return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 3e38 and x > above and x >= least

    return _that(good, f"a finite number{bound}")


def either(*kinds: Kind) -> Kind:
    """Any one of several kinds."""

    def problem(value):
        found = [kind(value) for kind in kinds]
        return " or ".join(found) if all(found) else None

    return problem


def maybe(kind: Kind) -> Kind:
    """A value of a kind, or null."""
    return either(kind, null)


def listed(kind: Kind = anything) -> Kind:
    """A list whose entries are all of one kind."""

    def problem(value):
        if not isinstance(value, list | tuple):
            return "a list"
        wrong = next(((i, expected) for i, entry in enumerate(value) if (expected := kind(entry))), None)
        return wrong and f"a list whose entry {wrong[0]} is {wrong[1]}"

    return problem


def mapped(kind: Kind = anything, **fields: Kind) -> Kind:
    """An object. `fields` gives the kinds of some of its fields, which may be missing, and `kind` that of all other
    fields."""

    def problem(value):
        if not isinstance(value, dict):
            return "an object"
        wrong = ((key, fields.get(key, kind)(entry)) for key, entry in value.items())
        key, expected = next(((key, expected) for key, expected in wrong if expected), (None, None))
        return expected and f"an object in which {key!r:.60} is {expected}"

    return problem


def check_fields(value: dict, fields: dict[str, Kind], where) -> None:
    """Check the types and ranges of an object's fields.

    Args:
        value: The object.
        fields: {key: kind} of the fields that are read; a key may be missing.
        where: The file, with which the message starts.

    Raises:
        FtjaxError: If a field is of another kind. It names the field, what was expected and what was found.
    """
    for key, kind in fields.items():
        if key in value and (expected := kind(value[key])):
            raise FtjaxError(f"{where}: {key} = {value[key]!r:.100}; expected {expected}")


def read_text(file: Path) -> str:
    """The text of a UTF-8 file. Raises FtjaxError if there is no such file, or if it cannot be read or is too large."""
    file = Path(file)
    try:
        if not (found := mode(file)):
            raise FtjaxError(f"{file}: no such file")
        if not stat.S_ISREG(found):  # reading a pipe would wait for a writer
            raise FtjaxError(f"{file}: expected a file, found a folder or a device")
        if file.stat().st_size > LARGEST:
            raise FtjaxError(f"{file}: {file.stat().st_size:,} bytes; expected at most {LARGEST:,}")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FtjaxError(f"{file}: expected UTF-8: {error}") from None
    except OSError as error:
        raise FtjaxError(f"{file}: cannot be read: {error.strerror}") from None


def parse_json(text: str | bytes, where):
    """The value of a JSON text. where: its file, for the message. Raises FtjaxError if the text is not valid JSON, or
    nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise FtjaxError(f"{where}: invalid JSON: nested too deeply") from None
    except (ValueError, TypeError) as error:  # also for numbers of thousands of digits, and for what is no text
        raise FtjaxError(f"{where}: invalid JSON: {error}") from None


def read_json(file: Path, **fields: Kind) -> dict:
    """The object in a JSON file.

    Args:
        file: The file.
        fields: Kinds of the fields that the caller reads, see `check_fields`.

    Raises:
        FtjaxError: If there is no file, no valid JSON, no object, or a field of another kind.
    """
    value = parse_json(read_text(file), file)
    if not isinstance(value, dict):
        raise FtjaxError(f"{file}: expected a JSON object, found {type(value).__name__}")
    check_fields(value, fields, file)
    return value


def read_tensors(file: Path) -> dict:
    """The tensors of a safetensors file as numpy arrays, by name.

    Raises:
        FtjaxError: If the file is not a whole safetensors file, or if a tensor is not of floating point or holds NaN or
            infinity.
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
    except FtjaxError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise FtjaxError(f"{file}: not a whole safetensors file: {error}; fetch it again") from None
    for name, x in tensors.items():
        if not np.isfinite(x).all():
            raise FtjaxError(f"{file}: tensor {name} holds values that are NaN or infinite")
    return tensors


@contextlib.contextmanager
def limited(what: str, seconds: float = 10.0) -> Iterator[None]:
    """Limit the time and memory of foreign code, and turn whatever it raises into one FtjaxError.

    The limits need a signal, so they only apply in the main thread of a process on POSIX.

    Args:
        what: The code, with which the message starts; empty: the message is what the code raised.
        seconds: The longest time that it may take.

    Raises:
        FtjaxError: For any error in the block, and if it takes longer, or takes MOST_MEMORY more than the process's
            peak so far.
    """
    try:
        with _watched(seconds):
            yield
    except FtjaxError:
        raise
    except BaseException as error:  # a panic in a tokenizer's Rust code is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        reason = f"{str(error) or type(error).__name__:.500}"
        raise FtjaxError(f"{what}: {reason}" if what else reason) from None


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
    left, interval = signal.setitimer(signal.ITIMER_REAL, TICK, TICK)  # an earlier timer, such as a test runner's
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # before the handler goes: the signal alone ends a process
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begin), 1e-3), interval)
