"""Real tokenizers: loading, the size check, and the tokens that end an answer."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import re
import shutil
import sys
import time

import jax
import jinja2.sandbox
import numpy as np
import pytest

from ftjax import config as configs
from ftjax.assets import resolve
from ftjax.data import chat_templates
from ftjax.data.labelled import Labelled
from ftjax.data.prepare import fingerprint, prepare
from ftjax.data.template import Rendered
from ftjax.data.tokenise import encode
from ftjax.errors import FtjaxError
from ftjax.foreign import limited
from ftjax.hub.families import read_config
from ftjax.hub.tokenizer import (
    chat_template,
    check_vocab,
    copy_tokenizer,
    end_token,
    end_tokens,
    generation,
    load_tokenizer,
    write_chat_template,
    write_settings,
)
from ftjax.hub.weights import write_model
from ftjax.lm import open_base
from ftjax.training import export
from ftjax.training.run_folder import Trained
from ftjax.tuning import METHODS

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo."}]


@pytest.fixture
def gpt2(shared, tmp_path):
    """A writable copy of GPT-2's tokenizer."""
    folder = tmp_path / "gpt2"
    shutil.copytree(shared / "tokenizers" / "gpt2", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def test_end_of_turn_of_a_chat_template(shared):
    folder = shared / "tokenizers" / "qwen3"
    tokenizer = load_tokenizer(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in end_tokens(folder, tokenizer)
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it: the template alone knows the end of a turn
    assert end_tokens(folder, tokenizer) == (tokenizer.convert_tokens_to_ids("<|endoftext|>"), end)


def test_a_plain_tokenizer_is_the_one_that_auto_tokenizer_makes():
    from transformers import AutoTokenizer

    folder = resolve("builtin:stories260K")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "Once upon a time,  Lily\tsaid: </s> ünïcode"
    assert type(ours) is type(theirs) and str(ours) == str(theirs)
    ids = ours(text)["input_ids"]
    assert ids == theirs(text)["input_ids"] and ours.decode(ids) == theirs.decode(ids)


def test_end_tokens_of_files_and_tokenizer(shared, gpt2):
    assert end_tokens(shared / "models" / "stories260K", load_tokenizer(shared / "models" / "stories260K")) == (1, 2)
    tokenizer = load_tokenizer(gpt2)
    assert end_tokens(gpt2, tokenizer) == (50256,)
    (gpt2 / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert end_tokens(gpt2, tokenizer) == (5, 50256)
    # As transformers reads them: the part for the text, where the whole model names none, and padding of no token.
    told = {"eos_token_id": None, "pad_token_id": -1, "text_config": {"eos_token_id": [6, 8], "bos_token_id": 1}}
    (gpt2 / "config.json").write_text(json.dumps(told))
    assert end_tokens(gpt2, tokenizer) == (6, 8, 50256)
    assert generation(gpt2) == {"eos_token_id": [6, 8], "bos_token_id": 1, "pad_token_id": -1}
    (gpt2 / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 50256]}))
    assert end_tokens(gpt2, tokenizer) == (7, 50256)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only system turns') }}", "cannot show a turn .*only system turns"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out the text of the assistant"),
    ],
)
def test_templates_without_an_answer(gpt2, template, message):
    tokenizer = load_tokenizer(gpt2)
    tokenizer.chat_template = template
    with pytest.raises(FtjaxError, match=message):
        end_tokens(gpt2, tokenizer)


def test_template_that_ends_turns_with_plain_text(gpt2):
    tokenizer = load_tokenizer(gpt2)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_tokens(gpt2, tokenizer) == (50256,)


def test_tokenizer_larger_than_the_embedding(gpt2):
    tokenizer = load_tokenizer(gpt2)
    check_vocab(tokenizer, 50257)
    with pytest.raises(FtjaxError, match=r"larger than the embedding: .*endoftext.* 50256, the embedding 50256 rows"):
        check_vocab(tokenizer, 50256)


