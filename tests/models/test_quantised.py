"""Quantised kernels: the code book and block rule of bitsandbytes, what they cost, and that nothing else is kept.

out, in: a kernel's axes; L layers, T tokens.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ftjax import assets
from ftjax.hub import families, weights
from ftjax.models.config import ModelConfig
from ftjax.models.quantised import NF4, Quantised, dequantised, dynamic_map, kind_of, quantise
from ftjax.models.transformer import Transformer
from ftjax.objectives import causal
from ftjax.tree import flatten, map_paths
from ftjax.tuning import METHODS

KINDS = {"int8": ("int8", False), "nf4": ("nf4", False), "nf4 twice": ("nf4", True)}


def kernel(*shape, seed=0):
    """Normal values of a real kernel's size, with outliers, and a row of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.02, shape).astype(np.float32)
    x[..., 1, :] = 0
    x[..., 2, 3] = 1.5
    return x


# -- the rule, written out and as bitsandbytes 0.50.2 computes it


def by_hand(x, block, code):
    """Blocks of one row's neighbours, each scaled by its largest magnitude, each value the nearest of the code book."""
    out = np.zeros_like(x, dtype=np.float64)
    for row, values in enumerate(x.astype(np.float64)):
        for start in range(0, len(values), block):
            part = values[start : start + block]
            largest = np.abs(part).max()
            if largest:
                nearest = np.abs(part[:, None] / largest - code).argmin(1)
                out[row, start : start + block] = code[nearest] * largest
    return out


@pytest.mark.parametrize("width", [64, 172, 21])
def test_values_are_the_nearest_of_their_block(width):
    x = kernel(12, width)
    there_and_back = lambda kind: tiny.jit(lambda x: quantise(x, kind).astype(jnp.float32))(x)  # noqa: E731
    nf4 = there_and_back("nf4")
    np.testing.assert_allclose(nf4, by_hand(x, 64, NF4), atol=1e-6)
    int8 = there_and_back("int8")
    np.testing.assert_allclose(int8, by_hand(x, 128, np.arange(-127, 128) / 127), atol=1e-6)


def test_code_book_is_the_published_one():
    """By its definition: QLoRA section 3 and create_normal_map of bitsandbytes."""
    from scipy.stats import norm

    offset = 0.9677083  # the mean of 1 - 1/30 and 1 - 1/32, in bitsandbytes' own precision
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(NF4, values / values.max(), atol=1e-6)


def test_bitsandbytes_quantises_to_the_same():
    torch, bnb = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes.functional")
    np.testing.assert_array_equal(NF4, bnb.get_4bit_type("nf4", "cpu").numpy())
    np.testing.assert_allclose(dynamic_map(), bnb.create_dynamic_map().numpy(), atol=1e-7)
    x = kernel(96, 256)
    codes, state = bnb.quantize_4bit(torch.from_numpy(x), blocksize=64, quant_type="nf4")
    ours = jax.jit(lambda x: quantise(x, "nf4"))(x)
    np.testing.assert_array_equal(ours.codes.ravel(), codes.numpy().ravel())
    np.testing.assert_array_equal(ours.scale.ravel(), state.absmax.numpy())
    np.testing.assert_array_equal(ours.astype(jnp.float32), bnb.dequantize_4bit(codes, state).numpy())
    _, state = bnb.quantize_4bit(torch.from_numpy(x), blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).numpy()
    ours = jax.jit(lambda x: quantise(x, "nf4", double=True).scale)(x)
    # Its kernel looks codes up by another way, and takes the neighbour of one in a hundred.
    apart = np.asarray(ours.codes, int).ravel() - state.absmax.numpy()
    assert np.abs(apart).max() <= 1 and (apart == 0).mean() > 0.97
    np.testing.assert_allclose(ours.decode().ravel(), theirs, atol=0.02 * np.abs(theirs).max())
    rows = torch.from_numpy(x[:, :128]).half()  # its int8 has one scale a row: here, one block
    codes, largest, _ = bnb.int8_vectorwise_quant(rows)
    ours = jax.jit(lambda x: quantise(x, "int8"))(rows.numpy())
    np.testing.assert_allclose(ours.scale[:, 0] * 127, largest.numpy(), rtol=1e-3)
    # bitsandbytes rounds products of half precision: a value between two codes may go either way.
    assert np.abs(np.asarray(ours.codes, int) - codes.numpy()).max() <= 1
    assert (np.asarray(ours.codes) == codes.numpy()).mean() > 0.999


