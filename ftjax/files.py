"""Write files so that a kill leaves the old or the new content, never a part of it; and write JSON without NaN."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ftjax.errors import FtjaxError

DRAFT = ".part"  # suffix of a file that is being written


def cache_home(name: str) -> Path:
    """The folder of this user for what can be computed again: `name` in ~/.cache/ftjax, or in XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftjax" / name


def mode(path: str | Path) -> int:
    """The `st_mode` of a path, or 0 if nothing is there.

    Raises OSError if a folder on the way may not be entered. From Python 3.14 on, `Path.exists` and its like take what
    lies there for absent.
    """
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
    except ValueError:  # a name with a zero byte
        pass
    return 0


def below(folder: Path) -> list[Path]:
    """The paths of all files below a folder, and of links to folders there, sorted. Raises OSError if a folder may not
    be read; `Path.rglob` leaves its files out."""

    def stop(error: OSError):
        raise error

    found = []
    for at, folders, files in os.walk(folder, onerror=stop):
        links = [name for name in folders if os.path.islink(os.path.join(at, name))]
        found += [Path(at, name) for name in files + links]
    return sorted(found)


def within(folder: Path, name: str) -> list[Path]:
    """The files of this name in the folders directly below a folder, sorted; none if there is no such folder. Raises
    OSError if one of the folders may not be read; `Path.glob` leaves it out."""
    return [at / name for at in (sorted(folder.iterdir()) if mode(folder) else ()) if mode(at / name)]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a draft, which replaces the file when the block ends.

    A kill leaves the old file or the new one, never a part of it. After an error, such as a full disk, no draft is
    left. A pipe or a device is not replaced: its own path is yielded. What is written for an open file of this process,
    such as /dev/stdout, goes behind what that has already.
    """
    name = {"/dev/stdout": "/dev/fd/1", "/dev/stderr": "/dev/fd/2"}.get(str(path), str(path))
    if found := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", name):
        # Opened by its name, a file that a shell made of the output would be cut to nothing first.
        with tempfile.TemporaryDirectory() as folder, open(int(found[1]), "wb", closefd=False) as file:
            yield Path(folder) / "draft"
            sys.stdout.flush()
            file.write((Path(folder) / "draft").read_bytes())
        return
    if path.exists() and not path.is_file():
        yield path
        return
    draft = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{DRAFT}")  # unique to this process
    try:
        with naming(path):
            yield draft
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """Yield an empty draft beside a folder, given by its real path, for the block to rename to it. An error deletes the
    draft; a kill leaves it to the next process.

    Raises FtjaxError if another process has the draft, or if the folder cannot be replaced without harm.
    """
    import fcntl

    if Path.cwd().is_relative_to(folder) or os.path.ismount(folder):
        raise FtjaxError(
            f"{folder}: is the folder that this command runs in or one above it, or a mount, and a new folder cannot "
            f"take its place; name a new one, such as {folder / 'out'}"
        )
    draft = folder.with_name(f".{folder.name}.ftjax{DRAFT}")
    draft.mkdir(parents=True, exist_ok=True)
    lock = os.open(draft, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FtjaxError(f"{folder}: another process writes it; wait for its end, or name another") from None
        for left in draft.iterdir():  # of a process that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield draft
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an error of the operating system, in the block, the name of the file or folder that is written there. The
    error of a full disk names none."""
    try:
        yield
    except OSError as error:
        if str(error.filename or path).startswith(str(path)):  # it is not about a file that is read
            error.filename = str(path)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old or the new content, never a part of it."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def as_json(value, indent: int | None = None) -> str:
    """Plain data as JSON text. NaN and infinite numbers, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(cell) for key, cell in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(cell) for cell in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_json(path: Path, value) -> None:
    """Write plain data as indented JSON, as `replace_text` does."""
    replace_text(path, as_json(value, 2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line, row by row, to a draft that replaces the file at the end."""
    with replacing(path) as draft, open(draft, "w", encoding="utf-8") as file:
        file.writelines(as_json(row) + "\n" for row in rows)