def test_copies_are_byte_equal(gpt2, tmp_path):
    (tmp_path / "out").mkdir()
    copy_tokenizer(gpt2, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (gpt2 / file.name).read_bytes()


def test_a_written_template_wins_over_every_other(gpt2):
    (gpt2 / "chat_template.jinja").write_text("old")
    (gpt2 / "additional_chat_templates").mkdir()
    (gpt2 / "additional_chat_templates" / "tool_use.jinja").write_text("older")
    before = json.loads((gpt2 / "tokenizer_config.json").read_text())
    write_chat_template(gpt2, "new {{ messages[0].content }}")
    assert load_tokenizer(gpt2).apply_chat_template(CHAT, tokenize=False) == "new Hi"
    after = json.loads((gpt2 / "tokenizer_config.json").read_text())
    assert after == before | {"chat_template": "new {{ messages[0].content }}"}


def test_the_template_of_a_folder_is_the_default_of_named_ones(gpt2):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    for templates, found in ((named, "{{ messages[0].content }}"), (named[:1], "")):
        write_settings(gpt2, chat_template=templates)
        assert chat_template(gpt2) == found
    write_settings(gpt2, chat_template=named)
    assert load_tokenizer(gpt2).apply_chat_template(CHAT, tokenize=False) == "Hi"


@pytest.mark.parametrize("method, format", [("lora", "adapter"), ("lora", "merged"), ("full", "full")])
def test_an_export_carries_the_runs_template(tmp_path, method, format):
    lm, spec = open_base(resolve("builtin:stories260K"), "float32")
    config = configs.default()
    config.tuning.method, config.data.template, config.data.end = method, "plain", "<unk>"
    spec = spec._replace(tuning=config.tuning)
    trained, frozen = METHODS[method].init(jax.random.key(0), lm.params, spec)
    run = Trained(trained, frozen, spec, lm, config)
    export.write(run, tmp_path / "out", format)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "<s>User:\nHi\n\nAssistant:\nYo.<unk>"
    if format != "adapter":
        official = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
        assert tokenizer.unk_token_id in official and set(lm.end_tokens) <= set(official)
    assert lm.tokenizer.chat_template is None


@pytest.mark.parametrize("closes", [False, True], ids=["", "closes"])
@pytest.mark.parametrize("pad", [None, "</s>", "<unk>"])
@pytest.mark.parametrize("official", [None, 2], ids=["", "eos"])
def test_an_exported_classifier_reads_the_token_that_was_trained(tmp_path, closes, pad, official):
    """Whatever fills rows up, on either side, and whatever closes a text; official: the padding of config.json."""
    import torch
    import transformers

    base = tmp_path / "base"
    shutil.copytree(resolve("builtin:stories260K"), base)
    backend = json.loads((base / "tokenizer.json").read_text())
    if closes:
        piece = {"SpecialToken": {"id": "</s>", "type_id": 0}}
        backend["post_processor"]["single"].append(piece)
        backend["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (base / "tokenizer.json").write_text(json.dumps(backend))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | ({"pad_token": pad} if pad else {})))
    model_config = json.loads((base / "config.json").read_text()) | {"pad_token_id": official}
    (base / "config.json").write_text(json.dumps(model_config))

    lm, spec = open_base(base, "float32", task=("classify", ("bad", "good")))
    family, out = read_config(base)[0], tmp_path / "out"
    write_model(out, lm.params, base, family, spec.model, labels=("bad", "good"))
    rows = [{"text": text, "label": "bad"} for text in ("Once upon a time", "Lily", "A dog ran.</s>", "He said: hi!")]
    how = Labelled("classify", "text", "", "label", ("bad", "good"), spec.model.head.pool, 0)
    examples = how.encode(lm.tokenizer, rows, [f"row {i}" for i in range(len(rows))])
    assert all(example.trained.sum() == 1 for example in examples)
    ours = np.stack([lm.logits(example.ids[None])[0, example.trained][0] for example in examples])

    whole = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            np.testing.assert_allclose(whole(**batch).logits.numpy(), ours, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "starter"])
def test_what_answers_are_trained_to_end_with_ends_them(shared, name, tmp_path):
    """In a vocabulary that spells it otherwise (a line end of byte-level BPE, a byte of SentencePiece) too."""
    folder = shared / "tokenizers" / "gpt2" if name == "gpt2" else resolve("builtin:stories260K")
    tokenizer, config = load_tokenizer(folder), configs.default()
    config.data.end = "\n"
    (example,) = encode([Rendered("Once", " upon")], tokenizer, end="\n")
    trained = int(example.ids[-1])
    assert trained == end_token(tokenizer, "\n") and tokenizer.decode(example.ids).endswith("Once upon\n")
    assert trained in end_tokens(folder, tokenizer, chat_templates.ends_of_run(config, tokenizer))
    if name == "starter":
        lm, spec = open_base(folder, "float32", config)
        assert trained in lm.end_tokens
        config.tuning.method = "full"
        trained_params, frozen = METHODS["full"].init(jax.random.key(0), lm.params, spec._replace(tuning=config.tuning))
        run = Trained(trained_params, frozen, spec, lm, config)
        export.write(run, tmp_path / "out", "full")
        assert trained in json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    config.data.mixture = ({"train": "a.jsonl", "end": "!"}, {"train": "b.jsonl"})
    assert chat_templates.ends_of_run(config, tokenizer) == [end_token(tokenizer, "!"), trained]


def test_the_ends_of_all_templates_of_a_mixture(shared):
    tokenizer, config = load_tokenizer(shared / "tokenizers" / "qwen3"), configs.default()
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    config.data.mixture = ({"train": "a.jsonl", "template": "chatml"}, {"train": "b.jsonl", "template": "plain"})
    ends = chat_templates.ends_of_run(config, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]


def test_the_template_of_a_run(shared):
    tokenizer = load_tokenizer(shared / "tokenizers" / "qwen3")
    config = configs.default()
    for name in ("", "tokenizer"):
        config.data.template = name
        assert chat_templates.installed(config, tokenizer) is tokenizer
    config.data.template = "chatml"
    named = chat_templates.installed(config, tokenizer)
    assert named.chat_template == chat_templates.TEMPLATES["chatml"].text != tokenizer.chat_template
    assert chat_templates.installed(config, named) is named
    config.data.mixture = ({"train": "a.jsonl"}, {"train": "b.jsonl", "template": "plain"})
    assert chat_templates.installed(config, tokenizer) is tokenizer  # which of the two should it be?


@pytest.fixture
def clock(monkeypatch):
    """clock(day): from then on, transformers reads this day."""
    from transformers.utils import chat_template_utils

    def at(day):
        class Clock(datetime.datetime):
            now = classmethod(lambda cls: datetime.datetime.fromisoformat(day))

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return at


def test_the_day_is_the_configs_and_not_the_clocks(shared, clock, tmp_path):
    tokenizer = load_tokenizer(shared / "tokenizers" / "qwen3")
    named = chat_templates.TEMPLATES["chatml"].text
    tokenizer.chat_template = (  # as Llama 3.2's
        "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- else %}{%- set day = 'no' %}"
        "{%- endif %}{{ 'Today: ' ~ day ~ ', ' ~ strftime_now('%-d.%m. %A') }}" + named
    )
    clock("2026-11-07")
    referee = tokenizer.apply_chat_template(CHAT, tokenize=False)
    clock("2027-01-02")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) != referee
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": CHAT}) + "\n")
    config, shown, digests = configs.default(), {}, set()
    config.data.update(train=str(rows), split=(1.0, 0.0, 0.0), cache="")
    for date in ("2024-07-26", "2026-11-07"):
        config.data.date = date
        configs.validate(config)
        text = chat_templates.of_run(config, tokenizer)
        for today in ("2027-01-02", "2027-01-03"):
            clock(today)
            own = chat_templates.installed(config, tokenizer)
            ids = {tuple(prepare(config, words, 512).train.examples[0].ids.tolist()) for words in (tokenizer, own)}
            ids |= {tuple(encode([Rendered(messages=tuple(CHAT))], own)[0].ids.tolist())}
            ids |= {tuple(own.apply_chat_template(CHAT, return_dict=True)["input_ids"])}
            ids |= {tuple(tokenizer.apply_chat_template(CHAT, chat_template=text)["input_ids"])}  # as it is exported
            digests.add(fingerprint(own))
            (shown[date, today],) = {tokenizer.decode(each) for each in ids}
    assert shown["2026-11-07", "2027-01-02"] == shown["2026-11-07", "2027-01-03"] == referee
    assert shown["2024-07-26", "2027-01-02"].startswith("Today: 26 Jul 2024, 26.07. Friday<|im_start|>")
    assert len(digests) == 2
    (example,) = encode([Rendered(messages=tuple(CHAT))], tokenizer)
    assert tokenizer.decode(example.ids) == shown["2024-07-26", "2027-01-03"]  # without a config
    config.data.date = "2024-7-26"
    with pytest.raises(FtjaxError, match="data.date: expected a day as YYYY-MM-DD; found '2024-7-26'"):
        configs.validate(config)


