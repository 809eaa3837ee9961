"""Rendered rows -> token ids and which of them are trained.

Two promises: the ids of a prompt are those that generation feeds, to the last one; and what is trained is the answer
together with the token that ends it, nothing else. Both are decided on ids, never on a template's promises.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.data import chat_templates, template
from ftjax.data.template import THINKING, Rendered
from ftjax.errors import FtjaxError
from ftjax.hub.tokenizer import Marks, end_token, last_close, marks, shared, show, turn_close

CHUNK = 1024  # texts given to the tokenizer at once; its own records take some 100 bytes a token

Place = Callable[[int], str]  # index of a row -> its name in an error, such as "a.jsonl row 3"
Span = tuple[int, int]  # first token, one past the last


class Example(NamedTuple):
    """One row: ids (T,) int32; trained (T,) bool, whether the token is a label, which the first never is.

    Of labelled rows, see ftjax.data.labelled: trained: whether a label is read off the token; targets (n, ...): that of
    each of those; second: where the second of two texts begins, 0: there is none; row: which of the rows that were
    encoded together it came from, None: the one at its own place; whole: how many tokens it had before it was cut,
    None: it was not.
    """

    ids: np.ndarray
    trained: np.ndarray
    targets: np.ndarray | None = None
    second: int = 0
    row: int | None = None
    whole: int | None = None


def row_number(index: int) -> str:
    """What an error calls a row of which nothing but its place is known."""
    return f"row {index + 1}"


def encode(
    rendered: Sequence[Rendered],
    tokenizer,
    train_on: str = "assistant",
    place: Place = row_number,
    end: str = "",
) -> list[Example]:
    """One Example for each row, uncut; the same whatever other rows stand beside it.

    Prompt and completion are encoded together; where that does not begin with the prompt's own ids (a token merged
    across the border), the prompt's ids come first and the completion is encoded after them. The end-of-text token is
    added after the completion unless it stands there, and trained. Messages go through their chat template; an
    assistant's turn is trained up to and including the token that ends it, but for those with `"train": False`.
    train_on: assistant (every turn), last (the last one) or all (every token of the row). end: the token that ends a
    text instead of the tokenizer's end-of-text.
    Raises FtjaxError naming the row: a template that fails, that rewrites what came before a trained turn, or that
    leaves out a part of that turn; a token that holds parts of two turns; a row in which nothing would be trained.
    """
    end_id = end_token(tokenizer, end)
    chats = {}  # by template
    examples = []
    for first in range(0, len(rendered), CHUNK):
        chunk = rendered[first : first + CHUNK]
        plain = [i for i, r in enumerate(chunk) if r.messages is None]
        done = dict(zip(plain, _encode_plain([chunk[i] for i in plain], tokenizer, train_on, end_id)))
        for name in dict.fromkeys(r.template for r in chunk if r.messages is not None):
            chats[name] = chats.get(name) or _chat(name, end, tokenizer)
            mine = [i for i, r in enumerate(chunk) if r.messages is not None and r.template == name]
            plans = [_plan(chats[name], chunk[i], train_on, place(first + i)) for i in mine]
            done |= zip(mine, _encode_chats(plans, chats[name], end_id))
        examples += [_example(*done[i], place, first + i) for i in range(len(chunk))]
    return examples


def encode_prompts(
    rendered: Sequence[Rendered], tokenizer, place: Place = row_number, end: str = "", goes_on: bool = False
) -> list[np.ndarray]:
    """The ids (T,) int32 that generation feeds for each row.

    Args:
        rendered: The rows. Of messages, those before the last assistant's are fed.
        tokenizer: Of transformers.
        place: Names a row in errors.
        end: See data.end.
        goes_on: Messages that do not end with the assistant's are fed whole.
    """
    texts = [r.prompt for r in rendered if r.messages is None]
    plain = iter(_prompt_ids(texts, tokenizer))
    chats, prompts = {}, []
    for i, r in enumerate(rendered):
        if r.messages is not None:
            chats[r.template] = chats.get(r.template) or _chat(r.template, end, tokenizer)
            turns = _answers(r.messages)
            open_ = not turns or goes_on and turns[-1] < len(r.messages) - 1
            before = r.messages if open_ else r.messages[: turns[-1]]
            prompts.append(_show(chats[r.template], r, before, True, place(i)))
    chat = iter(_one_bos(_ids(tokenizer, prompts, special=False), tokenizer))
    return [np.array(next(plain if r.messages is None else chat), np.int32) for r in rendered]


def reference(row: Rendered, tokenizer, place: str = row_number(0), end: str = "") -> str:
    """The answer that a generation for a row is compared with.

    It is template.reference, but for an answer that calls tools: that is what decoding a right generation gives, as
    only the chat template knows how a call is written.

    Args:
        row: the rendered row.
        tokenizer: the tokenizer that the row is encoded with.
        place: what an error calls the row.
        end: the token that ends an answer, see data.end.

    Returns:
        Text without special tokens, as `answer_of` leaves it.
    """
    turns = _answers(row.messages or ())
    if not turns or not row.messages[turns[-1]].get("tool_calls"):
        return template.reference(row)
    chat = _chat(row.template, end, tokenizer)
    before, through = (_show(chat, row, row.messages[: turns[-1] + more], not more, place) for more in (0, 1))
    if not through.startswith(before):  # encode refuses such a row
        return template.reference(row)
    ids = _ids(tokenizer, [through[len(before) :]], special=False)[0]
    return answer_of(tokenizer.decode(ids, skip_special_tokens=True))


def answer_of(text: str) -> str:
    """A decoded generation without white space at its ends, and without the empty thinking that a template may open."""
    return EMPTY_THINKING.sub("", text).strip()


# ---------------------------------------------------------------------------------------------- plain text


def _encode_plain(rows: list[Rendered], tokenizer, train_on: str, end: int) -> list[tuple[list[int], list[Span]]]:
    """(ids, what is trained) for each row."""
    if not rows:
        return []
    prompts = _prompt_ids([r.prompt for r in rows], tokenizer)
    joint = _one_bos(_ids(tokenizer, [r.prompt + r.completion for r in rows]), tokenizer)
    out = []
    for row, prompt, ids in zip(rows, prompts, joint):
        if ids[: len(prompt)] != prompt:
            ids = prompt + _continuation(tokenizer, row.completion)
        if ids[-1:] != [end]:
            ids = [*ids, end]
        out.append((ids, [(0 if train_on == "all" else len(prompt), len(ids))]))
    return out


def _prompt_ids(texts: list[str], tokenizer) -> list[list[int]]:
    prompts = _one_bos(_ids(tokenizer, texts), tokenizer)
    eos = tokenizer.eos_token_id
    if texts and _ids(tokenizer, ["a"])[0][-1] == eos:  # it closes every text; a prompt must stay open
        prompts = [ids[:-1] for ids in prompts]
    return prompts


def _continuation(tokenizer, text: str) -> list[int]:
    """Ids of a text that follows another: without the space that some tokenizers put before the first word."""
    before, both = _ids(tokenizer, ["\n", "\n" + text], special=False)
    if both[: len(before)] == before:
        return both[len(before) :]
    return _ids(tokenizer, [text], special=False)[0]


# ---------------------------------------------------------------------------------------------- chats


class Chat(NamedTuple):
    """A tokenizer and the chat template that it is used with."""

    tokenizer: object
    text: str | None  # Jinja; None: the tokenizer's own
    marks: Marks


class Turn(NamedTuple):
    """An assistant's turn in the text of a whole chat."""

    at: int  # its index in the messages
    prompt: str  # the chat before it, as generation feeds it
    stop: int  # characters of the chat up to the end of the turn
    loose: int  # further characters of white space, which no turn holds: a token may reach into them


