"""Named chat templates: how published model families write a conversation.

Their Jinja texts are the files of FOLDER. Every text puts the tokenizer's BOS first, once, where it has one of its own,
and shows each message whole or refuses it. `resolve` sets `end_of_text` before a text.
"""

from __future__ import annotations

import copy
import datetime
import re
from pathlib import Path
from typing import NamedTuple

from ftjax import assets
from ftjax import config as configs
from ftjax.errors import FtjaxError, nearest
from ftjax.hub.tokenizer import end_token, turn_end

FOLDER = Path(assets.__file__).parent / "chat_templates"


class Template(NamedTuple):
    """text: Jinja; tokens: what must be one token each; tool_tokens: further ones, for rows with tools; end_of_text:
    whether answers end with the tokenizer's end-of-text.
    """

    text: str
    tokens: tuple[str, ...] = ()
    tool_tokens: tuple[str, ...] = ()
    end_of_text: bool = False


# The heading of the input in a user's message, by which alpaca's two prompts are told apart.
ALPACA_INPUT = "\n\n### Input:\n"


def _read(name: str) -> str:
    """A file of FOLDER, with the files that it includes written out: tokenizer files hold one text and no others."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").strip()
    return re.sub(r'{% include "(\w+)" %}', lambda include: _read(include[1]), text)


TEMPLATES = {
    # github.com/tloen/alpaca-lora, templates/alpaca.json: Stanford Alpaca's two prompts, and a line end after the last
    # heading, so that no tokenizer merges its colon with an answer. Further turns repeat the headings, and a system
    # text replaces the preamble.
    "alpaca": Template(_read("alpaca"), end_of_text=True),
    # github.com/openai/openai-python/blob/v0.28.1/chatml.md; tools, calls and results as Qwen's and Hermes' templates
    # write them (huggingface.co/Qwen/Qwen2.5-7B-Instruct).
    "chatml": Template(_read("chatml"), ("<|im_start|>", "<|im_end|>")),
    # huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct; with tools, which it lacks, as Llama-3.1-8B-Instruct.
    "llama-3": Template(_read("llama-3"), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    # huggingface.co/mistralai/Mistral-Nemo-Instruct-2407, except that the system text stands before the first user's
    # text, as in Mistral-7B-Instruct-v0.2. Nemo puts it before the last user's, and only where no answer follows.
    "mistral": Template(
        _read("mistral"),
        ("[INST]", "[/INST]"),
        ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    # huggingface.co/google/gemma-3-1b-it
    "gemma": Template(_read("gemma"), ("<start_of_turn>", "<end_of_turn>")),
    # huggingface.co/microsoft/Phi-3.5-mini-instruct
    "phi": Template(_read("phi"), ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    # Words that any tokenizer has: every message under the name of its role.
    "plain": Template(_read("plain"), end_of_text=True),
}


def resolve(name: str, end: str, tokenizer) -> str:
    """The Jinja text of `data.template`, a key of TEMPLATES; empty for empty and `tokenizer`: the tokenizer's own.

    end: the token that ends an answer of alpaca and plain; empty: the tokenizer's end-of-text. Raises FtjaxError for an
    unknown name, and for a template whose tokens the tokenizer does not hold.
    """
    if not name:
        return ""
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise FtjaxError(
                f'data.template="tokenizer": this tokenizer has no chat template; those it can write are '
                f"{', '.join(able(tokenizer))}"
            )
        return ""
    if name not in TEMPLATES:
        known = ("tokenizer", *TEMPLATES)
        raise FtjaxError(f"data.template: {name!r}{nearest(name, known)}; one of {', '.join(known)}")
    lacks = _lacks(TEMPLATES[name].tokens, tokenizer)
    if lacks:
        raise FtjaxError(
            f"data.template={name!r} writes {', '.join(lacks)}, which should be one token each and this tokenizer has "
            f"not; those it can write are {', '.join(able(tokenizer))}"
        )
    if not TEMPLATES[name].end_of_text:
        return TEMPLATES[name].text
    if end_token(tokenizer, end) not in tokenizer.added_tokens_decoder:
        raise FtjaxError(
            f"data.end: {end!r} ends answers of data.template={name!r}, and should be a special token, so that no text "
            "merges with it; this is none"
        )
    return "{%- set end_of_text = " + repr(end or tokenizer.eos_token) + " %}" + TEMPLATES[name].text


def check_tools(name: str, tokenizer) -> None:
    """Raises FtjaxError where a tokenizer lacks what template `name` writes for tools."""
    lacks = _lacks(TEMPLATES[name].tool_tokens, tokenizer) if name in TEMPLATES else []
    if lacks:
        raise FtjaxError(
            f"data.template={name!r} writes {', '.join(lacks)} where there are tools, which should be one token each "
            "and this tokenizer has not"
        )


def of_run(config, tokenizer) -> str:
    """The Jinja text that all rows of a run are shown by, other than the one in the tokenizer's files.

    Empty where there is none, or where the sources of a mixture have several. Raises FtjaxError as `resolve` does.
    """
    named = {(data.template, data.end) for _, data, _ in configs.sources(config)}
    text = resolve(*named.pop(), tokenizer) if len(named) == 1 else ""
    own = dated(tokenizer, config.data.date).chat_template
    return own if not text and isinstance(own, str) and own.startswith(DATED) else text


def ends_of_run(config, tokenizer) -> list[int]:
    """Ids of the tokens that the answers of a run's sources are trained to end with, other than the end-of-text.

    Raises FtjaxError as `resolve` does.
    """
    ids = []
    for _, data, _ in configs.sources(config):
        ids += turn_end(tokenizer, resolve(data.template, data.end, tokenizer) or None)
        ids += [end_token(tokenizer, data.end)] if data.end else []
    return ids


def installed(config, tokenizer):
    """A tokenizer like this one with the run's template as its own, so that what is generated with it follows that.

    The tokenizer itself where `of_run` finds no other. Raises FtjaxError as `resolve` does.
    """
    tokenizer, text = dated(tokenizer, config.data.date), of_run(config, tokenizer)
    return _with_template(tokenizer, text) if text and text != tokenizer.chat_template else tokenizer


def _with_template(tokenizer, chat_template):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


DATED = "{%- macro strftime_now(format) -%}"


def dated(tokenizer, date: str = ""):
    """A tokenizer whose chat templates are told `date` wherever they ask for the day; itself where none asks.

    A macro in front of the template takes the place of the function `strftime_now` of transformers, so that the
    template means the same in whatever reads it. date: see data.date; empty: the default.
    """
    own = tokenizer.chat_template
    texts = own if isinstance(own, dict) else {"": own or ""}
    new = {name: _dated(text, date or configs.default().data.date) for name, text in texts.items()}
    return tokenizer if new == texts else _with_template(tokenizer, new if isinstance(own, dict) else new[""])


def _dated(text: str, date: str) -> str:
    if "strftime_now" not in text or text.startswith(DATED):
        return text
    day = datetime.datetime.fromisoformat(date)
    parts = sorted(set(re.findall(r"(?<!\{)%-?[aAbBcdDeFGHIjmMpSTuUVwWxXyY]", text)))
    told = "".join(f" | replace('{part}', '{day.strftime(part)}')" for part in parts)
    return DATED + "{{- format" + told + " -}}{%- endmacro -%}" + text


def able(tokenizer) -> list[str]:
    """The values of `data.template` that this tokenizer can write."""
    able = [name for name, template in TEMPLATES.items() if not _lacks(template.tokens, tokenizer)]
    return (["tokenizer"] if tokenizer.chat_template else []) + able


def _lacks(tokens: tuple[str, ...], tokenizer) -> list[str]:
    """Those of `tokens` that are not one token each."""
    vocab = tokenizer.get_added_vocab()
    return [token for token in tokens if token not in vocab]
