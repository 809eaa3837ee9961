"""A new task in one file, which no other file knows: ordered labels, by cumulative logits (McCullagh 1980)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_labelled import config, make

import ftjax
from ftjax import tasks
from ftjax.data.labelled import encoder, label_id
from ftjax.evaluation import by_label
from ftjax.objectives import classify


def target(how, row, place):
    return np.int32(label_id(how, row.get(how.label), place) if how.label else 0)


def above(logits):
    """P(label > c) of C labels, for c in 0..C-2, from the first logit and fixed thresholds: (..., C - 1)."""
    return jax.nn.sigmoid(logits[..., :1] - 2.0 * jnp.arange(logits.shape[-1] - 1))


def chances(logits):
    """Probabilities of the labels (..., C)."""
    steps = above(logits)
    ends = [(0, 0)] * (steps.ndim - 1)
    return jnp.pad(steps, [*ends, (1, 0)], constant_values=1.0) - jnp.pad(steps, [*ends, (0, 1)])


def sums(model, variables, batch, *, rngs=None):
    found = chances(classify.logits(model, variables, batch, rngs=rngs))
    right = jnp.take_along_axis(found, batch["labels"][..., None], axis=-1)[..., 0]
    weights = batch["weights"].astype(jnp.float32)
    loss = jnp.sum(-jnp.log(right + 1e-6) * weights)
    correct = jnp.sum((found.argmax(-1) == batch["labels"]) * weights)
    return loss, jnp.sum(weights), {"loss": loss, "correct": correct}


def record(labels, truth, found, thresholds):
    return labels[truth], labels[found.argmax()]


ORDINAL = tasks.Task(
    head="sequence",
    sums=sums,
    encode=encoder(target),
    judge=by_label.judge(lambda logits: np.asarray(chances(jnp.asarray(logits)), np.float64), record),
    judged="single_label",
    right="accuracy",
)


@pytest.fixture
def ordinal():
    tasks.register("ordinal", ORDINAL)
    yield
    del tasks.TASKS["ordinal"]


def test_a_task_that_no_other_file_knows_is_trained_scored_and_predicted(ordinal, tmp_path):
    c = config(tmp_path, make(tmp_path / "bert", "bert"), task__kind="ordinal", seed=1)
    result = ftjax.train(c, say=lambda text: None)
    scores = result.results["test"]["metrics"]
    assert scores["accuracy"]["value"] > 0.9
    again = ftjax.evaluate(str(tmp_path / "run"), str(tmp_path / "test.jsonl"))
    assert again["metrics"]["accuracy"] == scores["accuracy"]
    found = ftjax.predict(str(tmp_path / "run"), str(tmp_path / "test.jsonl"))
    assert {row["prediction"] for row in found} == {"bad", "good"}
    assert all(abs(sum(row["probabilities"].values()) - 1) < 1e-5 for row in found)


def test_a_task_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ftjax.FtjaxError, match="task.kind: 'ordinal'; expected one of causal, preference"):
        tasks.find("ordinal")
    with pytest.raises(ftjax.FtjaxError, match='did you mean "classify"'):
        tasks.find("clasify")
