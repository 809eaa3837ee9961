"""Check which tokens ftjax trains under chat templates, by a text in each message that occurs nowhere else.

Usage: python scripts/check_chat_masks.py TOKENIZER_DIR TEMPLATE.jinja...

For each template and each chat it prints `exact`, `refused: ...` or `WRONG: ...`. The tokenizer gets the tokens that
the template writes as special tokens. The check is independent of ftjax's own search: it finds the messages by their
texts and the tokens by the tokenizer's character offsets, and it knows the tokens that end turns from a list.
"""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

from ftjax.data.chat_templates import dated
from ftjax.data.template import Rendered
from ftjax.data.tokenise import encode
from ftjax.errors import FtjaxError

# What looks like a token of its own in the text of a template or of a chat.
TOKEN = re.compile(
    r"<[|｜][^|｜\s'\"{}]+[|｜]>|</?s>|\[\|[a-z]+\|\]|<seed:[a-z]+>|<(?:start|end)_of_turn>|<turn\||<\|turn>|"
    r"<SPECIAL_\d+>|\[/?[A-Z_]+\]|\[e~\[|\]~b\]|\]~!b\[|</?assistant>|<sep>|<(?:beginning|end)_of_sentence>"
)
# Tokens that end a turn, by the model cards of the families. What follows the last of them begins another turn.
ENDS = re.compile(
    r"<\|(?:im_end|eot_id|eom_id|eot|eom|end|return|call|end_of_text|endoftext|end_of_turn|assistant_end|end_of_msg|role_end)\|>|"
    r"</s>|<end_of_turn>|<turn\||<｜end▁of▁sentence｜>|<\|END_OF_TURN_TOKEN\|>|\[\|endofturn\|\]|<SPECIAL_12>|"
    r"<\|message_sep\|>|<sep>|<seed:eos>|\[e~\[|<end_of_sentence>|</assistant>|<｜hy_eos[^｜]*｜>"
)
# Empty thinking, which the prompt of an answer may hold and a finished chat not show.
NOTHING = re.compile(r"(?:<think>)?\s*</think>\s*")
SYSTEM = {"role": "system", "content": "Obey rule7alpha always."}
CALL = {"name": "look", "arguments": {"what": "call5kappa"}}
WHAT = {"type": "object", "properties": {"what": {"type": "string", "description": "What."}}, "required": ["what"]}
TOOLS = ({"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": WHAT}},)


def chat(turns: int) -> tuple[dict, ...]:
    """Questions and answers whose texts occur once each."""
    return tuple(
        {"role": role, "content": f"{text}{k}{name} it is."}
        for k in range(turns)
        for role, text, name in (("user", "Ask", "beta"), ("assistant", "Say", "gamma"))
    )


WITH_TOOLS = (
    {"role": "user", "content": "Ask0beta it is."},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "abcdefghi", "function": CALL}]},
    {"role": "tool", "name": "look", "content": "Found3delta.", "tool_call_id": "abcdefghi"},
    *chat(3)[3:],
)
CHATS = {  # name -> (messages, tools)
    "1 turn": (chat(1), ()),
    "3 turns": (chat(3), ()),
    "system": ((SYSTEM, *chat(3)), ()),
    "tools": (WITH_TOOLS, TOOLS),
}


def told(message: dict) -> str:
    """The text of a message that occurs nowhere else."""
    return CALL["arguments"]["what"] if message.get("tool_calls") else message["content"]


def show(tokenizer, messages: tuple[dict, ...], tools: tuple[dict, ...]) -> str:
    """The text of a chat, by transformers."""
    messages = [{k: v for k, v in m.items() if k != "train"} for m in messages]
    try:
        return tokenizer.apply_chat_template(messages, tools=list(tools) or None, tokenize=False)
    except TypeError:  # a template that goes through the tools without asking whether there are any
        return tokenizer.apply_chat_template(messages, tools=list(tools), tokenize=False)


def add_tokens(tokenizer, templates: list[str]) -> None:
    """Make the tokens that templates write special tokens of a tokenizer."""
    found = set()
    for template in templates:
        tokenizer.chat_template = template
        found |= set(TOKEN.findall(template))
        for messages, tools in CHATS.values():
            with contextlib.suppress(Exception):  # a template may refuse any chat
                found |= set(TOKEN.findall(show(tokenizer, messages, tools)))
    tokenizer.bos_token = tokenizer.bos_token or "<s>"
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(found - set(tokenizer.get_added_vocab()))})


