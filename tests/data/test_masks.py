"""Masks of chats: every template, one turn and several, with and without system text and thinking, by two referees.

The first is transformers' own mask of `{% generation %}`, over texts that say the same as ours in one line a family.
The second, for Qwen3's own template, is a slow rule on characters. The third, scripts/check_chat_masks.py, looks for a
text of each message that occurs nowhere else, under templates that end their turns in all the ways that real ones do.
"""

import copy
import functools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from ftjax.assets import resolve
from ftjax.data import chat_templates
from ftjax.data.template import Rendered, renderer
from ftjax.data.tokenise import encode, encode_prompts
from ftjax.errors import FtjaxError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import check_chat_masks  # noqa: E402

TURN = "{% generation %}{{ m.content }}END{% endgeneration %}"
MERGED = "{% set s = messages[0].content + '\n\n' if messages[0].role == 'system' %}"
TURNS = "{% for m in messages if m.role != 'system' %}"


class Family:
    """What a template should write, in one line; the tokenizer it is tried with; its BOS, end of turn and tokens."""

    def __init__(self, text, tokenizer, end, bos="<s>", tokens=(), **names):
        self.text = text.replace("TURN", TURN.replace("END", end))
        self.tokenizer, self.end, self.bos, self.tokens, self.names = tokenizer, end, bos, tokens, names


FAMILIES = {
    "alpaca": Family(
        "<s>{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}Below is an instruction that "
        "describes a task. Write a response that appropriately completes the request.{% endif %}" + TURNS + "{% if "
        "m.role == 'user' %}{{ '\n\n### Instruction:\n' + m.content + '\n\n### Response:\n' }}{% else %}TURN{% endif %}"
        "{% endfor %}",
        "starter",
        "</s>",
    ),
    "chatml": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}TURN{% else %}"
        "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}",
        "qwen3",
        "<|im_end|>",
        bos=None,
    ),
    "llama-3": Family(
        "<|begin_of_text|>{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{% if m.role == 'assistant' %}TURN{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}",
        "qwen3",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
    ),
    "mistral": Family(
        "<s>" + MERGED + TURNS + "{% if m.role == 'user' %}{{ '[INST]' ~ (s if loop.first) ~ m.content ~ '[/INST]' }}"
        "{% else %}TURN{% endif %}{% endfor %}",
        "starter",
        "</s>",
        tokens=("[INST]", "[/INST]"),
    ),
    "gemma": Family(
        "<s>" + MERGED + TURNS + "{% if m.role == 'user' %}{{ '<start_of_turn>user\n' ~ (s if loop.first) ~ m.content "
        "~ '<end_of_turn>\n' }}{% else %}{{ '<start_of_turn>model\n' }}TURN{{ '\n' }}{% endif %}{% endfor %}",
        "starter",
        "<end_of_turn>",
        tokens=("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi": Family(
        "<s>{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}TURN{% else %}"
        "{{ m.content + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}<|endoftext|>",
        "starter",
        "<|end|>",
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos_token="<|endoftext|>",
    ),
    "plain": Family(
        "<s>{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}"
        "{{ 'User:\n' + m.content + '\n\n' }}{% else %}{{ 'Assistant:\n' }}TURN{{ '\n\n' if not loop.last }}{% endif %}"
        "{% endfor %}",
        "starter",
        "</s>",
    ),
}


@functools.cache
def load(name, tokens=(), names=()):
    """A tokenizer on disk with further special tokens, as those of the family have them."""
    folder = resolve("builtin:stories260K") if name == "starter" else ROOT.parent / "shared/tokenizers" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)} | dict(names))
    return tokenizer


def family(name):
    it = FAMILIES[name]
    return it, load(it.tokenizer, it.tokens, tuple(it.names.items()))


def qwen3():
    return load("qwen3")


