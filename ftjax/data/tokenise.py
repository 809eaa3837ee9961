"""Rendered rows -> token ids, and which of the tokens are trained.

Two properties are guaranteed. The ids of a prompt are exactly those that generation is given. The trained tokens are
the answer and the token that ends it, and no others. Both are checked on ids, without trusting the chat template.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.data import chat_templates, template
from ftjax.data.template import THINKING, Rendered, answers, before_answer
from ftjax.errors import FtjaxError
from ftjax.hub.tokenizer import Marks, end_token, last_close, marks, shared, show, turn_close

MARK = "\ufdd0"  # a character of no text, within the text of a special token that means itself and not the token
CHUNK = 1024  # texts given to the tokenizer at once; its records take about 100 bytes a token

Place = Callable[[int], str]  # index of a row -> its name in errors, such as "a.jsonl row 3"
Span = tuple[int, int]  # first token, one past the last


class Example(NamedTuple):
    """One row as tokens.

    Attributes:
        ids: (T,) int32.
        trained: (T,) bool, whether the token is a label. The first token never is. For labelled rows (see
            ftjax.data.labelled): whether a label is predicted at the token.
        targets: (n, ...) for labelled rows, the target of each of the n tokens that are trained. None: the tokens
            themselves are the labels.
        second: Index of the token at which the second of two texts begins; 0: there is none, or the tokenizer gives no
            token types.
        row: Index of the row, among those that were encoded together, that this example was made of. None: the row at
            the example's own index.
        whole: Number of tokens before the row was cut; None: it was not cut.
        lost: Number of trained tokens that were cut off.
    """

    ids: np.ndarray
    trained: np.ndarray
    targets: np.ndarray | None = None
    second: int = 0
    row: int | None = None
    whole: int | None = None
    lost: int = 0


def row_number(index: int) -> str:
    """The name of a row in errors if only its index is known."""
    return f"row {index + 1}"


def encode(
    rendered: Sequence[Rendered], tokenizer, train_on: str = "assistant", place: Place = row_number, end: str = ""
) -> list[Example]:
    """One Example for each row, not cut. The result for a row does not depend on the other rows.

    Prompt and completion are encoded together. If the result does not begin with the ids of the prompt alone, because a
    token merged across the border, the completion is encoded after the ids of the prompt. The end-of-text token follows
    the completion, unless it is there already, and is trained. Messages are rendered by their chat template. An
    assistant's turn is trained up to and including the token that ends it, unless it has `"train": False`.

    Args:
        rendered: The rows.
        tokenizer: The tokenizer, from transformers.
        train_on: `assistant` (every turn), `last` (the last turn) or `all` (every token of the row).
        place: Names a row in errors.
        end: The token that ends a text instead of the tokenizer's end-of-text; empty: the end-of-text.

    Raises:
        FtjaxError: Names the row. If the template fails, rewrites what came before a trained turn, or leaves out a part
            of that turn; if a token holds parts of two turns; if no token of a row would be trained.
    """
    end_id = end_token(tokenizer, end)
    chat_of = functools.cache(lambda name: _chat(name, end, tokenizer))
    examples = []
    for first in range(0, len(rendered), CHUNK):
        chunk = rendered[first : first + CHUNK]
        plain = [i for i, r in enumerate(chunk) if r.messages is None]
        done = dict(zip(plain, _encode_plain([chunk[i] for i in plain], tokenizer, train_on, end_id)))
        for name in dict.fromkeys(r.template for r in chunk if r.messages is not None):
            chat = chat_of(name)
            mine = [i for i, r in enumerate(chunk) if r.messages is not None and r.template == name]
            at = [place(first + i) for i in mine]
            plans = [_plan(chat, _as_text(chat, chunk[i], at), train_on, at) for i, at in zip(mine, at)]
            done |= zip(mine, _encode_chats(plans, chat, end_id))
        examples += [_example(*done[i], place, first + i) for i in range(len(chunk))]
    return examples


def encode_prompts(
    rendered: Sequence[Rendered], tokenizer, place: Place = row_number, end: str = "", goes_on: bool = False
) -> list[np.ndarray]:
    """The ids (T,) int32 of the prompt of each row, from which generation starts.

    Args:
        rendered: The rows. Of a conversation, the messages before the last assistant message are the prompt.
        tokenizer: The tokenizer, from transformers.
        place: Names a row in errors.
        end: See data.end.
        goes_on: Whether all messages are the prompt if the last one is not the assistant's.

    Raises:
        FtjaxError: Names the row. If the chat template refuses its messages, if there is no template, or if a text is
            not Unicode.
    """
    texts = [r.prompt for r in rendered if r.messages is None]
    for i, r in enumerate(rendered):
        _check_characters(r.prompt if r.messages is None else "".join(m["content"] for m in r.messages), place(i))
    plain = iter(_prompt_ids(texts, tokenizer))
    chat_of, prompts = functools.cache(lambda name: _chat(name, end, tokenizer)), []
    for i, r in enumerate(rendered):
        if r.messages is not None:
            chat = chat_of(r.template)
            r = _as_text(chat, r, place(i))
            messages = before_answer(r.messages, goes_on)
            prompts.append(_show(chat, r, messages, True, place(i)))
            _need_all(chat, r, messages, prompts[-1], place(i))
    chats = iter(_one_bos(_ids(tokenizer, prompts, special=False), tokenizer))
    return [np.array(next(plain if r.messages is None else chats), np.int32) for r in rendered]


def _check_characters(text: str, place: str) -> None:
    """Raise FtjaxError for a text that no file in UTF-8 could hold, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FtjaxError(
            f"{place}: holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character; mend "
            "or remove it"
        ) from None


