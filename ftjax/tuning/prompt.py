"""Prompt tuning (Lester et al. 2021): n trained embeddings before every row, the model itself frozen.

n virtual tokens, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import FtjaxError
from ftjax.hub.peft import refuse_other_tasks
from ftjax.models.config import ModelConfig, layers_with
from ftjax.models.quantised import read_rows
from ftjax.tuning.base import Method, register

TENSOR = "prompt_embeddings"  # what PEFT calls the one tensor of every soft prompt
PREFIX = "base_model."  # before the names of the base's parameters, such as a head's: PEFT wraps no module of it


def virtual_tokens(spec) -> int:
    """n. Raises FtjaxError where they leave no positions to tokens, and where layers have the delta rule."""
    check_attention(spec.model)
    n, positions = spec.tuning.virtual_tokens, spec.model.max_positions
    if n > positions - 2:
        raise FtjaxError(
            f"tuning.virtual_tokens={n} leaves too few of the model's {positions} positions, because rows need at "
            f"least 2; set at most {positions - 2}"
        )
    return n


def check_attention(shape) -> None:
    """Raise FtjaxError unless all layers have attention with keys and values of one shape, which virtual tokens are."""
    if len(layers_with(shape, "attn")) < shape.layers:
        raise FtjaxError(
            "tuning.method: prompt, ptuning and prefix put virtual tokens before every document as keys and values of "
            "attention, but this model has layers that share these, heads of two sizes, or layers with the delta rule, "
            "which have none; use lora"
        )


def first_tokens(key, spec):
    """Ids (n,) of the tokens that a prompt starts as: drawn from the vocabulary, or those of tuning.prompt_text,
    repeated or cut."""
    n, ids = virtual_tokens(spec), spec.tuning.prompt_ids
    if spec.tuning.prompt_init == "text":
        if not ids:
            raise FtjaxError(f"tuning.prompt_text: {spec.tuning.prompt_text!r} has no tokens")
        return jnp.resize(jnp.array(ids, jnp.int32), n)
    return jax.random.randint(key, (n,), 0, spec.model.vocab_size)


def init(key, base, spec):
    """Start from rows of the embedding table, or from noise with a standard deviation of 1, as PEFT does."""
    if spec.tuning.prompt_init == "random":
        prompt = jax.random.normal(key, (virtual_tokens(spec), spec.model.width))
    else:
        prompt = read_rows(base["embed"]["embedding"], first_tokens(key, spec))
    return {"prompt": prompt.astype(jnp.float32)}, base


def variables(trained, frozen, spec):
    """The base's parameters, and the prompt, which the decoder puts before every segment."""
    return {"params": frozen, "adapter": {"prompt": trained["prompt"]}}


def axes(path):
    """Replicated on every device, because a prompt is small."""
    return None, None


def shared_config(peft_type: str, n: int, model: ModelConfig) -> dict:
    """The fields of adapter_config.json that every soft prompt has."""
    return {
        "peft_type": peft_type,
        "num_virtual_tokens": n,
        "token_dim": model.width,
        "num_transformer_submodules": 1,
        "num_attention_heads": model.heads,
        "num_layers": model.layers,
    }


def to_peft(trained, frozen, spec):
    """PEFT's PROMPT_TUNING."""
    prompt = np.asarray(trained["prompt"], np.float32)
    config = shared_config("PROMPT_TUNING", len(prompt), spec.model) | {"prompt_tuning_init": "RANDOM"}
    return config, {TENSOR: prompt}


def read_tensor(tensors: dict[str, np.ndarray], width: int, shape) -> np.ndarray:
    """The single tensor (n, width) of a soft prompt, float32, for a model of a shape. Raises FtjaxError for other
    tensors or another width, and where layers have the delta rule."""
    check_attention(shape)
    if other := sorted(tensors.keys() - {TENSOR}):
        raise FtjaxError(f"adapter tensor {other[0]}: a soft prompt has the tensor {TENSOR} alone")
    if TENSOR not in tensors:
        raise FtjaxError(f"adapter tensor {TENSOR} is missing")
    x = np.asarray(tensors[TENSOR], np.float32)
    if x.ndim != 2 or x.shape[1] != width:
        raise FtjaxError(f"adapter tensor {TENSOR} has shape {x.shape}, expected (virtual tokens, {width})")
    return x


def from_peft(adapter_config, tensors, base, spec):
    """Read a PEFT PROMPT_TUNING, or a P_TUNING, whose files hold the prompt that its encoder computed."""
    refuse_other_tasks(adapter_config)
    prompt = read_tensor(tensors, spec.model.width, spec.model)
    return {"prompt": prompt}, {"virtual_tokens": len(prompt), "prompt_init": "random"}


def soft_prompt(**fields) -> Method:
    """A row of METHODS for a method whose parameters become virtual tokens before every row."""
    return Method(causal_only=True, peft_prefix=PREFIX, virtual_tokens=virtual_tokens, **fields)


TAKES = ("virtual_tokens", "prompt_init", "prompt_text")
register(
    "prompt",
    soft_prompt(
        init=init,
        variables=variables,
        to_peft=to_peft,
        from_peft=from_peft,
        peft_type="PROMPT_TUNING",
        axes=axes,
        takes=TAKES,
        # Between the 1e-3 of PEFT's comparison (Llama-3.2-3B, GSM8K: 34.3 % with vocabulary initialisation, 5.7 % with
        # its defaults), with which the starter model hardly learns CommonGen, and the 3e-2 of PEFT's examples.
        lr=1e-2,
    ),
)
