"""Whether files are byte for byte as they were written: checksums, and records that hold their own digest."""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path


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


def changed(folder: Path, kept: dict[str, int]) -> list[str]:
    """Names of the files in a folder that are missing, or whose checksum differs from the one in `kept`."""
    return [name for name, crc in kept.items() if not (folder / name).is_file() or _checksum(folder / name) != crc]


def _checksum(file: Path) -> int:
    with open(file, "rb") as f:
        return functools.reduce(lambda crc, block: zlib.crc32(block, crc), iter(lambda: f.read(1 << 24), b""), 0)
