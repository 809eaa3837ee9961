"""From the config to examples: read, split, template, tokenise and fit, with a report of what that came to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from ftjax import config as configs
from ftjax.data import template
from ftjax.data.batches import Batches
from ftjax.data.read import join, read_parts
from ftjax.data.tokenise import Example, Place, encode, fit
from ftjax.errors import FtjaxError

if TYPE_CHECKING:
    import datasets

PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of one part's rows; every count is of rows or tokens."""

    source: str
    form: str
    guessed: bool  # the form was guessed by the columns
    rows: int  # before any was dropped
    quantiles: tuple[int, int, int, int]  # lengths at 5, 50, 95 % and the longest, before cutting
    max_length: int
    policy: str  # data.long
    long: int  # rows longer than max_length
    lost: int  # trained tokens cut or dropped with them
    dropped: int  # rows left out
    tokens: int  # of an epoch
    trained: int  # tokens of an epoch that are labels
    packing: bool
    efficiency: float  # share of a batch's tokens that is no padding, once batches are full


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of one part, all lists aligned: examples, the rows as read, and as rendered. Empty where there are none."""

    examples: list[Example] = dataclasses.field(default_factory=list)
    rows: list[dict] = dataclasses.field(default_factory=list)
    rendered: list[template.Rendered] = dataclasses.field(default_factory=list)
    report: Report | None = None

    def __len__(self) -> int:
        return len(self.examples)


@dataclasses.dataclass(frozen=True)
class Data:
    """The three parts of a run's rows; validation and test may be empty."""

    train: Part
    validation: Part
    test: Part
    max_length: int  # tokens of a row; data.max_length, or the model's positions where those are fewer

    @property
    def report(self) -> dict[str, dict]:
        """The reports of the parts that have rows, as plain data."""
        return {name: dataclasses.asdict(r) for name in PARTS if (r := getattr(self, name).report)}


def prepare(config, tokenizer, max_positions: int, vocab_size: int) -> Data:
    """The examples of train, validation and test.

    A part whose file is named consists of that file. Any other part is split off the rows of data.train at random by
    config.seed: its share in data.split of them, at least one; train keeps the rest. So naming data.validation alone
    still splits off a test part: a share of 0 turns that off. data.limit then takes that many rows of train at random,
    and leaves the other parts as they are. Rows keep their order in the file. data.max_length left at its default is
    capped by max_positions.
    Raises FtjaxError for any row or setting that cannot be used: see read, template and tokenise; further for a set
    data.max_length above max_positions, and for token ids beyond vocab_size.
    """
    data = config.data
    max_length = _max_length(data.max_length, max_positions)
    sources = {name: getattr(data, name) for name in PARTS if getattr(data, name)}
    if "train" not in sources:
        raise FtjaxError("data.train is empty: name a file, a directory or a hub data set.")
    read = {name: read_parts(source, f"data.{name}") for name, source in sources.items()}
    chosen = _split({name: sum(len(rows) for _, rows in parts) for name, parts in read.items()}, data, config.seed)
    done = {}
    for name, indices in chosen.items():
        origin = name if name in read else "train"
        done[name] = _part(read[origin], sources[origin], f"data.{origin}", indices, data, tokenizer, max_length)
        _check_ids(done[name].examples, tokenizer, vocab_size)
    if not done["train"].examples:
        raise FtjaxError(f"{data.train}: no row is left to train on (data.long={data.long!r} dropped them all)")
    return Data(**done, max_length=max_length)


def _max_length(asked: int, max_positions: int) -> int:
    if asked < 2:
        raise FtjaxError(f"data.max_length={asked}: a row needs 2 tokens at least, one to predict the other")
    if asked > max_positions and asked != configs.default().data.max_length:
        raise FtjaxError(
            f"data.max_length={asked} is more than the model's {max_positions} positions: set it to at most that"
        )
    return min(asked, max_positions)


