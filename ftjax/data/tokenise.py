"""Rendered rows -> token ids and which of them are trained.

Two promises: the ids of a prompt are those that generation feeds, to the last one; and what is trained is the answer
together with the token that ends it, nothing else. Both are decided on ids, never on a template's promises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.data.template import Rendered
from ftjax.errors import FtjaxError

CHUNK = 1024  # texts given to the tokenizer at once; its own records take some 100 bytes a token

Place = Callable[[int], str]  # index of a row -> its name in an error, such as "a.jsonl row 3"


class Example(NamedTuple):
    """One row: ids (T,) int32; trained (T,) bool, whether the token is a label. The first token never is."""

    ids: np.ndarray
    trained: np.ndarray


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
    """One Example for each row, uncut.

    Prompt and completion are encoded together; where that does not begin with the prompt's own ids (a token merged
    across the border), the prompt's ids come first and the completion is encoded after them. The end-of-text token is
    added after the completion unless it stands there, and trained. Messages go through the tokenizer's chat template;
    every assistant turn is trained up to and including the token that ends it. train_on: assistant, or all. end: the
    token that ends a text instead of the tokenizer's end-of-text.
    Raises FtjaxError naming the row: a template that fails, or that rewrites what an earlier prompt said so that no
    prompt would be met in generation; a row in which nothing would be trained.
    """
    end_id = end_token(tokenizer, end)
    examples = []
    for first in range(0, len(rendered), CHUNK):
        chunk = rendered[first : first + CHUNK]
        chat = [i for i, r in enumerate(chunk) if r.messages is not None]
        plain = [i for i, r in enumerate(chunk) if r.messages is None]
        done = dict(zip(plain, _encode_plain([chunk[i] for i in plain], tokenizer, end_id)))
        places = [place(first + i) for i in chat]
        done |= zip(chat, _encode_chats([chunk[i].messages for i in chat], tokenizer, places, end_id))
        examples += [_example(*done[i], train_on, place, first + i) for i in range(len(chunk))]
    return examples


def encode_prompts(rendered: Sequence[Rendered], tokenizer, place: Place = row_number) -> list[np.ndarray]:
    """The ids (T,) int32 that generation feeds for each row; of messages, all before the last assistant turn."""
    texts = [r.prompt for r in rendered if r.messages is None]
    plain = iter(_prompt_ids(texts, tokenizer))
    chats = []
    for i, r in enumerate(rendered):
        if r.messages is not None:
            turns = [k for k, m in enumerate(r.messages) if m["role"] == "assistant"]
            chats.append(_render(tokenizer, r.messages[: turns[-1]] if turns else r.messages, True, place(i)))
    chat = iter(_ids(tokenizer, chats, special=False))
    return [np.array(next(plain if r.messages is None else chat), np.int32) for r in rendered]


class Fitted(NamedTuple):
    """What `fit` kept: examples; kept, their indices before; and what it cost, in rows and trained tokens."""

    examples: list[Example]
    kept: list[int]
    long: int  # rows longer than max_length
    lost: int  # trained tokens of those, cut or dropped


def fit(examples: Sequence[Example], max_length: int, long: str, place: Place = row_number) -> Fitted:
    """Rows of at most max_length tokens: longer ones are cut at the end (`truncate`), left out (`drop`) or refused.

    Raises FtjaxError naming the row: under `raise`, the first long row; under `truncate`, a row of which no trained
    token is left.
    """
    out, kept, longer, lost = [], [], 0, 0
    for i, (ids, trained) in enumerate(examples):
        if len(ids) > max_length:
            longer += 1
            if long == "raise":
                raise FtjaxError(
                    f"{place(i)}: {len(ids)} tokens, more than data.max_length={max_length}; raise it, or set "
                    'data.long to "truncate" or "drop"'
                )
            lost += int(trained.sum() if long == "drop" else trained[max_length:].sum())
            if long == "drop":
                continue
            ids, trained = ids[:max_length], trained[:max_length]
            if not trained.any():
                raise FtjaxError(
                    f"{place(i)}: cut to data.max_length={max_length}, no trained token is left (its answer starts "
                    'later); raise data.max_length or set data.long="drop"'
                )
        out.append(Example(ids, trained))
        kept.append(i)
    return Fitted(out, kept, longer, lost)


# ---------------------------------------------------------------------------------------------- plain text


def _encode_plain(rows: list[Rendered], tokenizer, end: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """(ids, [(start, end) of what is trained]) for each row."""
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
        out.append((ids, [(len(prompt), len(ids))]))
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


def _encode_chats(
    chats: list, tokenizer, places: list[str], end_id: int
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """(ids, [(start, end) of what is trained]) for each chat.

    An answer starts where the rendered prompt before it ends. It ends with the chat up to it, less the white space
    that a template puts behind the end-of-turn token.
    """
    plans = []
    for messages, place in zip(chats, places):
        turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        if turns[0] == 0:
            raise FtjaxError(f"{place}: the first message is the assistant's: nothing comes before its answer")
        prompts = [_render(tokenizer, messages[:k], True, place) for k in turns]
        through = [_render(tokenizer, messages[: k + 1], False, place) for k in turns]
        whole = through[-1] if turns[-1] == len(messages) - 1 else _render(tokenizer, messages, False, place)
        plans.append((whole, turns, prompts, through))
    texts = list(dict.fromkeys(text for whole, _, prompts, through in plans for text in (whole, *prompts, *through)))
    encoded = dict(zip(texts, _one_bos(_ids(tokenizer, texts, special=False), tokenizer)))
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    out = []
    for messages, place, (whole, turns, prompts, through) in zip(chats, places, plans):
        ids = encoded[whole]
        prompt_ids = [encoded[text] for text in prompts]
        through_ids = [encoded[text] for text in through]
        if not all(whole.startswith(p) for p in prompts):
            raise FtjaxError(
                f"{place}: the chat template rewrites what it rendered before, so that the prompt of an answer is no "
                "part of the finished chat; train such answers as rows of their own, or by data.prompt and "
                "data.completion"
            )
        if ids[: len(prompt_ids[-1])] != prompt_ids[-1]:
            ids, through_ids[-1] = (
                prompt_ids[-1] + _continuation(tokenizer, text[len(prompts[-1]) :]) for text in (whole, through[-1])
            )
        spans = []
        for k, prompt, p_ids, t_ids in zip(turns, prompts, prompt_ids, through_ids):
            if ids[: len(p_ids)] != p_ids:
                raise FtjaxError(
                    f"{place}: message {k + 1} begins with characters that merge into one token with the template "
                    "before them: remove the white space at its beginning"
                )
            stop = _end_of_turn(tokenizer, special, t_ids, len(p_ids))
            if ids[: len(t_ids)] != t_ids:  # shown differently once more messages follow: train what is shown
                end = t_ids[stop - 1] if stop else None
                if end not in ids[len(p_ids) :] or not _all_shown(
                    messages[k], whole[len(prompt) :].split(tokenizer.convert_ids_to_tokens(end))[0]
                ):
                    raise FtjaxError(
                        f"{place}: the chat template rewrites message {k + 1} once more messages follow (such as "
                        "dropping its thinking): make it the last message of a row of its own, or remove what is "
                        "dropped"
                    )
                stop = ids.index(end, len(p_ids)) + 1
            elif stop is None:
                stop = len(t_ids)
                if len(t_ids) == len(ids) and ids[-1] != end_id:
                    ids, stop = [*ids, end_id], stop + 1  # no token of the template ends the chat
            spans.append((len(p_ids), stop))
        out.append((ids, spans))
    return out


def _end_of_turn(tokenizer, special: set[int], ids: list[int], start: int) -> int | None:
    """Just past the special token that ends ids[start:], white space behind it aside; None where no such token is."""
    for end in range(len(ids), start, -1):
        if ids[end - 1] in special:
            return end
        if tokenizer.decode(ids[end - 1 : end]).strip():
            return None
    return None


def _all_shown(message: dict, shown: str) -> bool:
    return all(text.strip() in shown for key, text in message.items() if key != "role" and isinstance(text, str))


def _render(tokenizer, messages, generation: bool, place: str) -> str:
    import jinja2

    if not tokenizer.chat_template:
        raise FtjaxError(
            f"{place}: messages need a chat template and this tokenizer has none; use prompt and completion columns, "
            "or data.prompt and data.completion"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
    except (jinja2.TemplateError, TypeError, ValueError) as e:
        raise FtjaxError(f"{place}: the chat template refuses these messages: {e}") from e


# ---------------------------------------------------------------------------------------------- shared


def _example(ids: list[int], spans: list[tuple[int, int]], train_on: str, place: Place, index: int) -> Example:
    trained = np.full(len(ids), train_on == "all")
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


def end_token(tokenizer, end: str = "") -> int:
    """Id of the token `end`, by default the tokenizer's end-of-text. Raises FtjaxError where it has no such token."""
    if not end and tokenizer.eos_token_id is None:
        raise FtjaxError(
            "the tokenizer names no end-of-text token: set data.end, or `eos_token` in tokenizer_config.json"
        )
    ids = _ids(tokenizer, [end], special=False)[0] if end else [tokenizer.eos_token_id]
    if len(ids) != 1:
        raise FtjaxError(f"data.end: {end!r} is {len(ids)} tokens for this tokenizer; expected exactly one")
    return ids[0]
