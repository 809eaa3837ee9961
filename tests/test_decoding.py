"""Generation, with `transformers` as the referee, and the draws, against their distribution."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TRANSFORMERS_5
from tiny_words import wordpiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ftjax import decoding, load
from ftjax import lm as lm_module
from ftjax.decoding import EXCLUDED, choose, generate
from ftjax.errors import FtjaxError
from ftjax.hub import families, weights
from ftjax.hub.tokenizer import load_tokenizer
from ftjax.models.config import ModelConfig
from ftjax.models.quantised import is_quantised, rounded
from ftjax.models.transformer import Transformer
from ftjax.tree import flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # its threads wait by spinning: beside XLA's on few cores they cost more than they do

SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
TINY = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=256),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "mistral": lambda: transformers.MistralConfig(
        **SMALL, num_key_value_heads=2, sliding_window=7, max_position_embeddings=256, tie_word_embeddings=False
    ),
}
GPT_OSS = SMALL | dict(num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
GPT_OSS |= dict(sliding_window=7, max_position_embeddings=256)


def needs_5(name):
    return pytest.param(name, marks=pytest.mark.skipif(not TRANSFORMERS_5, reason="its defaults are version 5's"))


def ours(folder):
    family, shape = families.read_config(folder)
    params = weights.read_params(folder, family, shape, dtype=lambda path: jnp.dtype("float32"))
    return Transformer(shape), {"params": params}


def theirs(model, prompts, n):
    """Greedy tokens of each prompt alone, with no end token: unpadded, so that nothing depends on its padding."""
    out = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            new = model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)
            out.append(new[0, len(prompt) :].tolist())
    return out


@pytest.mark.parametrize("name", TINY)
def test_greedy_equals_transformers(name, tmp_path):
    torch.manual_seed(0)
    config = TINY[name]()
    config.initializer_range = 0.3  # far from uniform: a random model's text then depends on what it attends to
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    decoder, variables = ours(tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 97, n).tolist() for n in (3, 21, 1, 17, 9)]
    new = generate(decoder, variables, prompts, max_new_tokens=24, batch_size=3)
    assert new == theirs(model, prompts, 24)
    assert len({token for row in new for token in row}) > 10

    ends = (new[1][5], new[4][0])
    stopped = generate(decoder, variables, prompts, max_new_tokens=24, end_tokens=ends)
    for row, all_of_it in zip(stopped, new, strict=True):
        cut = next((i for i, token in enumerate(all_of_it) if token in ends), 24)
        assert row == all_of_it[:cut]


def test_starter_writes_its_published_text(shared):
    folder = shared / "models/stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    [new] = generate(*ours(folder), [[1]], max_new_tokens=256)
    assert [new] == theirs(model, [[1]], 256)
    text = transformers.AutoTokenizer.from_pretrained(folder).decode(new)
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big, red ball. She wanted to play with it, but it was too high.\n"
        "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do."
    )


def test_kernels_rounded_for_answers_are_those_that_torch_rounds(tmp_path):
    torch.manual_seed(0)
    config = TINY["llama"]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    decoder, variables = ours(tmp_path)
    params = rounded(variables["params"], decoder.config.tied)
    small = {path: x.codes.dtype for path, x in flatten(params).items() if is_quantised(x)}
    assert set(small.values()) == {jnp.dtype("bfloat16")} and len(small) == 8  # seven of a block, and the head
    ids = np.random.default_rng(0).integers(1, 97, (2, 12))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim == 2 and "embed" not in name:
                x.copy_(x.bfloat16().float())
        want = model(torch.tensor(ids)).logits.numpy()
    found = np.asarray(decoder.apply({"params": params}, jnp.asarray(ids, jnp.int32)))
    # The other factor of a product is rounded as well: 8 bits of each of its values.
    assert 0 < np.abs(found - want).max() < 2**-7 * np.abs(want).max()


def test_the_starter_begins_its_published_text_with_rounded_kernels(shared):
    model, variables = ours(shared / "models/stories260K")
    exact, small = (generate(model, variables, [[1]], max_new_tokens=40, weights=w) for w in ("model", "bfloat16"))
    assert small == exact


@pytest.fixture(scope="module")
def random_model():
    shape = ModelConfig(
        vocab_size=61, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, hidden=32, max_positions=64,
        initializer_range=0.3,
    )  # fmt: skip
    model = Transformer(shape)
    return model, model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))


PROMPTS = [[1, 2, 3], [4], [5] * 20, [6, 7], [8, 9, 10, 11], [4]]


def test_a_draw_depends_on_its_own_row_alone(random_model):
    settings = dict(max_new_tokens=12, temperature=1.3, top_k=20, top_p=0.9, seed=3)
    whole = generate(*random_model, PROMPTS, **settings)
    assert whole == generate(*random_model, PROMPTS, batch_size=1, **settings)
    assert whole == generate(*random_model, PROMPTS, batch_size=4, **settings)
    assert whole[:2] == generate(*random_model, PROMPTS[:2], **settings)
    assert whole[1] != whole[5]  # the same prompt in another place
    assert whole != generate(*random_model, PROMPTS, **settings | {"seed": 4})


def test_answers_longer_than_one_stage_of_the_cache(random_model, monkeypatch):
    monkeypatch.setattr("ftjax.decoding.STAGE", 4)
    staged = generate(*random_model, PROMPTS, max_new_tokens=30, batch_size=5)
    monkeypatch.setattr("ftjax.decoding.STAGE", 64)
    assert staged == generate(*random_model, PROMPTS, max_new_tokens=30, batch_size=6)


def test_rows_on_a_mesh_write_the_same(random_model):
    alone = generate(*random_model, PROMPTS, max_new_tokens=12)
    mesh = jax.make_mesh((4, 1, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    model, variables = random_model
    with jax.set_mesh(mesh):
        variables = jax.device_put(variables, jax.sharding.NamedSharding(mesh, jax.P()))
        assert generate(model, variables, PROMPTS, max_new_tokens=12) == alone


@pytest.mark.parametrize("name", ["mistral", needs_5("gpt_oss")])
def test_what_prompts_share_is_computed_once_and_changes_nothing(name, tmp_path, monkeypatch):
    """Equal prompts, and prompts that begin alike, also within a window that is shorter than what they share."""
    torch.manual_seed(0)
    config = TINY[name]() if name in TINY else transformers.GptOssConfig(**GPT_OSS)
    config.initializer_range = 0.3
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    decoder, variables = ours(tmp_path)
    rng = np.random.default_rng(1)
    head = rng.integers(1, 97, 70).tolist()
    prompts = [head + rng.integers(1, 97, n).tolist() for n in (3, 14, 3)] + [head]
    prompts += prompts[1:2] * 4
    shapes = []  # (U, T) of the tokens that are computed, and the slots that are taken from what is shared
    filled = decoding.prefill
    monkeypatch.setattr(
        decoding, "prefill", lambda *given: (shapes.append((*given[6].shape, given[2])), filled(*given))[1]
    )
    new = generate(decoder, variables, prompts, max_new_tokens=20)
    assert shapes == [(4, 16, 80)]  # four prompts are unlike, and 70 of their tokens alike
    assert new == theirs(model, prompts, 20)
    streamed: dict[int, list] = {}
    for i, ids in generate(decoder, variables, prompts, max_new_tokens=20, batch_size=5, stream=True):
        streamed.setdefault(i, []).append(ids)
    for i, ids in enumerate(new):
        assert streamed[i][0] == ids[:1] and streamed[i][-1] == ids
        assert all(one == ids[: len(one)] for one in streamed[i])


TEXTS = (
    "Hi 😀👩‍👧 thére, 中文 €5 . It 's  a 'quoted ' word , is n't it ?",
    "\n 😀 ",
    "😀😀",
)


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/qwen3", "models/stories260K", "wordpiece"])
def test_pieces_of_an_answer_are_its_text_whatever_its_tokens_are(shared, name):
    """Token by token and by several, with special tokens and lone bytes within the text, and with parts of
    characters at its end; transformers decodes the whole."""
    tokenizer = wordpiece(list(TEXTS)) if name == "wordpiece" else load_tokenizer(shared / name)
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special][-1]
    rng, many = np.random.default_rng(0), 0
    for text in TEXTS:
        prompt = tokenizer("Once upon a ti", add_special_tokens=False)["input_ids"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answers = [ids[:n] for n in range(1, len(ids) + 1)]
        answers += [np.insert(ids, rng.integers(len(ids) + 1, size=3), special).tolist() for _ in range(4)]
        answers += [np.insert(ids, rng.integers(len(ids) + 1), ids[rng.integers(len(ids))]).tolist() for _ in range(4)]
        before = len(tokenizer.decode(prompt, skip_special_tokens=True))
        for answer in answers:
            whole = tokenizer.decode(prompt + answer, skip_special_tokens=True)[before:]
            for step in (1, 3):
                grown = [answer[:n] for n in range(1, len(answer), step)] + [answer]
                pieces = list(lm_module._pieces(tokenizer, prompt, iter(grown)))
                assert "".join(pieces) == whole and "" not in pieces
                many = max(many, len(pieces))
    assert many > 10


def test_spaces_that_a_tokenizer_removes_later_are_not_shown_before():
    words = ["a", " ", ".", "'", "s", "n", "'t", "ve"]
    inner = Tokenizer(models.Unigram([(word, -1.0) for word in ("[UNK]", *words)], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=True)
    rng = np.random.default_rng(0)
    for _ in range(200):
        answer = rng.integers(1, 9, 12).tolist()
        grown = [answer[:n] for n in range(1, 13)]
        pieces = list(lm_module._pieces(tokenizer, [1], iter(grown)))
        assert "".join(pieces) == tokenizer.decode([1, *answer])[1:]


def test_a_stream_begins_before_the_second_token_is_computed(monkeypatch):
    lm, calls = load("builtin:stories260K"), []
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *given: calls.append(given[-2:]) or decode(*given))
    for how in ({}, {"stop": (".",), "temperature": 1.0, "seed": 3}):
        how |= {"max_new_tokens": 70}
        (whole,) = lm.generate("Once upon a ti", **how)
        calls.clear()
        stream = lm.stream("Once upon a ti", **how)
        pieces = [next(stream)]
        assert not calls
        pieces += stream
        assert "".join(pieces) == whole and len(pieces) >= len(calls) > 2
    with pytest.raises(FtjaxError, match="max_new_tokens: expected 1 or more"):
        lm.stream("Once", max_new_tokens=0)


def test_ids_beyond_the_tokenizer_are_never_drawn(random_model):
    new = generate(*random_model, PROMPTS, max_new_tokens=12, temperature=5.0, vocab_size=10)
    assert max(token for row in new for token in row) < 10


LOGITS = np.log(np.array([0.02, 0.4, 0.08, 0.2, 0.3]))


def frequencies(n=20_000, **settings):
    keys = jax.random.split(jax.random.key(1), n)
    draws = choose(jnp.tile(jnp.asarray(LOGITS, jnp.float32), (n, 1)), keys, **settings)
    return np.bincount(np.asarray(draws), minlength=5) / n


@pytest.mark.parametrize(
    "settings, kept",
    [
        (dict(temperature=1.0, top_k=0, top_p=1.0), [0, 1, 2, 3, 4]),
        (dict(temperature=0.5, top_k=0, top_p=1.0), [0, 1, 2, 3, 4]),
        (dict(temperature=1.0, top_k=2, top_p=1.0), [1, 4]),
        (dict(temperature=1.0, top_k=0, top_p=0.69), [1, 4]),
        (dict(temperature=1.0, top_k=0, top_p=0.71), [1, 3, 4]),
        (dict(temperature=1.0, top_k=0, top_p=0.01), [1]),
        (dict(temperature=1.0, top_k=4, top_p=0.9), [1, 3, 4]),  # of the four kept, 0.4 + 0.3 hold 0.71, with 0.2 0.92
        (dict(temperature=0.0, top_k=0, top_p=1.0), [1]),
    ],
)
def test_draws_follow_the_distribution_left_by_the_cuts(settings, kept):
    p = np.zeros(5)
    p[kept] = np.exp(LOGITS[kept] / (settings["temperature"] or 1.0))
    p /= p.sum()
    found = frequencies(**settings)
    bound = 5 * np.sqrt(p * (1 - p) / 20_000)
    assert (np.abs(found - p) <= bound).all()


@pytest.mark.parametrize("settings", [dict(top_k=7, top_p=1.0), dict(top_k=0, top_p=0.8), dict(top_k=9, top_p=0.6)])
def test_the_cuts_equal_those_of_transformers(settings):
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * 2
    expected = torch.tensor(logits)
    if settings["top_k"]:
        expected = TopKLogitsWarper(settings["top_k"])(None, expected)
    if settings["top_p"] < 1:
        expected = TopPLogitsWarper(settings["top_p"])(None, expected)
    keys = jax.random.split(jax.random.key(0), 6 * 3000).reshape(3000, 6)
    draws = jax.vmap(lambda k: choose(jnp.asarray(logits), k, temperature=1.0, **settings))(keys)
    for row in range(6):
        allowed = set(np.flatnonzero(np.isfinite(expected[row].numpy())))
        seen = set(np.asarray(draws[:, row]).tolist())
        likely = {i for i in allowed if torch.softmax(expected[row], -1)[i] > 0.005}
        assert likely <= seen <= allowed
    assert EXCLUDED < logits.min()


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([[1], []], {}, "prompt 2 has no tokens"),
        ([[1], [1] * 60], {}, "prompt 2 has 60 tokens; with max_new_tokens=5 that exceeds the model's 64 positions"),
        ([[1]], {"max_new_tokens": 0}, "generate.max_new_tokens: expected 1 or more; found 0"),
        ([[1]], {"top_p": 0.0}, "generate.top_p"),
        ([[1]], {"temperature": -1.0}, "generate.temperature"),
        ([[1]], {"temperature": 1e-38}, "generate.temperature: expected 0 .greedy., or 1e-30 or more; found 1e-38"),
    ],
)
def test_bad_input_is_named(random_model, prompts, settings, message):
    with pytest.raises(FtjaxError, match=message):
        generate(*random_model, prompts, **{"max_new_tokens": 5} | settings)


@pytest.fixture(scope="module")
def loaded():
    from ftjax import load

    return load("builtin:stories260K", dtype="float32")


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda lm: lm.logits([[1, 5000]]), "logits: the id 5000 is no token of this model, whose ids are 0 to 511"),
        (lambda lm: lm.logits([[1, -1]]), "logits: the id -1 is no token of this model"),
        (lambda lm: lm.logits([[1, 2.7]]), "logits: expected whole numbers as input_ids, and 1 and 0 in"),
        (lambda lm: lm.logits([[1, 2]], [[1, 2]]), "logits: expected whole numbers as input_ids, and 1 and 0 in"),
        (lambda lm: lm.logits([[1, 2], [3]]), "logits: the rows have different lengths"),
        (lambda lm: lm.logits([[]]), r"logits: expected ids and mask of one shape .* found \(1, 0\)"),
        (lambda lm: lm.generate("a", stop="the end"), "stop: the tokenizer makes 4 tokens of 'the end'"),
        (lambda lm: lm.generate("a", weights="fp8"), "generate.weights: unknown value 'fp8'; expected one of model"),
        (lambda lm: lm.generate(["a", "b \ud83d"]), r"prompt 2: holds half of a surrogate pair \(.ud83d\)"),
    ],
)
def test_what_a_model_cannot_read_is_refused(loaded, ask, message):
    with pytest.raises(FtjaxError, match=message):
        ask(loaded)


def test_ids_of_padding_are_not_read(loaded):
    logits = loaded.logits([[-100, 1, 403]], [[0, 1, 1]])
    np.testing.assert_allclose(logits[:, 1:], loaded.logits([[1, 403]]), atol=1e-5)


def test_a_conversation_is_answered_as_its_chat_template_shows_it(tmp_path):
    from ftjax import assets, load
    from ftjax.data import chat_templates
    from ftjax.evaluation.run import answer

    lm = load(assets.resolve("builtin:stories260K"), dtype="float32")
    chat = [{"role": "user", "content": "Once?"}, {"role": "assistant", "content": "Yes."}]
    with pytest.raises(FtjaxError, match="prompt 1: messages need a chat template"):
        lm.generate(chat[:1])
    lm.tokenizer.chat_template = chat_templates.resolve("plain", "", lm.tokenizer)
    more = [*chat, {"role": "user", "content": "And then?"}]
    shown = [lm.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in (chat[:1], more)]
    expected = lm.generate(shown, max_new_tokens=8)
    assert lm.generate([chat[:1], more], max_new_tokens=8) == expected and all(expected)
    assert lm.generate(more, max_new_tokens=8) == lm.generate([more, shown[1]], max_new_tokens=8)[:1]
    assert lm.generate([chat], max_new_tokens=8) == expected[:1]  # the answer at the end is what is asked for
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": c}) + "\n" for c in (chat, more)))
    assert [row["completion"] for row in answer(lm, [], str(file), max_new_tokens=8)] == expected
    alone = lm.generate([shown[0]], max_new_tokens=4)
    assert lm.generate(shown[0], max_new_tokens=4) == lm.generate({"messages": chat}, max_new_tokens=4) == alone
    tools = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    lm.tokenizer.chat_template = tools + "{% for m in messages %}{{ m.content }} {% endfor %}"
    row = {"messages": chat[:1], "tools": [{"type": "function", "function": {"name": "Play"}}]}
    same = [{"role": "user", "content": "Play Once?"}]
    assert (
        lm.generate([row], max_new_tokens=8)
        == lm.generate(same, max_new_tokens=8)
        != lm.generate(chat[:1], max_new_tokens=8)
    )
    with pytest.raises(FtjaxError, match="prompt 2: message 1 should be an object with `role`"):
        lm.generate(["x", [{"content": "y"}]])
