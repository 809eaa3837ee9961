"""Matrix products in the forms that XLA's CPU computes fastest. On other platforms they are plain products.

The fences keep that compiler from turning the products back into slow forms.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

FEW = 32  # most rows of a product whose time is that of reading its kernel


def contract(a, b, dims, batch=((), ())):
    """jax.lax.dot_general over axes `dims` of a and b, summed in float32."""
    return jax.lax.dot_general(a, b, (dims, batch), preferred_element_type=jnp.float32)


def outer(a, b):
    """a (..., M)ᵀ b (..., N), summed over the leading axes without reshaping: (M, N) float32.

    XLA's CPU transposes and copies the left operand, together with what it is computed from, so the narrower operand is
    put on the left.
    """
    lead = tuple(range(a.ndim - 1))
    if a.shape[-1] <= b.shape[-1]:
        return contract(a, b, (lead, lead))
    return fenced(contract(b, a, (lead, lead))).T


@functools.partial(jax.jit, inline=True)  # traced once for layers alike
def by_rows(x, kernel):
    """x (..., in) kernel (out, in)ᵀ: (..., out) float32.

    For few rows XLA's CPU reads a float32 kernel 1.5 times as fast if the kernel is the left operand.
    """
    plain = lambda x, kernel: contract(x, kernel, ((x.ndim - 1,), (1,)))  # noqa: E731
    if x.size > FEW * x.shape[-1] or x.dtype != jnp.float32:
        return plain(x, kernel)

    def kernel_first(x, kernel):
        rows = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
        y = jax.lax.optimization_barrier(contract(kernel, rows, ((1,), (0,))))
        return y.T.reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, kernel, cpu=kernel_first, default=plain)


@functools.partial(jax.jit, inline=True)
def fenced(x):
    """x, behind a barrier: a CPU compiler must compute it before it continues."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