class Plan(NamedTuple):
    """A conversation as text, and the turns of it that are to be found among its tokens."""

    whole: str
    turns: list[Turn]
    messages: tuple[dict, ...]
    everything: bool  # all tokens are trained, but for the turns that are found
    place: str


def _chat(name: str, end: str, tokenizer) -> Chat:
    tokenizer = chat_templates.dated(tokenizer)
    text = chat_templates.resolve(name, end, tokenizer) or None
    return Chat(tokenizer, text, marks(tokenizer, text))


def _plan(chat: Chat, row: Rendered, train_on: str, place: str) -> Plan:
    if row.tools:
        chat_templates.check_tools(row.template, chat.tokenizer)
    everything = train_on == "all"
    answers = _answers(row.messages)
    wanted = answers[-1:] if train_on == "last" else answers
    # Where everything is trained, what is not must be found; else what is.
    found = [k for k in wanted if row.messages[k].get("train", True) != everything]
    if not everything and not found:
        raise FtjaxError(f"{place}: every answer is marked as not to be trained")
    if found[:1] == [0]:
        raise FtjaxError(f"{place}: the first message is the assistant's: nothing comes before its answer")
    whole = _show(chat, row, row.messages, False, place)
    if found[-1:] == [len(row.messages) - 1]:
        whole = _behind_its_prompt(chat, row, whole, place)
    return Plan(whole, [_turn(chat, row, k, whole, place) for k in found], row.messages, everything, place)


