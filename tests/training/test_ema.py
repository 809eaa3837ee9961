"""The average of what is trained: torch's own, kept in checkpoints, validated and exported."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from jax.sharding import NamedSharding, PartitionSpec

import ftjax
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.objectives import causal
from ftjax.training import sharding
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.optimizer import optimizer
from ftjax.training.report import read_metrics
from ftjax.training.step import State, compile_step, init_state
from ftjax.tree import flatten

DECAY = 0.8


def stepper(pair, method, ema):
    optim = optimizer(configs.default().optim, lambda step: 1e-2)
    step = compile_step(
        None, sums=lambda variables, batch, rngs: causal.sums(pair.model, variables, batch, rngs=rngs),
        variables=functools.partial(method.variables, spec=pair.spec), optimizer=optim, seed=0, ema=ema,
    )  # fmt: skip
    return optim, step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_average_is_that_of_torch(dtype):
    """Of every step's weights, the first one's as they are; in float32 whatever the weights are stored in."""
    pair = tiny.tuned(tiny.pair("llama2"), rank=4)
    method, trained, frozen = tiny.start(pair)
    optim, step = stepper(pair, method, DECAY)
    state = tiny.jit(functools.partial(init_state, optim, ema=DECAY))(jax.tree.map(lambda x: x.astype(dtype), trained))
    names = list(flatten(trained))

    def as_torch(tree):
        return torch.nn.ParameterList([torch.tensor(np.asarray(x, np.float32)) for x in jax.tree.leaves(tree)])

    averaged = torch.optim.swa_utils.AveragedModel(
        as_torch(trained), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)
    )
    compiled = None
    for seed in range(6):
        batch = tiny.batch([[doc] for doc in tiny.documents((12, 12), seed=seed)], [[0], [0]], 12)
        compiled = compiled or step.lower(state, frozen, batch).compile(tiny.HASTE)
        state, _ = compiled(state, frozen, batch)
        averaged.update_parameters(as_torch(state.trained))
        if seed == 0 and dtype == "float32":
            jax.tree.map(np.testing.assert_array_equal, state.ema, state.trained)
    assert state.averaged is state.ema
    for path, ours, theirs in zip(names, jax.tree.leaves(state.ema), averaged.module.parameters(), strict=True):
        assert ours.dtype == jnp.float32
        # Stored in bfloat16, torch sees weights that ours were rounded to.
        tolerance = {"float32": 1e-6, "bfloat16": 4e-3}[dtype] * float(theirs.detach().abs().max())
        np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=tolerance, err_msg=path)
    assert any(np.abs(e - t).max() > 1e-3 for e, t in zip(*map(jax.tree.leaves, (state.ema, state.trained))))


def test_without_a_decay_there_is_none():
    pair = tiny.tuned(tiny.pair("llama2"), rank=4)
    method, trained, _ = tiny.start(pair)
    optim, _ = stepper(pair, method, 0.0)
    state = init_state(optim, trained)
    assert state.ema is None and state.averaged is state.trained


def run(run_dir, steps, ema=DECAY, **fields):
    c = configs.default()
    c.update(run_dir=str(run_dir))
    c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", limit=80, buckets=1, cache="")
    c.tuning.update(rank=4)
    c.optim.update(lr=5e-3, schedule="constant", warmup=0)
    c.train.update(steps=8, batch_size=8, eval_every=4, save_every=2, log_every=2, ema=ema, keep=8)
    c.evaluate.rows = 8
    c.export.update(formats=("adapter", "merged"), checkpoint="last")
    c.log.update(tensorboard=False, compilation_cache=False)
    c.update(fields)
    return c


class Killed(Exception):
    pass


def test_a_run_keeps_validates_resumes_and_exports_it(tmp_path, monkeypatch):
    whole = ftjax.train(run(tmp_path / "whole", 8), say=lambda line: None)
    plain = ftjax.train(run(tmp_path / "plain", 8, ema=0.0), say=lambda line: None)
    losses = [[row["loss"] for row in read_metrics(r.run_dir) if "loss" in row] for r in (whole, plain)]
    assert losses[0] == losses[1] and whole.val_loss != plain.val_loss  # training itself is not touched

    # What ftjax.load gives of the run, the adapter and the merged model is one, and not what was trained.
    ids = [[1, 403, 407, 261, 378]]
    logits = {n: ftjax.load(tmp_path / "whole" / n, checkpoint="last").logits(ids) for n in ("", "adapter", "merged")}
    np.testing.assert_allclose(logits["adapter"], logits[""], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits["merged"], logits[""], rtol=0, atol=1e-4)
    assert np.abs(ftjax.load(tmp_path / "plain", checkpoint="last").logits(ids) - logits[""]).max() > 1e-2

    # Killed behind its fourth step, it goes on to the same bits.
    save = Checkpoints.save

    def die(self, state, record, val_loss):
        save(self, state, record, val_loss)
        if int(state.step) == 4:
            self.close()
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", die)
    with pytest.raises(Killed):
        ftjax.train(run(tmp_path / "killed", 8), say=lambda line: None)
    monkeypatch.undo()
    again = ftjax.train(run(tmp_path / "killed", 8), say=lambda line: None)
    assert again.resumed_from == 4 and again.val_loss == whole.val_loss
    np.testing.assert_array_equal(ftjax.load(tmp_path / "killed", checkpoint="last").logits(ids), logits[""])


def test_it_lies_on_the_mesh_as_what_is_trained():
    pair = tiny.tuned(tiny.pair("llama2"), rank=4)
    method, trained, _ = tiny.start(pair)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    places = sharding.parameter_shardings(trained, pair.model.config, mesh, method.axes)
    with jax.set_mesh(mesh):
        optim, _ = stepper(pair, method, DECAY)
        moments = sharding.optimizer_shardings(optim, trained, places, mesh)
        state_places = State(NamedSharding(mesh, PartitionSpec()), places, moments, places)
        state = jax.jit(functools.partial(init_state, optim, ema=DECAY), out_shardings=state_places)(trained)
    for ours, theirs in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.trained), strict=True):
        assert ours.sharding == theirs.sharding
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.ema))


def test_decay_must_be_a_share():
    c = configs.default()
    c.train.ema = 1.0
    with pytest.raises(FtjaxError, match=r"train\.ema: expected a number at least 0 and below 1"):
        configs.validate(c)
