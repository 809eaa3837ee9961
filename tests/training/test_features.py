"""A head that alone is trained reads states that were computed once: the same run, in less time."""

from __future__ import annotations

import errno
import os

import jax
import numpy as np
import pytest
import tiny

import ftjax
from ftjax import config as configs
from ftjax.data.batches import Batches
from ftjax.data.store import Cache
from ftjax.data.tokenise import Example
from ftjax.errors import of_disk
from ftjax.objectives import causal
from ftjax.training import features, sharding
from ftjax.training.report import read_metrics


@pytest.mark.parametrize("packing", [False, True])
def test_states_are_those_that_the_trained_tokens_are_predicted_from(packing, tmp_path):
    """In every batch of every epoch, by whatever rows they were computed."""
    pair, rng = tiny.pair("gpt2-untied"), np.random.default_rng(0)
    docs = tiny.documents(rng.integers(4, 12, 13))
    examples = [Example(doc, np.arange(len(doc)) >= rng.integers(1, len(doc))) for doc in docs]
    batches = Batches(examples, 4, 24, packing=packing, buckets=1, seed=3)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        compute = lambda b: features.states(pair.model, {"params": pair.params}, b)  # noqa: E731
        kept = features.Features(batches, "states", compute, (pair.model.config.width,), np.float32, tmp_path)
    assert len(kept) == len(batches) and not list(tmp_path.iterdir())
    sums = tiny.jit(lambda batch: causal.sums(pair.model, {"params": pair.params}, batch))
    head = tiny.jit(lambda batch: causal.sums(pair.model, {"params": {"lm_head": pair.params["lm_head"]}}, batch))
    for step in range(2 * len(batches)):
        batch = kept.get(step)
        states = batch.pop("states")
        total, weight, _ = sums(batch)
        ours, counted, _ = head({"states": states} | {k: batch[k] for k in ("labels", "weights")})
        assert counted == weight > 0 and not states[batch["weights"] == 0].any()
        np.testing.assert_allclose(ours, total, rtol=1e-5)
        np.testing.assert_array_equal(kept.get(step, slice(1, 3))["states"], states[1:3])


@pytest.mark.parametrize("stored", [False, True])
def test_the_disk_is_claimed_before_anything_is_computed(stored, tmp_path, monkeypatch):
    """A page of a map for which the disk has no room ends the process; the claim is an error of the system."""
    examples = [Example(np.arange(1, 9), np.arange(8) > 0)] * 8
    batches, claimed, truth = Batches(examples, 8, 8, shuffle=False), [], os.posix_fallocate
    how = {"cache": Cache(tmp_path), "key": "k"} if stored else {"folder": tmp_path}
    monkeypatch.setattr(os, "posix_fallocate", lambda *call: claimed.append(call[1:]) or truth(*call))
    with pytest.raises(ZeroDivisionError):
        features.Features(batches, "reference", lambda batch: 1 / 0, (5,), np.float32, **how)
    assert claimed == [(0, 8 * 7 * 5 * 4)]

    def full(*call):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError) as error:
        features.Features(batches, "reference", lambda batch: 1 / 0, (5,), np.float32, **how)
    assert of_disk(error.value) == f"{tmp_path}: No space left on device"
    assert not list(tmp_path.iterdir())


def run(run_dir, cached):
    c = configs.default()
    c.update(run_dir=str(run_dir))
    c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", limit=60, buckets=2, cache="")
    c.tuning.method = "head"
    c.optim.lr = 3e-3
    c.train.update(epochs=3.0, batch_size=8, eval_every=6, log_every=1, cache_features=cached)
    c.evaluate.rows = 8
    c.export.formats = ("full",)
    c.log.update(tensorboard=False, compilation_cache=False)
    result = ftjax.train(c, say=lambda line: None)
    rows = [row for row in read_metrics(run_dir) if "loss" in row]
    return result, np.array([[row["loss"], row["grad_norm"]] for row in rows])


@pytest.mark.slow
def test_a_run_has_the_losses_of_one_without_them(tmp_path):
    (ours, losses), (theirs, want) = (run(tmp_path / name, name == "with") for name in ("with", "without"))
    np.testing.assert_allclose(losses, want, rtol=2e-5)
    assert ours.val_loss == pytest.approx(theirs.val_loss, rel=1e-5) and len(want) == ours.steps > 10
    assert want[-4:, 0].mean() < want[:4, 0].mean() - 0.05
    # The tied head was untied: transformers reads it so.
    ids = np.array([[1, 403, 407, 261, 378]])
    whole = tiny.torch_logits(tiny.tiny_models.load(tmp_path / "with" / "full"), ids)
    np.testing.assert_allclose(ftjax.load(tmp_path / "with").logits(ids), whole, rtol=0, atol=1e-4)
    assert np.abs(whole - ftjax.load("builtin:stories260K").logits(ids)).max() > 1e-2


@pytest.mark.parametrize(
    ("change", "used"),
    [
        ({}, True),
        ({"train.cache_features": False}, False),
        ({"train.dropout": 0.1}, False),  # states differ from step to step
        ({"train.neftune": 5.0}, False),
        ({"train.ema": 0.9}, True),
        ({"task.kind": "masked"}, False),  # other tokens are masked in each epoch
    ],
)
def test_states_are_kept_where_they_stay_the_same(change, used):
    c = configs.default()
    configs.override(c, [f"{key}={value}" for key, value in change.items()])
    assert features.usable(c, {"lm_head": {}}, steps=11, epoch=10) == used
    assert not features.usable(c, {"lm_head": {}}, steps=10, epoch=10)
    assert not features.usable(c, {"lm_head": {}, "final_norm": {}}, steps=11, epoch=10)