def test_the_token_that_ends_a_text(gpt2):
    tokenizer = load_tokenizer(gpt2)
    assert end_token(tokenizer) == 50256 and end_token(tokenizer, "!") == 0
    with pytest.raises(
        FtjaxError, match="data.end: the tokenizer makes 2 tokens of 'two words'; expected a text of exactly one"
    ):
        end_token(tokenizer, "two words")
    tokenizer.eos_token = None
    with pytest.raises(FtjaxError, match="names no end-of-text token: set data.end"):
        end_token(tokenizer)


def test_folder_without_tokenizer_and_broken_tokenizer(tmp_path):
    with pytest.raises(FtjaxError, match="no tokenizer; expected tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(FtjaxError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def own_rules(tmp_path_factory):
    """A folder with a byte-level tokenizer.json that splits as no class of transformers does, and its tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s?\p{L}+|[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.normalizer, tokenizer.decoder = normalizers.Replace("x", "ks"), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<eos>", "<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the quick brown fox in 2024 and 1999"] * 20, trainer)
    folder = tmp_path_factory.mktemp("own")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, tokenizer


CLASSES = "Qwen2 GPT2 Llama CodeLlama Gemma Cohere Bert Roberta XLMRoberta T5 Albert Deberta DebertaV2 MPNet Nllb Bart"


def test_every_class_follows_the_file(own_rules):
    folder, referee = own_rules
    text = "In 2024,  the Café fox\n\nÜber 19990 <eos> x"
    names = ["PreTrainedTokenizerFast", "Qwen2TokenizerFast", "ByT5Tokenizer", "EsmcTokenizer"]
    cases = [("llama", name) for name in names + [f"{name}Tokenizer" for name in CLASSES.split()]]
    cases += [(kind, None) for kind in ("qwen2", "qwen3", "gpt2", "llama", "gemma", "bert", "t5")]
    for kind, name in cases:
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        settings = {"eos_token": "<eos>", "unk_token": "<unk>"} | ({"tokenizer_class": name} if name else {})
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_tokenizer(folder)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == referee.encode(text, add_special_tokens=False).ids, (kind, name)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == referee.decode(ids, False), (kind, name)
        assert tokenizer.eos_token == "<eos>"


def test_no_code_of_a_repository_is_run(gpt2, tmp_path):
    (gpt2 / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (gpt2 / "tokenizer_config.json").write_text(json.dumps(settings))
    with contextlib.suppress(FtjaxError):  # refused, or loaded as a plain one: either will do
        load_tokenizer(gpt2)
    assert not (tmp_path / "ran").exists()


LLAMA2 = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture
def sentencepiece_alone(tmp_path):
    """A function that makes a directory of a content of tokenizer.model."""

    def make(content):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA2 | {"add_bos_token": True}))
        (tmp_path / "tokenizer.model").write_bytes(content)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02",
            "the package sentencepiece reads, and this is not installed",
        ),
        (b"IQ== 0\nIg== 1\n", "tokenizer.model: not a SentencePiece model, .*; put the tokenizer.json"),
    ],
)
def test_tokenizer_model_alone_says_what_it_needs(sentencepiece_alone, content, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as where it is not installed
    with pytest.raises(FtjaxError, match=message):
        load_tokenizer(sentencepiece_alone(content))


def test_tokenizer_model_alone_has_the_tokens_of_sentencepiece(sentencepiece_alone):
    """A BPE model, as LLaMA 2's, does; of another algorithm the class makes other tokens, and it is refused."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = [
        f"{a} {b}, {c} naïve ways." for a in ("The", "a", "some") for b in ("dogs", "cats") for c in ("7", "in", "by")
    ]

    def trained(kind):
        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text * 5), model_writer=file, model_type=kind, vocab_size=310, byte_fallback=True,
            split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            hard_vocab_limit=False,
        )  # fmt: skip
        return file.getvalue()

    model = trained("bpe")
    found, pieces = load_tokenizer(sentencepiece_alone(model)), sentencepiece.SentencePieceProcessor(model_proto=model)
    for line in (*text, "Hello  world\n\t12345 <x> 日本語"):
        assert found(line)["input_ids"] == [pieces.bos_id(), *pieces.encode(line)]
    with pytest.raises(FtjaxError, match="LlamaTokenizer makes other tokens of this model than SentencePiece does"):
        load_tokenizer(sentencepiece_alone(trained("unigram")))


@pytest.mark.parametrize(
    "program",
    [
        lambda: re.match(r"(\w+\.?)+X", "model.layers.0.self_attn.q_proj.lora_embedding"),
        lambda: (
            jinja2.sandbox.SandboxedEnvironment()
            .from_string("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
            .render()
        ),
    ],
    ids=["regular expression", "template"],
)
def test_a_program_of_others_that_does_not_end_is_stopped(program):
    begin = time.monotonic()
    with pytest.raises(FtjaxError, match="^the program: takes longer than 0.3 s"), limited("the program", 0.3):
        program()
    assert time.monotonic() - begin < 20


def test_whatever_a_program_of_others_raises_is_one_error():
    with pytest.raises(FtjaxError, match="^it: division by zero"), limited("it"):
        1 / 0  # noqa: B018
    with pytest.raises(KeyboardInterrupt), limited("it"):
        raise KeyboardInterrupt
    with pytest.raises(FtjaxError, match="^mine"), limited("it"):
        raise FtjaxError("mine")
