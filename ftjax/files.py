"""Write files so that a kill leaves the old content or the new content, never a part; and JSON without NaN."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

DRAFT = ".part"  # end of the name of a file that is being written


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a draft that takes a file's place when the block ends.

    A kill leaves the old file or the new one, never a part; an error, such as that of a full disk, leaves no draft.
    """
    draft = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{DRAFT}")  # nobody else's
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        error.filename = str(path)  # an error of a write does not say where
        raise
    finally:
        draft.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one, never a part."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def as_json(value, indent: int | None = None) -> str:
    """Plain data as JSON text. Numbers that are NaN or infinite, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(cell) for key, cell in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(cell) for cell in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_json(path: Path, value) -> None:
    """As replace_text, of `as_json` with indentation."""
    replace_text(path, as_json(value, 2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line, row by row, to a draft that replaces the file at the end."""
    with replacing(path) as draft, open(draft, "w", encoding="utf-8") as file:
        file.writelines(as_json(row) + "\n" for row in rows)
