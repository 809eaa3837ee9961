"""Rows -> text: what the model is given (the prompt) and what it should answer (the completion), or messages."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os.path
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ftjax.data.chat_templates import ALPACA_INPUT, TEMPLATES
from ftjax.errors import FtjaxError, check_known, nearest
from ftjax.foreign import parse_json


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One row as text, or as a conversation that a chat template renders.

    Attributes:
        prompt: Text that the model is given.
        completion: Text that it should answer.
        messages: Each with `role` and `content`. A message that is not trained has `"train": False`; only where all
            tokens are trained does this matter for a message that is not the assistant's. None: the row is plain text.
        tools: JSON schemas of tools.
        template: A value of `data.template`; empty: the tokenizer's own chat template.
    """

    prompt: str = ""
    completion: str = ""
    messages: tuple[dict, ...] | None = None
    tools: tuple[dict, ...] = ()
    template: str = ""


# The two prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py), to the letter.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_PROMPT_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ROLES = {  # names of roles in ShareGPT and in data sets that follow it -> names in chat templates
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
PROMPT_COLUMN = "prompt_template"  # column with a row's own template, which takes precedence over data.prompt
ASKED = ("question", "instruction", "query", "input")  # columns that other data sets have for a prompt
IMAGES = ("image", "images", "pixel_values")  # columns of rows that are not text alone
THINKING = ("reasoning_content", "thinking", "reasoning")  # fields of a message, which transformers treats as one


def guess(columns, prompt: str = "", completion: str = "") -> str:
    """The form of rows with these columns.

    Args:
        columns: Names of the columns.
        prompt: data.prompt.
        completion: data.completion. If it or `prompt` is set, the form is `template`, whatever the columns.

    Returns:
        A key of FORMS, or `template`.

    Raises:
        FtjaxError: If no known form fits the columns.
    """
    if prompt or completion:
        return "template"
    for name, form in FORMS.items():
        if all(any(one in columns for one in names) for names in form.needs):
            return name
    raise FtjaxError(
        f"data.form: no known form fits the columns {', '.join(columns)}. Known: messages; conversations; instruction "
        "(input) output; prompt completion (or response); question answer; prompt (or conversations) chosen rejected; "
        "chosen rejected; prompt left right rating; prompt responses (or completions, answers) ranks (or scores); "
        "text. "
        'For other columns set data.prompt="...{column}..." and data.completion="...{column}...".'
    )


def renderer(
    form: str, prompt: str = "", completion: str = "", template: str = "", system: str = ""
) -> Callable[[dict, str], Rendered]:
    """A function that renders rows of one form.

    Args:
        form: A key of FORMS, or `template`.
        prompt: The template of the prompt, for form `template`.
        completion: The template of the completion, for form `template`.
        template: See data.template. If it is set, every row becomes messages.
        system: System text, the first message of conversations that bring none of their own.

    Returns:
        (row, place) -> Rendered. `place` names the row in errors, such as `a.jsonl row 3`. It raises FtjaxError if the
        row lacks a needed column, has a value of the wrong type, or has no answer to train on.

    Raises:
        FtjaxError: If a setting cannot be used.
    """
    check_known(form, ("template", *FORMS), "data.form: unknown form")
    render = _from_templates(prompt, completion) if form == "template" else FORMS[form].render
    if template and form == "text":
        raise FtjaxError(
            f"data.template={template!r}: rows of form text are not conversations; leave data.template empty, or set "
            "data.prompt and data.completion to the question and the answer"
        )

    def whole(row: dict, place: str) -> Rendered:
        if form != "template":
            _refuse_images(row, place)
        rendered = render(row, place, template)
        if rendered.messages is None and template:
            asked, answer = {"role": "user", "content": rendered.prompt}, rendered.completion
            rendered = Rendered(messages=(asked, {"role": "assistant", "content": answer}))
        if rendered.messages is not None:
            if not any(_answers_with(message) for message in rendered.messages):
                roles = ", ".join(dict.fromkeys(repr(message["role"]) for message in rendered.messages))
                raise FtjaxError(
                    f"{place}: no assistant message has text or a tool call, so there is nothing to train on; add an "
                    f"answer with the role 'assistant' (the row has {roles}), or remove the row"
                )
            for number, message in enumerate(rendered.messages, 1):
                if message["role"] == "assistant" and message.get("train", True) and not _says(message):
                    raise FtjaxError(
                        f"{place}: message {number} is an empty answer, and training it would teach the model to say "
                        'nothing; fill it, mark it with "train": false, or remove the row (data.clean.empty=True)'
                    )
            return _conversation(rendered.messages, row, place, template, system)
        if system:
            raise FtjaxError(
                f"{place}: data.system needs conversations, and this row is not one; set data.template too"
            )
        return rendered

    return whole


