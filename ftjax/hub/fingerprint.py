"""A short name for the content of a model directory, so that a resumed run notices another base under the same path."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ftjax.hub.weights import weight_files

BLOCK = 1 << 16  # bytes a sample
SAMPLES = 64  # of each file, evenly spread: whole checkpoints are too large to read twice


def fingerprint(folder: Path) -> str:
    """Hash of config.json and, of each safetensors file, its size, its header and 64 samples of 64 KiB."""
    digest = hashlib.blake2b((Path(folder) / "config.json").read_bytes(), digest_size=16)
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            digest.update(f.read(min(length, size)))
            for i in range(SAMPLES):
                f.seek((size - BLOCK) * i // (SAMPLES - 1) if size > BLOCK else 0)
                digest.update(f.read(BLOCK))
    return digest.hexdigest()
