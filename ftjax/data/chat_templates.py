"""Named chat templates: how published model families write a conversation.

Their Jinja texts are the files of FOLDER. Each text begins with the tokenizer's BOS, once, if the tokenizer has one.
Each renders every message whole or refuses it. `resolve` sets the variable `end_of_text` before a text that uses it.
"""

from __future__ import annotations

import copy
import datetime
import re
from pathlib import Path
from typing import NamedTuple

from ftjax import assets
from ftjax import config as configs
from ftjax.errors import FtjaxError, check_known
from ftjax.hub.tokenizer import end_token, turn_end

FOLDER = Path(assets.__file__).parent / "chat_templates"


class Template(NamedTuple):
    """A named chat template.

    Attributes:
        text: Jinja text.
        tokens: Texts that must be one token each.
        tool_tokens: Further such texts, needed only for rows with tools.
        end_of_text: Whether answers end with the tokenizer's end-of-text.
    """

    text: str
    tokens: tuple[str, ...] = ()
    tool_tokens: tuple[str, ...] = ()
    end_of_text: bool = False


# The heading of the input in a user's message, which distinguishes alpaca's two prompts.
ALPACA_INPUT = "\n\n### Input:\n"


def _read(name: str) -> str:
    """The text of a file of FOLDER with its includes expanded, because a tokenizer's files hold a single text."""
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
    # huggingface.co/mistralai/Mistral-Nemo-Instruct-2407, except that the system text comes before the first user's
    # text, as in Mistral-7B-Instruct-v0.2. Nemo puts it before the last user's text, and only if no answer follows.
    "mistral": Template(
        _read("mistral"),
        ("[INST]", "[/INST]"),
        ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    # huggingface.co/google/gemma-3-1b-it
    "gemma": Template(_read("gemma"), ("<start_of_turn>", "<end_of_turn>")),
    # huggingface.co/microsoft/Phi-3.5-mini-instruct
    "phi": Template(_read("phi"), ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    # Plain words that any tokenizer can encode: every message follows the name of its role.
    "plain": Template(_read("plain"), end_of_text=True),
}


def resolve(name: str, end: str, tokenizer) -> str:
    """The Jinja text of a value of `data.template`.

    Args:
        name: A key of TEMPLATES, `tokenizer`, or empty.
        end: The token that ends an answer of alpaca and plain; empty: the tokenizer's end-of-text.
        tokenizer: The tokenizer, from transformers.

    Returns:
        The text. For `tokenizer` and an empty name it is empty, which means the tokenizer's own template.

    Raises:
        FtjaxError: If the name is unknown, if the tokenizer lacks tokens of the template, or if `name` is `tokenizer`
            and the tokenizer has no template.
    """
    if not name:
        return ""
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise FtjaxError(
                f'data.template="tokenizer": this tokenizer has no chat template; templates that it supports: '
                f"{', '.join(able(tokenizer))}"
            )
        return ""
    check_known(name, ("tokenizer", *TEMPLATES), "data.template: unknown template")
    lacks = _lacks(TEMPLATES[name].tokens, tokenizer)
    if lacks:
        raise FtjaxError(
            f"data.template={name!r} writes {', '.join(lacks)}, and this tokenizer has no single token for each of "
            f"them; templates that it supports: {', '.join(able(tokenizer))}"
        )
    if not TEMPLATES[name].end_of_text:
        return TEMPLATES[name].text
    if end_token(tokenizer, end) not in tokenizer.added_tokens_decoder:
        raise FtjaxError(
            f"data.end: {end!r} is to end the answers of data.template={name!r} but is no special token of this "
            "tokenizer, so it could merge with the text of an answer; name a special token"
        )
    return "{%- set end_of_text = " + repr(end or tokenizer.eos_token) + " %}" + TEMPLATES[name].text


def check_tools(name: str, tokenizer) -> None:
    """Raise FtjaxError if a tokenizer lacks tokens that the template `name` needs for tools."""
    lacks = _lacks(TEMPLATES[name].tool_tokens, tokenizer) if name in TEMPLATES else []
    if lacks:
        raise FtjaxError(
            f"data.template={name!r} writes {', '.join(lacks)} for tools, and this tokenizer has no single token for "
            "each of them; set another template, or remove the tools"
        )


def of_run(config, tokenizer) -> str:
    """The Jinja text that renders all rows of a run, if it differs from the template in the tokenizer's files.

    Empty if it does not, or if the sources of a mixture have several. Raises FtjaxError as `resolve` does.
    """
    named = {(data.template, data.end) for _, data, *_ in configs.sources(config)}
    text = resolve(*named.pop(), tokenizer) if len(named) == 1 else ""
    own = dated(tokenizer, config.data.date).chat_template
    return own if not text and isinstance(own, str) and own.startswith(DATED) else text


def ends_of_run(config, tokenizer) -> list[int]:
    """Ids of the tokens, other than the end-of-text, with which the answers of a run's sources are trained to end.

    Raises FtjaxError as `resolve` does.
    """
    ids = []
    for _, data, *_ in configs.sources(config):
        ids += turn_end(tokenizer, resolve(data.template, data.end, tokenizer) or None)
        ids += [end_token(tokenizer, data.end)] if data.end else []
    return ids


def installed(config, tokenizer):
    """A copy of the tokenizer with the run's template as its own, so that generation follows that template.

    If `of_run` finds no other template, it is the tokenizer itself. Raises FtjaxError as `resolve` does.
    """
    tokenizer, text = dated(tokenizer, config.data.date), of_run(config, tokenizer)
    return _with_template(tokenizer, text) if text and text != tokenizer.chat_template else tokenizer


def _with_template(tokenizer, chat_template):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


DATED = "{%- macro strftime_now(format) -%}"


def dated(tokenizer, date: str = ""):
    """A tokenizer whose chat templates get `date` as the current day; the tokenizer itself if no template needs a day.

    A macro before the template replaces the function `strftime_now` of transformers, so that the template gives the
    same text in every program that reads it. date: see data.date; empty: its default.
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
    replacements = "".join(f" | replace('{part}', '{day.strftime(part)}')" for part in parts)
    return DATED + "{{- format" + replacements + " -}}{%- endmacro -%}" + text


def able(tokenizer) -> list[str]:
    """The values of `data.template` that this tokenizer can encode."""
    able = [name for name, template in TEMPLATES.items() if not _lacks(template.tokens, tokenizer)]
    return (["tokenizer"] if tokenizer.chat_template else []) + able


def _lacks(tokens: tuple[str, ...], tokenizer) -> list[str]:
    """Those of `tokens` that are not one token each for this tokenizer."""
    vocab = tokenizer.get_added_vocab()
    return [token for token in tokens if token not in vocab]