# -- what it costs


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.5156), ("nf4", 0.2813), ("nf4 twice", 0.2579)])
def test_bytes_of_a_kernel(kind, share):
    q = jax.eval_shape(lambda x: quantise(x, *KINDS[kind]), jax.ShapeDtypeStruct((4096, 11008), jnp.bfloat16))
    assert stored_bytes(q) / (2 * q.size) == pytest.approx(share, abs=1e-4)
    assert q.shape == (4096, 11008) and q.dtype == jnp.bfloat16


ROOT = Path(__file__).parents[2]


def stored_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def quantised(params, kind, tables=False):
    def one(path, x):
        kept_as = kind_of(path, KINDS[kind][0], tables)
        return x if kept_as == "none" else quantise(x, kept_as, KINDS[kind][1])

    return map_paths(one, params)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.55), ("nf4 twice", 0.30)])
def test_bytes_of_a_whole_model(kind, share):
    """Llama-2-7B, its table and head in bfloat16 included."""
    shape = ModelConfig(
        vocab_size=32000, width=4096, layers=32, heads=32, kv_heads=32, head_dim=128, hidden=11008, max_positions=4096,
        tied=False,
    )  # fmt: skip
    base = weights.param_shapes(shape, jnp.bfloat16)
    found = stored_bytes(jax.eval_shape(lambda base: quantised(base, kind), base)) / stored_bytes(base)
    assert 0.9 * share < found <= share


def test_the_table_of_bytes_is_true(tmp_path):
    """docs/results.md: of each model the kernels' bytes and the whole base's, against bfloat16's."""
    import transformers

    transformers.GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    folders = {"starter": assets.resolve("builtin:stories260K"), "GPT-2": tmp_path}
    folders |= {f"Llama 3.1 {size}": ROOT / "configs" / f"llama-3.1-{size.lower()}" for size in ("8B", "70B")}
    text = (ROOT / "docs" / "results.md").read_text()
    for name, folder in folders.items():
        family, shape = families.read_config(Path(folder))
        base = weights.param_shapes(shape, jnp.bfloat16)
        row = [float(cell) for cell in re.search(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.M)[1].split("|")]
        found = []
        for kind in ("int8", "nf4 twice"):
            small, tables = (
                jax.eval_shape(functools.partial(quantised, kind=kind, tables=t), base) for t in (False, True)
            )
            kernels = [
                {path: x for path, x in flatten(tree).items() if kind_of(path, kind) != "none"}
                for tree in (small, base)
            ]
            found += [stored_bytes(a) / stored_bytes(b) for a, b in (kernels, (small, base), (tables, base))]
        np.testing.assert_allclose(row, found, atol=0.005, err_msg=name)
        assert found[0] <= 0.55 and found[3] <= 0.30  # of what is quantised, for every shape
        if name.startswith("Llama"):
            assert found[2] <= 0.55 and found[5] <= 0.30


# -- in the model