def offsets(tokenizer, ids: list[int]) -> list[tuple[int, int]]:
    """First character and one past the last of each token, by decoding."""
    ends = [len(tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)) for n in range(len(ids) + 1)]
    return list(zip(ends, ends[1:]))


def check(tokenizer, messages: tuple[dict, ...], tools: tuple[dict, ...] = (), train_on: str = "assistant") -> str:
    """`exact`, `refused: why` or `WRONG: why` for the tokens that are trained of one chat."""
    tokenizer = dated(tokenizer)
    try:
        (example,) = encode([Rendered(messages=messages, tools=tools)], tokenizer, train_on)
    except FtjaxError as error:
        return f"refused: {error}"
    text = show(tokenizer, messages, tools)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    if ids[:2] == [tokenizer.bos_token_id] * 2 and tokenizer.bos_token_id is not None:
        ids, places = ids[1:], places[1:]
    mine = example.ids.tolist()
    if mine not in (ids, [*ids, tokenizer.eos_token_id]):  # the prompt of the last answer was encoded by itself
        places, shown = offsets(tokenizer, mine), tokenizer.decode(mine, clean_up_tokenization_spaces=False)
        if not text.endswith(tokenizer.eos_token):
            shown = shown.removesuffix(tokenizer.eos_token)
        if NOTHING.sub("", shown) != NOTHING.sub("", text):
            return "WRONG: another text than the template's"
        text = shown
    trained = {c for (a, b), on in zip(places, example.trained) if on for c in range(a, min(b, len(text)))}
    answers = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    wanted = {k for k in (answers[-1:] if train_on == "last" else answers) if messages[k].get("train", True)}
    if any(text.count(told(messages[k])) != 1 for k in wanted):
        return "WRONG: an answer is not shown, or more than once"
    found = [(text.find(told(m)), text.find(told(m)) + len(told(m))) for m in messages]
    allowed = set()
    for k in wanted:
        start, stop = found[k]
        if not set(range(start, stop)) <= trained:
            return f"WRONG: message {k + 1} is not wholly trained"
        before = max((b for _, b in found[:k]), default=0)
        behind = text[stop : min((a for a, _ in found[k + 1 :] if a >= stop), default=len(text))]
        ends = list(ENDS.finditer(behind))
        if ends:  # behind a last turn the first of them is needed: a template may close the whole chat besides
            needed = ends[-1] if k + 1 < len(messages) else ends[0]
            if not set(range(stop, stop + needed.end())) <= trained:
                return f"WRONG: the end of message {k + 1} is not trained: {behind[: needed.end()]!r}"
            rest = behind[ends[-1].end() :]
            close = range(stop, stop + len(behind) - len(rest.lstrip()))
        else:
            close = range(stop, stop + len(behind) - len(behind.lstrip()))
            if messages[k].get("tool_calls"):  # the call's own closing text
                close = range(stop, max([stop, *(c + 1 for c in trained if c < stop + len(behind))]))
        opening = min((c for c in range(before, start) if c in trained), default=start)
        allowed |= set(range(opening, stop)) | set(close)
    if not (wrong := trained - allowed):
        return "exact"
    if "{% generation %}" in tokenizer.chat_template.replace("{%-", "{%").replace("-%}", "%}"):
        chat = tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, return_dict=True, return_assistant_tokens_mask=True
        )
        if example.trained.tolist()[: len(chat["input_ids"])] == [bool(on) for on in chat["assistant_masks"]]:
            return "exact"  # the template's author knows of an end token that is not in our list
    shown = "".join(c if i in wrong else " " for i, c in enumerate(text))
    return f"WRONG: trained besides: {' '.join(shown.split(' ' * 2)).strip()!r}"


def main() -> int:
    """Print a table of the templates that the command line names; the exit status is 1 where a mask is wrong."""
    from transformers import AutoTokenizer

    tokenizer, files = AutoTokenizer.from_pretrained(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    add_tokens(tokenizer, [file.read_text(encoding="utf-8") for file in files])
    wrong = 0
    for file in files:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        print(f"{file.stem}:")
        for name, (messages, tools) in CHATS.items():
            result = check(tokenizer, messages, tools)
            wrong += result.startswith("WRONG")
            print(f"  {name}: {result}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
