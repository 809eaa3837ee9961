"""Prepare the examples of a run: read, clean, split, augment, render, tokenise and fit its rows, and report counts."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax import config as configs
from ftjax import stops, tasks
from ftjax.data import canaries, chat_templates, labelled, store, template
from ftjax.data.augment import augment
from ftjax.data.batches import Batches
from ftjax.data.clean import Removed, clean, records
from ftjax.data.compared import sides
from ftjax.data.read import read_table
from ftjax.data.split import PARTS, absent, decontaminate, limit, shots, split
from ftjax.data.store import Examples
from ftjax.data.table import Table
from ftjax.data.tokenise import Example, encode, encode_prompts, reference
from ftjax.errors import FtjaxError
from ftjax.files import cache_home
from ftjax.progress import counted

MANY = 20_000  # from this number of rows on, more processes save more time than they take to start
MOST_IDS = 1 << 24  # ids that are looked through at once
MEANT = "auto"  # the value of data.cache that means the user's cache folder


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the rows of one source become tokens. With the tokenizer, it determines ids and trained tokens.

    The fields are those of the same name in the config's group `data`. `form` is a key of template.FORMS or `template`,
    and `labelled` the column whose cells `labels` are the names of.
    """

    form: str
    prompt: str
    completion: str
    template: str
    system: str
    train_on: str
    end: str
    labels: tuple[str, ...]
    labelled: str

    def render(self, rows: list[dict], places: list[str]) -> list[template.Rendered]:
        """The rows as text. Raises FtjaxError, which names the place of the row, if a row cannot be used."""
        render = template.renderer(self.form, self.prompt, self.completion, self.template, self.system)
        if self.labels:
            rows = [self._named(row, place) for row, place in zip(rows, places, strict=True)]
        return [render(row, place) for row, place in zip(rows, places, strict=True)]

    def sides(self, row: dict, place: str) -> tuple[str, str]:
        """(prompt, answer) of a row as text. Raises FtjaxError if training would refuse what the row holds."""
        (rendered,) = self.render([row], [place])
        return template.question(rendered), template.reference(rendered)

    def _named(self, row: dict, place: str) -> dict:
        """A row with the name of its label. Raises FtjaxError if its label is neither a name nor the id of one."""
        label = labelled.label_name(row.get(self.labelled)) or ""
        if label not in self.labels:
            # If names are numbers, 1 may be the first name or the second id, so that only names are read.
            by_id = not any(re.fullmatch(r"[-+]?[\d.]+", name) for name in self.labels)
            if not (by_id and label.isdecimal() and int(label) < len(self.labels)):
                raise FtjaxError(
                    f"{place}: column {self.labelled!r} holds {row.get(self.labelled)!r:.80}; expected one of "
                    f"data.labels ({', '.join(self.labels)}) or, where no name is a number, the id of one, counted "
                    "from 0"
                )
            label = self.labels[int(label)]
        own = template.parse(row.get(template.PROMPT_COLUMN) or "", f"{place}: {template.PROMPT_COLUMN}")
        if any(name == self.labelled for _, name in own):
            raise FtjaxError(
                f"{place}: {template.PROMPT_COLUMN} names {self.labelled!r}, the column of data.labels, so that the "
                "prompt would hold the answer; remove it from the template"
            )
        return row | {self.labelled: label}

    def choices(self, tokenizer, row: dict, place: str) -> list[tuple[str, Example]]:
        """(answer as text, the row with this answer as tokens, of which only the answer is trained) for each label.

        Args:
            tokenizer: The tokenizer, from transformers.
            row: The row. Its own label is not used.
            place: Name of the row in errors.
        """
        rows, places = [row | {self.labelled: label} for label in self.labels], [place] * len(self.labels)
        how = dataclasses.replace(self, train_on="assistant")
        return list(zip(map(template.reference, how.render(rows, places)), how.encode(tokenizer, rows, places)))

    def encode(self, tokenizer, rows: list[dict], places: list[str]) -> list[Example]:
        """The rows as tokens.

        Args:
            tokenizer: The tokenizer, from transformers.
            rows: The rows.
            places: Names of the rows for errors.

        Raises:
            FtjaxError: If a row cannot be used. It names the row's place.
        """
        return encode(self.render(rows, places), tokenizer, self.train_on, places.__getitem__, self.end)

    def check(self) -> None:
        """Raise FtjaxError if the rows can be neither trained nor evaluated on."""


