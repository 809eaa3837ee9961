"""Rendered rows -> token ids and which of them are trained.

Two promises: the ids of a prompt are those that generation feeds, to the last one; and what is trained is the answer
together with the token that ends it, nothing else. Both are decided on ids, never on a template's promises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.data import chat_templates
from ftjax.data.template import THINKING, Rendered
from ftjax.errors import FtjaxError
from ftjax.hub.tokenizer import end_token, turn_end

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
    Raises FtjaxError naming the row: a template that fails, or that rewrites a trained turn or what came before it once
    more messages follow; a row in which nothing would be trained.
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
    rendered: Sequence[Rendered], tokenizer, place: Place = row_number, end: str = ""
) -> list[np.ndarray]:
    """The ids (T,) int32 that generation feeds for each row; of messages, all before the last assistant turn."""
    texts = [r.prompt for r in rendered if r.messages is None]
    plain = iter(_prompt_ids(texts, tokenizer))
    chats, prompts = {}, []
    for i, r in enumerate(rendered):
        if r.messages is not None:
            chats[r.template] = chats.get(r.template) or _chat(r.template, end, tokenizer)
            turns = _answers(r.messages)
            prompts.append(_show(chats[r.template], r, turns[-1] if turns else None, True, place(i)))
    chat = iter(_one_bos(_ids(tokenizer, prompts, special=False), tokenizer))
    return [np.array(next(plain if r.messages is None else chat), np.int32) for r in rendered]


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
    close: list[int]  # the token that ends a turn and the ids behind it; empty: no token does
    special: frozenset[int]  # ids of special tokens


class Turn(NamedTuple):
    """An assistant's turn as text."""

    at: int  # its index in the messages
    prompt: str  # the chat before it, as generation feeds it
    through: str  # the chat up to and including it


class Plan(NamedTuple):
    """A conversation as text, and the turns of it that are to be found among its tokens."""

    whole: str
    turns: list[Turn]
    messages: tuple[dict, ...]
    everything: bool  # all tokens are trained, but for the turns that are found
    place: str


def _chat(name: str, end: str, tokenizer) -> Chat:
    text = chat_templates.resolve(name, end, tokenizer) or None
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Chat(tokenizer, text, turn_end(tokenizer, text), frozenset(tokenizer.all_special_ids) | special)


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
    turns = [Turn(k, _show(chat, row, k, True, place), _show(chat, row, k + 1, False, place)) for k in found]
    return Plan(_show(chat, row, None, False, place), turns, row.messages, everything, place)


def _encode_chats(plans: list[Plan], chat: Chat, end_id: int) -> list[tuple[list[int], list[Span]]]:
    """(ids, what is trained) for each chat."""
    texts = [text for plan in plans for text in (plan.whole, *(t for turn in plan.turns for t in turn[1:]))]
    texts = list(dict.fromkeys(texts))
    encoded = dict(zip(texts, _one_bos(_ids(chat.tokenizer, texts, special=False), chat.tokenizer)))
    return [_place_turns(plan, chat, encoded, end_id) for plan in plans]


