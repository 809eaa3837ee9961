"""Named chat templates: how published model families write a conversation, as Jinja texts.

Every text puts the tokenizer's BOS first, once, where it has one of its own, and shows each message whole or refuses
it. `end_of_text` is set before a text by `resolve`.
"""

from __future__ import annotations

import copy
import datetime
import re
from typing import NamedTuple

from ftjax import config as configs
from ftjax.errors import FtjaxError, nearest
from ftjax.hub.tokenizer import end_token, turn_end


class Template(NamedTuple):
    """text: Jinja; tokens: what must be one token each; tool_tokens: further ones, for rows with tools; end_of_text:
    whether answers end with the tokenizer's end-of-text.
    """

    text: str
    tokens: tuple[str, ...] = ()
    tool_tokens: tuple[str, ...] = ()
    end_of_text: bool = False


BOS = "{{- bos_token if bos_token != eos_token }}"

# The system text, where the first message brings one, and the messages behind it.
SYSTEM = """
{%- set system, turns = '', messages %}
{%- if messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- endif %}
"""

NO_ROLE = "{{- raise_exception('it has no place for a message of the role ' ~ turn.role) }}"
NO_TOOLS = """
{%- if tools or turns | selectattr('tool_calls') | list %}
    {{- raise_exception('it has no place for tools; chatml, llama-3 and mistral have') }}
{%- endif %}
"""
SYSTEM_FIRST = """
{%- if system and (not turns or turns[0].role != 'user') %}
    {{- raise_exception('it shows system text in the first message behind it, which must be the user\\'s') }}
{%- endif %}
"""
CALL_ALONE = (
    "{%- if turn.content %}{{- raise_exception('it shows a tool call or text in one message, not both') }}{%- endif %}"
)

