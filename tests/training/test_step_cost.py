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
from ftjax.models import attention
from ftjax.models.config import ModelConfig
from ftjax.models.transformer import Transformer
from ftjax.objectives import causal
from ftjax.training.flops import flops_per_token
from ftjax.training.optimizer import optimizer
from ftjax.training.step import compile_step, init_state
from ftjax.tuning import METHODS

LLAMA = ModelConfig(
    vocab_size=4096, width=512, layers=8, heads=8, kv_heads=8, head_dim=64, hidden=1376, max_positions=512, tied=False
)


ALL = 1 << 30  # tokens of a head's chunk: no loop, whose body XLA would count once


def lowered(
    shape: ModelConfig, method_name: str, B: int, T: int, tuning: dict | None = None, *, M: int = 0,
    head_chunk: int = 0, **options,
):  # fmt: skip
    """The training step of a llama, not yet compiled, and the shapes of its base, and of what is trained and frozen.

    M: trained tokens of each row, 0: all T."""
    tuning = {"method": method_name, "rank": 8} | (tuning or {})
    method, spec = METHODS[method_name], tiny.spec(families.FAMILIES["llama"], shape, **tuning)
    model, base = Transformer(shape, **options), weights.param_shapes(shape)
    trained, frozen = jax.eval_shape(functools.partial(method.init, spec=spec), jax.random.key(0), base)
    optim = optimizer(configs.default().optim, lambda step: 1e-3)
    state = jax.eval_shape(functools.partial(init_state, optim), trained)
    step = compile_step(
        None, sums=lambda variables, batch, rngs: causal.sums(
            model, variables, batch, rngs=rngs, head_chunk=head_chunk
        ),
        variables=functools.partial(method.variables, spec=spec), optimizer=optim, seed=0,
    )  # fmt: skip
    ids, read = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, M or T), jnp.int32)
    batch = dict.fromkeys(("tokens", "positions", "segment_ids"), ids) | dict.fromkeys(("loss_index", "labels"), read)
    batch["weights"] = jax.ShapeDtypeStruct(read.shape, jnp.float32)
    return step.lower(state, frozen, batch), base, trained, frozen


@functools.cache
def flops(method_name, vocab, **tuning):
    """FLOPs of a compiled step of 4 rows of 256 tokens, all of them trained, and the same by formula."""
    shape = dataclasses.replace(LLAMA, vocab_size=vocab)
    B, T = 4, 256
    program, *trees = lowered(shape, method_name, B, T, tuning, head_chunk=ALL, unroll=0)
    counted = program.compile(tiny.MEASURED).cost_analysis()["flops"]
    # The formula counts what causal attention needs; products with a mask compute of the other half what lies within
    # the piece of a query.
    masked = flops_per_token(shape, *trees, 2 * T) - flops_per_token(shape, *trees, T)
    masked /= min(T // attention.PIECE, attention.PIECES)
    return counted, B * T * (flops_per_token(shape, *trees, T) + masked)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_twice_the_vocabulary_takes_little_more_memory(method):
    """What has the shape of embedding and head aside, which are their gradients and a chunk's share of the head's: the
    head's chunks do not grow."""

    def temporaries(vocab):
        shape = dataclasses.replace(LLAMA, vocab_size=vocab, layers=2)
        program, *_ = lowered(shape, method, 4, 512)
        own = 3 * 4 * vocab * shape.width * (method == "full")
        return program.compile(tiny.MEASURED).memory_analysis().temp_size_in_bytes - own

    small, large = temporaries(32_000), temporaries(64_000)
    print(f"{method}: {small / 1e6:.1f} MB, {large / 1e6:.1f} MB of temporaries")
    assert large < 1.1 * small


def test_prompts_cost_the_head_nothing():
    """Arithmetic falls with the share of tokens that are trained, by what the head takes for each."""
    B, T, D, V = 4, 256, LLAMA.width, 32_000
    shape = dataclasses.replace(LLAMA, vocab_size=V, layers=2)
    programs = {M: lowered(shape, "lora", B, T, M=M, head_chunk=ALL, unroll=0)[0] for M in (T, T // 2, T // 4)}
    counted = {M: program.compile(tiny.MEASURED).cost_analysis()["flops"] for M, program in programs.items()}
    for M in (T // 2, T // 4):
        assert counted[T] - counted[M] == pytest.approx(2 * 2 * B * (T - M) * D * V, rel=0.05)


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


def test_steps_get_cheaper_the_fewer_layers_are_trained():
    """No backward pass below the lowest trained layer: what a layer less saves is what its gradients cost."""
    counted = {}
    for k in (1, 4, 8):
        counted[k], formula = flops("last_layers", 4096, layers=k)
        assert formula == pytest.approx(counted[k], rel=0.04)
    full, forward = flops("full", 4096)[0], flops("full", 4096)[0] / 3
    print({k: f"{c / full:.3f}" for k, c in counted.items()})
    # All layers and no head: full training less the head's own gradient. Then two thirds of each layer fall away.
    assert counted[1] < counted[4] < counted[8] < full
    per_layer = (counted[8] - counted[1]) / 7
    assert counted[4] == pytest.approx(counted[1] + 3 * per_layer, rel=0.01)
    assert counted[1] < 0.5 * full and counted[1] - per_layer > forward


@pytest.mark.parametrize("method", ["head", "norms"])
def test_other_parts_cost_what_the_formula_says(method):
    counted, formula = flops(method, 4096)
    print(f"{method}: {counted / formula:.4f}, {counted / flops('full', 4096)[0]:.3f} of a full step")
    assert formula == pytest.approx(counted, rel=0.04)


def test_layers_below_are_scanned_without_a_backward_pass():
    """In the scanned program too: one loop back, of the trained layers alone, and no gradient of a frozen kernel."""
    shape = dataclasses.replace(LLAMA, vocab_size=64, width=32, heads=4, kv_heads=4, head_dim=8, hidden=48)
    text = lowered(shape, "last_layers", 2, 16, {"layers": 3})[0].as_text()
    assert text.count("stablehlo.while") == 3  # below, the trained layers, and back through these
    assert "tensor<5x32x32xf32>" in text and "tensor<3x48x32xf32>" in text
    # Of frozen kernels nothing is made: their shape stands in arguments, and in the loop that reads them.
    made = [line for line in text.splitlines() if " = " in line and line.rstrip().endswith("tensor<5x48x32xf32>")]
    assert not [line for line in made if "while" not in line and "iterArg" not in line], made


@pytest.mark.parametrize(("method", "remat"), [("full", "none"), ("lora", "full")])
def test_program_does_not_grow_with_depth(method, remat):
    """Compile time goes with the number of instructions, before and after XLA's passes."""
    size = {}
    for layers in (4, 32):
        shape = ModelConfig(
            vocab_size=64, width=32, layers=layers, heads=4, kv_heads=2, head_dim=8, hidden=48, max_positions=64
        )
        program, *_ = lowered(shape, method, 2, 16, remat=remat)
        size[layers] = [text.count(" = ") for text in (program.as_text(), program.compile(tiny.MEASURED).as_text())]
    print(method, size)
    assert np.all(np.array(size[32]) <= 1.05 * np.array(size[4]))