def every():
    """Qwen3's tokenizer with the tokens of every family: byte-level, so that all text decodes to itself."""
    templates = chat_templates.TEMPLATES.values()
    tokens = [token for t in templates for token in t.tokens + t.tool_tokens]
    return load("qwen3", tuple(dict.fromkeys(tokens)), (("bos_token", "<s>"), ("eos_token", "</s>")))


def chat(turns, system, thinking):
    """Messages of `turns` questions with their answers."""
    think = "<think>\nIt is {}?\n</think>\n\n" if thinking else "{0:.0}"
    said = [{"role": "system", "content": "Be brief."}] if system else []
    for k in range(turns):
        said += [{"role": "user", "content": f"What is {k}?"}]
        said += [{"role": "assistant", "content": think.format(str(k)) + f"It was {k}. Größe: 🙂"}]
    return tuple(said)


def trained_text(example, tokenizer):
    """The text of every stretch that is trained; each decoded by itself, as tokenizers drop a text's leading space."""
    starts = np.flatnonzero(np.diff(example.trained.astype(int), prepend=0))
    stretches = np.split(example.ids, starts)[1::2]
    return "".join(tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in stretches)


def answers(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("thinking", [False, True], ids=["", "thinking"])
@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_named_templates_against_transformers(shared, name, turns, system, thinking, train_on):
    it, tokenizer = family(name)
    messages = chat(turns, system, thinking)
    row = Rendered(messages=messages, template=name)
    (example,), (prompt,) = encode([row], tokenizer, train_on), encode_prompts([row], tokenizer)

    text = chat_templates.resolve(name, "", tokenizer)
    assert example.ids.tolist() == tokenizer.apply_chat_template(list(messages), chat_template=text)["input_ids"]
    referee = tokenizer.apply_chat_template(
        list(messages), chat_template=it.text, return_dict=True, return_assistant_tokens_mask=True
    )
    assert example.ids.tolist() == referee["input_ids"]
    assert (example.ids == tokenizer.bos_token_id).sum() == (it.bos is not None)

    mask = np.array(referee["assistant_masks"], bool)
    starts = np.flatnonzero(np.diff(mask.astype(int), prepend=0) == 1)
    if train_on == "last":
        mask[: starts[-1]] = False
    assert example.trained.tolist() == (np.arange(len(mask)) > 0 if train_on == "all" else mask).tolist()
    assert prompt.tolist() == example.ids[: starts[-1]].tolist()

    said = answers(messages)[-1:] if train_on == "last" else answers(messages)
    if train_on != "all":
        assert trained_text(example, tokenizer) == "".join(answer + it.end for answer in said)


def shown_by_qwen3(messages):
    """[(what stands before an answer, the answer with its end)] of Qwen3's own template, by the rules it states."""
    asked = max(k for k, m in enumerate(messages) if m["role"] == "user")
    out, before = [], ""
    for k, m in enumerate(messages):
        if m["role"] != "assistant":
            before += f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
            continue
        thinking, _, answer = m["content"].rpartition("</think>")
        thinking = thinking.removeprefix("<think>").strip("\n")
        answer = answer.lstrip("\n")
        late = k > asked and (k == len(messages) - 1 or thinking)
        out.append(
            (before + "<|im_start|>assistant\n", f"<think>\n{thinking}\n</think>\n\n" * late + answer + "<|im_end|>")
        )
        before = "\n"
    return out


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("thinking", [False, True], ids=["", "thinking"])
@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
@pytest.mark.parametrize("turns", [1, 3])
def test_qwen3s_own_template(shared, turns, system, thinking, train_on):
    tokenizer, messages = qwen3(), chat(turns, system, thinking)
    row = Rendered(messages=messages)
    if turns > 1 and thinking and train_on == "assistant":
        with pytest.raises(FtjaxError, match=f"row 1: .* leaves out or rewrites a part of message {2 + system} "):
            encode([row], tokenizer, train_on)
        return
    (example,) = encode([row], tokenizer, train_on)
    assert example.ids.tolist() == tokenizer.apply_chat_template(list(messages))["input_ids"]
    pieces = shown_by_qwen3(messages)
    assert "".join(before + shown for before, shown in pieces) + "\n" == tokenizer.decode(example.ids)
    wanted = [shown for _, shown in pieces][-1:] if train_on == "last" else [shown for _, shown in pieces]
    if train_on == "all":
        assert example.trained[1:].all()
    else:
        assert trained_text(example, tokenizer) == "".join(wanted)
    encoding = tokenizer("".join(before + shown for before, shown in pieces) + "\n", return_offsets_mapping=True)
    mask, at = np.zeros(len(example.ids), bool), 0
    for before, shown in pieces:  # the slow rule: a token is trained where its characters lie in an answer
        at += len(before)
        inside = [at <= a and b <= at + len(shown) for a, b in encoding["offset_mapping"]]
        mask |= np.array(inside) if shown in wanted else False
        at += len(shown)
    if train_on != "all":
        assert example.trained.tolist() == mask.tolist()


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}, "id": "abcdefghi"}
TOOLS = ({"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}},)
WITH_TOOLS = (
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Bye."},
)
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
MISTRAL = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "abcdefghi"}]</s>'