# github.com/openai/openai-python/blob/v0.28.1/chatml.md; tools, calls and results as Qwen's and Hermes' templates write
# them (huggingface.co/Qwen/Qwen2.5-7B-Instruct).
CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n' ~ (system ~ '\\n\\n' if system) }}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' ~ tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' ~ system ~ '<|im_end|>\\n' }}
{%- endif %}
{%- for turn in turns %}
    {%- if turn.role in ('system', 'user') %}
        {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}
    {%- elif turn.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' ~ turn.content }}
        {%- for call in turn.tool_calls or [] %}
            {%- set called = call.function or call %}
            {%- if turn.content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' ~ called.name ~ '", "arguments": ' }}
            {{- called.arguments if called.arguments is string else called.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif turn.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' ~ turn.content ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}{NO_ROLE}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct; with tools, which that one lacks, as Llama-3.1-8B-Instruct.
LLAMA3 = """
{%- set header, close = '<|start_header_id|>', '<|eot_id|>' %}
{%- set behind = '<|end_header_id|>\\n\\n' %}
{%- if tools %}
    {{- header ~ 'system' ~ behind ~ 'Environment: ipython\\nCutting Knowledge Date: December 2023\\n' }}
    {{- 'Today Date: 26 Jul 2024\\n\\n' ~ system | trim ~ close }}
    {%- if turns[0].role != 'user' %}
        {{- raise_exception('it shows tools in the first message, which must be the user\\'s') }}
    {%- endif %}
{%- elif messages[0].role == 'system' %}
    {{- header ~ 'system' ~ behind ~ system | trim ~ close }}
{%- endif %}
{%- for turn in turns %}
    {%- if turn.role == 'user' and tools and loop.first %}
        {{- header ~ 'user' ~ behind }}
        {{- 'Given the following functions, please respond with a JSON for a function call with its proper ' }}
        {{- 'arguments that best answers the given prompt.\\n\\nRespond in the format {"name": function name, ' }}
        {{- '"parameters": dictionary of argument name and its value}.Do not use variables.\\n\\n' }}
        {%- for tool in tools %}{{- tool | tojson(indent=4) ~ '\\n\\n' }}{%- endfor %}
        {{- turn.content | trim ~ close }}
    {%- elif turn.role == 'assistant' and turn.tool_calls %}
        {CALL_ALONE}
        {%- if turn.tool_calls | length > 1 %}{{- raise_exception('it shows one tool call a message') }}{%- endif %}
        {%- set called = turn.tool_calls[0].function or turn.tool_calls[0] %}
        {{- header ~ 'assistant' ~ behind ~ '{"name": "' ~ called.name ~ '", "parameters": ' }}
        {{- called.arguments if called.arguments is string else called.arguments | tojson }}
        {{- '}' ~ close }}
    {%- elif turn.role in ('system', 'user', 'assistant') %}
        {{- header ~ turn.role ~ behind ~ turn.content | trim ~ close }}
    {%- elif turn.role == 'tool' %}
        {{- header ~ 'ipython' ~ behind ~ turn.content | tojson ~ close }}
    {%- else %}{NO_ROLE}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- header ~ 'assistant' ~ behind }}{%- endif %}
"""

# huggingface.co/mistralai/Mistral-Nemo-Instruct-2407, but for the system text: before the first user's, as
# Mistral-7B-Instruct-v0.2 has it. Nemo's own stands before the last user's, and only where no answer follows.
MISTRAL = """
{SYSTEM_FIRST}
{%- set asked = turns | selectattr('role', 'equalto', 'user') | list %}
{%- for turn in turns %}
    {%- if turn.role == 'user' %}
        {%- if tools and turn == asked[-1] %}
            {{- '[AVAILABLE_TOOLS]' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' ~ (system ~ '\\n\\n' if system and loop.first) ~ turn.content ~ '[/INST]' }}
    {%- elif turn.role == 'assistant' and turn.tool_calls %}
        {CALL_ALONE}
        {{- '[TOOL_CALLS][' }}
        {%- for call in turn.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('a tool call needs an id of 9 letters') }}{%- endif %}
            {{- (call.function | tojson)[:-1] ~ ', "id": "' ~ call.id ~ '"}' ~ (', ' if not loop.last) }}
        {%- endfor %}
        {{- ']' ~ eos_token }}
    {%- elif turn.role == 'assistant' %}
        {{- turn.content ~ eos_token }}
    {%- elif turn.role == 'tool' %}
        {%- if turn.tool_call_id | length != 9 %}
            {{- raise_exception('the result of a tool needs a tool_call_id of 9 letters') }}
        {%- endif %}
        {{- '[TOOL_RESULTS]{"content": ' ~ turn.content ~ ', "call_id": "' ~ turn.tool_call_id }}
        {{- '"}[/TOOL_RESULTS]' }}
    {%- else %}{NO_ROLE}{%- endif %}
{%- endfor %}
"""

# huggingface.co/google/gemma-3-1b-it
GEMMA = """
{NO_TOOLS}
{SYSTEM_FIRST}
{%- for turn in turns %}
    {%- if turn.role not in ('user', 'assistant') %}{NO_ROLE}{%- endif %}
    {{- '<start_of_turn>' ~ ('model' if turn.role == 'assistant' else 'user') ~ '\\n' }}
    {{- (system ~ '\\n\\n' if system and loop.first) ~ turn.content | trim ~ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""

# huggingface.co/microsoft/Phi-3.5-mini-instruct
PHI = """
{NO_TOOLS}
{%- if system %}{{- '<|system|>\\n' ~ system ~ '<|end|>\\n' }}{%- endif %}
{%- for turn in turns %}
    {%- if turn.role not in ('user', 'assistant') %}{NO_ROLE}{%- endif %}
    {{- '<|' ~ turn.role ~ '|>\\n' ~ turn.content ~ '<|end|>\\n' }}
{%- endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token }}
"""

# github.com/tloen/alpaca-lora, templates/alpaca.json: Stanford Alpaca's two prompts, and a line end behind the last
# heading, so that no tokenizer merges its colon with an answer. The prompts are told apart by the heading of the input,
# which stands in the user's message. Further turns repeat the headings; a system text replaces the preamble.
ALPACA_INPUT = "\n\n### Input:\n"
ALPACA = """
{NO_TOOLS}
{%- if system %}{{- system }}
{%- elif '\\n\\n### Input:\\n' in turns[0].content %}
    {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' }}
    {{- 'Write a response that appropriately completes the request.' }}
{%- else %}
    {{- 'Below is an instruction that describes a task. ' }}
    {{- 'Write a response that appropriately completes the request.' }}
{%- endif %}
{%- for turn in turns %}
    {%- if turn.role == 'user' %}{{- '\\n\\n### Instruction:\\n' ~ turn.content }}
    {%- elif turn.role == 'assistant' %}
        {{- '\\n\\n### Response:\\n' ~ turn.content ~ end_of_text }}
    {%- else %}{NO_ROLE}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\\n\\n### Response:\\n' }}{%- endif %}
"""

# Words that any tokenizer has: every message under the name of its role.
PLAIN = """
{NO_TOOLS}
{%- if system %}{{- system ~ '\\n\\n' }}{%- endif %}
{%- for turn in turns %}
    {%- if turn.role == 'user' %}{{- 'User:\\n' ~ turn.content ~ '\\n\\n' }}
    {%- elif turn.role == 'assistant' %}
        {{- 'Assistant:\\n' ~ turn.content ~ end_of_text ~ ('\\n\\n' if not loop.last) }}
    {%- else %}{NO_ROLE}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:\\n' }}{%- endif %}
"""


PARTS = {"NO_ROLE": NO_ROLE, "NO_TOOLS": NO_TOOLS, "SYSTEM_FIRST": SYSTEM_FIRST, "CALL_ALONE": CALL_ALONE}


def _whole(text: str) -> str:
    for name, part in PARTS.items():
        text = text.replace("{" + name + "}", part.strip())
    return BOS + SYSTEM + text.strip()


TEMPLATES = {
    "alpaca": Template(_whole(ALPACA), end_of_text=True),
    "chatml": Template(_whole(CHATML), ("<|im_start|>", "<|im_end|>")),
    "llama-3": Template(_whole(LLAMA3), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": Template(
        _whole(MISTRAL),
        ("[INST]", "[/INST]"),
        ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "gemma": Template(_whole(GEMMA), ("<start_of_turn>", "<end_of_turn>")),
    "phi": Template(_whole(PHI), ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "plain": Template(_whole(PLAIN), end_of_text=True),
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
