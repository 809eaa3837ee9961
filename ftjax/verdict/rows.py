"""The rows of runs. Parts that each seed would split off train differently are split once, into files. The content of
all files that a run reads is part of what identifies the run."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from ftjax import assets, user_code
from ftjax import config as configs
from ftjax.data.prepare import PARTS, rows
from ftjax.errors import FtjaxError
from ftjax.evaluation import compare
from ftjax.files import below, write_jsonl
from ftjax.hub import resolve
from ftjax.hub.fingerprint import of_named, record
from ftjax.training import job

# Fields that name files or folders that a run reads.
READ = ("data.train", "data.validation", "data.test", "data.mixture", "data.augment.function", "data.template")
READ += ("data.earlier", "data.decontaminate", "tuning.init_from")


def contents(config) -> dict[str, str]:
    """Digests of the files and folders that the fields of a config name.

    A data set or an adapter that is named on the hub has no digest: only its name in the config identifies it.

    Returns:
        {`content of FIELD`: digest}.
    """
    fields = configs.flat(config)
    model = resolve.resolve_model(config.model.path, config.model.revision)
    found = {"content of model.path": _of_model(model, tuple(sorted(map(_state, model.iterdir()))))}
    for key in READ:
        files = [file for text in _texts(fields.get(key)) for file in _files(text)]
        if files:
            known = [_digest(f, _state(f)) for f in files]
            found[f"content of {key}"] = hashlib.blake2b("".join(known).encode(), digest_size=8).hexdigest()
    named = compare.named_files(config) | job.named_files(config)
    return found | {f"content of {file}": digest for file, digest in of_named(named).items()}


def _texts(value) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, dict | tuple | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _files(text: str) -> list[Path]:
    """The files that a text names, as in data.train or as "file.py:name"; none if it names none."""
    path = Path(assets.resolve(text))
    if path.is_file():
        return [path]
    if path.is_dir():
        return [file for file in below(path) if file.is_file()]
    pieces = [piece.strip() for piece in (*text.split(","), text.rpartition(":")[0]) if piece.strip()]
    found = [
        Path(name) for piece in pieces for name in sorted(glob.glob(piece, recursive=True)) or [assets.resolve(piece)]
    ]
    return [file for at in found if at.is_file() for file in (user_code.files(at) if at.suffix == ".py" else [at])]


def _state(file: Path) -> tuple[str, int, int]:
    """Name, size and time of modification. A file with the same state is not read again."""
    return file.name, file.stat().st_size, file.stat().st_mtime_ns


@functools.lru_cache(maxsize=64)
def _of_model(folder: Path, state: tuple) -> str:
    """Digest of the weights and the tokenizer in a directory, as in a run's own record."""
    known = record(folder, "")
    text = json.dumps([known["weights"], known["tokenizer"]], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@functools.lru_cache(maxsize=4096)
def _digest(file: Path, state: tuple) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fix_rows(config, folder: Path, say) -> None:
    """Split parts off train by the config's seed and write them to files, which the config then names.

    Nothing is done if no part is to be split off. If `folder` holds other rows, which earlier runs have read, the files
    go to a new folder next to it.

    Args:
        config: The config, which is changed.
        folder: Folder of the files.
        say: Called with each line for a person.

    Raises:
        FtjaxError: If parts are to be split off a data.mixture, because its sources have no files of their own.
    """
    data = config.data
    open_parts = [part for part, share in zip(PARTS, data.split) if part != "train" and share and not data[part]]
    if not open_parts:
        return
    if data.mixture:
        raise FtjaxError(
            "data.mixture: each seed would split the mixture differently; name files for the parts of its entries, or "
            "set data.split=(1.0, 0.0, 0.0)"
        )
    whole = configs.copy(config)
    whole.data.update(limit=0, shots=0)
    (source,), _ = rows(whole, augmented=False)
    draft = folder.with_name(f"{folder.name}.{socket.gethostname()}-{os.getpid()}.part")
    draft.mkdir(parents=True, exist_ok=True)
    written = [part for part in PARTS if len(source.tables.get(part) or ())]
    for part in written:
        write_jsonl(draft / f"{part}.jsonl", source.tables[part])
    digest = _of_folder(draft)
    if folder.is_dir() and _of_folder(folder) != digest:
        say(
            f"{folder}: {data.train} has changed since these rows were written; its rows are written to "
            f"{folder.name}-{digest[:8]}"
        )
        folder = folder.with_name(f"{folder.name}-{digest[:8]}")
    if not folder.is_dir():
        with contextlib.suppress(OSError):  # another process was quicker, with the same rows
            draft.rename(folder)
    shutil.rmtree(draft, ignore_errors=True)
    named = {part: str(folder / f"{part}.jsonl") for part in written}
    data.update(**named, columns=(), split=(1.0, 0.0, 0.0))
    say(f"{folder}: all seeds use these rows of {', '.join(named)}")


def _of_folder(folder: Path) -> str:
    """Digest of the rows of all parts in a folder."""
    files = [folder / f"{part}.jsonl" for part in PARTS]
    texts = [f"{f.name} {_digest(f, _state(f))}" for f in files if f.is_file()]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