@pytest.mark.parametrize(
    "name, trained",
    [
        ("", HERMES + "It is 3.<|im_end|><think>\n\n</think>\n\nBye.<|im_end|>"),
        ("chatml", HERMES + "It is 3.<|im_end|>Bye.<|im_end|>"),
        ("llama-3", '{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>It is 3.<|eot_id|>Bye.<|eot_id|>'),
    ],
)
def test_tools(shared, name, trained):
    tokenizer = family(name)[1] if name else qwen3()
    row = Rendered(messages=WITH_TOOLS, tools=TOOLS, template=name)
    (example,), (prompt,) = encode([row], tokenizer), encode_prompts([row], tokenizer)
    text = chat_templates.resolve(name, "", tokenizer) or None
    referee = tokenizer.apply_chat_template(list(WITH_TOOLS), tools=list(TOOLS), chat_template=text)
    assert example.ids.tolist() == referee["input_ids"]
    assert trained_text(example, tokenizer) == trained
    assert '"description": "Adds."' in tokenizer.decode(prompt)
    assert example.ids[: len(prompt)].tolist() == prompt.tolist()


BARE = (  # a template that knows two roles, as many do, and no tools
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    "\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST = {"role": "developer", "content": "d"}
ASKED = ({"role": "user", "content": "Add d."}, {"role": "assistant", "content": "Done."})


@pytest.mark.parametrize(
    "template, messages, tools, left_out",
    [
        ("", (FIRST, *ASKED), (), "message 1, whose role is 'developer'"),
        ("", (*ASKED, {"role": "critic", "content": "d"}, *ASKED), (), "message 3, whose role is 'critic'"),
        (BARE, (*ASKED, {"role": "system", "content": "d"}, *ASKED), (), "message 3, whose role is 'system'"),
        (BARE, ASKED, TOOLS, "does not show the tools"),
        ("", (*ASKED, {"role": "system", "content": "d"}, *ASKED), (), ""),
        ("", WITH_TOOLS, TOOLS, ""),
        ("", (FIRST | {"content": " "}, *ASKED), (), ""),
    ],
)
def test_what_a_template_leaves_out_is_refused(shared, template, messages, tools, left_out):
    tokenizer = copy.copy(qwen3())
    tokenizer.chat_template = template or tokenizer.chat_template
    marked = [m | {"content": f"mark{k}"} for k, m in enumerate(messages) if m["content"].strip()]
    referee = tokenizer.apply_chat_template(marked, tools=list(tools) or None, tokenize=False)
    assert all(m["content"] in referee for m in marked) == (not left_out or bool(tools))
    row = Rendered(messages=messages, tools=tools)
    for made in (encode, encode_prompts):
        if not left_out:
            assert len(made([row], tokenizer)) == 1
        else:
            with pytest.raises(FtjaxError, match=f"row 1: the chat template .*{left_out}"):
                made([row], tokenizer)


def test_chatml_with_tools_is_what_qwen3_prompts_with(shared):
    row = Rendered(messages=({"role": "system", "content": "S"}, *WITH_TOOLS), tools=TOOLS)
    own, named = (encode_prompts([Rendered(row.messages, "", row.messages, TOOLS, t)], qwen3()) for t in ("", "chatml"))
    assert own[0].tolist() == named[0].tolist()


def test_mistral_moves_its_tools_to_the_last_question(shared):
    tokenizer = every()
    row = Rendered(messages=WITH_TOOLS[:4], tools=TOOLS, template="mistral")
    assert trained_text(encode([row], tokenizer)[0], tokenizer) == MISTRAL + "It is 3.</s>"
    row = Rendered(messages=WITH_TOOLS, tools=TOOLS, template="mistral")
    with pytest.raises(FtjaxError, match="row 1: the chat template changes earlier turns.*train_on=.last"):
        encode([row], tokenizer)
    assert trained_text(encode([row], tokenizer, "last")[0], tokenizer) == "Bye.</s>"
    with pytest.raises(FtjaxError, match=r"writes \[AVAILABLE_TOOLS\], .* for tools"):
        encode([row], family("mistral")[1])


@pytest.mark.parametrize("name", ["gemma", "phi", "alpaca", "plain"])
@pytest.mark.parametrize("messages, tools", [(WITH_TOOLS, ()), (WITH_TOOLS[-2:], TOOLS)], ids=["calls", "tools"])
def test_families_without_tools_refuse_them(shared, name, messages, tools):
    with pytest.raises(FtjaxError, match="row 1: the chat template refuses these messages: it has no place for tools"):
        encode([Rendered(messages=messages, tools=tools, template=name)], every())


@pytest.mark.parametrize("name", ["", *FAMILIES])
@pytest.mark.parametrize("content", [" x y ", "x \n", "naïve 日本語 \u200b🙂", "a <b> & {{ c }}", "x{end}y", "\n\nx"])
def test_contents_that_are_hard_to_find_again(shared, name, content):
    tokenizer = every()
    end = {"mistral": "</s>", "": "<|im_end|>"}.get(name) or FAMILIES[name].end
    content = content.replace("{end}", end)
    shown = content.strip() if name in ("gemma", "llama-3") else content.lstrip("\n") if name == "" else content
    messages = chat(2, False, False)
    messages = tuple(m | {"content": content} if m["role"] == "assistant" else m for m in messages)
    row = Rendered(messages=messages, template=name)
    last = encode([row], tokenizer, "last")[0]
    thinking = "<think>\n\n</think>\n\n" if name == "" else ""  # what Qwen3 puts before a last answer
    assert trained_text(last, tokenizer) == thinking + shown + end
    if content.startswith("\n") and name not in (
        "gemma",
        "llama-3",
        "mistral",
    ):  # line ends behind a line end: one token
        with pytest.raises(FtjaxError, match="row 1: the first characters of message 2 merge"):
            encode([row], tokenizer)
    else:
        assert trained_text(encode([row], tokenizer)[0], tokenizer) == shown + end + thinking + shown + end


@pytest.mark.parametrize("name", ["", *FAMILIES])
def test_turns_marked_as_not_trained(shared, name):
    tokenizer, messages = every(), chat(3, True, False)
    marked = tuple(m | {"train": False} if k == 4 else m for k, m in enumerate(messages))
    (with_all,), (but_one,) = (encode([Rendered(messages=m, template=name)], tokenizer) for m in (messages, marked))
    assert with_all.ids.tolist() == but_one.ids.tolist()
    said = trained_text(with_all, tokenizer)
    end = said[len(said.rstrip("\n")) - len(tokenizer.decode(with_all.ids[with_all.trained][-1:])) :]
    one = messages[4]["content"] + end
    assert said.count(one) == 1 and trained_text(but_one, tokenizer) == said.replace(one, "")
    (rest,) = encode([Rendered(messages=marked, template=name)], tokenizer, "all")
    assert (rest.trained[1:] == ~(with_all.trained & ~but_one.trained)[1:]).all() and not rest.trained[0]
    with pytest.raises(FtjaxError, match="row 1: every answer is marked as not trained"):
        encode([Rendered(messages=marked[:5], template=name)], tokenizer, "last")


def test_only_answers_can_be_left_out_where_everything_is_trained():
    row = {"messages": [{"role": "user", "content": "Who?", "train": False}, {"role": "assistant", "content": "Lily."}]}
    rendered, tokenizer = renderer("messages", template="plain")(row, "row 1"), every()
    with pytest.raises(FtjaxError, match="row 1: message 1, of the role 'user', is marked as not trained .* only answ"):
        encode([rendered], tokenizer, "all")
    assert trained_text(encode([rendered], tokenizer)[0], tokenizer).startswith("Lily.")


def test_an_empty_thought_that_qwen3_drops_from_an_earlier_answer(shared):
    nothing = "<think>\n\n</think>\n\n"
    messages = tuple(
        m | {"content": nothing + m["content"]} if m["role"] == "assistant" else m for m in chat(2, False, False)
    )
    (example,) = encode([Rendered(messages=messages)], qwen3())
    one, two = answers(chat(2, False, False))
    assert trained_text(example, qwen3()) == one + "<|im_end|>" + nothing + two + "<|im_end|>"


@pytest.mark.parametrize("thinking", ["", "<think>\nHm.\n</think>\n\n", "field"])
def test_thinking_that_the_prompt_opens_and_the_chat_does_not_show(shared, thinking):
    """As DeepSeek-R1-Distill's template, in the parts that matter."""
    tokenizer = load("qwen3", ("<User>", "<Assistant>", "<End>"))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<User>' + m.content }}{% else %}"
        "{{ '<Assistant>' + m.content.split('</think>')[-1] + '<End>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
    )
    messages = list(chat(2, False, False))
    if thinking == "field":
        messages[-1] = messages[-1] | {"reasoning": "Hm."}
    else:
        messages[-1] = messages[-1] | {"content": thinking + messages[-1]["content"]}
    answer = answers(chat(2, False, False))[-1]
    for row, train_on in (
        (Rendered(messages=tuple(messages)), "last"),
        (Rendered(messages=tuple(messages[2:])), "assistant"),
    ):
        (example,), (prompt,) = encode([row], tokenizer, train_on), encode_prompts([row], tokenizer)
        assert example.ids[: len(prompt)].tolist() == prompt.tolist()
        assert tokenizer.decode(prompt).endswith("<Assistant><think>\n")
        assert trained_text(example, tokenizer) == "Hm." * bool(thinking) + "\n</think>\n\n" + answer + "<End>"
    with pytest.raises(
        FtjaxError, match='message 2 does not occur in the whole chat; set data.train_on="last", mark .* alpaca'
    ):
        encode([Rendered(messages=tuple(messages))], tokenizer)


