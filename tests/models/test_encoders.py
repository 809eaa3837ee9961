"""Encoders and heads over labels against transformers: hidden states, logits, packed rows, files both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tiny_encoders import CLASSES, DECODERS, ENCODERS, make

from ftjax.errors import FtjaxError
from ftjax.hub import families, weights
from ftjax.models.transformer import Transformer
from ftjax.tuning import METHODS

CASES = [(name, task) for name in ENCODERS for task in CLASSES]
CASES += [(name, task) for name in DECODERS for task in ("sequence", "token", "span")]


def theirs(model, task, tokens, mask, types=None):
    """transformers' float32 logits, or hidden states where it has no head; of answers (B, T, 2)."""
    import torch

    kwargs = {} if types is None else {"token_type_ids": torch.tensor(types)}
    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask), **kwargs)
    if task == "none":
        return out.last_hidden_state.numpy()
    if task == "span":
        return np.stack([out.start_logits.numpy(), out.end_logits.numpy()], -1)
    return out.logits.numpy()


def rows(pad: int, seed=0):
    """tokens, mask (2, 14): a whole row and one of 9 tokens; none of them is the padding's id."""
    tokens = np.random.default_rng(seed).integers(2, 50, (2, 14))
    mask = np.ones_like(tokens)
    tokens[1, 9:], mask[1, 9:] = pad, 0
    return tokens, mask


def ours(shape, params, task, tokens, mask, types=None):
    """Our logits on padded rows: (B, C) of sequences, else (B, T, ...)."""
    model, segments = Transformer(shape), jnp.asarray(mask, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    types = None if types is None else jnp.asarray(types)
    if task != "sequence":
        return np.asarray(model.apply({"params": params}, jnp.asarray(tokens), positions, segments, types=types))
    places = np.zeros((len(tokens), 1), int) if shape.head.pool != "last" else mask.sum(1, keepdims=True) - 1
    states = model.apply(
        {"params": params}, jnp.asarray(tokens), positions, segments, jnp.asarray(places), types, method="read"
    )
    return np.asarray(model.apply({"params": params}, states, method="logits"))[:, 0]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_padded_rows_are_transformers(name, task, tmp_path):
    model, _, shape, params = make(name, task, tmp_path)
    assert shape.head.task == task
    pad = model.config.pad_token_id or 0
    tokens, mask = rows(pad)
    types = np.random.default_rng(1).integers(0, 2, tokens.shape) if shape.types > 1 else None
    expected, found = theirs(model, task, tokens, mask, types), ours(shape, params, task, tokens, mask, types)
    real = mask.astype(bool) if expected.ndim == 3 else slice(None)
    np.testing.assert_allclose(found[real], expected[real], atol=1e-4)
    assert np.ptp(expected[real]) > 0.1


@pytest.mark.parametrize("name", ["bert", "bert-relu"])
def test_pooled_output_is_transformers(name, tmp_path):
    """The pooler is a part of our head: an identity in the classifier's place gives what it hands over."""
    model, _, shape, params = make(name, "sequence", tmp_path)
    tokens, mask = rows(0)
    pooled = theirs_of_the_pooler(model, tokens, mask)
    params["head"]["out"] = {"kernel": jnp.eye(shape.width), "bias": jnp.zeros(shape.width)}
    shape = dataclasses.replace(shape, head=dataclasses.replace(shape.head, labels=shape.width))
    np.testing.assert_allclose(ours(shape, params, "sequence", tokens, mask), pooled, atol=1e-4)
    assert np.ptp(pooled) > 0.1


def theirs_of_the_pooler(model, tokens, mask):
    import torch

    with torch.no_grad():
        return model.bert(torch.tensor(tokens), attention_mask=torch.tensor(mask)).pooler_output.numpy()


@pytest.mark.parametrize(("name", "task"), [case for case in CASES if case[1] in ("none", "sequence", "token")])
def test_packed_rows_are_plain_ones(name, task, tmp_path):
    model, _, shape, params = make(name, task, tmp_path)
    lengths = (9, 5, 11)
    parts = [np.random.default_rng(i).integers(2, 50, (1, n)) for i, n in enumerate(lengths)]
    alone = [ours(shape, params, task, part, np.ones_like(part)) for part in parts]
    tokens = jnp.asarray(np.concatenate(parts, axis=1))
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None])
    segments = jnp.asarray(np.repeat(np.arange(1, 4), lengths)[None])
    net = Transformer(shape)
    if task == "sequence":
        ends = np.cumsum(lengths)
        index = jnp.asarray((ends - 1 if shape.head.pool == "last" else ends - lengths)[None])
        states = net.apply({"params": params}, tokens, positions, segments, index, method="read")
        packed = np.asarray(net.apply({"params": params}, states, method="logits"))[0]
        np.testing.assert_allclose(packed, np.concatenate(alone), atol=1e-5)
    else:
        packed = np.asarray(net.apply({"params": params}, tokens, positions, segments))
        np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), atol=1e-5)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_what_is_written_loads_there_to_the_same_logits(name, task, tmp_path):
    import transformers

    model, family, shape, params = make(name, task, tmp_path / "source")
    names = ("no", "maybe", "yes")[: shape.head.labels]
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"num_labels": 1}))  # as old releases wrote
    weights.write_model(tmp_path / "out", params, tmp_path / "source", family, shape, labels=names)
    again, info = getattr(transformers, CLASSES[task]).from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    missing = {name for name in info["missing_keys"] if "pooler" not in name}  # no file of a bare encoder needs one
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
    if shape.head.labels:
        assert again.config.id2label == dict(enumerate(names))
    tokens, mask = rows(model.config.pad_token_id or 0)
    np.testing.assert_allclose(theirs(again.eval(), task, tokens, mask), theirs(model, task, tokens, mask), atol=1e-5)
    assert families.read_config(tmp_path / "out") == families.from_hf(families.to_hf(family, shape)) == (family, shape)


