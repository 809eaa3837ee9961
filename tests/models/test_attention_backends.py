"""Kernels of attention against XLA's: numbers, gradients, no leak between packed documents, and what each refuses.

On a CPU splash attention is interpreted, and the calls for GPUs are computed by XLA from the same arguments.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.hub import weights
from ftjax.models import attention_backends as backends
from ftjax.models import remat
from ftjax.models.attention import attend_in_row, key_layout
from ftjax.models.config import ModelConfig
from ftjax.models.transformer import Transformer
from ftjax.plan import flops
from ftjax.plan.devices import parse
from ftjax.plan.run import environment
from ftjax.training import sharding
from ftjax.tree import flatten

ROOT = Path(__file__).resolve().parents[2]
B, T, H, K, D = 2, 128, 4, 2, 16
needs_tokamax = pytest.mark.skipif(not importlib.util.find_spec("tokamax"), reason="needs the extra `tokamax`")
GPU = any(d.platform == "gpu" for d in jax.devices())
KERNELS = {
    "splash": functools.partial(backends.splash, interpret=True),
    "cudnn": functools.partial(backends.cudnn, implementation="xla"),
    "tokamax": functools.partial(backends.tokamax, implementation="xla"),
}
NAMES = ["splash", "cudnn", pytest.param("tokamax", marks=needs_tokamax)]
# Two documents and padding; one document.
PACKED = np.array([[1] * 50 + [2] * 61 + [0] * 17, [1] * T], np.int32)
ALONE = np.array([[1] * 90 + [0] * 38, [1] * T], np.int32)


def arrays(dtype="float32"):
    shapes = {"q": (B, T, H, D), "k": (B, T, K, D), "v": (B, T, K, D), "g": (B, T, H, D)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes.values(), strict=True)]


def value_and_gradients(attend, q, k, v, g, real):
    """What tokens that are no padding get, and the gradients of q, k and v by them."""

    @tiny.jit
    def run(q, k, v, g):
        out, back = jax.vjp(lambda *x: jnp.where(real[..., None, None], attend(*x), 0), q, k, v)
        return out, *back(g)

    return run(q, k, v, g)


def reference(segments, window, causal):
    return lambda q, k, v: attend_in_row(q, *key_layout(k, v), segments, window=window, causal=causal)


@pytest.mark.parametrize("window, causal", [(0, True), (20, True), (0, False), (20, False)])
@pytest.mark.parametrize("name", NAMES)
def test_packed_rows(name, window, causal):
    kernel = functools.partial(KERNELS[name], segments=jnp.array(PACKED), window=window, causal=causal, packed=True)
    ours = value_and_gradients(kernel, *arrays(), PACKED > 0)
    theirs = value_and_gradients(reference(jnp.array(PACKED), window, causal), *arrays(), PACKED > 0)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window, causal", [(0, True), (20, True), (0, False), (20, False)])
def test_cudnn_without_a_mask_for_rows_of_one_document(window, causal):
    kernel = functools.partial(KERNELS["cudnn"], segments=jnp.array(ALONE), window=window, causal=causal, packed=False)
    ours = value_and_gradients(kernel, *arrays(), ALONE > 0)
    theirs = value_and_gradients(reference(jnp.array(ALONE), window, causal), *arrays(), ALONE > 0)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_cudnn_told_of_single_documents_shows_packed_ones_nothing():
    q, k, v, _ = arrays()
    out = KERNELS["cudnn"](q, k, v, jnp.array(PACKED), window=0, causal=True, packed=False)
    assert np.isnan(out).all()


def leaks(kernel, dtype, causal):
    """How far the second document moves when the first one changes, and the first itself."""
    q, k, v, g = arrays(dtype)
    first = jnp.array(PACKED == 1)[..., None, None] & (jnp.arange(B) == 0)[:, None, None, None]
    run = jax.jit(functools.partial(kernel, segments=jnp.array(PACKED), window=0, causal=causal, packed=True))
    one = run(q, k, v).astype(jnp.float32)
    two = run(*(jnp.where(first, 3 * x + 1, x) for x in (q, k, v))).astype(jnp.float32)
    moved = np.abs(np.asarray(one - two))[0]
    return moved[PACKED[0] == 2].max(), moved[PACKED[0] == 1].max()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_no_document_sees_another(name, causal):
    others, own = leaks(KERNELS[name], "float32", causal)
    assert others == 0 and own > 0.1


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", ["cudnn", pytest.param("tokamax", marks=needs_tokamax)])
@pytest.mark.parametrize("window, causal", [(0, True), (20, True), (0, False)])
def test_on_a_gpu(name, window, causal):
    kernel = backends.BACKENDS[name].attend
    global D
    old, D = D, 64
    try:
        for segments, packed in ((PACKED, True), (ALONE, False)):
            run = functools.partial(kernel, segments=jnp.array(segments), window=window, causal=causal, packed=packed)
            half = [x.astype("bfloat16") for x in arrays()]  # drawn in bfloat16, the numbers are others
            ours = value_and_gradients(run, *half, segments > 0)
            theirs = value_and_gradients(
                reference(jnp.array(segments), window, causal), *(x.astype("float32") for x in half), segments > 0
            )
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=0.02 * np.abs(b).max())
        others, own = leaks(kernel, "bfloat16", causal)
        assert others == 0 and own > 0.1
    finally:
        D = old


# ---- in the model -----------------------------------------------------------------------------------------------
SHAPE = ModelConfig(
    vocab_size=64, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, hidden=32, max_positions=T, tied=True,
    windows=(30, 0, 30),
)  # fmt: skip


def model_gradient(mesh=None, **options):
    params = jax.tree.map(
        lambda x: 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), weights.param_shapes(SHAPE)
    )
    rows = 4
    ids = jax.random.randint(jax.random.key(1), (rows, T), 0, SHAPE.vocab_size)
    segments = jnp.array(np.concatenate([PACKED] * 2))
    model = Transformer(SHAPE, **options)

    def loss(params):
        x = model.apply({"params": params}, ids, None, segments, method="hidden")
        return jnp.mean(jnp.where(segments[..., None] > 0, x, 0) ** 2)

    return tiny.jit(jax.value_and_grad(loss))(params)


def test_splash_in_a_model_whose_layers_differ_in_their_window_and_on_a_mesh(monkeypatch):
    row = backends.BACKENDS["splash"]
    calls = []

    def counted(*args, window, **how):
        calls.append((args[0].shape, window))
        return KERNELS["splash"](*args, window=window, **how)

    monkeypatch.setitem(backends.BACKENDS, "splash", row._replace(attend=counted))
    value, gradient = model_gradient()
    kernels = backends.Kernels("splash", "tpu")
    with jax.set_mesh(sharding.make_mesh({"data": 1, "fsdp": 2, "sequence": 1, "tensor": 2}, jax.devices()[:4])):
        ours, found = model_gradient(kernels=kernels, remat="products")
    assert {window for _, window in calls} == {0, 30}
    assert {shape for shape, _ in calls} == {(2, T, 2, 8)}  # half of the rows, half of the heads
    assert float(ours) == pytest.approx(float(value), rel=1e-5)
    expected = flatten(gradient)
    for path, g in flatten(found).items():
        np.testing.assert_allclose(g, expected[path], rtol=0, atol=1e-5 * np.abs(expected[path]).max(), err_msg=path)


def test_presets_of_remat_keep_what_a_kernel_of_cudnn_gives(monkeypatch):
    """Traced only: there is no cuDNN to run it."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def forward_kernels(preset):
        model = Transformer(SHAPE, jnp.bfloat16, remat=preset, kernels=backends.Kernels("cudnn", "gpu", (9, 0)))
        loss = lambda p, ids: jnp.sum(model.apply({"params": p}, ids, method="hidden"))  # noqa: E731
        text = str(jax.make_jaxpr(jax.grad(loss))(weights.param_shapes(SHAPE), ids))
        return text.count(f"{remat.KERNELS[0]}[")

    # Two kernels, one a window: each runs once forward; where what they gave is not kept, once more.
    assert [forward_kernels(preset) for preset in ("none", "products", "attention", "full")] == [2, 2, 2, 4]