def asked(row: dict, place: str, template: str = "", system: str = "") -> Rendered:
    """A row with `messages`, `conversations` or a `prompt` as a conversation to continue. The row needs no answer.

    Args:
        row: The row.
        place: Name of the row in errors.
        template: See data.template.
        system: See `renderer`.

    Raises:
        FtjaxError: If the row has none of these columns, or malformed messages.
    """
    _refuse_images(row, place)
    column = next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
    messages = _turns(row, column, place) if column else ({"role": "user", "content": field(row, "prompt", place)},)
    return _conversation(messages, row, place, template, system)


def _refuse_images(row: dict, place: str) -> None:
    if found := next((name for name in IMAGES if row.get(name) not in (None, "", [])), None):
        raise FtjaxError(
            f"{place}: column {found!r} holds an image, and only text can be trained; remove the row, or the column if "
            "the text makes sense without it"
        )


def reference(rendered: Rendered) -> str:
    """The answer of a row: its completion, or the last assistant message, followed by its tool calls as JSON."""
    if rendered.messages is None:
        return rendered.completion.strip()
    if not (found := answers(rendered.messages)):
        return ""
    last = rendered.messages[found[-1]]
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in last.get("tool_calls", ())]
    return "\n".join([last["content"].strip(), *calls]).strip()


def question(rendered: Rendered) -> str:
    """What comes before that answer, as text: the prompt, or all earlier messages."""
    if rendered.messages is None:
        return rendered.prompt.strip()
    return "\n".join(m["content"] for m in before_answer(rendered.messages)).strip()


def answers(messages: Sequence[dict]) -> list[int]:
    """The indices of the assistant's messages."""
    return [k for k, message in enumerate(messages) if message["role"] == "assistant"]


def before_answer(messages: tuple[dict, ...], goes_on: bool = False) -> tuple[dict, ...]:
    """The messages before the assistant's last one; all messages if it has none.

    goes_on: whether it is all messages too if the last one is not the assistant's.
    """
    found = answers(messages)
    open_ = not found or goes_on and found[-1] < len(messages) - 1
    return messages if open_ else messages[: found[-1]]


# ---------------------------------------------------------------------------------------------- the forms


# Each of these functions is the `render` of a Form.


def _text(row: dict, place: str, template: str) -> Rendered:
    return Rendered("", _answer(field(row, "text", place), place))


def _prompt(row: dict, place: str, template: str) -> Rendered:
    answer = "response" if row.get("completion") is None and row.get("response") is not None else "completion"
    if isinstance(row.get("prompt"), list):  # TRL's conversational form, of which only the completion is trained
        asked, answered = _turns(row, "prompt", place), row.get(answer)
        if not isinstance(answered, list):
            answered = [{"role": "assistant", "content": field(row, answer, place)}]
        return Rendered(messages=_untrained(asked) + _turns({answer: answered}, answer, place))
    return Rendered(field(row, "prompt", place), _answer(field(row, answer, place), place))


def _question(row: dict, place: str, template: str) -> Rendered:
    question, answer = field(row, "question", place), _answer(field(row, "answer", place), place)
    return Rendered(question, answer) if template else Rendered(f"Question: {question}\nAnswer:", f" {answer}")


def _instruction(row: dict, place: str, template: str) -> Rendered:
    """Input and output may be in `instances`, as in the seed tasks of Self-Instruct."""
    if row.get("output") is None and isinstance(row.get("instances"), list):
        if len(row["instances"]) != 1:
            raise FtjaxError(f"{place}: {len(row['instances'])} `instances`; expected one; write each as its own row")
        row = row | row["instances"][0]
    given = "" if row.get("input") in (None, "") else field(row, "input", place)
    instruction, output = field(row, "instruction", place), _answer(field(row, "output", place), place)
    if template:
        between = ALPACA_INPUT if template == "alpaca" else "\n\n"
        return Rendered(instruction + (between + given if given else ""), output)
    prompt = ALPACA_PROMPT_INPUT if given else ALPACA_PROMPT
    return Rendered(prompt.format(instruction=instruction, input=given), output)


