"""Writing files so that a kill leaves the old content or the new, never a part."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one, never a part."""
    draft = _draft(path)
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """One object a line, UTF-8, row by row into a draft that takes the file's place at the end."""
    draft = _draft(path)
    with open(draft, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(draft, path)


def _draft(path: Path) -> Path:
    """A name that no other process writes to, on this host or another."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")