def recipe(data, columns: list[str]) -> tuple[Recipe, bool]:
    """The recipe of a `data` group for rows with these columns, and whether its form was guessed from the columns.

    Raises FtjaxError if no known form fits the columns, if data.form is set together with data.prompt or
    data.completion, or if data.labels is set and the label is no part of the answer alone.
    """
    if (data.prompt or data.completion) and data.form not in ("auto", "template"):
        raise FtjaxError(
            f"data.form={data.form!r} conflicts with the templates data.prompt and data.completion; set only one of "
            "the two"
        )
    guessed = data.form == "auto"
    form = template.guess(columns, data.prompt, data.completion) if guessed else data.form
    fields = (data.prompt, data.completion, data.template, data.system, data.train_on, data.end)
    label = (data.label or next((name for name in tasks.LABELS if name in columns), "")) if data.labels else ""
    parsed = [template.parse(data[key], f"data.{key}", columns) for key in ("prompt", "completion")]
    named = [any(name == label for _, name in parts) for parts in parsed]
    if data.labels and (form != "template" or label not in columns or named != [False, True]):
        raise FtjaxError(
            f"data.labels: expected data.completion, and not data.prompt, to name the column of the label, such as "
            f'" {{label}}"; data.label is {label or "empty"!r}, and the columns are {", ".join(columns)}'
        )
    return Recipe(form, *fields, tuple(data.labels), label), guessed and form != "template"


class _Watched(dict):
    """A row that notes in `seen` which of its cells are read."""

    def __init__(self, row: dict, seen: set):
        super().__init__(row)
        self.seen = seen

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def __or__(self, other):
        return _Watched({**self, **other}, self.seen)


def unread(how: Recipe | labelled.Labelled, table: Table) -> list[str]:
    """The columns of a table that a recipe does not read in its first rows; none if it cannot use these rows."""
    seen: set[str] = set()
    try:
        for i in range(min(len(table), 20)):
            how.sides(_Watched(table.row(i), seen), table.place(i))
    except FtjaxError:  # the row is refused where it is encoded
        return []
    return [name for name in table.columns if name not in seen and len(table)]