def test_thinking_in_a_field(shared):
    thought = {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}
    row = {"messages": [{"role": "user", "content": "So?"}, thought]}
    tokenizer, shown = every(), "<think>\nHm.\n</think>\n\nYes."
    for template, end in (("", "<|im_end|>"), ("chatml", "<|im_end|>"), ("gemma", "<end_of_turn>")):
        rendered = renderer("messages", template=template)(row, "row 1")
        assert trained_text(encode([rendered], tokenizer)[0], tokenizer) == shown + end
    own = load("qwen3", ("[X]",))
    own.chat_template = chat_templates.TEMPLATES["chatml"].text  # a template that knows no such field
    with pytest.raises(FtjaxError, match="row 1: the chat template leaves out or rewrites a part of message 2"):
        encode([renderer("messages")(row, "row 1")], own)


def test_any_chunking_gives_the_same(shared):
    rows = [
        Rendered(messages=chat(turns, system, thinking), template=name)
        for name in FAMILIES
        for turns in (1, 2)
        for system in (False, True)
        for thinking in (False, True)
    ]
    rows += [Rendered("a", " b"), Rendered(messages=chat(1, True, True))]
    whole = encode(rows, every())
    for size in (1, 7):
        parts = [e for at in range(0, len(rows), size) for e in encode(rows[at : at + size], every())]
        assert all(np.array_equal(a, b) for one, two in zip(whole, parts, strict=True) for a, b in zip(one, two))


