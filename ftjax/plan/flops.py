"""FLOPs that a program executes, counted in its jaxpr: every loop as often as it runs, recomputation included."""

from __future__ import annotations

import math

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# One FLOP an element of the result, as XLA counts; exp, log, tanh and the like are counted apart by XLA, and not here.
ELEMENTWISE = {"add", "add_any", "sub", "mul", "div", "neg", "max", "min", "select_n", "integer_pow", "square", "abs"}
ELEMENTWISE |= {"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "sign", "rem", "clamp", "floor"}
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "argmax", "cumsum"}  # one an element of the operand


def count(function, *arguments) -> float:
    """FLOPs of `function` on arguments of these shapes, of all devices together. Operations that no result needs are
    not counted."""
    closed = jax.make_jaxpr(function)(*arguments)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _jaxpr(jaxpr)


def _jaxpr(jaxpr) -> float:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        (contract, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contract)
    if name == "triangular_solve":
        return equation.outvars[0].aval.size * equation.invars[0].aval.shape[-1]
    if name == "cond":
        return max(_jaxpr(branch.jaxpr) for branch in equation.params["branches"])
    inner = [j.jaxpr if isinstance(j, core.ClosedJaxpr) else j for j in core.jaxprs_in_params(equation.params)]
    if inner:
        return _times(equation) * sum(map(_jaxpr, inner))
    if name in ELEMENTWISE:
        return equation.outvars[0].aval.size
    return equation.invars[0].aval.size if name in REDUCTIONS else 0


def _times(equation) -> int:
    """How often all devices together execute the body of an equation. The body of a shard_map is what one device
    executes."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "pallas_call":  # blocks that a kernel skips for its mask are counted
        return math.prod(equation.params["grid_mapping"].grid)
    if equation.primitive.name == "shard_map":
        return math.prod(equation.params["mesh"].shape[axis] for axis in equation.params["newly_manual_axes"])
    return 1
