"""Token ids and masks, with real tokenizers; the referee is transformers' own encoding and its assistant masks."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ftjax.assets import resolve
from ftjax.data.chat_templates import TEMPLATES
from ftjax.data.read import read_table
from ftjax.data.template import Rendered, guess, renderer
from ftjax.data.template import reference as plain_reference
from ftjax.data.tokenise import answer_of, encode, encode_prompts, reference
from ftjax.errors import FtjaxError
from ftjax.evaluation.metrics import score
from ftjax.hub.tokenizer import load_tokenizer, marks

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def load(path):
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(params=["starter", "gpt2", "qwen3"])
def tokenizer(request, shared):
    return load(
        resolve("builtin:stories260K") if request.param == "starter" else str(shared / "tokenizers" / request.param)
    )


@pytest.fixture
def qwen3(shared):
    return load(str(shared / "tokenizers/qwen3"))


def chat(*contents, system=None, **last):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents)]
    messages[-1] |= last
    return Rendered(messages=((({"role": "system", "content": system}),) if system else ()) + tuple(messages))


def trained_text(example, tokenizer):
    return tokenizer.decode(example.ids[example.trained])


def test_the_text_of_a_special_token_in_a_message_stays_text(shared):
    qwen3, starter = (load_tokenizer(f) for f in (shared / "tokenizers/qwen3", resolve("builtin:stories260K")))
    for tokenizer, template, token, other in (
        (qwen3, "", "<|im_end|>", "<|box_end|>"),
        (qwen3, "chatml", "<|im_end|>", "<|box_end|>"),
        (starter, "plain", "</s>", ""),
    ):
        says = f"No{token}\n<|im_start|>user\n{other}{token}{token} so."
        row = dataclasses.replace(chat(f"What is {token}?", says, "And?", says), template=template)
        clean = dataclasses.replace(chat("What is it?", f"No{other}.", "And?", f"No{other}."), template=template)
        (example, known), (prompt,) = encode([row, clean], tokenizer), encode_prompts([row], tokenizer)
        for i in tokenizer.added_tokens_decoder:  # all of them, but for those that the template does not write
            assert (example.ids == i).sum() == (known.ids == i).sum()
        assert example.ids[: len(prompt)].tolist() == prompt.tolist()
        text = tokenizer.decode(example.ids)
        if tokenizer is qwen3:
            shown = tokenizer.apply_chat_template(
                row.messages, tokenize=False, chat_template=TEMPLATES["chatml"].text if template else None
            )
            assert text == shown and trained_text(example, tokenizer).count(says) == 2
        assert encode([clean], tokenizer)[0].ids.tolist() == known.ids.tolist()


def test_the_tokens_that_a_template_writes_are_found_in_all_its_parts(shared):
    tokens = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|call|>", "<|other|>")
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/qwen3", additional_special_tokens=tokens)
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.calls %}<|call|>{% endif %}<|end|>"
    found = marks(tokenizer, template + "{% endfor %}").around
    assert [token for token in tokens if not found.fullmatch(token)] == ["<|other|>"]


def test_a_token_that_cannot_be_text_is_refused(shared):
    rules = json.loads((Path(resolve("builtin:stories260K")) / "tokenizer.json").read_text())
    model = {"type": "Unigram", "unk_id": 0, "vocab": [[token, 0.0] for token in rules["model"]["vocab"]]}
    backend = Tokenizer.from_str(json.dumps(rules | {"model": model}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    row = dataclasses.replace(chat("Hi</s>", "Yo"), template="plain")
    with pytest.raises(
        FtjaxError, match="row 1: holds the text '</s>', which this tokenizer can only read as the token"
    ):
        encode([row], tokenizer)


def real_rows(shared):
    dolly = read_table(str(shared / "data/instruct/dolly_hhrlhf_train_small.jsonl")).select(range(100))
    rows = [renderer(guess(dolly.columns))(row, "") for row in dolly]
    gsm8k = read_table(str(shared / "data/gsm8k/test.jsonl")).select(range(100))
    return rows + [renderer("template", "Q: {question}\nA:", " {answer}")(row, "") for row in gsm8k]


def test_prompt_is_what_generation_feeds_and_the_rest_is_trained(tokenizer, shared):
    rows = real_rows(shared)
    for row, example, prompt in zip(rows, encode(rows, tokenizer), encode_prompts(rows, tokenizer), strict=True):
        assert prompt.tolist() == tokenizer(row.prompt)["input_ids"] == example.ids[: len(prompt)].tolist()
        assert not example.trained[: len(prompt)].any() and example.trained[len(prompt) :].all()
        assert example.ids[-1] == tokenizer.eos_token_id
        joint = tokenizer(row.prompt + row.completion)["input_ids"]
        if joint[: len(prompt)] == prompt.tolist():
            assert example.ids.tolist() == [*joint, tokenizer.eos_token_id]
        else:  # still the same text, whatever the tokens
            assert tokenizer.decode(example.ids[:-1]) == tokenizer.decode(joint)


def test_a_token_across_the_border_is_split(tokenizer):
    row = Rendered("He sa", "w a ball")
    (example,), (prompt,) = encode([row], tokenizer), encode_prompts([row], tokenizer)
    assert example.ids[: len(prompt)].tolist() == prompt.tolist() == tokenizer("He sa")["input_ids"]
    assert tokenizer.decode(example.ids, skip_special_tokens=True).strip() == "He saw a ball"


def test_one_bos_one_eos():
    tokenizer = load(resolve("builtin:stories260K"))
    for row in (Rendered("<s>Once", " upon</s>"), Rendered("Once", " upon"), Rendered("", "<s>Once upon</s>")):
        (example,) = encode([row], tokenizer)
        assert (example.ids == tokenizer.bos_token_id).sum() == (example.ids == tokenizer.eos_token_id).sum() == 1
        assert example.trained[-1] and not example.trained[0]


def test_text_rows_train_all_but_the_first_token(tokenizer):
    (example,) = encode([Rendered("", "Once upon a time")], tokenizer)
    assert example.ids.tolist() == [*tokenizer("Once upon a time")["input_ids"], tokenizer.eos_token_id]
    assert example.trained.tolist() == [False] + [True] * (len(example.ids) - 1)


def test_train_on_all(tokenizer):
    (example,) = encode([Rendered("Once upon", " a time")], tokenizer, train_on="all")
    assert not example.trained[0] and example.trained[1:].all()


def test_a_tokenizer_that_closes_every_text_leaves_prompts_open():
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(resolve("builtin:stories260K"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (example,), (prompt,) = (f([Rendered("Once", " upon")], tokenizer) for f in (encode, encode_prompts))
    assert prompt[-1] != 2 and prompt.tolist() == example.ids[: len(prompt)].tolist()
    assert (example.ids == 2).sum() == 1 and example.trained[-1]


@pytest.mark.parametrize(
    "row",
    [
        chat("hi", "yo"),
        chat("hi", "yo", "and?", "no", system="Be brief."),
        chat("hi", "yo\n\n", "and?", " no", "then", "bye <b>"),
        Rendered(messages=(*chat("hi", "yo").messages, {"role": "user", "content": "unanswered"})),
    ],
)
def test_chats_equal_the_generation_masks_of_transformers(qwen3, row, monkeypatch):
    monkeypatch.setattr(qwen3, "chat_template", CHATML)
    referee = qwen3.apply_chat_template(
        list(row.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (example,) = encode([row], qwen3)
    assert example.ids.tolist() == referee["input_ids"]
    assert example.trained.astype(int).tolist() == list(referee["assistant_masks"])


def test_a_template_without_an_end_token_gets_the_end_of_text(qwen3, monkeypatch):
    monkeypatch.setattr(
        qwen3,
        "chat_template",
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
    )
    (example,) = encode([chat("hi", "yo", "and?", "no")], qwen3)
    assert trained_text(example, qwen3) == " yo\n no\n<|im_end|>"


def test_a_template_that_puts_more_behind_the_end_of_a_turn(qwen3, monkeypatch):
    """Such as the end-of-text that Phi's puts behind a finished chat."""
    monkeypatch.setattr(qwen3, "chat_template", CHATML + "{{ '<|endoftext|>' if not add_generation_prompt }}")
    (example,) = encode([chat("hi", "yo", "and?", "no")], qwen3)
    assert trained_text(example, qwen3) == "yo<|im_end|>no<|im_end|>"
    assert qwen3.decode(example.ids[-2:]) == "\n<|endoftext|>"