TABLES = {  # of a masked head -> of the embeddings
    "bert": ("cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    "roberta": ("lm_head.decoder", "roberta.embeddings.word_embeddings"),
    "distilbert": ("vocab_projector", "distilbert.embeddings.word_embeddings"),
    "modernbert": ("decoder", "model.embeddings.tok_embeddings"),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_table_of_a_masked_head_is_that_of_the_embeddings(name, tmp_path):
    """Files may repeat it. transformers 5 computes with another one that they have, and 4 with the embeddings."""
    _, family, shape, params = make(name, "masked", tmp_path)
    head, table = TABLES[name]
    stored = load_file(tmp_path / "model.safetensors")
    again = stored | {f"{head}.weight": stored[f"{table}.weight"].copy()}
    save_file(again, tmp_path / "model.safetensors")
    found = weights.read_params(tmp_path, family, shape)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True))
    save_file(again | {f"{head}.weight": again[f"{head}.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(FtjaxError, match=f"{head}.weight differs from {table}.weight, but tie_word_embeddings"):
        weights.read_params(tmp_path, family, shape)
    if name == "bert":
        other = {"cls.predictions.decoder.bias": stored["cls.predictions.bias"] + 1}
        save_file(stored | other, tmp_path / "model.safetensors")
        with pytest.raises(FtjaxError, match="decoder.bias differs from cls.predictions.bias"):
            weights.read_params(tmp_path, family, shape)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(FtjaxError, match="tie_word_embeddings is false: a masked head with a table of its own"):
        families.read_config(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{"targets": ("wte", "c_attn"), "rank": 2}, {"targets": ("c_attn",), "rank": 2, "modules_to_save": ("wte",)}],
    ids=["lora", "saved"],
)
def test_a_changed_table_under_a_head_over_labels_is_a_whole_model(fields, tmp_path):
    """Although config.json ties the head over the vocabulary, which the model does not have, to this table."""
    import transformers

    model, family, shape, params = make("gpt2", "sequence", tmp_path / "source")
    spec = tiny.spec(family, shape, **fields)
    trained, frozen = METHODS["lora"].init(jax.random.key(0), params, spec)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32), trained)
    tokens, mask = rows(0)
    places = jnp.asarray(mask.sum(1, keepdims=True) - 1)
    net, inputs = Transformer(shape), (jnp.asarray(tokens), jnp.asarray(np.cumsum(mask, 1) - 1), jnp.asarray(mask))
    variables = METHODS["lora"].variables(trained, frozen, spec)
    want = net.apply(variables, net.apply(variables, *inputs, places, method="read"), method="logits")[:, 0]
    weights.write_model(
        tmp_path / "out", METHODS["lora"].merge(trained, frozen, spec), tmp_path / "source", family, shape
    )
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert again.config.tie_word_embeddings
    assert np.abs(theirs(model, "sequence", tokens, mask) - want).max() > 0.1
    np.testing.assert_allclose(theirs(again, "sequence", tokens, mask), want, atol=1e-4)


def test_a_masked_head_with_another_table_than_the_embeddings_is_not_written(tmp_path):
    _, family, shape, params = make("bert", "masked", tmp_path / "source")
    spec = tiny.spec(family, shape, targets=("word_embeddings", "query"), rank=2)
    merged = METHODS["lora"].merge(*METHODS["lora"].init(jax.random.key(0), params, spec), spec)
    with pytest.raises(FtjaxError, match="the head of a bert model over masked tokens is its table of embeddings"):
        weights.write_model(tmp_path / "out", merged, tmp_path / "source", family, shape)
    assert not (tmp_path / "out").exists()
