"""Output on a terminal during long work: lines that fit its width, and a sign of life."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

SOON, LATER = 10, 60  # seconds before the first line and between further lines, if the output is not a terminal
_open: list[object] = []  # work in progress, the outermost first, which is the only one that is shown
quiet = False  # True on all processes of a run but the first


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def counted(n: int, what: str) -> str:
    """`1 step`, `1,200 steps`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def columns(stream) -> int:
    """Number of characters that a line may have without wrapping on the terminal; 79 elsewhere."""
    try:
        return max(os.get_terminal_size(stream.fileno()).columns - 1, 1)
    except (OSError, ValueError):
        return 79


@contextlib.contextmanager
def doing(what: str, stream=None) -> Iterator[None]:
    """Show on standard error that long work is running, and for how long.

    On a terminal one line counts the seconds, and disappears when the work ends. Elsewhere a line is written after 10
    seconds and then every minute, so that short work leaves no trace in a file.

    Args:
        what: The work, such as "compiling the training step".
        stream: Where to write; None: standard error.
    """
    stream, begin, ended, me = stream or sys.stderr, time.perf_counter(), threading.Event(), object()
    live, shown = stream.isatty(), False

    def tick():
        nonlocal shown
        wait = 1 if live else SOON
        while not ended.wait(wait):
            if _open[0] is me and not quiet:
                took = clock(time.perf_counter() - begin)
                line = f"{what} {took}"[: columns(stream)]
                stream.write(f"\r\033[K{line}" if live else f"{what}: {took} so far\n")
                stream.flush()
                shown = live
            wait = 1 if live else LATER

    _open.append(me)
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _open.remove(me)
        if shown:
            stream.write("\r\033[K")
            stream.flush()
