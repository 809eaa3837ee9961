"""What a step costs, as XLA counts it: arithmetic of full and LoRA steps, and programs that do not grow with depth."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ftjax import config as configs
from ftjax.hub import families, weights
from ftjax.models.config import DecoderConfig
from ftjax.models.decoder import Decoder
from ftjax.objectives import causal
from ftjax.training.flops import flops_per_token
from ftjax.training.optimizer import optimizer
from ftjax.training.step import compile_step, init_state
from ftjax.tuning import METHODS

LLAMA = DecoderConfig(
    vocab_size=4096, width=512, layers=8, heads=8, kv_heads=8, head_dim=64, hidden=1376, max_positions=512, tied=False
)


def lowered(shape: DecoderConfig, method_name: str, B: int, T: int, *, rank: int = 8, **options):
    """The training step of a llama, not yet compiled, and the shapes of its base and of what it trains."""
    method, spec = METHODS[method_name], tiny.spec(families.FAMILIES["llama"], shape, method=method_name, rank=rank)
    model, base = Decoder(shape, **options), weights.param_shapes(shape)
    trained, frozen = jax.eval_shape(functools.partial(method.init, spec=spec), jax.random.key(0), base)
    optim = optimizer(configs.default().optim, lambda step: 1e-3)
    state = jax.eval_shape(functools.partial(init_state, optim), trained)
    step = compile_step(
        None, sums=lambda variables, batch, rngs: causal.sums(model, variables, batch, rngs=rngs),
        variables=functools.partial(method.variables, spec=spec), optimizer=optim, seed=0,
    )  # fmt: skip
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = dict.fromkeys(("tokens", "positions", "segment_ids", "loss_index", "labels"), ids)
    batch["weights"] = jax.ShapeDtypeStruct((B, T), jnp.float32)
    return step.lower(state, frozen, batch), base, trained


@functools.cache
def flops(method_name, vocab):
    """FLOPs of a compiled step of 4 rows of 256 tokens, all of them trained, and the same by formula."""
    shape = dataclasses.replace(LLAMA, vocab_size=vocab)
    B, T = 4, 256
    program, base, trained = lowered(shape, method_name, B, T, unroll=0)
    counted = program.compile(tiny.HASTE).cost_analysis()["flops"]
    formula = flops_per_token(shape, base, trained, method_name == "lora", T)
    # The formula counts what causal attention needs; a product with a mask computes the other half too.
    masked = 6 * shape.layers * T * shape.heads * shape.head_dim
    return counted, B * T * (formula + masked)


@pytest.mark.parametrize("vocab", [4096, 32000])
def test_lora_computes_no_gradient_of_a_frozen_kernel(vocab):
    lora, full = flops("lora", vocab)[0], flops("full", vocab)[0]
    print(f"V = {vocab}: {lora / 1e9:.1f} / {full / 1e9:.1f} GFLOP = {lora / full:.3f}")
    assert lora <= 0.72 * full


@pytest.mark.parametrize("method", ["full", "lora"])
def test_formula_is_what_the_compiler_counts(method):
    counted, formula = flops(method, 4096)
    print(f"{method}: {counted / formula:.4f}")
    assert formula == pytest.approx(counted, rel=0.04)


@pytest.mark.parametrize(("method", "remat"), [("full", "none"), ("lora", "full")])
def test_program_does_not_grow_with_depth(method, remat):
    """Compile time goes with the number of instructions, before and after XLA's passes."""
    size = {}
    for layers in (4, 32):
        shape = DecoderConfig(
            vocab_size=64, width=32, layers=layers, heads=4, kv_heads=2, head_dim=8, hidden=48, max_positions=64
        )
        program, _, _ = lowered(shape, method, 2, 16, remat=remat)
        size[layers] = [text.count(" = ") for text in (program.as_text(), program.compile(tiny.HASTE).as_text())]
    print(method, size)
    assert np.all(np.array(size[32]) <= 1.05 * np.array(size[4]))