def _split(counts: dict[str, int], data, seed: int) -> dict[str, np.ndarray]:
    """{part: indices of rows in its source, ascending}; parts that are not in `counts` take theirs from train's."""
    shares = dict(zip(PARTS, data.split))
    if len(data.split) != 3 or min(data.split) < 0 or abs(sum(data.split) - 1) > 1e-6:
        raise FtjaxError(f"data.split={tuple(data.split)}: expected three shares that add up to 1")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(counts["train"])
    chosen, at = {}, 0
    for name in ("validation", "test"):
        if name in counts:
            chosen[name] = np.arange(counts[name])
        else:
            size = max(1, round(counts["train"] * shares[name])) if shares[name] else 0
            chosen[name], at = np.sort(order[at : at + size]), at + size
    if at >= len(order):
        raise FtjaxError(
            f"data.split={tuple(data.split)} leaves no row to train on, of {len(order)}: name data.validation and "
            "data.test, or set data.split=(1.0, 0.0, 0.0)"
        )
    chosen["train"] = np.sort(order[at:][: data.limit or None])
    return {name: chosen[name] for name in PARTS}


def _part(
    parts: list[tuple[str, datasets.Dataset]], source: str, key: str, indices, data, tokenizer, max_length: int
) -> Part:
    if len(indices) == 0:
        return Part()
    table = join(parts, key)
    form = _form(table.column_names, data)
    render = template.renderer(form, data.prompt, data.completion)
    where = _places(parts)

    def place(i: int) -> str:
        return where(int(indices[i]))

    rows = table.select(indices).to_list()
    rendered = [render(row, place(i)) for i, row in enumerate(rows)]
    examples = encode(rendered, tokenizer, data.train_on, place, data.end)
    fitted = fit(examples, max_length, data.long, place)
    lengths = np.array([len(e.ids) for e in examples])
    report = Report(
        source=source,
        form=form,
        guessed=data.form == "auto" and form != "template",
        rows=len(rows),
        quantiles=tuple(np.quantile(lengths, (0.05, 0.5, 0.95, 1), method="nearest").tolist()),
        max_length=max_length,
        policy=data.long,
        long=fitted.long,
        lost=fitted.lost,
        dropped=len(rows) - len(fitted.examples),
        tokens=sum(len(e.ids) for e in fitted.examples),
        trained=int(sum(e.trained.sum() for e in fitted.examples)),
        packing=data.packing,
        efficiency=_efficiency(fitted.examples, data, max_length),
    )
    return Part(fitted.examples, [rows[i] for i in fitted.kept], [rendered[i] for i in fitted.kept], report)


def _form(columns: list[str], data) -> str:
    if (data.prompt or data.completion) and data.form not in ("auto", "template"):
        raise FtjaxError(
            f"data.form={data.form!r} and the templates data.prompt, data.completion: set one or the other"
        )
    return template.guess(columns, data.prompt, data.completion) if data.form == "auto" else data.form


def _places(parts: list[tuple[str, datasets.Dataset]]) -> Place:
    """Index over all files of a source -> `file row n`."""
    ends = np.cumsum([len(rows) for _, rows in parts])

    def place(index: int) -> str:
        file = int(np.searchsorted(ends, index, side="right"))
        return f"{parts[file][0]} row {index - int(ends[file]) + len(parts[file][1]) + 1}"

    return place


def _efficiency(examples: list[Example], data, max_length: int) -> float:
    if not examples:
        return 1.0
    return Batches(examples, 1, max_length, packing=data.packing, buckets=data.buckets).efficiency


def _check_ids(examples: list[Example], tokenizer, vocab_size: int) -> None:
    most = max((int(e.ids.max()) for e in examples), default=0)
    if most >= vocab_size:
        raise FtjaxError(
            f"the tokenizer is larger than the model's embedding: token {tokenizer.convert_ids_to_tokens(most)!r} has "
            f"the id {most}, the embedding {vocab_size} rows. Use the tokenizer that belongs to the model."
        )