def test_templates_that_a_tokenizer_cannot_write(shared):
    gpt2 = load("gpt2")
    rows = [Rendered(messages=chat(1, False, False), template="gemma")]
    with pytest.raises(
        FtjaxError, match="<start_of_turn>, <end_of_turn>, .* templates that it supports: alpaca, plain"
    ):
        encode(rows, gpt2)
    with pytest.raises(
        FtjaxError,
        match=r'data.template: unknown template \'gema\' \(did you mean "gemma"\?\); expected one of tokenizer, alpaca',
    ):
        chat_templates.resolve("gema", "", gpt2)
    with pytest.raises(
        FtjaxError, match="this tokenizer has no chat template; templates that it supports: alpaca, plain"
    ):
        chat_templates.resolve("tokenizer", "", gpt2)
    with pytest.raises(FtjaxError, match="row 1: messages need a chat template.* set data.template .* alpaca, plain"):
        encode([Rendered(messages=chat(1, False, False))], gpt2)


def test_answers_of_alpaca_and_plain_end_as_the_config_says(shared):
    tokenizer = load("starter")
    for name in ("alpaca", "plain"):
        row = Rendered(messages=chat(2, False, False), template=name)
        (example,), (prompt,) = encode([row], tokenizer, end="<s>"), encode_prompts([row], tokenizer, end="<s>")
        assert trained_text(example, tokenizer) == "".join(answer + "<s>" for answer in answers(row.messages))
        assert example.ids[: len(prompt)].tolist() == prompt.tolist()
        with pytest.raises(FtjaxError, match="data.end: 'a' is to end the answers .* is no special token"):
            encode([row], tokenizer, end="a")