@pytest.mark.parametrize(
    "packed, causal, window, kernel, mask_type, sliding",
    [
        (True, True, 20, "fmhaScaleBiasSoftmax", "CAUSAL", 0),
        (False, True, 0, "fmhaSoftmax", "CAUSAL", 0),
        (False, True, 20, "fmhaSoftmax", "CAUSAL", 20),
        (False, False, 0, "fmhaSoftmax", "PADDING", 0),
        (False, False, 20, "fmhaScaleBiasSoftmax", "NO_MASK", 0),
    ],
)
def test_what_is_asked_of_cudnn(packed, causal, window, kernel, mask_type, sliding, monkeypatch):
    """Lowered for CUDA, which needs no GPU: a mask only where documents or windows need one."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)

    def loss(q, k, v, segments):
        out = backends.cudnn(q, k, v, segments, window=window, causal=causal, packed=packed)
        return jnp.sum(out.astype(jnp.float32))

    q, k, v, _ = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in arrays())
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn\$(\w+)", text)) == {kernel, f"{kernel}Backward"}
    assert set(re.findall(r"mask_type.{5,9}22(.*?)\\22", text)) == {mask_type}
    assert set(re.findall(r"sliding_window_length.22: *(\d+)", text)) == {str(sliding)}


def test_flops_of_a_kernel_are_those_of_its_products(monkeypatch):
    for arithmetic in ("ELEMENTWISE", "REDUCTIONS"):
        monkeypatch.setattr(flops, arithmetic, set())
    q, k, v, _ = arrays()
    segments = jnp.array(PACKED)
    ours = flops.count(lambda *x: backends.splash(*x, segments, window=0, causal=True), q, k, v)
    assert ours == pytest.approx(flops.count(reference(segments, 0, True), q, k, v), rel=0.1)


def test_memory_with_splash_attention_is_traced_before_anything_is_compiled():
    """Two lengths that have no kernel yet; what is kept does not grow with the square of the length."""

    def kept(length):
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        model = Transformer(SHAPE, jnp.bfloat16, "attention", kernels=backends.Kernels("splash", "tpu"))
        hidden = lambda p, ids: model.apply({"params": p}, ids, method="hidden")  # noqa: E731
        return sum(
            size for shape, size in remat.kept_bytes(hidden, weights.param_shapes(SHAPE), ids) if length in shape
        )

    assert kept(768) == pytest.approx(2 * kept(384), rel=0.05)


# ---- the table --------------------------------------------------------------------------------------------------
def case(name="splash", platform="tpu", capability="", packed=True, **changes):
    kernels = backends.choose(name, platform, capability, packed)
    made = backends.case_of(kernels, SHAPE, "bfloat16", 4, T, False, False, {"data": 2, "tensor": 2})
    return made._replace(**changes)


@pytest.mark.parametrize(
    "made, why",
    [
        (case(), ""),
        (case("cudnn", "gpu", "9.0"), ""),
        (case("xla", "gpu", prefix=True, dropout=True), ""),
        (case("splash", "cpu"), "it is for a tpu, and this is a cpu"),
        (case(prefix=True), "the tuning method puts keys"),
        (case(dropout=True), "train.dropout"),
        (case(sinks=True), "attention sinks"),
        (case("cudnn", "gpu", "9.0", sinks=True), "attention sinks"),
        (case(mesh={"sequence": 2}), "mesh.sequence"),
        (case(rows=3), "3 rows do not divide over 2"),
        (case(kv_heads=1), "1 KV heads do not divide over mesh.tensor=2"),
        (case(length=130), "130 tokens, which is no multiple of 128"),
        (case("cudnn", "gpu", "gfx90a"), "it is for GPUs of NVIDIA's"),
        (case("cudnn", "gpu", "9.0", dtype="float32"), "bfloat16, not in float32"),
        (case("cudnn", "gpu", "9.0", head_dim=12), "no multiple of 8"),
        (case("cudnn", "gpu", "8.0", head_dim=256), "at most 128 on this GPU"),
        (case("cudnn", "gpu", "9.0", head_dim=256), ""),
        (case("cudnn", "gpu", "9.0", length=33), "an odd number"),
        (case("tokamax", "gpu", "8.0"), "tokamax" if not importlib.util.find_spec("tokamax") else "Hopper"),
    ],
)
def test_what_rules_a_kernel_out(made, why):
    found = backends.why_not(made)
    assert why in found and bool(why) == bool(found)


def test_what_is_chosen_is_told():
    assert [backends.choose("auto", p).name for p in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "splash"]
    assert backends.settle("auto", [case("auto", "cpu")]) == ""
    assert backends.settle("auto", [case("auto")]) == "attention splash"
    said = backends.settle("auto", [case("auto", length=130)])
    assert said == "attention xla: splash cannot serve: rows of 130 tokens, which is no multiple of 128"
    assert backends.settle("auto", [case("auto"), case("auto", length=130)]).startswith("attention splash, and xla for")
    with pytest.raises(FtjaxError, match="model.attention: cudnn cannot serve this run: it is for a gpu.*auto or xla"):
        backends.settle("cudnn", [case("cudnn", "cpu")])


def test_choices_of_the_config_are_the_table():
    assert configs.FIELDS["model.attention"].choices == backends.CHOICES


AOT = """
import sys, jax, jax.numpy as jnp
sys.path.insert(0, "tests/models")
import test_attention_backends as t
from ftjax.models.attention_backends import Kernels
from ftjax.models.transformer import Transformer
from ftjax.hub import weights
from ftjax.plan.compiled import device_list
from ftjax.plan.devices import parse
from ftjax.training import sharding
from jax.sharding import NamedSharding, PartitionSpec

mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "sequence": 1, "tensor": 2}, device_list(parse("v6e:2x2")))
assert mesh.devices.flat[0].platform == "tpu"
model = Transformer(t.SHAPE, jnp.bfloat16, "products", kernels=Kernels("splash", "tpu"))
params = weights.param_shapes(t.SHAPE)
places = sharding.parameter_shardings(params, t.SHAPE, mesh)
at = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
ids = at(jax.ShapeDtypeStruct((4, t.T), jnp.int32), NamedSharding(mesh, PartitionSpec("fsdp")))
loss = lambda p, i, s: jnp.sum(model.apply({"params": p}, i, None, s, method="hidden").astype(jnp.float32))
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    done = jax.jit(jax.grad(loss)).trace(jax.tree.map(at, params, places), ids, ids).lower().compile()
text = done.as_text()
print({phase: text.count(f"splash_mha_{phase}_segmented") > 0 for phase in ("fwd", "dq", "dkv")})
"""


@pytest.mark.slow
def test_splash_compiles_for_a_tpu_in_a_scanned_model_on_a_mesh():
    pytest.importorskip("libtpu", reason="needs the extra `plan-tpu`")
    env = os.environ | environment(parse("v6e:2x2"))
    done = subprocess.run([sys.executable, "-c", AOT], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.stdout.strip() == "{'fwd': True, 'dq': True, 'dkv': True}", done.stderr[-3000:]