def recipe_if_any(data, columns: list[str]) -> tuple[Recipe | None, bool]:
    """As `recipe`, but (None, False) if no form is set and none fits the columns."""
    try:
        return recipe(data, columns)
    except FtjaxError:
        if data.form != "auto" or data.prompt or data.completion:
            raise
        return None, False


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts of the rows and tokens of one source in one part."""

    source: str
    form: str
    guessed: bool  # whether the form was guessed from the columns
    rows: int  # before any was dropped for its length
    quantiles: tuple[int, int, int, int]  # tokens of a row: 5, 50 and 95 % quantile and the maximum, before cutting
    max_length: int  # tokens
    policy: str  # data.long
    long: int  # rows longer than max_length
    lost: int  # trained tokens that were lost because these rows were cut or dropped
    dropped: int  # rows left out
    tokens: int  # tokens of the rows that were kept
    trained: int  # how many of these tokens are trained


class Piece(NamedTuple):
    """The rows of one source in one part, as read, cleaned and split.

    Attributes:
        table: The rows.
        digest: Digest of the table.
        kept: (n,) for each example, the index of its row in the table. Rows may be missing, or have several examples.
        recipe: How the rows became tokens.
    """

    table: Table
    digest: str
    kept: np.ndarray
    recipe: Recipe | labelled.Labelled


@dataclasses.dataclass(frozen=True)
class Part:
    """N examples, and the rows that they were made of, which are rendered again on demand. It may be empty.

    Attributes:
        examples: The N examples.
        source: (N,) int32, index into Data.sources of each example's source.
        pieces: The rows, one Piece for each source that has any, in the order of the examples.
        reports: {name of the source: its Report}.
        efficiency: Share of a full batch's tokens that are not padding.
    """

    examples: Examples = dataclasses.field(default_factory=lambda: Examples.of([]))
    source: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    pieces: tuple[Piece, ...] = ()
    reports: dict[str, Report] = dataclasses.field(default_factory=dict)
    efficiency: float = 1.0

    def __len__(self) -> int:
        return len(self.examples)

    def place(self, i: int) -> str:
        """File and number of the row that an example was made of, such as `a.jsonl row 3`."""
        piece, at = self._at(i)
        return piece.table.place(at)

    def row(self, i: int) -> dict:
        """The row that an example was made of, as cleaned."""
        piece, at = self._at(i)
        return piece.table.row(at)

    @property
    def numbers(self) -> np.ndarray:
        """(N,) number of each example's row, from 0. Examples of one row stand one after another and share a number."""
        piece = np.repeat(np.arange(len(self.pieces)), [len(piece.kept) for piece in self.pieces])
        row = np.concatenate([np.zeros(0, int), *(piece.kept for piece in self.pieces)])
        return np.cumsum((np.diff(piece, prepend=0) != 0) | (np.diff(row, prepend=row[:1]) != 0))

    def recipe(self, i: int) -> Recipe | labelled.Labelled:
        """The recipe by which the row of an example became tokens."""
        return self._at(i)[0].recipe

    def rendered(self, i: int) -> template.Rendered:
        """The row of an example as text."""
        piece, at = self._at(i)
        (rendered,) = piece.recipe.render([piece.table.row(at)], [piece.table.place(at)])
        return rendered

    def reference(self, i: int, tokenizer) -> str:
        """The reference answer of an example's row, as decoding a correct generation gives it."""
        rendered, recipe = self.rendered(i), self.recipe(i)
        if getattr(recipe, "goes_on", False) and rendered.messages and rendered.messages[-1]["role"] != "assistant":
            return ""  # the whole conversation is the prompt
        return reference(rendered, tokenizer, self.place(i), recipe.end)

    def prompts(self, tokenizer) -> Iterator[np.ndarray]:
        """The prompt ids (T,) int32 from which generation starts, for each example. They are not cut."""
        for piece, rendered, _, places in self._chunks():
            goes_on = getattr(piece.recipe, "goes_on", False)
            yield from encode_prompts(rendered, tokenizer, places.__getitem__, piece.recipe.end, goes_on)

    def each(self) -> Iterator[tuple[template.Rendered, dict]]:
        """(row as text, row as it is) for every example, in order."""
        for _, rendered, rows, _ in self._chunks():
            yield from zip(rendered, rows, strict=True)

    def _chunks(self) -> Iterator[tuple[Piece, list[template.Rendered], list[dict], list[str]]]:
        for piece in self.pieces:
            table = piece.table.select(piece.kept)
            for start, rows in table.chunks():
                places = [table.place(i) for i in range(start, start + len(rows))]
                yield piece, piece.recipe.render(rows, places), rows, places

    def select(self, indices: np.ndarray) -> Part:
        """The examples at ascending `indices` as a part of its own. Its reports are those of the whole part."""
        pieces, start = [], 0
        for piece in self.pieces:
            mine = indices[(indices >= start) & (indices < start + len(piece.kept))] - start
            pieces.append(piece._replace(kept=piece.kept[mine]))
            start += len(piece.kept)
        return dataclasses.replace(
            self, examples=self.examples.select(indices), source=self.source[indices], pieces=tuple(pieces)
        )

    def desirable(self) -> Part:
        """The examples less those whose answer is labelled as undesirable."""
        examples = self.examples
        if examples.targets is None:
            return self
        return self.select(np.flatnonzero(examples.targets[examples.first]))

    def of_source(self, index: int) -> Examples:
        """The examples of one source, given its index in Data.sources."""
        return self.examples.select(np.flatnonzero(self.source == index))

    def _at(self, i: int) -> tuple[Piece, int]:
        """(the piece, index of the row in its table) of an example. Several examples may share a row."""
        for piece in self.pieces:
            if i < len(piece.kept):
                return piece, int(piece.kept[i])
            i -= len(piece.kept)
        raise IndexError(i)