def reply(row: Rendered, answer: str, messages: tuple[dict, ...], tokenizer, place: str, end: str = "") -> list[int]:
    """The ids of the text between an answer of a conversation and the next answer.

    Args:
        row: The conversation before the answer.
        answer: The answer.
        messages: The messages that follow it.
        tokenizer: The tokenizer, from transformers.
        place: Names the row in errors.
        end: See data.end.

    Returns:
        From the end of the answer on, its end token included, up to what opens the next answer.

    Raises:
        FtjaxError: If the chat template refuses the messages, or does not show the answer as one text.
    """
    chat, before = _chat(row.template, end, tokenizer), row.messages
    whole = (*before, {"role": "assistant", "content": answer}, *messages)
    talk = _as_text(chat, dataclasses.replace(row, messages=whole), place)
    shown, mark = _marked_chat(chat, talk, len(before), place, generation=True)
    return continuation(chat.tokenizer, shown.partition(mark)[2])


def reference(row: Rendered, tokenizer, place: str = row_number(0), end: str = "") -> str:
    """The answer that a generation for a row is compared with.

    It is template.reference, except for an answer that calls tools. For these it is the text that decoding a correct
    generation gives, because only the chat template determines how a call is written.

    Args:
        row: The rendered row.
        tokenizer: The tokenizer with which the row is encoded.
        place: Name of the row in errors.
        end: The token that ends an answer, see data.end.

    Returns:
        Text without special tokens, normalised by `answer_of`.
    """
    turns = answers(row.messages or ())
    if not turns or not row.messages[turns[-1]].get("tool_calls"):
        return template.reference(row)
    chat = _chat(row.template, end, tokenizer)
    row = _as_text(chat, row, place)
    before, through = (_show(chat, row, row.messages[: turns[-1] + more], not more, place) for more in (0, 1))
    if not through.startswith(before):  # encode refuses such a row
        return template.reference(row)
    ids = _ids(tokenizer, [through[len(before) :]], special=False)[0]
    return answer_of(tokenizer.decode(ids, skip_special_tokens=True))


def answer_of(text: str) -> str:
    """A decoded generation without white space at its ends, and without an empty thinking block.

    Chat templates may open such a block in the prompt.
    """
    return EMPTY_THINKING.sub("", text).strip()