def _messages(row: dict, place: str, template: str, column: str = "messages") -> Rendered:
    return Rendered(messages=_turns(row, column, place))


def _preference(row: dict, place: str, template: str) -> Rendered:
    """The chosen answer of a preference. It may be text, a message, or messages.

    The messages may begin with the answer, or with the first message of the conversation. If there is no prompt, a text
    is a whole conversation in the format of Anthropic's HH-RLHF.
    """
    others = () if row.get("prompt") else ("conversations", "messages")
    column = next((name for name in others if isinstance(row.get(name), list)), "prompt")
    chosen = row.get("chosen")
    if not isinstance(chosen, str | list | dict):
        chosen = field(row, "chosen", place)
    if isinstance(chosen, str) and not isinstance(row.get(column), list):
        return _preferred_text(row, chosen, place)
    if isinstance(chosen, str):
        chosen = {"role": "assistant", "content": chosen}
    chosen = _turns({"chosen": [chosen] if isinstance(chosen, dict) else chosen}, "chosen", place)
    if isinstance(row.get(column), list):
        asked = _turns(row, column, place)
        if chosen[: len(asked)] == asked:
            chosen = chosen[len(asked) :]
        elif chosen[0]["role"] not in ("assistant", "tool"):
            raise FtjaxError(
                f"{place}: column 'chosen' begins with a message of the {chosen[0]['role']}, and not with those of "
                f"{column!r}; leave the prompt out of one of them"
            )
        return Rendered(messages=(_untrained(asked) if column == "prompt" else asked) + chosen)
    if chosen[0]["role"] != "assistant":
        asked = row.get("prompt")
        if isinstance(asked, str) and not any(asked.strip() in message["content"] for message in chosen):
            raise FtjaxError(
                f"{place}: column 'chosen' begins with a message of the {chosen[0]['role']}, and no message has the "
                "text of 'prompt', which would not be read; write it as a message, or remove the column"
            )
        return Rendered(messages=chosen)
    return Rendered(messages=({"role": "user", "content": field(row, "prompt", place)}, *chosen))


def _preferred_text(row: dict, chosen: str, place: str) -> Rendered:
    """The chosen text, after the prompt in its own column or after what both texts begin with."""
    if row.get("prompt") is None and chosen.lstrip().startswith(("Human:", "Assistant:")):
        return Rendered(messages=_hh_turns(chosen, place))
    if "prompt" in row or not isinstance(row.get("rejected"), str):
        return Rendered(field(row, "prompt", place), _answer(chosen, place))
    if other := next((name for name in ASKED if name in row), ""):
        raise FtjaxError(
            f"{place}: column 'prompt' does not exist; rename {other!r} to 'prompt', or remove it if the prompt is "
            "what both answers begin with"
        )
    if not (asked := _beginning(chosen, row["rejected"])):
        raise FtjaxError(
            f"{place}: column 'prompt' does not exist, and 'chosen' and 'rejected' do not begin alike, so that their "
            "beginning is no prompt either; put what was asked into a column 'prompt'"
        )
    return Rendered(asked, _answer(chosen[len(asked) :], place))


def _beginning(one: str, other: str) -> str:
    """The words with which two texts begin, without the white space after them."""
    common = os.path.commonprefix([one, other])
    inside = any(rest and not rest[0].isspace() for rest in (one[len(common) :], other[len(common) :]))
    return (re.sub(r"\S*$", "", common) if inside else common).rstrip()