class Gone(NamedTuple):
    """The rows that a step left out, and the table that they belong to."""

    table: Table
    removed: list[Removed]


@dataclasses.dataclass(frozen=True)
class Data:
    """The three parts of a run's rows. Validation and test may be empty.

    Attributes:
        train, validation, test: The examples of each part.
        max_length: Most tokens of a row: data.max_length, or the model's positions if those are fewer.
        sources: Names of the Z sources of a mixture; without a mixture, one empty name.
        labels: Names of the task's labels, in the order of their ids.
        shares: (Z,) each source's share of the examples of an epoch. None: an epoch has every row once.
        gone: Rows that cleaning and decontamination left out.
        notes: What else the user should know about the preparation.
        canaries: {"planted", "row"} of each canary, see canaries.plant; the planted ones are the last rows of train.
        fingerprint: Digest of the rows of every part.
    """

    train: Part
    validation: Part
    test: Part
    max_length: int
    sources: tuple[str, ...] = ("",)
    labels: tuple[str, ...] = ()
    shares: np.ndarray | None = None
    gone: tuple[Gone, ...] = ()
    notes: tuple[str, ...] = ()
    canaries: tuple[dict, ...] = ()
    fingerprint: str = ""

    def removed(self) -> Iterator[dict]:
        """Every row that cleaning and decontamination left out, in the form of `clean.records`."""
        for table, removed in self.gone:
            yield from records(table, removed)

    @property
    def report(self) -> dict[str, dict]:
        """{part: {source: its Report as a dict}}, for the parts that have rows."""
        found = {part: getattr(self, part).reports for part in PARTS if getattr(self, part).reports}
        return {part: {name: dataclasses.asdict(r) for name, r in reports.items()} for part, reports in found.items()}


def prepare(
    config,
    tokenizer,
    max_positions: int,
    *,
    pool: str = "",
    known: tuple[str, ...] = (),
    parts: tuple[str, ...] = PARTS,
) -> Data:
    """Prepare the examples of train, validation and test by the steps that `config.data` asks for.

    If the config names a file for a part, the part consists of that file. Otherwise its rows are split off data.train,
    see split.split. Rows keep their order in the file, and synthetic rows follow them. If data.max_length has its
    default value, it is capped by `max_positions`. The sources of a mixture are prepared separately, each by its own
    settings, and their parts are joined.

    Args:
        config: The whole config.
        tokenizer: The tokenizer, from transformers.
        max_positions: Number of the model's positions.
        pool: Which token of a text the head over labels reads, see ModelConfig.
        known: Names of the labels of the model's head, in the order of their ids.
        parts: Which of PARTS are prepared. The others are empty. Only train is augmented.

    Returns:
        The three parts, with reports and notes.

    Raises:
        FtjaxError: If a row or a setting cannot be used, see read, clean, split, template and tokenise; if
            data.max_length was set to more than `max_positions`; if `parts` includes train and a source has no row left
            for it.
    """
    chosen, gone = rows(config, augmented="train" in parts)
    data = _tokenised(config, chosen, gone, tokenizer, max_positions, pool, known, True, parts)
    for index, source in enumerate(chosen if "train" in parts else ()):
        if not (data.train.source == index).any():
            by, todo = f"data.long={config.data.long!r}", "raise data.max_length"
            if not len(source.tables["train"]):
                by, todo = "cleaning and data.decontaminate", "relax their settings"
            if len(chosen) > 1:
                todo += f", or remove {source.name} from data.mixture"
            raise FtjaxError(f"{source.data.train}: {by} dropped all rows, so none is left to train on; {todo}")
    return data


