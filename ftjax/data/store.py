"""Tokenised rows: one flat array with the start of each row, in memory or mapped from files that later runs reuse.

N rows, S tokens of all of them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax import seals
from ftjax.data.table import CHUNK, Table
from ftjax.data.tokenise import Example, Place, row_number
from ftjax.errors import FtjaxError
from ftjax.files import naming
from ftjax.seals import digest

META, IDS, TRAINED, LENGTHS, TARGETS = "meta.json", "ids.int32", "trained.bool", "lengths.int32", "targets"
STORED = ("length", "labels", "second", "row", "whole", "lost")  # the columns of LENGTHS
EACH = ("start", "first", *STORED)  # arrays of Examples with a number for each example
_encoder: Callable | None = None  # the encoder of a worker process, see _install
DRAFTS_LIVE = 86_400  # seconds; an older draft belongs to a run that was killed


@dataclasses.dataclass(eq=False)
class Examples(Sequence[Example]):
    """N examples laid out in flat arrays. Indexing gives an Example whose arrays are views.

    Attributes:
        ids: (S,) int32.
        trained: (S,) bool.
        start: (N,) where each example begins in `ids`.
        length: (N,) tokens of each example.
        labels: (N,) trained tokens of each example.
        first: (N,) where the targets of each example begin in `targets`.
        second: (N,) see Example.
        row: (N,) index of the table's row that each example was made of.
        whole: (N,) tokens of each example before it was cut.
        lost: (N,) see Example.
        targets: (n, ...) for labelled rows, see Example. None: a trained token is its own label.
    """

    ids: np.ndarray
    trained: np.ndarray
    start: np.ndarray
    length: np.ndarray
    labels: np.ndarray
    first: np.ndarray
    second: np.ndarray
    row: np.ndarray
    whole: np.ndarray
    lost: np.ndarray
    targets: np.ndarray | None = None

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """A list of Example laid out flat. If it is an Examples already, it is returned as it is."""
        if isinstance(examples, cls):
            return examples
        counts = [
            (n, e.trained.sum(), e.second, i if e.row is None else e.row, e.whole or n, e.lost)
            for i, (e, n) in enumerate((e, len(e.ids)) for e in examples)
        ]
        ids = np.concatenate([np.zeros(0, np.int32), *(e.ids for e in examples)], dtype=np.int32)
        trained = np.concatenate([np.zeros(0, bool), *(e.trained for e in examples)])
        labelled = len(examples) and examples[0].targets is not None
        targets = np.concatenate([e.targets for e in examples]) if labelled else None
        return cls.in_order(ids, trained, np.array(counts, np.int64).reshape(-1, len(STORED)), targets)

    @classmethod
    def in_order(cls, ids: np.ndarray, trained: np.ndarray, counts: np.ndarray, targets: np.ndarray | None) -> Examples:
        """The examples whose arrays stand one after another.

        Args:
            ids: (S,) int32.
            trained: (S,) bool.
            counts: (N, columns STORED) int64.
            targets: (n, ...), or None.
        """
        each = dict(zip(STORED, counts.T, strict=True))
        return cls(ids, trained, _starts(each["length"]), first=_starts(each["labels"]), targets=targets, **each)

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        at = slice(self.start[index], self.start[index] + self.length[index])
        mine = slice(self.first[index], self.first[index] + self.labels[index])
        targets = None if self.targets is None else self.targets[mine]
        others = (int(x[index]) for x in (self.second, self.row, self.whole, self.lost))
        return Example(self.ids[at], self.trained[at], targets, *others)

    def first_texts(self) -> Examples:
        """The examples cut to their first text, which of a preference is the prompt with the chosen answer."""
        length = np.where(self.second > 0, self.second, self.length)
        labels = np.array([np.count_nonzero(self.trained[a : a + n]) for a, n in zip(self.start, length)], np.int64)
        # Without targets, the tokens of the answer are its labels.
        return dataclasses.replace(self, length=length, labels=labels, second=np.zeros_like(length), targets=None)

    def truths(self) -> np.ndarray:
        """(n, ...) the targets of all examples, one after another."""
        before = np.cumsum(self.labels) - self.labels
        return self.targets[np.repeat(self.first - before, self.labels) + np.arange(self.labels.sum())]

    def ends(self) -> list[int]:
        """The distinct last tokens of examples whose last token is trained, ascending."""
        last = (self.start + self.length - 1)[self.length > 0]
        return np.unique(self.ids[last[self.trained[last]]]).tolist()

    def select(self, indices: np.ndarray) -> Examples:
        """The examples at these indices, in this order."""
        return dataclasses.replace(self, **{name: getattr(self, name)[indices] for name in EACH})


class Fitted(NamedTuple):
    """The result of `fit`.

    Attributes:
        examples: The examples that are kept.
        long: Number of examples longer than max_length.
        lost: Trained tokens of those that were cut or dropped.
    """

    examples: Examples
    long: int
    lost: int


def fit(examples: Sequence[Example], max_length: int, long: str, place: Place = row_number) -> Fitted:
    """Limit examples to max_length tokens.

    Args:
        examples: The examples.
        max_length: Most tokens of an example.
        long: What happens to longer ones: `truncate` (cut at the end), `drop` (left out) or `raise`.
        place: Names a row in errors.

    Raises:
        FtjaxError: Names the row. With `raise`, the first long row; with `truncate`, a row of which no trained token is
            left.
    """
    examples = Examples.of(examples)
    over = np.flatnonzero(examples.whole > max_length)
    before = int(examples.labels[over].sum() + examples.lost[over].sum())
    if long == "raise" and len(over):
        raise FtjaxError(
            f"{place(int(examples.row[over[0]]))}: {examples.whole[over[0]]} tokens, more than "
            f'data.max_length={max_length}; raise it, or set data.long to "truncate" or "drop"'
        )
    if long == "drop":
        kept = np.flatnonzero(examples.whole <= max_length)
        return Fitted(examples.select(kept), len(over), before)
    length, labels = np.minimum(examples.length, max_length), examples.labels.copy()
    for i in over.tolist():
        labels[i] = np.count_nonzero(examples.trained[examples.start[i] : examples.start[i] + length[i]])
        if not labels[i]:
            raise FtjaxError(
                f"{place(int(examples.row[i]))}: cut to data.max_length={max_length}, no trained token is left "
                '(the answer starts later); raise data.max_length, or remove the row (in training, by data.long="drop")'
            )
    cut = dataclasses.replace(examples, length=length, labels=labels)
    return Fitted(cut, len(over), before - int(labels[over].sum()))


class Chain:
    """Several arrays of one kind, read by position as if they were concatenated, without being copied together."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = list(arrays)
        self.ends = np.cumsum([len(a) for a in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.arrays[0].shape[1:])

    @property
    def dtype(self):
        return self.arrays[0].dtype

    def __getitem__(self, at: slice | np.ndarray) -> np.ndarray:
        """A slice within one of the arrays, or the elements at any positions."""
        if isinstance(at, slice):
            k = int(np.searchsorted(self.ends, at.start, side="right"))
            begin = int(self.ends[k]) - len(self.arrays[k])
            return self.arrays[k][at.start - begin : at.stop - begin]
        which = np.searchsorted(self.ends, at, side="right")
        out = np.empty((len(at), *self.shape[1:]), self.dtype)
        for k in np.unique(which):
            mine = which == k
            out[mine] = self.arrays[k][at[mine] - (self.ends[k] - len(self.arrays[k]))]
        return out


def join(parts: Sequence[Examples]) -> Examples:
    """The examples of several, one after another. Arrays that are mapped from files stay mapped."""
    if len(parts) == 1:
        return parts[0]
    each = {name: np.concatenate([getattr(p, name) for p in parts]) for name in EACH}
    of = np.repeat(np.arange(len(parts)), list(map(len, parts)))  # (N,) the part of each example
    each["start"] += _starts([len(p.ids) for p in parts])[of]
    targets = None
    if parts[0].targets is not None:
        each["first"] += _starts([len(p.targets) for p in parts])[of]
        targets = Chain([p.targets for p in parts])
    return Examples(Chain([p.ids for p in parts]), Chain([p.trained for p in parts]), targets=targets, **each)


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])[:-1].astype(np.int64)