# ---------------------------------------------------------------------------------------------- plain text


def _encode_plain(rows: list[Rendered], tokenizer, train_on: str, end: int) -> list[tuple[list[int], list[Span]]]:
    """(ids, trained spans) of each row of plain text."""
    if not rows:
        return []
    prompts = _prompt_ids([r.prompt for r in rows], tokenizer)
    joint = _one_bos(_ids(tokenizer, [r.prompt + r.completion for r in rows]), tokenizer)
    out = []
    for row, prompt, ids in zip(rows, prompts, joint):
        if ids[: len(prompt)] != prompt:
            ids = prompt + continuation(tokenizer, row.completion)
        if ids[-1:] != [end]:
            ids = [*ids, end]
        out.append((ids, [(0 if train_on == "all" else len(prompt), len(ids))]))
    return out


def _prompt_ids(texts: list[str], tokenizer) -> list[list[int]]:
    prompts = _one_bos(_ids(tokenizer, texts), tokenizer)
    eos = tokenizer.eos_token_id
    if texts and _ids(tokenizer, ["a"])[0][-1] == eos:  # the tokenizer ends every text, but a prompt must stay open
        prompts = [ids[:-1] for ids in prompts]
    return prompts


def continuation(tokenizer, text: str, **how) -> list[int]:
    """Ids of a text that follows another text, without the space that some tokenizers put before the first word. how:
    of `_ids`."""
    before, both = _ids(tokenizer, ["\n", "\n" + text], special=False, **how)
    if both[: len(before)] == before:
        return both[len(before) :]
    return _ids(tokenizer, [text], special=False, **how)[0]


# ---------------------------------------------------------------------------------------------- chats


class Chat(NamedTuple):
    """A tokenizer and the chat template with which it is used."""

    tokenizer: object
    text: str | None  # Jinja; None: the tokenizer's own
    marks: Marks


class Turn(NamedTuple):
    """An assistant's turn in the text of a whole chat."""

    at: int  # its index in the messages
    prompt: str  # the chat before it, as generation is given it
    stop: int  # characters of the chat up to the end of the turn
    loose: int  # characters of white space after it that belong to no turn; the last token may extend into them


class Plan(NamedTuple):
    """A conversation as text, and the turns that have to be located among its tokens."""

    whole: str
    turns: list[Turn]
    messages: tuple[dict, ...]
    everything: bool  # whether all tokens are trained except those of `turns`; otherwise those of `turns` are
    place: str


def _chat(name: str, end: str, tokenizer) -> Chat:
    tokenizer = chat_templates.dated(tokenizer)
    text = chat_templates.resolve(name, end, tokenizer) or None
    return Chat(tokenizer, text, marks(tokenizer, text))


def _as_text(chat: Chat, row: Rendered, place: str) -> Rendered:
    """A row whose messages and tools stay text: `<|im_end|>` in an answer must not end its turn. Each special token
    that the template writes itself gets MARK within its text, see `_ids`."""
    pattern, tokens = chat.marks.around, chat.tokenizer.added_tokens_decoder
    found = set(pattern.findall(repr((row.messages, row.tools))))
    for token in found:
        if not chat.tokenizer.is_fast or tokens.keys() & continuation(chat.tokenizer, token, split_special_tokens=True):
            raise FtjaxError(
                f"{place}: holds the text {token!r}, which this tokenizer can only read as the token itself; remove it "
                "from the row"
            )

    def marked(value):
        if isinstance(value, str):
            return pattern.sub(lambda token: token[0][0] + MARK + token[0][1:], value)
        if isinstance(value, dict):
            return {key: marked(cell) for key, cell in value.items()}
        return [marked(cell) for cell in value] if isinstance(value, list | tuple) else value

    if not found:
        return row
    return dataclasses.replace(row, messages=tuple(marked(row.messages)), tools=tuple(marked(row.tools)))