def given(config, source: str, tokenizer, max_positions: int, *, pool: str = "", truths: bool = True) -> Data:
    """Render and tokenise rows that a user gives to a finished model. They become the part `test`, in their order.

    Of `config.data`, only the fields that say how rows become tokens are used. No row is cleaned, split, left out or
    added. A row of more than data.max_length tokens is cut; with data.long="raise" it is an error.

    Args:
        config: The whole config, with the model's task and its labels.
        source: The rows, see read_table.
        tokenizer: The tokenizer, from transformers.
        max_positions: Number of the model's positions.
        pool: See `prepare`.
        truths: Whether the rows have labels.

    Returns:
        Data whose parts train and validation are empty.

    Raises:
        FtjaxError: If a row cannot be used.
    """
    config = configs.copy(config)
    config.data.update(train=source, validation="", test="", mixture=())
    if config.data.long == "drop":
        config.data.long = "truncate"
    table = read_table(source, "data.train", _scratch() if config.data.streaming else None, config.data.columns)
    chosen = [Source("", config.data, {"test": table}, [], table, [])]
    return _tokenised(config, chosen, [], tokenizer, max_positions, pool, (), truths, ("test",))


def _tokenised(
    config,
    chosen: list[Source],
    gone: list[Gone],
    tokenizer,
    max_positions: int,
    pool: str,
    known: tuple[str, ...],
    truths: bool,
    parts: tuple[str, ...],
) -> Data:
    """Tokenise the sources' rows of some parts; see `prepare` and `given` for the arguments."""
    task = tasks.find(config.task.kind)
    # The positions of each text begin at 0.
    max_length = _max_length(config.data.max_length, task.texts * max_positions)
    cache = cache_of(config.data)
    tokenizer = chat_templates.dated(tokenizer, config.data.date)
    read_by = fingerprint(tokenizer)
    names, labels_as = task.labels or (), config.task.labels_as
    if labels_as == "auto" and not (config.task.labels or known):
        labels_as = "names"
    if task.encode:
        names = labelled.names_of(config, [(source.data, source.whole) for source in chosen], known)

    def how(source: Source, table: Table):
        guessed, notes = False, []
        if task.encode:
            found = labelled.recipe(config, source.data, table, names, pool, max_length, truths)
            found, notes = labelled.reading(found, table, source.whole, labels_as)
            if config.task.text not in ("", found.text):
                notes.append(f"{table.files[0]} has no column {config.task.text!r}; texts are read from {found.text!r}")
        elif task.recipe:
            found, guessed = task.recipe(config, source.data, table.columns, max_length, max_positions)
            if truths:
                found.check()
        else:
            found, guessed = recipe(source.data, table.columns)
        by_reward = task.recipe and task.texts == 1  # a reward may read any column of a prompt's row
        if "train" in parts and not by_reward and (left := unread(found, table)):
            notes.append(f"columns that are no part of the texts or labels: {', '.join(left)}")
        source.notes.extend(text for text in notes if text not in source.notes)
        return found, guessed

    done = {part: _part(part, chosen, config.data, how, tokenizer, read_by, max_length, cache) for part in parts}
    done = {part: done.get(part, Part()) for part in PARTS}
    sources = tuple(source.name for source in chosen)
    counts = np.bincount(done["train"].source, minlength=len(sources))
    return Data(
        **done,
        max_length=max_length,
        sources=sources,
        labels=names,
        shares=_shares(config, counts),
        gone=tuple(gone),
        notes=tuple(f"{source.name}: {note}".removeprefix(": ") for source in chosen for note in source.notes),
        canaries=tuple(canary for source in chosen for canary in source.canaries),
        fingerprint=store.digest([[piece.digest for piece in done[part].pieces] for part in PARTS]),
    )


# ---------------------------------------------------------------------------------------------- rows


