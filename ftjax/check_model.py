"""`ftjax check-model`: a model directory as ftjax computes it, against transformers, layer by layer."""

from __future__ import annotations

import bisect
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import FtjaxError
from ftjax.hub import families, weights
from ftjax.models.config import with_layers
from ftjax.models.transformer import Transformer, keep_layers

TOKENS = 64  # of the row that is compared
BOUND = 1e-3  # of a difference, relative to the largest value, that float32 explains


def check(folder: Path) -> bool:
    """Print how far the logits of a decoder's directory are from those of transformers, and if they are not the same,
    the first block whose output differs.

    Returns:
        Whether they are the same.

    Raises:
        FtjaxError: If the model is no decoder, or if transformers cannot load it here.
    """
    family, shape = families.read_config(folder)
    if shape.head.task != "causal" or shape.layers < 2:
        raise FtjaxError(f"{folder}: check-model is for decoders of two layers or more with a head over the vocabulary")
    params = weights.read_params(folder, family, shape, dtype=lambda path: np.dtype(np.float32))
    weights.check_finite(folder, params, family, shape)
    try:
        from transformers import AutoModelForCausalLM

        how = {"attn_implementation": "eager", "dtype": "float32", "use_safetensors": True, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(folder, **how).eval().requires_grad_(False)
        ids = np.random.default_rng(0).integers(0, shape.vocab_size, (1, min(TOKENS, shape.max_positions)))
        theirs = model(next(model.parameters()).new_tensor(ids.tolist()).long(), output_hidden_states=True)
    except ImportError as error:
        raise FtjaxError(f"check-model needs transformers with torch: {error}") from None
    except Exception as error:  # of any kind, as these files may hold anything
        reason = " ".join(str(error).split())
        raise FtjaxError(f"{folder}: transformers cannot compute this model: {reason:.500}") from None

    def differs(ours, theirs) -> float:
        theirs = theirs.numpy()
        return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())

    def part(n: int) -> bool:
        """Whether the states after n blocks differ."""
        fewer = dataclasses.replace(with_layers(shape, range(n)), final_norm=False)
        lower = keep_layers(params, shape, range(n))
        lower.pop("final_norm", None)
        states = jax.jit(lambda p: Transformer(fewer).apply({"params": p}, jnp.asarray(ids), method="hidden"))(lower)
        error = differs(states, theirs.hidden_states[n])
        print(f"states after {n} of {shape.layers} blocks: {error:.1e}")
        return error > BOUND

    logits = jax.jit(lambda p: Transformer(shape).apply({"params": p}, jnp.asarray(ids)))(params)
    found = differs(logits, theirs.logits)
    print(f"logits of {ids.size} tokens: they differ from transformers' by {found:.1e} of their largest value")
    if found <= BOUND:
        return True
    block = bisect.bisect_left(range(1, shape.layers), True, key=part)  # the last one if all states are the same
    beside = " or the embeddings before it" * (block == 0)
    beside += " or the norm and head after it" * (block == shape.layers - 1)
    print(f"they part in block {block} (from 0){beside}")
    return False
