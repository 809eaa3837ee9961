"""Whether files are byte for byte as they were written: checksums, and records that hold their own digest."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from stat import S_ISREG

from ftjax.files import cache_home, mode, replace_json

LARGE = 1 << 26  # bytes, whose checksum takes 15 ms
SETTLED = 2_000_000_000  # nanoseconds after which a change of a file changes its times


def digest(*parts) -> str:
    """Hex digest of texts, bytes and plain data. The length of each part is hashed too, so that the border between
    parts counts."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()


def sealed(record: dict) -> dict:
    """A record of plain data with its own digest, which `opened` checks."""
    return record | {"digest": digest(record)}


def opened(file: Path) -> dict | None:
    """Read a sealed record from a JSON file; None if the file does not exist or is not as it was written."""
    try:
        record = json.loads(file.read_bytes())
        return record if record.pop("digest") == digest(record) else None
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return None


def checksums(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """{name: CRC-32 of the file's bytes} of the named files in a folder."""
    return {name: _checksum(folder / name) for name in names}


def changed(folder: Path, kept: dict[str, int], again: bool = True) -> list[str]:
    """Names of the files in a folder that are missing, or whose checksum differs from the one in `kept`.

    Args:
        folder: The folder.
        kept: {name: checksum}.
        again: Whether to read a large file again that was read before and has the same path, inode, size and times.
    """
    of = _checksum if again else _known
    return [name for name, crc in kept.items() if not S_ISREG(mode(folder / name)) or of(folder / name) != crc]


def _known(file: Path) -> int:
    """As `_checksum`, which is read only once of a large file that does not change."""
    stat = file.stat()
    if stat.st_size < LARGE:
        return _checksum(file)
    place = cache_home("checksums") / f"{digest(str(file.resolve()))}.json"
    key = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    found = opened(place)
    if found and found["file"] == key:
        return found["crc"]
    crc = _checksum(file)
    # A file that was just written may be written again without another time.
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED:
        with contextlib.suppress(OSError):  # without a cache the file is read each time
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_json(place, sealed({"file": key, "crc": crc}))
    return crc


def _checksum(file: Path) -> int:
    with open(file, "rb") as f:
        return functools.reduce(lambda crc, block: zlib.crc32(block, crc), iter(lambda: f.read(1 << 24), b""), 0)