class Source(NamedTuple):
    """One source during preparation: its name, its own `data` group, and the rows of each part."""

    name: str
    data: object
    tables: dict[str, Table]
    notes: list[str]  # what the user should know about the preparation
    whole: Table  # all rows of data.train, before any is split off to another part or left out by a limit
    canaries: list[dict]  # see canaries.plant


def rows(config, augmented: bool = True) -> tuple[list[Source], list[Gone]]:
    """The rows of every part of every source, and the rows that were left out.

    The rows are read, cleaned, split, decontaminated and limited, in this order. With `augmented`, synthetic rows are
    added to those of train.
    """
    folder = _scratch() if config.data.streaming else None
    sources, gone = read_and_clean(config, folder)
    dealt = []  # of each source: (rows of train's table, indices of those that stay in train)
    for source in sources:
        data, tables = source.data, dict(source.tables)
        dealt_by = _dealt_by(data, tasks.find(config.task.kind), tables["train"].columns)
        chosen = split(tables, dealt_by, config.seed, config.task)
        dealt.append((len(tables["train"]), chosen["train"]))
        source.tables.update({part: tables.get(part, tables["train"]).select(at) for part, at in chosen.items()})
        # If no rows had to be split off, `split` has not checked that the column exists.
        column = data.stratify or dealt_by.label
        if column in tables["train"].columns:
            own = {part: at for part, at in chosen.items() if part == "train" or part not in tables}
            for value, lacking in absent(tables["train"], column, own).items():
                source.notes.append(f"{column} {value}: no row of it in {', '.join(lacking)}")
    others = _evaluation_rows(sources, config)
    for source, (count, indices) in zip(sources, dealt):
        table = source.tables["train"]
        kept = np.arange(len(table))
        if others:
            kept, removed = decontaminate(table, others, source.data, config.task)
            gone += [Gone(table, removed)] if removed else []
            if odd := [r for r in removed if r.conflict]:
                source.notes.append(
                    f"{len(odd):,} of the rows left out have another label: {odd[0].place} {odd[0].why}"
                )
        few = limit(indices[kept], source.data.limit, count, config.seed)
        if source.data.shots:
            column = labelled.column(source.data.label, tasks.LABELS, table, "data.label")
            there = dict(zip(indices.tolist(), table.column(column), strict=True))
            cells = {i: labelled.label_name(there[i]) for i in few.tolist()}
            few = shots(cells, source.data.shots, count, config.seed)
        source.tables["train"] = table = table.select(np.flatnonzero(np.isin(indices, few)))
        if augmented:
            source.tables["train"], made, failed = augment(table, source.data, config.seed, folder, config.task)
            source.notes.extend(_counted("synthetic rows", made))
            source.notes.extend(_counted("synthetic rows given up, for no draw differed from the rows there", failed))
            if count := data.canaries:
                usual = tasks.find(config.task.kind).columns.label
                label = data.label or next((name for name in usual if name in table.columns), "")
                table = source.tables["train"]
                source.tables["train"], drawn = canaries.plant(table, count, config.seed, (label,), folder)
                source.canaries.extend(drawn)
    return sources, gone


def _dealt_by(data, task, columns: list[str]):
    """A copy of a `data` group whose data.label is the column by which rows are split, or empty.

    A column that is guessed counts as one that is named, because a run records what it guessed, and its recorded config
    must split the rows alike.
    """
    data = data.copy_and_resolve_references()
    usual = task.columns.label if task.encode else ()
    data.label = (data.label or next((name for name in usual if name in columns), "")) if task.stratified else ""
    return data


def _counted(what: str, counts: dict[str, int]) -> list[str]:
    """A list with one note of the counts above 0; an empty list if all counts are 0."""
    there = [f"{name} {n:,}" for name, n in counts.items() if n]
    return [f"{what}: {', '.join(there)}"] if there else []


