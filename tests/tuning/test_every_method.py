"""What holds for every row of METHODS: what is remembered of what is trained, and what the documentation says."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from ftjax import config as configs
from ftjax.objectives import causal
from ftjax.training.optimizer import multipliers, optimizer, schedule
from ftjax.training.step import compile_step, init_state
from ftjax.tree import flatten
from ftjax.tuning import METHODS

OWN = {name: row for name, row in METHODS.items() if name != "vera"}  # which a test registers
TUNING = {"rank": 4, "virtual_tokens": 3, "layers": 2, "pattern": (r".*attn\.c_proj\..*",)}
MOMENTS = {"adamw": 2, "lion": 1, "sgd": 1}


@functools.cache
def started(method):
    pair = tiny.tuned(tiny.pair("gpt2"), method=method, **TUNING)
    return pair, *tiny.start(pair)


def moments(state):
    """Shapes of what an optimizer remembers, its counts of steps aside."""
    return sorted(x.shape for x in jax.tree.leaves(state.optimizer) if x.ndim)


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("method", OWN)
def test_only_what_is_trained_has_optimizer_state(method, name):
    pair, row, trained, _ = started(method)
    config = configs.default().optim
    config.name = name
    by_leaf = multipliers(
        config, pair.model.config.layers, row.lr_scale, functools.partial(row.layer_ids, spec=pair.spec)
    )
    optim = optimizer(config, schedule(config, 10, 1e-3), by_leaf)
    state = jax.eval_shape(functools.partial(init_state, optim), trained)
    shapes = [x.shape for x in jax.tree.leaves(trained)]
    assert moments(state) == sorted(MOMENTS[name] * shapes)
    base = sum(x.size for x in jax.tree.leaves(pair.params))
    assert method == "full" or sum(math.prod(shape) for shape in shapes) < base


@pytest.mark.parametrize("method", OWN)
def test_a_step_moves_what_is_trained_and_nothing_else(method):
    pair, row, trained, frozen = started(method)
    config = configs.default().optim
    config.update(warmup=0, schedule="constant")
    optim = optimizer(config, schedule(config, 10, 1e-2))
    step = compile_step(
        None, sums=lambda variables, batch, rngs: causal.sums(pair.model, variables, batch, rngs=rngs),
        variables=functools.partial(row.variables, spec=pair.spec), optimizer=optim, seed=0,
    )  # fmt: skip
    before = jax.tree.map(np.asarray, (trained, frozen))
    batch = tiny.batch([[doc] for doc in tiny.documents((12, 9))], [[0], [3]], 12)
    state = init_state(optim, jax.tree.map(lambda x: x.copy(), trained))
    state, _ = step.lower(state, frozen, batch).compile(tiny.HASTE)(state, frozen, batch)
    jax.tree.map(np.testing.assert_array_equal, frozen, before[1])
    for path, x in flatten(state.trained).items():
        # A's gradient is zero while B is.
        assert np.any(np.asarray(x) != flatten(before[0])[path]) or path.endswith("/lora/a"), path


def test_the_table_of_methods_is_true():
    """A row for every method with its learning rate, whether PEFT has a form of it, and whether it merges."""
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|$", text, re.MULTILINE)
    assert {name for name, *_ in rows} == OWN.keys()
    for name, _, rate, form, merges in rows:
        row = OWN[name]
        assert float(re.match(r" ([\d.e-]+):", rate)[1]) == row.lr, name
        assert bool(form.strip()) == (row.to_peft is not None), name
        assert (merges.strip() == "no") == (row.merge is None), name
