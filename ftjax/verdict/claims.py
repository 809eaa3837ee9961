"""Who runs what, where several processes or hosts share a folder: one file a claim, that exists or does not.

A claim is made by a link, which fails where there is one, and its owner touches it while it lives. What a process of
this host that has died left behind, and what nobody has touched for `stale` seconds, is taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

STALE = 600.0  # seconds without a sign of life of an owner after which a claim is free
WAIT = 1.0  # seconds between looks at a claim of somebody else


@contextlib.contextmanager
def claimed(path: Path, stale: float = STALE) -> Iterator[bool]:
    """Whether `path` is this process's while the block runs; False where another one has it. The folder must exist."""
    if not (_take(path) or (_left(path, stale) and _take(path))):
        yield False
        return
    ended = threading.Event()
    alive = threading.Thread(target=_touch, args=(path, stale / 4, ended), daemon=True)
    alive.start()
    try:
        yield True
    finally:
        ended.set()
        alive.join()
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(path: Path, stale: float = STALE) -> Iterator[None]:
    """As `claimed`, once others have let go of it."""
    while True:
        with claimed(path, stale) as mine:
            if mine:
                yield
                return
        time.sleep(WAIT)


def owner(path: Path) -> str:
    """Who has a claim, for a person."""
    try:
        said = json.loads(path.read_text())
    except FileNotFoundError:
        return "nobody"
    return f"process {said['pid']} of {said['host']}"


def _take(path: Path) -> bool:
    me = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    draft = path.with_name(f"{path.name}.{me}.part")  # whole before anybody sees it
    draft.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _left(path: Path, stale: float) -> bool:
    """Take away a claim that nobody keeps; whether it was there, and this process was the one that took it."""
    try:
        before = path.stat()
        said = json.loads(path.read_text())
    except FileNotFoundError:
        return True
    here = said["host"] == socket.gethostname()
    if time.time() - before.st_mtime < stale and not (here and not _runs(said["pid"])):
        return False
    aside = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.left")
    try:
        os.rename(path, aside)  # of several that find it, one succeeds
    except FileNotFoundError:
        return False
    taken = aside.stat().st_ino == before.st_ino
    if not taken:  # another one was quicker, and this is its new claim
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
    return taken


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _touch(path: Path, every: float, ended: threading.Event) -> None:
    while not ended.wait(every):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