def _behind_its_prompt(chat: Chat, row: Rendered, whole: str, place: str) -> str:
    """The text of a chat whose last answer stands behind the prompt that generation feeds.

    Templates of reasoning models open the thinking in that prompt (`<think>`), and some show no thinking in a finished
    chat, as DeepSeek-R1's. Then the answer follows the prompt with its thinking, or with none.
    """
    *before, message = row.messages
    prompt = _show(chat, row, before, True, place)
    opened = prompt.rstrip().endswith("<think>")
    if whole.startswith(prompt) or message.get("tool_calls") or not (opened or prompt.rstrip().endswith("</think>")):
        return whole
    thinking, _, answer = message["content"].rpartition("</think>")
    thinking = next((message[key] for key in THINKING if key in message), thinking.removeprefix("<think>")).strip("\n")
    if thinking and not opened:
        return whole
    said = f"{thinking}\n</think>\n\n" * opened + answer.lstrip("\n")
    shown, mark = _marked_chat(chat, row, len(before), place)
    return prompt + said + shown.partition(mark)[2]


def _turn(chat: Chat, row: Rendered, k: int, whole: str, place: str) -> Turn:
    """Where the turn of message k lies in the text of a whole chat.

    The chat is shown again with a text in place of the answer that occurs nowhere else. What then stands behind that
    text is the end of the turn and the rest of the chat, however the template changes the answer itself.
    """
    before, message, after = row.messages[:k], row.messages[k], row.messages[k + 1 :]
    prompt = _show(chat, row, before, True, place)
    if not whole.startswith(prompt):
        raise FtjaxError(
            f"{place}: the chat template rewrites what it rendered before, so that the prompt of message {k + 1} is no "
            f"part of the chat; {_advice(chat, row, k)}"
        )
    text, mark = _marked_chat(chat, row, k, place)
    marked = (*before, _marked(message, mark))

    def behind(*further: dict, generation: bool = False) -> str:
        try:
            return _show(chat, row, (*marked, *further), generation, place).partition(mark)[2]
        except FtjaxError:  # the template refuses a chat that is none of the row's
            return ""

    rest, loose = text.partition(mark)[2], 0
    if after:
        ends_here, goes_on = behind(), behind(generation=True)
        close = turn_close(rest, ends_here, chat.marks) or turn_close(rest, goes_on, chat.marks)
        if close is None and rest.startswith(chat.marks.between):
            close = len(chat.marks.between) or None
        if close is None:  # no token ends the turn
            close = len(ends_here) if rest.startswith(ends_here) else 0
            blank = rest[close : shared(rest, goes_on, chat.marks.tokens)]
            loose = len(blank) - len(blank.lstrip())
    else:
        goes_on = functools.cache(lambda: behind({"role": "user", "content": "Why?"}))
        close = last_close(rest, goes_on, chat.marks)
        if close is None:  # the end-of-text token will follow; what is text of another turn must not be trained
            close = shared(rest, goes_on(), chat.marks.tokens)
            close = close if rest[close:].strip() else len(rest)
    stop = len(whole) - len(rest) + close
    if not whole.endswith(rest[close:]) or not _shows(message, prompt, whole[:stop], chat, row, before, place):
        raise FtjaxError(
            f"{place}: the chat template leaves out or rewrites a part of message {k + 1} (such as its thinking); "
            f"remove that part, or {_advice(chat, row, k)}"
        )
    return Turn(k, prompt, stop, loose)