# ---------------------------------------------------------------------------------------------- on disk


class Cache(NamedTuple):
    """Where tokenised rows are stored. folder None: they are held in memory; size: most bytes kept in the folder."""

    folder: Path | None
    size: int = 20_000_000_000


def tokenised(
    table: Table, encode: Callable[[list[dict], list[str]], list[Example]], key: str, cache: Cache, processes: int = 1
) -> Examples:
    """The examples of a table's rows, from the cache if an earlier run stored them there.

    Chunks are encoded in several processes and come back in order, so that the result, and the first error, do not
    depend on their number.

    Args:
        table: The rows.
        encode: (rows, their places) -> one Example for each row, or several that say which row is theirs. A pure
            function, which can be pickled if processes > 1.
        key: Digest of everything that the result depends on, see `digest`.
        cache: Where the result is stored.
        processes: Number of processes that encode.
    """
    if cache.folder is None:
        return Examples.of([e for chunk in _encoded(table, encode, processes) for e in chunk])
    with kept(cache, key, "tokens", lambda draft: _write(draft, _encoded(table, encode, processes))) as (entry, meta):
        return _open(entry, meta)


@contextlib.contextmanager
def kept(cache: Cache, key: str, what: str, write: Callable[[Path], dict | None]) -> Iterator[tuple[Path, dict]]:
    """The folder of a cache entry and its record, for a block that opens its files. If there is no such entry, or its
    files are not byte for byte as they were written, it is written first.

    Args:
        cache: Where the entry is stored.
        key: Digest of everything that the entry depends on, see `digest`.
        what: What the entry holds, for a warning.
        write: write(folder) writes the files, and returns what else the record should hold, if anything.
    """
    entry = cache.folder / key
    meta = _whole(entry)
    if meta is None:
        if entry.exists():
            warnings.warn(f"{entry}: these cached {what} are damaged; they are computed again", stacklevel=4)
        cache.folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".part", dir=cache.folder))
        try:
            with naming(cache.folder):
                meta = write(draft) or {}
                meta |= {"checksums": seals.checksums(draft, sorted(file.name for file in draft.iterdir()))}
                (draft / META).write_text(json.dumps(seals.sealed(meta)))
                _publish(draft, entry)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    yield entry, meta
    with contextlib.suppress(OSError):  # a cache that belongs to someone else, or is on a read-only disk
        os.utime(entry)
    _evict(cache, entry)


