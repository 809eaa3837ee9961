"""Rows -> text: what the model is given (the prompt) and what it should answer (the completion), or messages."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable

from ftjax.errors import FtjaxError, nearest


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One row as text. `messages`, where given, goes through the tokenizer's chat template instead."""

    prompt: str = ""
    completion: str = ""
    messages: tuple[dict, ...] | None = None


# The two prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py), to the letter.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def guess(columns, prompt: str = "", completion: str = "") -> str:
    """The form of rows with these columns: a key of FORMS. Templates in the config come before any column.

    Raises FtjaxError when no form fits.
    """
    if prompt or completion:
        return "template"
    for form, needed in GUESS:
        if all(any(name in columns for name in names) for names in needed):
            return form
    raise FtjaxError(
        f"data.form: no known form fits the columns {', '.join(columns)}. Known: messages; instruction (input) output; "
        'prompt completion (or response); text. For other columns set data.prompt="...{column}..." and '
        'data.completion="...{column}...".'
    )


def renderer(form: str, prompt: str = "", completion: str = "") -> Callable[[dict, str], Rendered]:
    """(row, place) -> Rendered, for a form of FORMS; `place` names the row in errors, such as `a.jsonl row 3`.

    `prompt` and `completion` are the templates of form `template`. Raises FtjaxError for a bad template at once, and,
    when called, for a row without a needed column, with a value that is no text, or with nothing to learn in it.
    """
    if form == "template":
        return _from_templates(prompt, completion)
    if form not in FORMS:
        raise FtjaxError(f"data.form: unknown form {form!r}{nearest(form, FORMS)}; known: {', '.join(FORMS)}")
    return FORMS[form]


def reference(rendered: Rendered) -> str:
    """The answer that a generation for this row is compared with: the completion, or the last assistant's text."""
    if rendered.messages is None:
        return rendered.completion.strip()
    texts = [m.get("content") or "" for m in rendered.messages if m["role"] == "assistant"]
    return texts[-1].strip() if texts else ""


# ---------------------------------------------------------------------------------------------- the forms


def _text(row: dict, place: str) -> Rendered:
    return Rendered("", _answer(field(row, "text", place), place))


def _prompt(row: dict, place: str) -> Rendered:
    answer = "response" if row.get("completion") is None and row.get("response") is not None else "completion"
    return Rendered(field(row, "prompt", place), _answer(field(row, answer, place), place))


def _instruction(row: dict, place: str) -> Rendered:
    values = {"instruction": field(row, "instruction", place)}
    template = ALPACA
    if row.get("input") not in (None, ""):
        values["input"], template = field(row, "input", place), ALPACA_INPUT
    return Rendered(template.format(**values), _answer(field(row, "output", place), place))


def _messages(row: dict, place: str) -> Rendered:
    messages = row.get("messages")
    if messages is None:
        raise _missing(row, "messages", place)
    if not isinstance(messages, list) or not messages:
        raise FtjaxError(f"{place}: `messages` should be a list of objects with `role` and `content`")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise FtjaxError(f"{place}: message {number} should be an object with `role` and `content`")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise FtjaxError(f"{place}: message {number}: `content` should be text, found {_kind(content)}")
    # A data set fills what one message lacks and another has with None; templates ask whether a key is there.
    messages = tuple({k: v for k, v in m.items() if v is not None} for m in messages)
    answers = [m for m in messages if m["role"] == "assistant"]
    if not any(m.get("content", "").strip() or m.get("tool_calls") for m in answers):
        raise FtjaxError(f"{place}: no assistant message with any text: nothing to train on")
    return Rendered(messages=messages)


FORMS = {"text": _text, "prompt": _prompt, "instruction": _instruction, "messages": _messages}
GUESS = (  # form, groups of columns of which each must be there by one of its names; the first form that fits
    ("messages", (("messages",),)),
    ("instruction", (("instruction",), ("output",))),
    ("prompt", (("prompt",), ("completion", "response"))),
    ("text", (("text",),)),
)


def _from_templates(prompt: str, completion: str) -> Callable[[dict, str], Rendered]:
    if not completion:
        raise FtjaxError(
            'data.completion is empty: data.form "template" needs the answer, such as data.completion=" {answer}"'
        )
    before, after = parse(prompt, "data.prompt"), parse(completion, "data.completion")
    if not any(name for _, name in after):
        raise FtjaxError(f"data.completion: {completion!r} names no {{column}}: every row would get the same answer")

    def render(row: dict, place: str) -> Rendered:
        # The answer's own fields decide whether it is empty: a template that begins with a space is never empty itself.
        if not any(field(row, name, place).strip() for _, name in after if name):
            _answer("", place)
        return Rendered(fill(before, row, place), fill(after, row, place))

    return render


def parse(template: str, key: str) -> list[tuple[str, str | None]]:
    """`"Words: {src}"` -> [("Words: ", "src")]: (literal, column or None) in order; `{{` and `}}` are literal braces.

    Only plain column names stand in braces: no attribute, index, conversion or format, so that a template cannot reach
    into Python objects. Raises FtjaxError naming `key`.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as e:
        raise FtjaxError(f"{key}: {template!r}: {e}; a literal brace is written {{{{ or }}}}") from e
    for _, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion or any(c in name for c in ".[]{}")):
            raise FtjaxError(f"{key}: {template!r}: braces hold one plain column name, such as {{src}}, not {name!r}")
    return [(literal, name) for literal, name, _, _ in parts]


def fill(parts: list[tuple[str, str | None]], row: dict, place: str) -> str:
    """The text of a parsed template for one row; raises FtjaxError for a column that the row lacks."""
    return "".join(literal + (field(row, name, place) if name else "") for literal, name in parts)


def field(row: dict, name: str, place: str) -> str:
    """A cell as text; numbers as Python writes them. Raises FtjaxError where it is missing, null or no text."""
    value = row.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    if value is None:
        raise _missing(row, name, place)
    raise FtjaxError(f"{place}: column {name!r} should be text, found {_kind(value)}")


def _missing(row: dict, name: str, place: str) -> FtjaxError:
    there = [key for key, cell in row.items() if cell is not None]
    state = "is null or absent" if name in row else "does not exist"
    return FtjaxError(f"{place}: column {name!r} {state}{nearest(name, there)}; the row has: {', '.join(there)}")


def _answer(text: str, place: str) -> str:
    if not text.strip():
        raise FtjaxError(f"{place}: the answer is empty, so that every label would be masked: mend or remove the row")
    return text


def _kind(value) -> str:
    return "nothing" if value is None else type(value).__name__