def _marked_chat(chat: Chat, row: Rendered, k: int, place: str) -> tuple[str, str]:
    """(the text of a chat with a mark in place of message k's answer, the mark, which occurs there once)."""
    said = repr(row.messages)
    mark = next(text for n in itertools.count() if (text := f"answer{n}x") not in said)
    text = _show(chat, row, (*row.messages[:k], _marked(row.messages[k], mark), *row.messages[k + 1 :]), False, place)
    if text.count(mark) != 1:
        often = "more than once" if mark in text else "not at all"
        raise FtjaxError(
            f"{place}: the chat template shows the text or call of message {k + 1} {often}; {_advice(chat, row, k)}"
        )
    return text, mark


def _advice(chat: Chat, row: Rendered, k: int) -> str:
    """What to do where message k cannot be trained."""
    others = 'set data.train_on="last", mark the answer with "train": false, or ' * (k != _answers(row.messages)[-1])
    names = [name for name in chat_templates.able(chat.tokenizer) if name not in ("tokenizer", row.template)]
    return f"{others}set data.template to one of {', '.join(names)}"


def _marked(message: dict, mark: str) -> dict:
    """A message with `mark` in place of its text, or of what its last tool call is given."""
    if not message.get("tool_calls"):
        return message | {"content": mark}
    *calls, last = message["tool_calls"]
    last = last | {"function": last["function"] | {"arguments": {"argument": mark}}}
    return message | {"tool_calls": [*calls, last]}


def _shows(message: dict, prompt: str, through: str, chat: Chat, row: Rendered, before, place: str) -> bool:
    """Whether the text `through` the end of a turn holds all that its message says, white space aside.

    What opens an answer, such as `<think>`, may stand in the prompt already.
    """
    said = [EMPTY_THINKING.sub("", message["content"]), *(message[key] for key in THINKING if key in message)]

    def holds(text: str) -> bool:
        text = "".join(text.split())
        return all("".join(part.split()) in text for part in said)

    return holds(through[len(prompt) :]) or holds(
        through[shared(prompt, _show(chat, row, before, False, place), chat.marks.tokens) :]
    )


EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*")  # nothing is lost where a template drops it


def _encode_chats(plans: list[Plan], chat: Chat, end_id: int) -> list[tuple[list[int], list[Span]]]:
    """(ids, what is trained) for each chat."""
    texts = [p.whole for p in plans] + [text for p in plans for t in p.turns for text in (t.prompt, p.whole[: t.stop])]
    texts = list(dict.fromkeys(texts))
    encoded = dict(zip(texts, _one_bos(_ids(chat.tokenizer, texts, special=False), chat.tokenizer)))
    return [_place_turns(plan, chat, encoded, end_id) for plan in plans]