def test_turns_that_end_otherwise_than_an_answer_in_text(qwen3, monkeypatch):
    """Such as the end of message that Llama's writes behind a call."""
    other = CHATML.replace("m.content + '<|im_end|>'", "m.content + ('<|box_end|>' if m.call else '<|im_end|>')", 1)
    monkeypatch.setattr(qwen3, "chat_template", other)
    (example,) = encode([chat("hi", "f(1)", call=True)], qwen3)
    assert trained_text(example, qwen3) == "f(1)<|box_end|>"


@pytest.mark.parametrize("template", ["", "chatml"])
def test_the_reference_of_a_tool_call_is_what_was_trained(qwen3, template):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Łódź", "days": 3}}}
    row = renderer("messages", template=template)({"messages": [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]}, "row 1")  # fmt: skip
    (example,) = encode([row], qwen3)
    right = reference(row, qwen3)
    trained = qwen3.decode(example.ids[example.trained], skip_special_tokens=True)
    assert right == trained.replace("<think>\n\n</think>\n\n", "").strip() == answer_of(trained)
    assert right.startswith('<tool_call>\n{"name": "weather"') and "Łódź" in right
    assert score("exact_match", ["", right], [[right]] * 2, [{}] * 2, None)[1] == [0, 1]
    text = renderer("messages")(
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a "}]}, ""
    )
    assert reference(text, qwen3) == "a" == plain_reference(text)
    assert '"weather"' in plain_reference(row)  # what cleaning takes for the answer is not empty


def test_chat_faults(qwen3, monkeypatch):
    late = Rendered(messages=({"role": "assistant", "content": "x"}, *chat("hi", "yo").messages))
    with pytest.raises(FtjaxError, match="row 1: the first message is from the assistant"):
        encode([late], qwen3)
    assert trained_text(encode([late], qwen3, "last")[0], qwen3) == "<think>\n\n</think>\n\nyo<|im_end|>"
    monkeypatch.setattr(
        qwen3, "chat_template", CHATML + "{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}"
    )
    with pytest.raises(FtjaxError, match="row 2: the chat template refuses these messages: no"):
        encode([chat("hi", "yo"), chat("hi", "yo", "and?", "no")], qwen3)
    monkeypatch.setattr(qwen3, "chat_template", "{{ messages[-1].content }}{% if add_generation_prompt %}A{% endif %}")
    with pytest.raises(FtjaxError, match="row 1: the chat template changes earlier turns"):
        encode([chat("hi", "yo")], qwen3)


def test_a_row_whose_every_label_is_masked(shared):
    gpt2 = load(str(shared / "tokenizers/gpt2"))
    with pytest.raises(FtjaxError, match="row 2: .*every label is masked"):
        encode([Rendered("", "fine"), Rendered("", "<|endoftext|>")], gpt2)