def _place_turns(plan: Plan, chat: Chat, encoded: dict[str, list[int]], end_id: int) -> tuple[list[int], list[Span]]:
    """An answer starts where the rendered prompt before it ends, and goes to the token that ends its turn."""
    ids, through = encoded[plan.whole], [encoded[turn.through] for turn in plan.turns]
    if not all(plan.whole.startswith(turn.prompt) for turn in plan.turns):
        raise FtjaxError(
            f"{plan.place}: the chat template rewrites what it rendered before, so that the prompt of an answer is no "
            f"part of the finished chat; {LAST}"
        )
    if plan.turns and not _begins(ids, encoded[plan.turns[-1].prompt]):
        last = plan.turns[-1]  # nothing that is looked for follows, so that its first token may be cut at the border
        ids, through[-1] = (
            encoded[last.prompt] + _continuation(chat.tokenizer, text[len(last.prompt) :])
            for text in (plan.whole, last.through)
        )
    spans = []
    for turn, turn_ids in zip(plan.turns, through):
        start = len(encoded[turn.prompt])
        if not _begins(ids, encoded[turn.prompt]):
            raise FtjaxError(
                f"{plan.place}: the first characters of message {turn.at + 1} merge into one token with the template "
                "before them: remove the white space at its beginning (data.clean.whitespace=True), or set "
                'data.train_on="last"'
            )
        spans.append((start, _stop(plan, turn, chat, ids, turn_ids, start)))
    if plan.messages[-1]["role"] == "assistant" and ids[-1] != end_id and _closed(chat, ids, 0) is None:
        ids = [*ids, end_id]  # no token of the template ends the chat
        spans[-1:] = [(a, b + (b == len(ids) - 1)) for a, b in spans[-1:]]
    if plan.everything:
        borders = [0, *(at for span in spans for at in span), len(ids)]
        spans = list(zip(borders[::2], borders[1::2]))
    return ids, spans


def _stop(plan: Plan, turn: Turn, chat: Chat, ids: list[int], turn_ids: list[int], start: int) -> int:
    """One past the last token of a turn that starts at `start` of a chat's ids."""
    message, shown = plan.messages[turn.at], turn.through[len(turn.prompt) :]
    stop = _closed(chat, turn_ids, start)
    end = turn_ids[stop - 1] if stop else None
    stop = stop or len(turn_ids)
    if not _begins(ids, turn_ids[:stop]):  # shown differently once more messages follow: train what is shown
        stop = ids.index(end, start) + 1 if end in ids[start:] else None
        shown = plan.whole[len(turn.prompt) :].partition(chat.tokenizer.convert_ids_to_tokens(end))[0] if stop else ""
        if not stop or EMPTY_THINKING.sub("", message["content"]).strip() not in shown:
            raise FtjaxError(
                f"{plan.place}: the chat template rewrites message {turn.at + 1} once more messages follow (such as "
                f"dropping its thinking); {LAST}"
            )
    if any(message.get(key, "").strip() not in shown for key in THINKING):
        raise FtjaxError(f"{plan.place}: the chat template leaves out the thinking of message {turn.at + 1}; {LAST}")
    return stop


LAST = (
    'set data.train_on="last", mark the answer with "train": false, remove what is left out, or choose another '
    "data.template"
)
EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*")  # nothing is lost where a template drops it


def _closed(chat: Chat, ids: list[int], start: int) -> int | None:
    """Just past the token that ends the turn ids[start:], what a template puts behind it aside; None: no token does."""
    behind = len(chat.close)
    if behind and ids[-behind:] == chat.close and len(ids) - behind >= start:
        return len(ids) - behind + 1
    for end in range(len(ids), start, -1):  # a turn may end otherwise than an answer in text, such as a tool call's
        if ids[end - 1] in chat.special:
            return end
        if chat.tokenizer.decode(ids[end - 1 : end]).strip():
            return None
    return None


def _begins(ids: list[int], start: list[int]) -> bool:
    return ids[: len(start)] == start


def _answers(messages: Sequence[dict]) -> list[int]:
    return [k for k, message in enumerate(messages) if message["role"] == "assistant"]


def _show(chat: Chat, row: Rendered, upto: int | None, generation: bool, place: str) -> str:
    """The text of the messages before index `upto`, with the opening of an answer where `generation`."""
    import jinja2

    if not (chat.text or chat.tokenizer.chat_template):
        raise FtjaxError(
            f"{place}: messages need a chat template and this tokenizer has none: set data.template; those that it can "
            f"write are {', '.join(chat_templates.able(chat.tokenizer))}"
        )
    messages = [{key: cell for key, cell in message.items() if key != "train"} for message in row.messages[:upto]]
    try:
        return chat.tokenizer.apply_chat_template(
            messages,
            tools=list(row.tools) or None,
            chat_template=chat.text,
            tokenize=False,
            add_generation_prompt=generation,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as e:
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