def each(user, assistant, behind="", opening="", system="{{ m.content }}\n", front=""):
    """A template: what it writes for each role, behind the whole chat, and before an answer that is asked for."""
    return (
        front + "{% for m in messages %}{% if m.role == 'system' %}" + system + "{% elif m.role == 'user' %}" + user
        + "{% else %}" + assistant + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + opening + "{% else %}"
        + behind + "{% endif %}"
    )  # fmt: skip


def headed(end, behind="", last=None, front=""):
    """A template that writes `<|role|>` before each message and `end` behind it, or `last` where none follows."""
    text = "<|{{ m.role }}|>\n{{ m.content }}" + end
    answer = text if last is None else text[: -len(end)] + f"{{% if loop.last %}}{last}{{% else %}}{end}{{% endif %}}"
    return each(text, answer, behind, "<|assistant|>\n", text, front)


SHAPES = {  # name -> (template, what comes of three turns)
    "every turn ends": (headed("<|end|>\n"), "exact"),
    "and the chat too": (headed("<|end|>\n", "<|endoftext|>"), "exact"),
    "the chat alone ends": (headed("\n", "<|endoftext|>"), "exact"),  # GLM-Edge
    "nothing ends": (headed("\n"), "exact"),
    "ended by the next header": (headed(""), "exact"),  # GLM-4
    "ended by the next header and the chat": (headed("", "<|endoftext|>"), "exact"),
    "the last ends otherwise": (headed("<|end|>", last="<|return|>"), "exact"),  # gpt-oss
    "the last alone does not end": (headed("<|end|>", last=" ", front="<|system|>"), "exact"),  # Apertus
    "two tokens end": (headed("<|END_RESPONSE|><|end|>"), "exact"),  # Command A
    "a header behind the chat": (headed("<|end|>", "<|user|>"), "exact"),
    "one header token": (  # no end, and the token before each role is the same
        each(
            "<|im_start|>user\n{{ m.content }}",
            "<|im_start|>assistant\n{{ m.content }}",
            "<|endoftext|>",
            "<|im_start|>assistant\n",
            "<|im_start|>system\n{{ m.content }}",
        ),
        "exact",
    ),
    "roles as words": (  # the case of plain role names
        each("user:\n{{ m.content }}\n", "assistant:\n{{ m.content }}\n", "</s>", "assistant:\n"),
        "exact",
    ),
    "roles as words on one line": (
        each("USER: {{ m.content }} ", "ASSISTANT: {{ m.content }}</s>", "", "ASSISTANT:"),
        "exact",
    ),  # Vicuna
    "headings": (  # an answer's last token merges with the line ends of the next heading
        each("### Ask:\n{{ m.content }}\n\n", "### Say:\n{{ m.content }}\n\n", "</s>", "### Say:\n"),
        "exact",
    ),
    "line ends before headings": (
        each("\n\n### Ask:\n{{ m.content }}", "\n\n### Say:\n{{ m.content }}", "", "\n\n### Say:\n"),
        "exact",
    ),
    "no opening of answers": (  # Llama 2
        each("<s>[INST] {{ m.content }} [/INST]", " {{ m.content }} </s>"),
        "exact",
    ),
    "no opening and no end": (each("Q: {{ m.content }}\n", "A: {{ m.content }}\n"), "exact"),
    "answers repeated at the end": (
        each(
            "<|user|>{{ m.content }}",
            "<|assistant|>{{ m.content }}<|end|>",
            "{{ messages[1].content }}",
            "<|assistant|>",
        ),
        "message . more than once",
    ),
    "answers left out": (
        headed("<|end|>").replace(
            "else %}<|{{ m.role }}|>\n{{ m.content }}", "elif loop.last %}<|{{ m.role }}|>\n{{ m.content }}"
        ),
        "does not occur in the whole chat",
    ),
    "a prompt that is no part of the chat": (
        headed("<|end|>").replace("prompt %}<|assistant|>\n", "prompt %}<|assistant|>\n<hm>"),
        "message 2 does not occur",
    ),
    "answers cut": (
        headed("<|end|>").replace("else %}<|{{ m.role }}|>\n{{ m.content", "else %}<|{{ m.role }}|>\n{{ m.content[:8]"),
        "leaves out",
    ),
    "nothing between messages": (each("{{ m.content }}", "{{ m.content }}"), "merge into one token|exact"),
}


