"""Claims on work, for several processes or hosts that share a folder. Each claim is one file.

A process claims work by creating a file that does not exist yet, and touches it while it works. The claim of a process
on this host holds until that process ends, for whatever reason. The claim of a process on another host holds until
nobody has touched the file for `stale` seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ftjax.errors import FtjaxError
from ftjax.foreign import check_fields, maybe, parse_json, string, whole

STALE = 600.0  # seconds after which the claim of a silent process on another host is free
CLAIM = {"host": string, "pid": whole(1), "started": maybe(string), "since": string}  # fields of a claim
WAIT = 1.0  # seconds between checks of another process's claim


@contextlib.contextmanager
def claimed(path: Path, stale: float = STALE) -> Iterator[bool]:
    """Yield whether this process holds the claim `path` while the block runs; False if another process holds it. The
    folder must exist."""
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


def owner(path: Path) -> str:
    """A description of the process that holds a claim, for a person."""
    claim = {}
    with contextlib.suppress(FileNotFoundError):
        claim = _claim(path)
    if "pid" not in claim:
        return "nobody"
    since = f", since {claim['since']}" if "since" in claim else ""
    return f"process {claim['pid']} of {claim['host']}{since}"


def _take(path: Path) -> bool:
    pid, host = os.getpid(), socket.gethostname()
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    try:
        with path.open("x") as file:
            json.dump({"host": host, "pid": pid, "started": _started(pid), "since": since}, file)
    except FileExistsError:
        return False
    return True


def _left(path: Path, stale: float) -> bool:
    """Remove a claim whose process is gone. Returns True if it existed and this process was the one that removed it."""
    try:
        before = path.stat()
        claim = _claim(path)
    except FileNotFoundError:
        return True
    if claim["host"] == socket.gethostname():
        if _runs(claim["pid"], claim.get("started")):
            return False
    elif _now(path) - before.st_mtime < stale:
        return False
    aside = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.left")
    try:
        os.rename(path, aside)  # if several processes try, one succeeds
    except FileNotFoundError:
        return False
    after = aside.stat()
    taken = (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    if not taken:  # another one was quicker, and this is its new claim
        with contextlib.suppress(OSError):
            os.link(aside, path)
    aside.unlink()
    return taken


def _claim(path: Path) -> dict:
    """The content of a claim. For a claim that is being written, was cut short by a kill or is invalid, {"host":
    ""}."""
    with contextlib.suppress(FtjaxError):
        claim = parse_json(path.read_bytes(), path)
        if isinstance(claim, dict) and {"host", "pid"} <= claim.keys():
            check_fields(claim, CLAIM, path)
            return claim
    return {"host": ""}


def _now(path: Path) -> float:
    """The time by the clock of the file system, which may differ from this machine's."""
    with tempfile.TemporaryFile(prefix=f"{path.name}.", dir=path.parent) as probe:
        return os.fstat(probe.fileno()).st_mtime


def _runs(pid: int, started: str | None) -> bool:
    """Whether the process that made a claim is still running, and its number was not reused since."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return started is None or _started(pid) == started


def _started(pid: int) -> str | None:
    """Start time of a process on this host, by Linux's clock since boot; None for a process that has ended, or if the
    time is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"


def _touch(path: Path, every: float, ended: threading.Event) -> None:
    while not ended.wait(every):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