def _plan(chat: Chat, row: Rendered, train_on: str, place: str) -> Plan:
    if row.tools:
        chat_templates.check_tools(row.template, chat.tokenizer)
    everything = train_on == "all"
    turns = answers(row.messages)
    left_out = [k for k, message in enumerate(row.messages) if not message.get("train", True) and k not in turns]
    if everything and left_out:
        raise FtjaxError(
            f"{place}: message {left_out[0] + 1}, of the role {row.messages[left_out[0]]['role']!r}, is marked as not "
            "trained (`train` false or `weight` 0), and with data.train_on=all only answers can be left out; remove "
            "the mark, or set data.train_on=assistant"
        )
    wanted = turns[-1:] if train_on == "last" else turns
    # If everything is trained, the untrained turns have to be located; otherwise the trained turns.
    found = [k for k in wanted if row.messages[k].get("train", True) != everything]
    if not everything and not found:
        raise FtjaxError(
            f"{place}: every answer is marked as not trained (`train` false or `weight` 0); mark one as trained, or "
            "remove the row"
        )
    if found[:1] == [0]:
        raise FtjaxError(
            f"{place}: the first message is from the assistant, so it has no prompt; put a user message before it, or "
            "remove it"
        )
    whole = _show(chat, row, row.messages, False, place)
    _need_all(chat, row, row.messages, whole, place)
    if found[-1:] == [len(row.messages) - 1]:
        whole = _behind_its_prompt(chat, row, whole, place)
    return Plan(whole, [_turn(chat, row, k, whole, place) for k in found], row.messages, everything, place)


def _need_all(chat: Chat, row: Rendered, messages: Sequence[dict], text: str, place: str) -> None:
    """Raise FtjaxError if the template leaves out tools, or a message of a role other than user and assistant.

    Many templates show nothing of a role that they do not know. `text` is the rendered text of the messages.
    """
    if row.tools and text in (_show(chat, dataclasses.replace(row, tools=()), messages, g, place) for g in (0, 1)):
        raise FtjaxError(
            f"{place}: the chat template does not show the tools of this row; remove them, or "
            f"{_other_templates(chat, row)}"
        )
    rare = [k for k, m in enumerate(messages) if m["role"] not in ("user", "assistant") and m["content"].strip()]
    if not rare:
        return
    mark, marked = _unused(row), list(messages)
    for k in rare:
        marked[k] = messages[k] | {"content": f"{mark}{k}x"}
    try:
        shown = _show(chat, row, marked, False, place).casefold()
    except FtjaxError:  # it reads these texts, as JSON for instance
        return
    for k in rare:
        if f"{mark}{k}x" not in shown:
            raise FtjaxError(
                f"{place}: the chat template leaves out message {k + 1}, whose role is {messages[k]['role']!r}; write "
                f"it with a role that the template shows, remove it, or {_other_templates(chat, row)}"
            )