def _place_turns(plan: Plan, chat: Chat, encoded: dict[str, list[int]], end_id: int) -> tuple[list[int], list[Span]]:
    """An answer starts where the rendered prompt before it ends, and goes to the end of its turn."""
    ids = encoded[plan.whole]

    def length(text: str) -> int | None:
        """Tokens of a text that the chat begins with; None where its last token goes on behind it."""
        if text not in encoded:
            (encoded[text],) = _one_bos(_ids(chat.tokenizer, [text], special=False), chat.tokenizer)
        return len(encoded[text]) if ids[: len(encoded[text])] == encoded[text] else None

    if plan.turns and length(plan.turns[-1].prompt) is None:
        last = plan.turns[-1]  # nothing that is looked for follows, so that its first token may be cut at the border
        for text in (plan.whole, *(plan.whole[: last.stop + n] for n in range(last.loose + 1))):
            encoded[text] = encoded[last.prompt] + _continuation(chat.tokenizer, text[len(last.prompt) :])
        ids = encoded[plan.whole]
    spans = []
    for turn in plan.turns:
        start = length(turn.prompt)
        stops = (length(plan.whole[: turn.stop + n]) for n in range(turn.loose + 1))
        stop = next((n for n in stops if n is not None), None)
        if start is None or stop is None:
            border = "first characters" if start is None else "last characters"
            beside = "before them" if start is None else "behind them"
            raise FtjaxError(
                f"{plan.place}: the {border} of message {turn.at + 1} merge into one token with the template {beside}: "
                "remove the white space at its beginning and end (data.clean.whitespace=True), or set "
                'data.train_on="last"'
            )
        spans.append((start, stop))
    if plan.messages[-1]["role"] == "assistant" and ids[-1] != end_id and not _closed(plan.whole, chat):
        ids = [*ids, end_id]  # no token of the template ends the chat
        spans[-1:] = [(a, b + (b == len(ids) - 1)) for a, b in spans[-1:]]
    if plan.everything:
        borders = [0, *(at for span in spans for at in span), len(ids)]
        spans = list(zip(borders[::2], borders[1::2]))
    return ids, spans


def _closed(whole: str, chat: Chat) -> bool:
    """Whether an end token stands last in a chat, white space aside."""
    last = next(reversed(list(chat.marks.ends.finditer(whole))), None)
    return last is not None and not whole[last.end() :].strip()


def _answers(messages: Sequence[dict]) -> list[int]:
    return [k for k, message in enumerate(messages) if message["role"] == "assistant"]


def _show(chat: Chat, row: Rendered, messages: Sequence[dict], generation: bool, place: str) -> str:
    """The text of messages of a row, with the opening of an answer where `generation`."""
    if not (chat.text or chat.tokenizer.chat_template):
        raise FtjaxError(
            f"{place}: messages need a chat template and this tokenizer has none: set data.template; those that it can "
            f"write are {', '.join(chat_templates.able(chat.tokenizer))}"
        )
    shown = [{key: cell for key, cell in message.items() if key != "train"} for message in messages]
    try:
        return show(chat.tokenizer, shown, chat.text, list(row.tools) or None, generation)
    except FtjaxError as e:
        raise FtjaxError(f"{place}: the chat template refuses these messages: {e}") from e


# ---------------------------------------------------------------------------------------------- shared


def _example(ids: list[int], spans: list[Span], place: Place, index: int) -> Example:
    trained = np.zeros(len(ids), bool)
    for start, end in spans:
        trained[start:end] = True
    trained[:1] = False
    if not trained.any():
        raise FtjaxError(f"{place(index)}: every label is masked: no token of this row would be trained")
    return Example(np.array(ids, np.int32), trained)


def _ids(tokenizer, texts: list[str], special: bool = True) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def _one_bos(rows: list[list[int]], tokenizer) -> list[list[int]]:
    """A text that brings its own BOS must not get the tokenizer's besides."""
    bos = tokenizer.bos_token_id
    return rows if bos is None else [ids[1:] if ids[:2] == [bos, bos] else ids for ids in rows]
