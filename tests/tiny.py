"""Tiny random models, made and saved by transformers and read by ftjax.hub, and batches of random documents.

B rows, T tokens, M trained tokens a row at most, V vocabulary.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tiny_models
import torch

from ftjax import config as configs
from ftjax.hub import families, weights
from ftjax.models.transformer import Transformer
from ftjax.tuning import METHODS, Spec

torch.set_num_threads(1)  # models this small only wait for further threads

# Most of these tests' time is compilation: leave LLVM's own optimisation away.
HASTE = {"xla_backend_optimization_level": 0}
# Where memory, arithmetic or the last digits are compared, fusions are those of a user's program (tests/haste.py).
MEASURED = HASTE | {"xla_cpu_use_fusion_emitters": True}
jit = functools.partial(jax.jit, compiler_options=HASTE)

VARIANTS = tiny_models.VARIANTS | {
    "llama-one-kv-head": ("llama", tiny_models.SIZES | {"num_key_value_heads": 1}),
    # Eight frequencies: some are left alone, some on the ramp, some divided.
    "llama3-wide": (
        "llama",
        tiny_models.SIZES
        | {"head_dim": 16}
        | tiny_models.rotary(1000.0, **tiny_models.LLAMA3, original_max_position_embeddings=64),
    ),
}


class Pair(NamedTuple):
    """One model twice: as transformers computes it, and as we read it from the files that transformers wrote."""

    torch: Any
    family: families.Family
    model: Transformer
    params: dict
    spec: Spec


@functools.cache
def pair(name: str) -> Pair:
    """The variant `name`; its torch model is shared between tests: copy it before training it."""
    return read(tiny_models.make(*VARIANTS[name]))


def read(torch_model) -> Pair:
    """Any transformers model as a Pair, through a directory on disk."""
    with tempfile.TemporaryDirectory() as folder:
        torch_model.save_pretrained(folder)
        family, shape = families.read_config(Path(folder))
        params = weights.read_params(Path(folder), family, shape)
    return Pair(torch_model, family, Transformer(shape), params, spec(family, shape))


def spec(family, shape, **tuning) -> Spec:
    """The Spec of a model with the default tuning, changed by `tuning`."""
    config = configs.default().tuning
    config.update(tuning)
    return Spec(shape, families.linear_names(family, shape), config, family)


def tuned(pair: Pair, **tuning) -> Pair:
    """`pair` with other fields of config.tuning."""
    return pair._replace(spec=spec(pair.family, pair.model.config, **tuning))


def start(pair: Pair, key: int = 0):
    """(method, trained, frozen) of `pair.spec.tuning.method` before training."""
    method = METHODS[pair.spec.tuning.method]
    init = jit(lambda key, base: method.init(key, base, pair.spec))
    return method, *init(jax.random.key(key), pair.params)


def documents(lengths, vocab: int = 50, seed: int = 0) -> list[np.ndarray]:
    """Random token ids, one array a length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, n) for n in lengths]


def batch(rows, prompts, T: int) -> dict[str, np.ndarray]:
    """A batch as objectives take it, of rows of documents [[ids, ...], ...]; an empty row is all padding.

    prompts: as `rows`, how many tokens at the start of each document are not trained (the first never is).
    """
    B = len(rows)
    out = {name: np.zeros((B, T), np.int32) for name in ("tokens", "positions", "segment_ids")}
    trained = []  # (row, place that predicts, label)
    for b, (row, starts) in enumerate(zip(rows, prompts, strict=True)):
        at = 0
        for segment, (ids, prompt) in enumerate(zip(row, starts, strict=True)):
            place = slice(at, at + len(ids))
            out["tokens"][b, place], out["positions"][b, place] = ids, np.arange(len(ids))
            out["segment_ids"][b, place] = segment + 1
            trained += [(b, at + t - 1, ids[t]) for t in range(max(prompt, 1), len(ids))]
            at += len(ids)
    M = max(sum(r == b for r, _, _ in trained) for b in range(B))
    out |= {"loss_index": np.zeros((B, M), np.int32), "labels": np.zeros((B, M), np.int32)}
    out["weights"] = np.zeros((B, M), np.float32)
    for b in range(B):
        for m, (_, t, label) in enumerate(entry for entry in trained if entry[0] == b):
            out["loss_index"][b, m], out["labels"][b, m], out["weights"][b, m] = t, label, 1
    return out


def torch_logits(torch_model, ids, **inputs) -> np.ndarray:
    """Float32 logits (B, T, V) of transformers; inputs: `attention_mask`, `position_ids`."""
    with torch.no_grad():
        tensors = {name: torch.tensor(np.asarray(x)) for name, x in inputs.items()}
        return torch_model(torch.tensor(np.asarray(ids)), **tensors).logits.float().numpy()


def torch_loss(torch_model, docs, prompts, label_smoothing: float = 0.0):
    """Sum of the cross entropy over the trained tokens of documents, padded into one batch, and their count."""
    ids = torch.zeros(len(docs), max(map(len, docs)), dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for b, (doc, prompt) in enumerate(zip(docs, prompts, strict=True)):
        prompt = max(prompt, 1)
        ids[b, : len(doc)], mask[b, : len(doc)] = torch.as_tensor(doc), 1
        labels[b, prompt : len(doc)] = torch.as_tensor(doc[prompt:])
    logits = torch_model(ids, attention_mask=mask).logits[:, :-1]
    labels = labels[:, 1:]  # cross_entropy ignores -100
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=label_smoothing
    )
    return total, int((labels != -100).sum())


def torch_gradients(pair: Pair, torch_model) -> dict[str, np.ndarray]:
    """The gradients that a torch model holds after `backward`, by our paths and laid out as our parameters are."""
    named = dict(torch_model.named_parameters())
    out = {}
    for path, (names, transposed, _) in families.tensor_names(pair.family, pair.model.config).items():
        layers = [named[name].grad.numpy() for name in names]
        layers = [x.T if transposed else x for x in layers]
        out[path] = np.stack(layers) if path.startswith("layers/") else layers[0]
    return out
