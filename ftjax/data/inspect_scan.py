"""One pass over the rows of a part: contents of the columns, lengths of texts, and findings in single rows."""

from __future__ import annotations

import dataclasses
import json
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.data import textchecks
from ftjax.data.compared import Sides, Texts, columns_text
from ftjax.data.prepare import Recipe
from ftjax.data.similar import normalise, row_text
from ftjax.data.table import CHUNK, Table
from ftjax.data.template import Rendered
from ftjax.errors import FtjaxError

LABEL_VALUES = 100  # most distinct values of a column of labels
LABEL_LENGTH = 60  # most characters of a label
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "intent", "tags", "ner_tags", "tag")
SAMPLE_ROWS, SAMPLE_WORDS = 5_000, 200_000  # size of the sample for diversity and the tokenizer's coverage


@dataclasses.dataclass
class Column:
    """The contents of a column.

    Attributes:
        types: Types of the cells, see _type.
        empty: Indices of the rows without text or number.
        chars: Number of characters of each cell.
        hashes: Hash of each cell.
        values: Number of rows of each value; None if there are too many values.
        text: Whether any cell holds text.
        blank: Whether any text contains white space, and so is not just a name or a number.
    """

    types: set[str] = dataclasses.field(default_factory=set)
    empty: array = dataclasses.field(default_factory=lambda: array("q"))
    chars: array = dataclasses.field(default_factory=lambda: array("i"))
    hashes: array = dataclasses.field(default_factory=lambda: array("q"))
    values: Counter | None = dataclasses.field(default_factory=Counter)
    text: bool = False
    blank: bool = False

    @property
    def type(self) -> str:
        """The type of the cells as text: string, int64, list of string, object of role, content, or JSON if mixed."""
        return _one_type(self.types)

    @property
    def distinct(self) -> int:
        """Number of distinct cells."""
        return len(np.unique(np.frombuffer(self.hashes, np.int64)))


class View(NamedTuple):
    """A row as the checks see it. prompt and answer are empty if no form fits or the row cannot be used."""

    text: str  # text of all columns
    prompt: str
    answer: str
    error: str  # why the row cannot be used; empty if it can
    ids: Sequence[int]  # tokens of the row as trained; those of its columns if no form fits
    script: str  # script of most letters; empty if there are no letters
    scan: Scan