@pytest.mark.parametrize(("name", "kind"), [("llama-biases", "nf4 twice"), ("gpt2", "int8")])
def test_the_model_computes_with_what_the_kernels_stand_for(name, kind):
    """Logits, gradients and merged weights, through scan and remat, are those of the dequantised base."""
    pair = tiny.tuned(tiny.pair(name), rank=4)
    method = METHODS["lora"]
    frozen = tiny.jit(lambda params: quantised(params, kind))(pair.params)
    trained, frozen = tiny.jit(lambda base: method.init(jax.random.key(0), base, pair.spec))(frozen)
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    batch = tiny.batch([[doc] for doc in tiny.documents((12, 9))], [[0], [3]], 12)

    def loss(trained, frozen, remat):
        model = Transformer(pair.model.config, remat=remat)
        return causal.sums(model, method.variables(trained, frozen, pair.spec), batch)[0]

    differentiated = tiny.jit(jax.value_and_grad(loss), static_argnums=2, compiler_options=tiny.MEASURED)
    step = functools.partial(differentiated, trained)
    whole, whole_gradient = step(dequantised(frozen), "none")
    plain, _ = step(pair.params, "none")
    assert abs(plain - whole) > 1e-4  # something was rounded
    for remat in ("none", "full"):
        ours, gradient = step(frozen, remat)
        np.testing.assert_allclose(ours, whole, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, whole_gradient)
    merged = dequantised(method.merge(trained, frozen, pair.spec))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(merged))
    got = tiny.jit(lambda params: causal.sums(pair.model, {"params": params}, batch)[0])(merged)
    np.testing.assert_allclose(got, whole, rtol=1e-5)


def test_no_dequantised_kernel_lives_between_forward_and_backward():
    """Temporary memory of a step, as XLA plans it: what it grows by with each layer is far less than the layer's
    kernels would take, which is what it does grow by where the model is given them dequantised.

    Wide and short: kernels outweigh activations.
    """
    batch = tiny.batch([[doc] for doc in tiny.documents((4,))], [[0]], 4)
    method = METHODS["lora"]

    def temporary(layers, kind, given):
        shape = ModelConfig(
            vocab_size=50, width=128, layers=layers, heads=4, kv_heads=4, head_dim=32, hidden=256, max_positions=16
        )
        spec = tiny.spec(families.FAMILIES["llama"], shape, method="lora", rank=2)
        base = jax.eval_shape(lambda base: quantised(base, kind), weights.param_shapes(shape))
        trained, frozen = jax.eval_shape(lambda base: method.init(jax.random.key(0), base, spec), base)
        loss = lambda t, f: causal.sums(Transformer(shape), method.variables(t, given(f), spec), batch)[0]  # noqa: E731
        compiled = jax.jit(jax.value_and_grad(loss)).lower(trained, frozen).compile(tiny.MEASURED)
        return compiled.memory_analysis().temp_size_in_bytes

    kernels = 4 * (4 * 128 * 128 + 3 * 128 * 256)  # bytes of one layer's, in float32
    growth = lambda kind, given: (temporary(12, kind, given) - temporary(4, kind, given)) / 8  # noqa: E731
    assert growth("int8", lambda frozen: frozen) < 0.1 * kernels
    assert growth("nf4 twice", lambda frozen: frozen) < 0.1 * kernels
    assert growth("nf4 twice", dequantised) > 0.9 * kernels


def test_a_quantised_kernel_looks_like_an_array():
    x = jnp.asarray(kernel(3, 8, 70))
    q = tiny.jit(lambda x: quantise(x, "nf4", double=True, dtype=jnp.bfloat16))(x)
    assert (q.shape, q.ndim, q.size, q.dtype) == ((3, 8, 70), 3, 3 * 8 * 70, jnp.bfloat16)
    assert isinstance(q, Quantised) and flatten({"a": {"kernel": q}}) == {"a/kernel": q}
    assert dequantised({"kernel": q})["kernel"].dtype == jnp.bfloat16
    alone = tiny.jit(lambda x: quantise(x, "nf4", double=True, dtype=jnp.bfloat16))(x[2])
    jax.tree.map(np.testing.assert_array_equal, q[2], alone)  # layers do not touch each other
    with pytest.raises(TypeError, match="cannot be indexed within"):
        alone[0]


def test_a_kernel_is_quantised_to_the_same_bits_on_every_mesh():
    kernels = np.random.default_rng(0).normal(size=(20, 96, 256)).astype("float32")
    small = jax.jit(functools.partial(quantise, kind="nf4", double=True))
    alone = [small(kernel) for kernel in kernels]
    with jax.set_mesh(jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        place = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec("fsdp", "tensor"))
        shared = [small(jax.device_put(kernel, place)) for kernel in kernels]
    jax.tree.map(np.testing.assert_array_equal, shared, alone)
