"""Products in the forms that a CPU likes, against numpy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.models import products


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("M, N", [(3, 8), (8, 3), (5, 5)])
def test_outer(M, N, dtype, tolerance):
    a, b = normal(2, 7, M), normal(2, 7, N, seed=1)
    found = jax.jit(products.outer)(jnp.asarray(a, dtype), jnp.asarray(b, dtype))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.einsum("btm,btn->mn", a, b), rtol=0, atol=tolerance * 14)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("rows", [(1,), (4, 1), (2, 3), (2, products.FEW)])
def test_by_rows(rows, dtype, tolerance):
    x, kernel = normal(*rows, 12), normal(9, 12, seed=1)
    found = jax.jit(products.by_rows)(jnp.asarray(x, dtype), jnp.asarray(kernel, dtype))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, x @ kernel.T, rtol=0, atol=tolerance * 12)


def test_the_wider_operand_of_a_kernels_gradient_is_not_copied_on_a_cpu():
    """Nor does the compiler turn the narrow form back into the one that copies it."""
    if jax.default_backend() != "cpu":
        pytest.skip("about XLA's CPU")
    a, b = jax.ShapeDtypeStruct((4, 32, 64), "float32"), jax.ShapeDtypeStruct((4, 32, 8), "float32")
    text = jax.jit(lambda a, b: products.outer(jax.nn.silu(a), b)).lower(a, b).compile().as_text()
    assert "f32[64,128]" not in text and "f32[8,128]" in text