@dataclasses.dataclass
class Scan:
    """A part of a source, and the results of one pass over its N rows."""

    name: str  # such as `train`, or `train of NAME` in a mixture
    part: str  # train | validation | test
    source: str
    data: object  # the config group of this source
    table: Table
    recipe: Recipe | None  # None: no form fits the columns
    guessed: bool
    tokenizer: object
    sides: Sides  # what rows are compared by according to the config
    start: int  # number of rows of the parts before it
    special: tuple[str, ...] = ()  # the tokenizer's special tokens
    unknown: int | None = None  # id of its unknown token, see _unknown
    columns: dict[str, Column] = dataclasses.field(default_factory=dict)
    tokens: dict[str, array] = dataclasses.field(default_factory=lambda: defaultdict(lambda: array("i")))
    scripts: Counter = dataclasses.field(default_factory=Counter)
    features: dict[str, list[str]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    hits: dict[str, dict[int, str]] = dataclasses.field(default_factory=lambda: defaultdict(dict))
    prompts: array = dataclasses.field(default_factory=lambda: array("q"))  # hashes of the prompts, if a form fits
    answers: array = dataclasses.field(default_factory=lambda: array("q"))
    sample: list[str] = dataclasses.field(default_factory=list)
    coverage: dict[str, float | None] = dataclasses.field(default_factory=dict)
    label: str | None = None
    labels: list[tuple[str, ...]] | None = None  # labels of each row: one, or several if it has a list of tags

    def __len__(self) -> int:
        return len(self.table)

    @property
    def by(self) -> Sides:
        """What rows are compared by.

        If the config does not say what the model reads, it is all text except labels and columns of unique names, such
        as ids.
        """
        if self.sides.known:
            return self.sides
        text = [c for c, column in self.columns.items() if column.text and c != self.label]
        answers = [c for c in text if self.columns[c].blank or self.columns[c].distinct < len(self)]
        return Sides(columns_text(answers or text), label=self.label or "")

    def folded(self, index: int) -> tuple[str, ...] | None:
        """The labels of a row in their folded spelling; None if rows have no labels."""
        return None if self.labels is None else tuple(map(fold, self.labels[index]))

    def beside(self, index: int, other: int) -> str:
        """The name of another row in a note on a row: `row 3` if it is in the same file, otherwise with its file."""
        table = self.table
        return f"row {table.number[other]}" if table.file[index] == table.file[other] else table.place(other)


def scan(scan: Scan, checks: dict[str, Callable[[View], str | bool | None]]) -> Scan:
    """Fill in a Scan by a pass over its rows.

    Args:
        scan: The part. It is changed in place and returned.
        checks: {name: check(view) -> a note on the row, or a false value if nothing is found}.
    """
    added = [str(token) for token in scan.tokenizer.added_tokens_decoder.values() if token.special]
    scan.special = tuple(dict.fromkeys([*scan.tokenizer.all_special_tokens, *added]))
    scan.unknown = _unknown(scan.tokenizer)
    scan.columns = {name: Column() for name in scan.table.columns}
    for start, rows in scan.table.chunks(CHUNK):
        for i, view in enumerate(_views(scan, rows, start), start):
            for name, check in checks.items():
                note = check(view)
                if note:
                    scan.hits[name][i] = note
            for name, feature in FEATURES.items():
                scan.features[name].append(feature(view))
    scan.label = _label(scan)
    if scan.label is not None:
        scan.labels = list(map(label_values, scan.table.column(scan.label)))
    some = scan.table.select(np.arange(0, len(scan), max(1, len(scan) // SAMPLE_ROWS)))
    scan.sample = list(Texts((some, scan.by.whole)))
    scan.coverage = _coverage(scan)
    return scan


def label_values(cell) -> tuple[str, ...]:
    """The labels of a cell as text: one, or each of a list. An empty cell has none."""
    if isinstance(cell, list):
        return tuple(text for c in cell for text in label_values(c))
    return () if cell is None or cell == "" else (str(cell),)


def fold(label: str) -> str:
    """A label without differences of spelling: case, white space, punctuation, and the notation of numbers."""
    text = normalise(label)
    try:
        return repr(float(text))
    except ValueError:
        return text


# ---------------------------------------------------------------------------------------------- rows


def _views(scan: Scan, rows: list[dict], start: int) -> Iterator[View]:
    texts = {name: [_cell(scan, column, name, row[name], start + i) for i, row in enumerate(rows)]
             for name, column in scan.columns.items()}  # fmt: skip
    if scan.recipe is None:
        ids = {name: _ids(scan.tokenizer, texts[name]) for name, column in scan.columns.items() if column.text}
        for name, cells in ids.items():
            scan.tokens[name].extend(map(len, cells))
        seen = [("", "", "", [t for cells in ids.values() for t in cells[i]]) for i in range(len(rows))]
    else:
        seen = _encoded(scan, rows, [scan.table.place(start + i) for i in range(len(rows))])
        scan.prompts.extend(hash(prompt) if prompt else 0 for prompt, *_ in seen)
        scan.answers.extend(hash(answer) for _, answer, *_ in seen)
    for row, (prompt, answer, error, ids) in zip(rows, seen, strict=True):
        text = row_text(row)
        found = textchecks.scripts(text)
        scan.scripts.update(found)
        script = max(found, key=found.get, default="")
        yield View(text, prompt, answer, error, ids, script, scan)


def sides(rendered: Rendered) -> tuple[str, str]:
    """(prompt, answer) as text. Of messages, the assistant's texts are the answer and all others the prompt."""
    if rendered.messages is None:
        return rendered.prompt, rendered.completion
    # A tool call has no text.
    turns = [(m["role"] == "assistant", m["content"]) for m in rendered.messages if m["content"]]
    return tuple("\n".join(text for own, text in turns if own is side) for side in (False, True))


def _encoded(scan: Scan, rows: list[dict], places: list[str]) -> list[tuple]:
    """(prompt, answer, error, ids) of each row. Rows that fail are found by halving, as one stops its whole chunk."""
    try:
        rendered = scan.recipe.render(rows, places)
        examples = scan.recipe.encode(scan.tokenizer, rows, places)
    except FtjaxError as error:
        if len(rows) == 1:
            return [("", "", str(error).removeprefix(f"{places[0]}: "), ())]
        half = len(rows) // 2
        return _encoded(scan, rows[:half], places[:half]) + _encoded(scan, rows[half:], places[half:])
    scan.tokens["row"].extend(len(e.ids) for e in examples)
    scan.tokens["trained"].extend(int(e.trained.sum()) for e in examples)
    return [(*sides(r), "", e.ids) for r, e in zip(rendered, examples, strict=True)]


def _cell(scan: Scan, column: Column, name: str, cell, index: int) -> str:
    """The text of a cell, which is also added to the statistics of its column."""
    text = cell if isinstance(cell, str) else row_text({name: cell})
    column.types.add(_type(cell))
    if text.strip():
        column.text = True
        column.blank = column.blank or len(text.split(None, 1)) > 1
    elif _is_empty(cell):
        column.empty.append(index)
    column.chars.append(len(text))
    column.hashes.append(hash(text if isinstance(cell, str) else repr(cell)))
    if column.values is not None:
        column.values.update(label_values(cell) if isinstance(cell, str | int | list) else ())
        named = name == scan.data.label
        if not named and (len(column.values) > LABEL_VALUES or len(text) > LABEL_LENGTH and not isinstance(cell, list)):
            column.values = None
    return text


def _is_empty(cell) -> bool:
    """Whether a cell holds neither text nor a number, not even in nested lists and objects."""
    if isinstance(cell, list | dict):
        return all(map(_is_empty, cell.values() if isinstance(cell, dict) else cell))
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _type(cell) -> str:
    if isinstance(cell, list):
        return f"list of {_one_type(set(map(_type, cell)))}"
    return f"object of {', '.join(cell)}" if isinstance(cell, dict) else TYPES[type(cell)]


TYPES = {type(None): "null", str: "string", bool: "bool", int: "int64", float: "float64"}


def _one_type(types: set[str]) -> str:
    """The common type of cells of these types, or JSON. An empty list is compatible with any list."""
    known = types - {"null", "list of null"} or types - {"null"} or {"null"}
    return known.pop() if len(known) == 1 else "JSON"


def _label(scan: Scan) -> str | None:
    """The column of labels: data.label, or else a column with few values that has a usual name or is the answer."""
    if scan.data.label:
        return scan.data.label if scan.data.label in scan.columns else None
    most = max(2, len(scan) // 4)  # values
    few = [c for c, column in scan.columns.items() if column.values is not None and 2 <= len(column.values) <= most]
    answered = [c for c in few if f"{{{c}}}" in scan.data.completion]
    named = sorted((c for c in few if c.lower() in LABEL_NAMES), key=lambda c: LABEL_NAMES.index(c.lower()))
    return next(iter(answered + named), None)


# ---------------------------------------------------------------------------------------------- features


MARKDOWN = re.compile(
    r"^(?:#{1,6} \S|\|.+\|\s*$)|\*\*\S[^*\n]*\*\*|^ *(?:[-*+]|\d+[.)]) \S.*\n+ *(?:[-*+]|\d+[.)]) \S", re.MULTILINE
)
HTML = re.compile(r"</[a-zA-Z][a-zA-Z0-9]*>|<(?:br|hr|img)\b[^>\n]*>")


def layout(view: View) -> str:
    """The format of an answer: JSON, HTML, a code block, Markdown or plain text."""
    answer = view.answer.strip()
    if not answer:
        return ""
    if answer[0] in "{[" and _is_json(answer):
        return "JSON"
    if "```" in answer:
        return "a code block"
    return "HTML" if HTML.search(answer) else "Markdown" if MARKDOWN.search(answer) else "plain text"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def edges(view: View) -> str:
    """Where an answer has white space around it."""
    answer = view.answer
    before, after = answer != answer.lstrip(), answer != answer.rstrip()
    words = ("white space around it", "white space before it", "white space behind it", "no white space around it")
    return words[2 * (not before) + (not after)] if answer else ""


def ending(view: View) -> str:
    """The kind of character with which an answer ends."""
    last = view.answer.rstrip()[-1:]
    return "" if not last else "a letter" if last.isalpha() else "a digit" if last.isdigit() else "a mark"


FEATURES: dict[str, Callable[[View], str]] = {
    "script": lambda view: view.script,
    "layout": layout,
    "edges": edges,
    "ending": ending,
}


# ---------------------------------------------------------------------------------------------- the tokenizer

UNSPACED = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")  # written without blanks
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _coverage(scan: Scan) -> dict[str, float | None]:
    """Statistics of the tokens of a sample: tokens a word, and the shares of unknown tokens and of byte tokens.

    Tokens a word are None for scripts without blanks. A byte token stands for a part of a character, or is written like
    SentencePiece's `<0xE4>`.
    """
    tokenizer = scan.tokenizer
    counts = Counter(i for ids in _ids(tokenizer, scan.sample) for i in ids) if scan.sample else Counter()
    words = sum(len(text.split()) for text in scan.sample)
    total = max(counts.total(), 1)
    names = dict(zip(counts, tokenizer.convert_ids_to_tokens(list(counts))))
    parts = sum(n for i, n in counts.items() if BYTE.fullmatch(names[i]) or "\ufffd" in tokenizer.decode([i]))
    unspaced = sum(scan.scripts[name] for name in UNSPACED) > 0.5 * scan.scripts.total()
    return {
        "tokens_per_word": None if unspaced or not words else counts.total() / words,
        "unknown": counts[scan.unknown] / total,
        "bytes": parts / total,
    }


def _unknown(tokenizer) -> int | None:
    """The id of the unknown token.

    None if that token also has another role, as in GPT-2, whose bytes can encode every text.
    """
    offices = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in offices else tokenizer.unk_token_id