def pairs(form: str, row: dict, place: str, template: str = "") -> list[dict]:
    """The pairs of a row, each as a row of the form `preference`.

    Args:
        form: One of PAIRED.
        row: The row.
        place: Name of the row in errors.
        template: See data.template. Without one, an answer of a ballot follows its prompt after a space.

    Raises:
        FtjaxError: If the row does not say which of two answers is better.
    """
    if form == "ballot":
        rating = field(row, "rating", place).strip().lower()
        if rating not in ("left", "right"):
            raise FtjaxError(
                f"{place}: column 'rating' holds {rating!r}; expected left or right. A tie does not say which answer "
                "is better: remove the row, or leave such rows out by data.clean.empty=True"
            )
        space = "" if template or field(row, "prompt", place)[-1:].isspace() else " "
        sides = [space + _answer(field(row, name, place), place) for name in ("left", "right")]
        chosen, rejected = sides if rating == "left" else sides[::-1]
        return [row | {"chosen": chosen, "rejected": rejected}]
    if form != "ranked":
        return [row]
    answers = next((row[name] for name in RANKED if isinstance(row.get(name), list)), None)
    named = [name for name in ("ranks", "scores") if name in row]
    column = min(named, key=lambda name: row[name] is None, default="")
    if answers is None or len(answers) < 2 or None in answers:
        raise FtjaxError(
            f"{place}: expected a list of two or more answers, none of them null, in one of the columns "
            f"{', '.join(RANKED)}"
        )
    figures = row[column] if column else list(range(len(answers)))
    numbers = isinstance(figures, list) and all(type(x) in (int, float) and x == x for x in figures)
    if not numbers or len(figures) != len(answers):
        raise FtjaxError(f"{place}: column {column!r} holds {figures!r:.80}; expected {len(answers)} numbers")
    rank = [-x if column == "scores" else x for x in figures]
    order = sorted(range(len(answers)), key=rank.__getitem__)
    found = [(i, j) for i, j in itertools.combinations(order, 2) if rank[i] < rank[j]]
    if not found:
        raise FtjaxError(f"{place}: column {column!r} ranks all answers alike; remove the row")
    return [row | {"chosen": answers[i], "rejected": answers[j]} for i, j in found]


def _first_pair(row: dict, place: str, template: str, form: str) -> Rendered:
    return _preference(pairs(form, row, place, template)[0], place, template)


def _hh_turns(text: str, place: str) -> tuple[dict, ...]:
    _, *parts = re.split(r"\n\n(Human|Assistant): ?", "\n\n" + text.lstrip("\n"))
    roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
    if roles[-1:] != ["assistant"] or roles[0] != "user":
        raise FtjaxError(
            f"{place}: column 'chosen' has no prompt beside it, so it should begin with '\\n\\nHuman: ' and end "
            f"with '\\n\\nAssistant: ' and an answer; found {text[:40]!r}"
        )
    return _untrained(tuple({"role": r, "content": t} for r, t in zip(roles[:-1], parts[1:-2:2]))) + (
        {"role": "assistant", "content": _answer(parts[-1], place)},
    )


def _untrained(messages: tuple[dict, ...]) -> tuple[dict, ...]:
    """The messages, with all answers marked as not trained, because they are part of a prompt."""
    return tuple(m | {"train": False} if m["role"] == "assistant" else m for m in messages)


class Form(NamedTuple):
    """What the rows of a form hold, and how they become text.

    Attributes:
        render: render(row, place, data.template) -> Rendered, the text of a row. See `renderer`.
        needs: Groups of names of columns. The form fits rows that have a column of each group.
        read: Columns of the text that the model reads. Empty: rows hold conversations.
        answer: Columns of the text that it should answer.
        note: What the user should know of the form.
    """

    render: Callable[[dict, str, str], Rendered]
    needs: tuple[tuple[str, ...], ...]
    read: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    note: str = ""