def read_and_clean(config, folder: str | None = None) -> tuple[list[Source], list[Gone]]:
    """Read the files that each source names, and clean the parts that data.clean.parts names.

    Args:
        config: The whole config.
        folder: Directory that holds the rows; None: they are held in memory.

    Returns:
        (the sources, whose tables hold the parts that have a file; the rows that cleaning left out).

    Raises:
        FtjaxError: If data.train is empty, or if rows cannot be read or cleaned.
    """
    sources, gone = [], []
    for name, data, tables in read_sources(config, folder):
        notes, reads = [], {}
        for part, table in tables.items():
            for file in filter(os.path.exists, table.files):  # a name of the hub stands for several splits
                if (other := reads.setdefault(os.path.realpath(file), part)) != part:
                    notes.append(f"warning: {part} reads {file}, as {other} does, so its rows are not held out")
            if part in data.clean.parts:
                by = sides(data, table.columns, config.task)
                cleaned = clean(table, data.clean, answers(config, data, table), folder, by)
                gone += [Gone(table, cleaned.removed)] if cleaned.removed else []
                tables[part] = cleaned.table
                notes += _counted(f"cleaning changed rows of {part}", cleaned.changed)
                notes += [f"{part}: {cleaned.conflict}"] if cleaned.conflict else []
        sources.append(Source(name, data, tables, notes, tables["train"], []))
    return sources, gone


def read_sources(config, folder: str | None = None) -> Iterator[tuple[str, object, dict[str, Table]]]:
    """(name, `data` group, rows of each part that has a file) of each source.

    Raises FtjaxError if data.train is empty or rows cannot be read. folder: see `read_and_clean`.
    """
    for name, data, *_ in configs.sources(config):
        files = {part: data[part] for part in PARTS if data[part] or part == "train"}
        yield name, data, {k: read_table(file, f"data.{k}", folder, data.columns) for k, file in files.items()}


def answers(config, data, table: Table) -> Callable[[dict, str], tuple[str, str]] | None:
    """A function (row, place) -> (prompt, answer) as text. For a row with a label it gives ("", text of the row).

    Args:
        config: The whole config.
        data: The `data` group of the rows' source.
        table: The rows.

    Returns:
        The function; None if no known form fits the columns.

    Raises:
        FtjaxError: If data.form or a template is set and cannot be used.
    """
    task = tasks.find(config.task.kind)
    if task.encode:
        return labelled.recipe(config, data, table, (), "", 0).sides
    of_pairs = task.recipe if task.texts == 2 else None
    how, _ = of_pairs(config, data, table.columns, 0, 0) if of_pairs else recipe_if_any(data, table.columns)
    return how and how.sides


def _evaluation_rows(sources: list[Source], config) -> list[tuple[str, Table]]:
    """(name, rows) of every evaluation set that data.decontaminate names."""
    others = []
    for name in config.data.decontaminate:
        if name in PARTS[1:]:
            others += [(name, source.tables[name]) for source in sources if len(source.tables[name])]
        else:
            others.append((name, read_table(name, "data.decontaminate")))
    return others


def _scratch() -> str:
    """A temporary directory for the rows of a streamed data set, deleted when the process exits."""
    folder = tempfile.mkdtemp(prefix="ftjax-rows-")
    stops.at_exit(shutil.rmtree, folder, True)
    return folder


# ---------------------------------------------------------------------------------------------- tokens


