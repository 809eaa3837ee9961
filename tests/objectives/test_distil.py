"""Distances to a teacher's distribution: losses and gradients against TRL and PyTorch in float64."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from ftjax.objectives import causal, distil
from ftjax.objectives.distil import Teacher
from ftjax.tree import flatten

CASES = [(beta, temperature) for beta in (0.0, 0.3, 0.5, 1.0) for temperature in (1.0, 0.7, 2.0)]
V = 40


def trl(student, teacher, beta, temperature):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an experimental part of TRL
        from trl.experimental.gkd import GKDTrainer
    return GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature, reduction="none")


def coarse(logits, temperature, ids):
    """Log-probabilities of the tokens `ids` and of all others together."""
    found = torch.log_softmax(logits / temperature, -1)
    rest = torch.logsumexp(found.scatter(-1, ids, -torch.inf), -1, keepdim=True)
    return torch.cat([found.gather(-1, ids), rest], -1)


@pytest.mark.parametrize("beta, temperature", CASES)
@pytest.mark.parametrize("top_k", [0, 5, V, 2 * V])
def test_the_divergence_is_that_of_trl(beta, temperature, top_k):
    """Of the whole vocabulary, or of the kept tokens and all others as one."""
    rng = np.random.default_rng(0)
    student, teacher = (3 * rng.normal(size=(2, 5, V)) for _ in range(2))
    how = Teacher(beta, temperature, top_k)
    kept = distil.known(jnp.array(teacher, jnp.float32), how)
    assert kept.shape[2:] == distil.per_token(how, V)
    f = lambda logits: distil.divergence(logits, kept, how).sum()  # noqa: E731
    ours, gradient = tiny.jit(jax.value_and_grad(f))(jnp.array(student, jnp.float32))
    mine, theirs = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
    if 0 < top_k < V:
        ids = theirs.topk(top_k).indices
        expected = trl(coarse(mine, temperature, ids), coarse(theirs, temperature, ids), beta, 1.0).sum()
        assert expected < trl(mine, theirs, beta, temperature).sum()
    else:
        expected = trl(mine, theirs, beta, temperature).sum()
    expected.backward()
    np.testing.assert_allclose(ours, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, mine.grad.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, chunk", [("llama2", 8), ("gpt2-untied", 0)])
def test_loss_and_gradients_of_a_student_are_those_of_pytorch(name, chunk):
    """Of all its parameters, with the loss of the labels beside it, and with answers that are not those of the rows."""
    pair = tiny.pair(name)
    docs, prompts = tiny.documents([9, 6, 12, 4]), [3, 1, 5, 2]
    batch = tiny.batch([[docs[0], docs[1]], [docs[2]], [docs[3]]], [prompts[:2], prompts[2:3], prompts[3:]], 16)
    other = jax.tree.map(lambda x: x * 1.3, pair.params)
    how = Teacher(0.3, 1.5, 0, 0.25)
    batch["given"] = np.array([[1.0], [0.0], [1.0]], np.float32) * np.ones_like(batch["weights"])
    keep = lambda params, batch: causal.of_logits(  # noqa: E731
        lambda logits: distil.known(logits, how), pair.model, {"params": params}, batch, head_chunk=chunk
    )
    batch["reference"] = np.asarray(tiny.jit(keep)(other, batch))

    def ours(params):
        total, weight, told = causal.sums(pair.model, {"params": params}, batch, head_chunk=chunk, teacher=how)
        return total / weight, told["divergence"] / weight

    (found, far), gradient = tiny.jit(jax.value_and_grad(ours, has_aux=True))(pair.params)
    student = copy.deepcopy(pair.torch).double()
    student.zero_grad()
    V = pair.model.config.vocab_size
    total, distance, count = 0.0, 0.0, 0
    rows = [(0, 0), (0, 1), (1, 2), (2, 3)]  # (row, document)
    for row, n in rows:
        ids, first = torch.tensor(docs[n])[None], max(prompts[n], 1)
        logits = student(ids).logits[0, first - 1 : -1]
        at = batch["segment_ids"][row, batch["loss_index"][row]] == (n + 1 if row == 0 else 1)
        there = batch["weights"][row] > 0
        known = torch.tensor(batch["reference"][row][at & there]).double()
        each = trl(logits, known * how.temperature, how.beta, how.temperature).sum(-1)
        label = torch.nn.functional.cross_entropy(logits[:, :V], ids[0, first:], reduction="none")
        share = 0.25 if row != 1 else 0.0
        total, distance = total + (share * label + (1 - share) * each).sum(), distance + each.sum()
        count += len(each)
    assert count == batch["weights"].sum()
    (total / count).backward()
    np.testing.assert_allclose(found, (total / count).item(), rtol=1e-5)
    np.testing.assert_allclose(far, (distance / count).item(), rtol=1e-5, atol=1e-6)  # of distributions that are near
    known = tiny.torch_gradients(pair, student)
    leaves = flatten(gradient)
    for path, x in leaves.items():
        np.testing.assert_allclose(
            x, known[path], rtol=1e-3, atol=1e-5 * np.abs(known[path]).max() + 1e-6, err_msg=path
        )
    assert leaves.keys() == known.keys()