@functools.cache
def shape_tokenizer(name, special):
    tokenizer = AutoTokenizer.from_pretrained(
        resolve("builtin:stories260K") if name == "starter" else ROOT.parent / "shared/tokenizers" / name
    )
    if special:
        check_chat_masks.add_tokens(tokenizer, [text for text, _ in SHAPES.values()])
    return tokenizer


@pytest.mark.parametrize("special", [True, False], ids=["", "plain"])
@pytest.mark.parametrize("name", ["starter", "qwen3"])
@pytest.mark.parametrize("shape", SHAPES)
def test_exactly_the_answers_whatever_ends_a_turn(shared, shape, name, special):
    tokenizer = shape_tokenizer(name, special)
    tokenizer.chat_template, expected = SHAPES[shape]
    found = {}
    for chat_name in ("1 turn", "3 turns", "system"):
        for train_on in ("assistant", "last"):
            found[chat_name, train_on] = check_chat_masks.check(
                tokenizer, check_chat_masks.CHATS[chat_name][0], train_on=train_on
            )
    wrong = [result for result in found.values() if result.startswith("WRONG")]
    if not special:  # what is no token ends no turn, and nothing tells a header behind the chat from an end
        wrong = [result for result in wrong if "the end of message" not in result and "<|user|>" not in result]
    assert not wrong, found
    if special:
        assert re.search(expected, found["3 turns", "assistant"]), found
        assert expected != "exact" or set(found.values()) == {"exact"}, found