def fingerprint(tokenizer) -> str:
    """Digest of everything that determines how a tokenizer turns texts and chats into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    settings = {k: str(v) for k, v in sorted(tokenizer.init_kwargs.items()) if k != "name_or_path"}
    name, special = type(tokenizer).__name__, tokenizer.all_special_tokens
    return store.digest(name, rules, settings, tokenizer.chat_template, special)


def _part(part, chosen: list[Source], data, how_of, tokenizer, read_by: str, max_length: int, cache) -> Part:
    """One part of all sources. how_of(source, table) -> (the recipe of the rows, whether its form was guessed)."""
    pieces, examples, reports, source = [], [], {}, []
    for index, one in enumerate(chosen):
        name, own, table = one.name, one.data, one.tables[part]
        if not len(table):
            continue
        how, guessed = how_of(one, table)
        content = store.table_digest(table)
        key = store.digest(store.code(), chat_templates.TEMPLATES, read_by, dataclasses.asdict(how), content)
        encoder = functools.partial(type(how).encode, how, tokenizer)
        encoded = store.tokenised(table, encoder, key, cache, _processes(data.processes, len(table)))
        if isinstance(how, Recipe):
            one.notes.extend(_tokens_in_texts(encoded, how, table, tokenizer))
        kept, long, lost = store.fit(encoded, max_length, data.long, table.place)
        pieces.append(Piece(table, content, kept.row, how))
        examples.append(kept)
        source.append(np.full(len(kept), index, np.int32))
        reports[name] = Report(
            source=getattr(own, part) or own.train,
            form=getattr(how, "shown", how.form),
            guessed=guessed,
            rows=len(table),
            quantiles=tuple(np.quantile(encoded.whole, (0.05, 0.5, 0.95, 1), method="nearest").tolist()),
            max_length=max_length,
            policy=data.long,
            long=long,
            lost=lost,
            dropped=len(table) - len(np.unique(kept.row)),
            tokens=int(kept.length.sum()),
            trained=int(kept.labels.sum()),
        )
    if not pieces:
        return Part()
    joined = store.join(examples)
    efficiency = 1.0
    if len(joined):
        efficiency = Batches(joined, 1, max_length, packing=data.packing, buckets=data.buckets).efficiency
    return Part(joined, np.concatenate(source), tuple(pieces), reports, efficiency)


def _tokens_in_texts(encoded: store.Examples, how: Recipe, table: Table, tokenizer) -> list[str]:
    """A list with one note of the rows whose texts hold special tokens; an empty list if there are none. Messages of
    chats hold none, see tokenise."""
    meant = how.prompt + how.completion  # the user's own templates
    special = [i for i, x in tokenizer.added_tokens_decoder.items() if x.special and str(x) not in meant]
    pieces = range(0, len(encoded.ids), MOST_IDS)
    at = [i + np.flatnonzero(np.isin(encoded.ids[i : i + MOST_IDS], special)) for i in pieces]
    at = np.concatenate([np.zeros(0, int), *at])
    example = np.searchsorted(encoded.start, at, "right") - 1
    at, last, second = (at - encoded.start[example], encoded.length[example] - 1, encoded.second[example])
    within = (at > 0) & (at < last) & ((second == 0) | (at != second) & (at != second - 1))
    rows = np.unique(encoded.row[example[within]]).tolist()
    if not rows or how.render([table.row(rows[0])], [table.place(rows[0])])[0].messages is not None:
        return []
    what = "whose text of a special token is read as the token itself, the first of them"
    return [f"{counted(len(rows), 'row')} {what} {table.place(rows[0])}"]


def _processes(asked: int, rows: int) -> int:
    return asked or max(1, min(os.cpu_count() or 1, rows // (MANY // 2)))


def cache_of(data) -> store.Cache:
    """Where a run keeps what later runs can use, by its `data` group."""
    if not data.cache:
        return store.Cache(Path(_scratch()) if data.streaming else None)
    return store.Cache(cache_home("data") if data.cache == MEANT else Path(data.cache), data.cache_size)


def _shares(config, counts: np.ndarray) -> np.ndarray | None:
    """(Z,) each source's share of the examples of an epoch; None if an epoch has every row once."""
    weights = [source.weight for source in configs.sources(config)]
    if weights[0] is None and config.data.temperature == 1:
        return None
    raw = np.array(weights, float) if weights[0] is not None else counts ** (1 / config.data.temperature)
    return raw / raw.sum()


def _max_length(asked: int, max_positions: int) -> int:
    if asked < 2:
        raise FtjaxError(
            f"data.max_length={asked}: a row needs at least 2 tokens, one to predict from and one to predict"
        )
    if asked > max_positions and asked != configs.default().data.max_length:
        raise FtjaxError(
            f"data.max_length={asked} is more than the model's {max_positions} positions: set it to at most that"
        )
    return min(asked, max_positions)