@functools.cache
def code() -> str:
    """Digest of the code that turns rows into tokens, with the code beside it, so that results of another version are
    not reused."""
    import tokenizers
    import transformers

    data = Path(__file__).parent
    files = [*data.glob("*.py"), *(data.parent / "tasks").glob("*.py"), data.parent / "hub" / "tokenizer.py"]
    texts = [file.read_bytes() for file in sorted(files)]
    return digest(tokenizers.__version__, transformers.__version__, *texts)


def table_digest(table: Table) -> str:
    """Digest of the cells and columns of a table. It does not depend on where the rows came from."""
    import pyarrow as pa

    hasher = hashlib.blake2b(digest_size=16)
    for start in range(0, len(table), 10 * CHUNK):
        chunk = table.arrow(start, start + 10 * CHUNK)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, chunk.schema.remove_metadata()) as stream:
            stream.write_table(chunk.replace_schema_metadata(None).combine_chunks())
        hasher.update(sink.getvalue())
    return hasher.hexdigest()


def _encoded(table: Table, encode, processes: int) -> Iterator[list[Example]]:
    """The examples of each chunk of rows, in order, each with the index of its row in the table."""
    tasks = ((start, rows, [table.place(start + i) for i in range(len(rows))]) for start, rows in table.chunks())

    def numbered(start, examples):
        return [e._replace(row=start + (i if e.row is None else e.row)) for i, e in enumerate(examples)]

    if processes <= 1:
        yield from (numbered(start, encode(*task)) for start, *task in tasks)
        return
    with _pool(processes, encode) as pool:
        # Each process has a few chunks waiting. Results are read in order, so that the first bad row gives the error.
        for start, found in ahead(((start, pool.submit(_encode, *task)) for start, *task in tasks), 4 * processes):
            yield numbered(start, found.result())


