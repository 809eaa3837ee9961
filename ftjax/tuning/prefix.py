"""Prefix tuning (Li & Liang 2021): n trained keys and values before every row in each layer, the model itself frozen.

L layers, n virtual tokens, K KV heads, d head size, h hidden width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.hub.peft import refuse_other_tasks
from ftjax.models.config import ModelConfig
from ftjax.models.quantised import read_rows
from ftjax.models.transformer import Transformer
from ftjax.tuning import prompt
from ftjax.tuning.base import register
from ftjax.tuning.encoders import dense, dense_init, encoder_axes


def init(key, base, spec):
    """The keys and values of real tokens (Li & Liang 2021, 7.4), or noise as PEFT draws it, of deviation 1.

    With tuning.prefix_projection: embeddings (n, K d) and two dense layers that make the prefix of them.
    """
    model, n = spec.model, prompt.virtual_tokens(spec)
    width, keys = model.kv_heads * model.head_dim, jax.random.split(key, 3)
    if spec.tuning.prefix_projection:
        h = spec.tuning.encoder_hidden or width
        return {
            "embedding": jax.random.normal(keys[0], (n, width)),
            "dense_0": dense_init(keys[1], h, width),
            "dense_1": dense_init(keys[2], model.layers * 2 * width, h),
        }, base
    if spec.tuning.prompt_init == "random":
        prefix = from_flat(jax.random.normal(keys[0], (n, model.layers * 2 * width)), model)
    else:
        tokens = {"prompt": read_rows(base["embed"]["embedding"], prompt.first_tokens(keys[0], spec))}
        prefix = Transformer(model).apply({"params": base, "adapter": tokens}, method="prefix")
    return {"prefix": jax.tree.map(lambda x: x.astype(jnp.float32), prefix)}, base


def encode(trained, spec):
    """{"k": (L, K, d, n), "v": (L, K, n, d)}, as the decoder takes them."""
    if "prefix" in trained:
        return trained["prefix"]
    h = jnp.tanh(dense(trained["dense_0"], trained["embedding"].astype(jnp.float32)))
    return from_flat(dense(trained["dense_1"], h), spec.model)


def variables(trained, frozen, spec):
    """The base's parameters, and the prefix, which every token of every segment sees."""
    return {"params": frozen, "adapter": {"prefix": encode(trained, spec)}}


def axes(path):
    """Keys and values are split by heads, as attention's are."""
    return (None, "kv_heads", None, None) if path.startswith("prefix/") else encoder_axes(path)


def from_flat(flat, model: ModelConfig) -> dict:
    """PEFT's (n, L · 2 · K · d), keys before values in each layer, -> what `encode` gives."""
    x = flat.reshape(-1, model.layers, 2, model.kv_heads, model.head_dim)
    return {"k": x[:, :, 0].transpose(1, 2, 3, 0), "v": x[:, :, 1].transpose(1, 2, 0, 3)}


def to_flat(prefix: dict) -> np.ndarray:
    """The way back."""
    k, v = (np.asarray(prefix[name], np.float32) for name in ("k", "v"))
    x = np.stack([k.transpose(3, 0, 1, 2), v.transpose(2, 0, 1, 3)], axis=2)  # (n, L, 2, K, d)
    return x.reshape(len(x), -1)


def to_peft(trained, frozen, spec):
    """PEFT's PREFIX_TUNING, a projection done: its files hold keys and values alone."""
    model, flat = spec.model, to_flat(encode(trained, spec))
    width = model.kv_heads * model.head_dim
    config = prompt.shared_config("PREFIX_TUNING", len(flat), model)
    # Of keys and values, as PEFT itself sets them for grouped heads.
    config |= {"token_dim": width, "num_attention_heads": model.kv_heads, "encoder_hidden_size": width}
    return config | {"prefix_projection": False}, {prompt.TENSOR: flat}


def from_peft(adapter_config, tensors, base, spec):
    """A PEFT PREFIX_TUNING, with or without a projection: its files hold what that made."""
    model = spec.model
    refuse_other_tasks(adapter_config)
    flat = prompt.read_tensor(tensors, model.layers * 2 * model.kv_heads * model.head_dim, model)
    fields = {"virtual_tokens": len(flat), "prefix_projection": False, "prompt_init": "random"}
    return {"prefix": from_flat(flat, model)}, fields


register(
    "prefix",
    prompt.soft_prompt(
        init=init,
        variables=variables,
        to_peft=to_peft,
        from_peft=from_peft,
        peft_type="PREFIX_TUNING",
        axes=axes,
        takes=(*prompt.TAKES, "prefix_projection", "encoder_hidden"),
        lr=5e-3,  # PEFT's comparison, started from the keys and values of 50 real tokens: 40.0 %
    ),
)