def _behind_its_prompt(chat: Chat, row: Rendered, whole: str, place: str) -> str:
    """The text of a chat, changed if necessary so that the last answer follows the prompt that generation is given.

    Templates of reasoning models open the thinking in that prompt (`<think>`). Some of them, such as DeepSeek-R1's,
    show no thinking in a finished chat. In that case the answer follows the prompt with its thinking, or without any.
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
    written = f"{thinking}\n</think>\n\n" * opened + answer.lstrip("\n")
    shown, mark = _marked_chat(chat, row, len(before), place)
    return prompt + written + shown.partition(mark)[2]


def _turn(chat: Chat, row: Rendered, k: int, whole: str, place: str) -> Turn:
    """Locate the turn of message k in the text of a whole chat.

    The chat is rendered again with the answer replaced by a text that occurs nowhere else. What follows that text is
    the end of the turn and the rest of the chat, however the template changes the answer itself.
    """
    before, message, after = row.messages[:k], row.messages[k], row.messages[k + 1 :]
    prompt = _show(chat, row, before, True, place)
    if not whole.startswith(prompt):
        raise FtjaxError(
            f"{place}: the chat template changes earlier turns once later ones follow, so the prompt of message "
            f"{k + 1} does not occur in the whole chat; {_advice(chat, row, k)}"
        )
    text, mark = _marked_chat(chat, row, k, place)
    marked = (*before, _marked(message, mark))

    def behind(*further: dict, generation: bool = False) -> str:
        try:
            return _show(chat, row, (*marked, *further), generation, place).partition(mark)[2]
        except FtjaxError:  # the template refuses this chat, which is not the row's own
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
        if close is None:  # the end-of-text token will be added; text of another turn must not be trained
            close = shared(rest, goes_on(), chat.marks.tokens)
            close = close if rest[close:].strip() else len(rest)
    stop = len(whole) - len(rest) + close
    if not whole.endswith(rest[close:]) or not _shows(message, prompt, whole[:stop], chat, row, before, place):
        raise FtjaxError(
            f"{place}: the chat template leaves out or rewrites a part of message {k + 1} (such as its thinking); "
            f"remove that part, or {_advice(chat, row, k)}"
        )
    return Turn(k, prompt, stop, loose)


def _marked_chat(chat: Chat, row: Rendered, k: int, place: str, generation: bool = False) -> tuple[str, str]:
    """(the text of a chat with a mark in place of message k's answer, the mark). The mark occurs once in the text."""
    mark = _unused(row)
    messages = (*row.messages[:k], _marked(row.messages[k], mark), *row.messages[k + 1 :])
    text = _show(chat, row, messages, generation, place)
    if text.count(mark) != 1:
        often = "more than once" if mark in text else "not at all"
        raise FtjaxError(
            f"{place}: the chat template shows the text or call of message {k + 1} {often}; {_advice(chat, row, k)}"
        )
    return text, mark


def _unused(row: Rendered) -> str:
    """A text that occurs nowhere in the messages of a row."""
    messages = repr(row.messages)
    return next(text for n in itertools.count() if (text := f"answer{n}x") not in messages)


def _advice(chat: Chat, row: Rendered, k: int) -> str:
    """What the user can do if message k cannot be trained."""
    others = 'set data.train_on="last", mark the answer with "train": false, or ' * (k != answers(row.messages)[-1])
    return others + _other_templates(chat, row)


def _other_templates(chat: Chat, row: Rendered) -> str:
    names = [name for name in chat_templates.able(chat.tokenizer) if name not in ("tokenizer", row.template)]
    return f"set data.template to one of {', '.join(names)}"


def _marked(message: dict, mark: str) -> dict:
    """A message with `mark` in place of its text, or in place of the arguments of its last tool call."""
    if not message.get("tool_calls"):
        return message | {"content": mark}
    *calls, last = message["tool_calls"]
    last = last | {"function": last["function"] | {"arguments": {"argument": mark}}}
    return message | {"tool_calls": [*calls, last]}


def _shows(message: dict, prompt: str, through: str, chat: Chat, row: Rendered, before, place: str) -> bool:
    """Whether `through`, the text up to the end of a turn, contains all that its message says, ignoring white space.

    The opening of an answer, such as `<think>`, may already be part of the prompt.
    """
    parts = [EMPTY_THINKING.sub("", message["content"]), *(message[key] for key in THINKING if key in message)]

    def holds(text: str) -> bool:
        text = "".join(text.split())
        return all("".join(part.split()) in text for part in parts)

    return holds(through[len(prompt) :]) or holds(
        through[shared(prompt, _show(chat, row, before, False, place), chat.marks.tokens) :]
    )


EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*")  # nothing is lost if a template drops it


def _encode_chats(plans: list[Plan], chat: Chat, end_id: int) -> list[tuple[list[int], list[Span]]]:
    """(ids, trained spans) of each chat."""
    texts = [p.whole for p in plans] + [text for p in plans for t in p.turns for text in (t.prompt, p.whole[: t.stop])]
    texts = list(dict.fromkeys(texts))
    encoded = dict(zip(texts, _one_bos(_ids(chat.tokenizer, texts, special=False), chat.tokenizer)))
    return [_place_turns(plan, chat, encoded, end_id) for plan in plans]


def _place_turns(plan: Plan, chat: Chat, encoded: dict[str, list[int]], end_id: int) -> tuple[list[int], list[Span]]:
    """(ids, trained spans) of a chat. An answer starts where its rendered prompt ends, and includes its turn's end."""
    ids = encoded[plan.whole]

    def length(text: str) -> int | None:
        """Number of tokens of a text with which the chat begins; None if its last token extends beyond the text."""
        if text not in encoded:
            (encoded[text],) = _one_bos(_ids(chat.tokenizer, [text], special=False), chat.tokenizer)
        return len(encoded[text]) if ids[: len(encoded[text])] == encoded[text] else None

    if plan.turns and length(plan.turns[-1].prompt) is None:
        last = plan.turns[-1]  # no other turn has to be located after it, so a token may be split at its first border
        for text in (plan.whole, *(plan.whole[: last.stop + n] for n in range(last.loose + 1))):
            encoded[text] = encoded[last.prompt] + continuation(chat.tokenizer, text[len(last.prompt) :])
        ids = encoded[plan.whole]
    spans = []
    for turn in plan.turns:
        start = length(turn.prompt)
        stops = (length(plan.whole[: turn.stop + n]) for n in range(turn.loose + 1))
        stop = next((n for n in stops if n is not None), None)
        if start is None or stop is None:
            border = "first characters" if start is None else "last characters"
            beside = "before them" if start is None else "after them"
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
    """Whether an end token is the last text of a chat, ignoring white space."""
    last = next(reversed(list(chat.marks.ends.finditer(whole))), None)
    return last is not None and not whole[last.end() :].strip()


def _show(chat: Chat, row: Rendered, messages: Sequence[dict], generation: bool, place: str) -> str:
    """The rendered text of messages of a row; with `generation`, followed by the text that opens an answer."""
    if not (chat.text or chat.tokenizer.chat_template):
        raise FtjaxError(
            f"{place}: messages need a chat template, and this tokenizer has none; set data.template to one that it "
            f"supports: {', '.join(chat_templates.able(chat.tokenizer))}"
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
        raise FtjaxError(
            f"{place(index)}: no token of this row would be trained (every label is masked); correct or remove the row"
        )
    return Example(np.array(ids, np.int32), trained)


def _ids(tokenizer, texts: list[str], special: bool = True, **how) -> list[list[int]]:
    """The ids of texts. Where MARK stands within the text of a special token, they are those of plain text."""
    if not texts:
        return []
    bare = [text.replace(MARK, "") for text in texts]
    found = tokenizer(bare, add_special_tokens=special, return_attention_mask=False, verbose=False, **how)["input_ids"]
    for i, text in enumerate(texts):
        if MARK in text:
            found[i] = _plainly(tokenizer, text, bare[i], special)
    return found


def _plainly(tokenizer, text: str, bare: str, special: bool) -> list[int]:
    """The ids of a text with MARK, given that text without it too."""
    within = np.cumsum([len(part) for part in text.split(MARK)[:-1]])  # the second character of each marked token
    tokens, ids = tokenizer.added_tokens_decoder, []
    found = tokenizer(bare, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    for i, (start, stop) in zip(found["input_ids"], found["offset_mapping"]):
        mine = i in tokens and np.any((start < within) & (within < stop))
        ids += continuation(tokenizer, str(tokens[i]), split_special_tokens=True) if mine else [i]
    return ids


def _one_bos(rows: list[list[int]], tokenizer) -> list[list[int]]:
    """Remove a second BOS: a text that already begins with BOS must not get the tokenizer's in addition."""
    bos = tokenizer.bos_token_id
    return rows if bos is None else [ids[1:] if ids[:2] == [bos, bos] else ids for ids in rows]