def ahead(items: Iterator, n: int) -> Iterator:
    """Yield the items of an iterator, but read it `n` items ahead."""
    drawn = collections.deque()
    for item in items:
        drawn.append(item)
        if len(drawn) > n:
            yield drawn.popleft()
    yield from drawn


def _install(encode) -> None:
    """In a worker process: keep the encoder, whose tokenizer takes longer to send than a chunk takes to encode."""
    global _encoder
    _encoder = encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use all cores


def _encode(rows: list[dict], places: list[str]) -> list[Example]:
    return _encoder(rows, places)


@contextlib.contextmanager
def _pool(processes: int, encode):
    """Spawned workers that do not run the caller's main module again, so that a script need not guard its own.

    An executor and not a multiprocessing.Pool, which waits for ever where a worker is killed, and now and then when it
    is ended with tasks in its pipe.
    """
    import multiprocessing
    import sys
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    main = sys.modules["__main__"]
    hidden = {name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__spec__ = None
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _install, (encode,))
    try:
        yield pool  # which starts a worker where a task finds none idle
    except BrokenProcessPool:
        raise FtjaxError(
            "a process that tokenised rows was killed, perhaps because memory ran out; set data.processes=1, or end "
            "other programs"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        main.__dict__.update(hidden)


def _write(folder: Path, chunks: Iterable[list[Example]]) -> dict:
    """Write the files of a cache entry with tokens. Returns what its record holds of them."""
    rows = tokens = 0
    kind = None  # dtype and shape of a target
    with (
        open(folder / IDS, "wb") as ids,
        open(folder / TRAINED, "wb") as trained,
        open(folder / LENGTHS, "wb") as lengths,
        open(folder / TARGETS, "wb") as targets,
    ):
        for chunk in chunks:
            flat = Examples.of(chunk)
            ids.write(flat.ids.tobytes())
            trained.write(flat.trained.tobytes())
            lengths.write(np.stack([getattr(flat, name) for name in STORED], 1).astype(np.int32).tobytes())
            if flat.targets is not None:
                kind = (str(flat.targets.dtype), flat.targets.shape[1:])
                targets.write(flat.targets.tobytes())
            rows, tokens = rows + len(flat), tokens + len(flat.ids)
    return {"rows": rows, "tokens": tokens, "targets": kind}


def _publish(draft: Path, entry: Path) -> None:
    """Rename a finished draft to its entry, unless another process was first: its entry has the same content."""
    try:
        os.rename(draft, entry)
    except OSError:
        if _whole(entry) is None:
            shutil.rmtree(entry)
            os.rename(draft, entry)


def _whole(entry: Path) -> dict | None:
    """The record of an entry whose files are byte for byte as they were written; otherwise None."""
    meta = seals.opened(entry / META)
    return None if meta is None or seals.changed(entry, meta["checksums"]) else meta


def _open(entry: Path, meta: dict) -> Examples:
    if not meta["tokens"]:
        return Examples.of([])
    counts = np.fromfile(entry / LENGTHS, np.int32).reshape(-1, len(STORED)).astype(np.int64)
    targets = None
    if meta["targets"]:
        dtype, shape = meta["targets"]
        targets = np.fromfile(entry / TARGETS, dtype).reshape(-1, *shape)
    ids, trained = np.memmap(entry / IDS, np.int32, mode="r"), np.memmap(entry / TRAINED, bool, mode="r")
    return Examples.in_order(ids, trained, counts, targets)


def _evict(cache: Cache, spared: Path) -> None:
    """Remove the least recently used entries until the rest fits into `cache.size`.

    A removed file that is mapped exists until it is closed.
    """
    entries = []
    for path in cache.folder.iterdir():
        # Another process may be evicting too; an entry may belong to someone who lets nobody look into it.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if path.suffix == ".part" and path.stat().st_mtime < time.time() - DRAFTS_LIVE:
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix != ".part" and (path / META).is_file():
                entries.append((path.stat().st_mtime, sum(f.lstat().st_size for f in path.iterdir()), path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total > cache.size and path != spared:
            shutil.rmtree(path, ignore_errors=True)
            total -= size