PAIRED = ("preference", "ranked", "ballot")  # forms that say which of two answers is better
RANKED = ("responses", "completions", "answers")  # columns with a list of answers, the best first or with ranks
CHOSEN = "the chosen answer is trained, the rejected one is not used"
BEST = "the best answer is trained, the others are not used"
FORMS = {  # of the forms that fit the columns, the first is taken
    "preference": Form(_preference, (("chosen",), ("rejected",)), note=CHOSEN),
    "ballot": Form(
        functools.partial(_first_pair, form="ballot"), (("prompt",), ("left",), ("right",), ("rating",)),
        ("prompt",), ("left", "right"), CHOSEN,
    ),
    "ranked": Form(
        functools.partial(_first_pair, form="ranked"),
        (("prompt", "conversations", "messages"), RANKED, ("ranks", "scores")), note=BEST,
    ),
    "messages": Form(_messages, (("messages",),)),
    "sharegpt": Form(functools.partial(_messages, column="conversations"), (("conversations",),)),
    "instruction": Form(
        _instruction, (("instruction",), ("output", "instances")), ("instruction", "input"), ("output", "instances")
    ),
    "prompt": Form(_prompt, (("prompt",), ("completion", "response")), ("prompt",), ("completion", "response")),
    "question": Form(_question, (("question",), ("answer",)), ("question",), ("answer",)),
    "text": Form(_text, (("text",),), ("text",)),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- conversations


def _answers_with(message: dict) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


def _says(message: dict) -> bool:
    return _answers_with(message) or any(message.get(key) for key in THINKING)


def _conversation(messages: tuple[dict, ...], row: dict, place: str, template: str, system: str) -> Rendered:
    """A conversation with its system text and tools. The system text of the row takes precedence over the config's."""
    own = row["system"] if isinstance(row.get("system"), str) else ""
    system, begun = own or system, messages[0]["role"] in ("system", "developer")
    if own and begun and own.strip() != messages[0]["content"].strip():
        raise FtjaxError(
            f"{place}: the column `system` and the first message are two different system texts; remove one of them"
        )
    if system and not begun:
        messages = ({"role": "system", "content": system}, *messages)
    if template in TEMPLATES:
        messages = tuple(_thinking_as_text(m) for m in messages)
    return Rendered(messages=messages, tools=_tools(row.get("tools"), place), template=template)


def _turns(row: dict, column: str, place: str) -> tuple[dict, ...]:
    messages = row.get(column)
    if messages is None:
        raise _missing(row, column, place)
    if not isinstance(messages, list) or not messages:
        raise FtjaxError(f"{place}: `{column}` should be a list of objects with `role` and `content`")
    return tuple(_turn(m, f"{place}: message {number}") for number, m in enumerate(messages, 1))


def _turn(message, where: str) -> dict:
    """A message with the field names that chat templates use. `where` names it in errors."""
    # A data set has None for a field that only other messages have, but templates test whether a key exists.
    turn = _there(message) if isinstance(message, dict) else {}
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in turn:
            turn[ours] = turn.pop(theirs)
    role = turn.get("role")
    if not isinstance(role, str):
        raise FtjaxError(f"{where} should be an object with `role` and `content`")
    if role == "function_call":
        turn["tool_calls"], turn["content"] = parse_json(turn.get("content"), f"{where}: the function call"), ""
    turn["role"] = role = ROLES.get(role, role)
    if "tool_calls" in turn:
        turn["tool_calls"] = _calls(turn["tool_calls"], where)
        if turn["tool_calls"]:
            turn.setdefault("content", "")
        else:
            del turn["tool_calls"]
    if isinstance(turn.get("content"), list):
        turn["content"] = _text_of(turn["content"], where)
    if not isinstance(turn.get("content"), str):
        raise FtjaxError(f"{where}: `content` should be text, found {_kind(turn.get('content'))}")
    trained = turn.pop("train", turn.pop("weight", True))
    if trained not in (True, False):
        raise FtjaxError(f"{where}: `train` should be true or false (or `weight` 1 or 0), found {trained!r}")
    if not trained:
        turn["train"] = False
    return turn


def _text_of(parts: list, where: str) -> str:
    """The text of a content that is a list of parts, in OpenAI's format: {"type": "text", "text": ...}."""
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    other = [p["type"] for p in parts if isinstance(p, dict) and p.get("type") not in (None, "text")]
    if other or not all(isinstance(text, str) for text in texts):
        raise FtjaxError(
            f"{where}: `content` contains {other[0] if other else 'a part without text'}; only text is supported"
        )
    return "".join(texts)


def _calls(calls, where: str) -> list[dict]:
    """Tool calls, each as {"type": "function", "function": {"name", "arguments"}} with the arguments as an object."""
    calls = calls if isinstance(calls, list) else [calls]
    out = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise FtjaxError(f"{where}: a tool call should be an object with `name` and `arguments`, found {call!r}")
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments.strip():  # OpenAI's format; templates write objects as JSON
            arguments = parse_json(arguments, f"{where}: the arguments of {function['name']!r}")
        arguments = {} if arguments is None or isinstance(arguments, str) else arguments
        rest = {key: cell for key, cell in _there(call).items() if key not in ("function", "name", "arguments")}
        out.append({"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}})
    return out


def _tools(tools, place: str) -> tuple[dict, ...]:
    """The tools in a cell as the schemas that chat templates expect, {"type": "function", "function": {...}}."""
    if tools is None or tools == "":
        return ()
    tools = parse_json(tools, f"{place}: `tools`") if isinstance(tools, str) else tools
    tools = tools if isinstance(tools, list) else [tools]
    tools = [parse_json(tool, f"{place}: `tools`") if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise FtjaxError(f"{place}: `tools` should be a list of JSON schemas, or that list as JSON text")
    tools = [_there(tool) for tool in tools]
    tools = [{"type": "function", "function": t} if "name" in t and "function" not in t else t for t in tools]
    return tuple(t | {"function": _there(t["function"])} if isinstance(t.get("function"), dict) else t for t in tools)


def _thinking_as_text(message: dict) -> dict:
    """Move thinking from its own field, which no named template knows, into the text before the answer.

    It is written as reasoning models write it.
    """
    thinking = next((message[key] for key in THINKING if key in message), None)
    if thinking is None:
        return message
    rest = {key: cell for key, cell in message.items() if key not in THINKING}
    return rest | {"content": "<think>\n" + thinking.strip("\n") + "\n</think>\n\n" + message["content"]}


def _there(cells: dict) -> dict:
    """The cells that are not None. Nested values are kept as they are, because there somebody wrote the null."""
    return {key: cell for key, cell in cells.items() if cell is not None}


# ---------------------------------------------------------------------------------------------- templates over columns


def _from_templates(prompt: str, completion: str) -> Callable[[dict, str], Rendered]:
    if not completion:
        raise FtjaxError(
            'data.completion is empty: data.form "template" needs the answer, such as data.completion=" {answer}"'
        )
    before, after = parse(prompt, "data.prompt"), parse(completion, "data.completion")
    if not any(name for _, name in after):
        raise FtjaxError(
            f"data.completion: {completion!r} names no {{column}}, so every row would get the same answer; add one"
        )

    def render(row: dict, place: str, template: str) -> Rendered:
        # The columns decide whether the answer is empty. The rendered template is not, if it has text of its own.
        if not any(field(row, name, place).strip() for _, name in after if name):
            _answer("", place)
        own = row.get(PROMPT_COLUMN)
        asked = parse(own, f"{place}: {PROMPT_COLUMN}") if own else before
        return Rendered(fill(asked, row, place), fill(after, row, place))

    return render


def parse(template: str, key: str, columns=()) -> list[tuple[str, str | None]]:
    """Parse a template: `"Words: {src}"` -> [("Words: ", "src")], (literal text, column or None) in order.

    `{{` and `}}` are literal braces. Braces may hold a plain column name only, without attribute, index, conversion or
    format, so that a template cannot reach into Python objects. Raises FtjaxError, which names `key`, for anything
    else, and for one of `columns` in double braces, which would write its name in every row.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as e:
        raise FtjaxError(f"{key}: {template!r}: {e}; a literal brace is written {{{{ or }}}}") from e
    for _, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion or any(c in name for c in ".[]{}")):
            raise FtjaxError(f"{key}: {template!r}: braces hold one plain column name, such as {{src}}, not {name!r}")
    literal = "".join(text + ("\0" if name else "") for text, name, _, _ in parts)
    if twice := sorted(set(re.findall(r"\{ *(\w+) *\}", literal)).intersection(columns)):
        raise FtjaxError(
            f"{key}: {template!r} has {twice[0]} in double braces, which write the name itself and not the cell; name "
            f"a column in single braces, {{{twice[0]}}}"
        )
    return [(text, name) for text, name, _, _ in parts]


def fill(parts: list[tuple[str, str | None]], row: dict, place: str) -> str:
    """The text of a parsed template for one row.

    Args:
        parts: The template, as `parse` returns it.
        row: The row.
        place: Name of the row in errors.

    Raises:
        FtjaxError: If the row lacks a column of the template.
    """
    return "".join(literal + (field(row, name, place) if name else "") for literal, name in parts)


def field(row: dict, name: str, place: str) -> str:
    """A cell as text; a number as Python writes it.

    Args:
        row: The row.
        name: Name of the column.
        place: Name of the row in errors.

    Raises:
        FtjaxError: If the cell is missing, null or of another type.
    """
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
        raise FtjaxError(f"{place}: the answer is empty, so there is nothing to train on; fill it or remove the row")
    return text


def _kind(value) -> str:
    return "nothing" if value is None else type(value).__name__
