"""Policy gradients: losses and gradients against TRL, the distribution that answers are drawn from, denominators."""

import collections
import copy
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from ftjax import config as configs
from ftjax.data.store import Examples
from ftjax.data.tokenise import Example
from ftjax.decoding import generate
from ftjax.hub.peft import write_adapter
from ftjax.objectives import causal, policy
from ftjax.tasks import policy as task
from ftjax.training import step
from ftjax.training.sharding import make_mesh, place_batch
from ftjax.tuning import METHODS

GROUP, ROWS, LONGEST = 4, 8, 6
PROMPTS = [p.tolist() for p in tiny.documents([3, 5], seed=4)]


def config(**overrides):
    c = configs.default()
    c.task.update(kind="policy", beta=0.0)
    c.rollout.group, c.train.batch_size, c.generate.max_new_tokens, c.model.head_chunk = GROUP, ROWS, LONGEST, 16
    for key, value in overrides.items():
        group, _, name = key.partition("__")
        c[group][name] = value
    return c


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(Pair, the LoRA that draws, another one, frozen, the other one in PEFT)."""
    import peft

    pair = tiny.pair("llama2")
    method, trained, frozen = tiny.start(pair)

    def moved(tree, key, size):
        keys = iter(jax.random.split(jax.random.key(key), 100))
        return jax.tree.map(lambda x: x + size * jax.random.normal(next(keys), x.shape), tree)

    first = moved(trained, 1, 0.1)
    second = moved(first, 2, 0.02)
    folder = tmp_path_factory.mktemp("adapter")
    settings, tensors = method.to_peft(second, frozen, pair.spec)
    write_adapter(folder / "adapter", tensors, settings, None, "base")
    base = copy.deepcopy(pair.torch).double().eval()
    return (
        pair,
        first,
        second,
        frozen,
        peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).double(),
    )


def rolled(models, c, rows=ROWS, dtype="float32"):
    """(answers of the first LoRA, their rewards, the batches of the updates)."""
    pair, first, _, frozen, _ = models
    lm = types.SimpleNamespace(
        model=pair.model.clone(dtype=jnp.dtype(dtype)), tokenizer=range(pair.model.config.vocab_size),
        end_tokens=(7, 9), kind="causal",
    )  # fmt: skip
    c.train.batch_size = rows
    prompts = [PROMPTS[i % 2] for i in range(rows // GROUP) for _ in range(GROUP)]
    variables = METHODS["lora"].variables(first, frozen, pair.spec)
    drawn = task.sample(lm, variables, prompts, (3,), c)
    rewards = np.random.default_rng(0).normal(size=rows)
    examples = Examples.of([Example(np.array(p, np.int32), np.zeros(len(p), bool)) for p in PROMPTS])
    data = types.SimpleNamespace(max_length=24, train=types.SimpleNamespace(examples=examples))
    return drawn, rewards, task.updates(lm, variables, data, c, prompts, drawn, {"reward": rewards})


def ours(models, trained, batch, c):
    """(mean loss, figures) of a LoRA on a batch."""
    pair, _, _, frozen, _ = models
    variables = METHODS["lora"].variables(trained, frozen, pair.spec)
    total, weight, told = policy.sums(pair.model, variables, batch, **task.always(c))
    return total / weight, {name: x / weight for name, x in told.items()}


def theirs(tuned, drawn, rewards, batch, c):
    """The loss of TRL's trainer on the same answers, advantages by its formulas, and the log-probabilities of `batch`
    before the update and by the reference."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    kind = RLOOTrainer if c.task.policy == "rloo" else GRPOTrainer
    lengths = [len(one.ids) for one in drawn]

    def padded(values, left=False):
        width = max(map(len, values))
        out = np.zeros((len(values), width))
        for i, x in enumerate(values):
            out[i, width - len(x) if left else 0 : width if left else len(x)] = x
        return torch.tensor(out)

    def by_answer(name):
        flat = batch[name][batch["weights"] > 0].astype(np.float64)
        return padded(np.split(flat, np.cumsum(lengths)[:-1]))

    prompts = [PROMPTS[i // GROUP % 2] for i in range(len(drawn))]
    mask, given = padded([np.ones(n) for n in lengths]), padded([np.ones(len(p)) for p in prompts], left=True)
    inputs = {
        "prompt_ids": padded(prompts, left=True).long(), "prompt_mask": given,
        "completion_ids": padded([one.ids for one in drawn]).long(), "completion_mask": mask,
        "num_items_in_batch": mask.sum(), "old_per_token_logps": by_answer("old"), "old_logps": by_answer("old").sum(1),
    }  # fmt: skip
    R = torch.tensor(rewards)
    if c.task.beta:
        inputs["ref_per_token_logps"] = by_answer("reference")
        if kind is RLOOTrainer:
            R = R - c.task.beta * (by_answer("sampled") - by_answer("reference")).sum(1)
    grouped = R.view(-1, GROUP)
    mean = grouped.mean(1, keepdim=True)
    if kind is RLOOTrainer:
        inputs["advantages"] = (grouped - (grouped.sum(1, keepdim=True) - grouped) / (GROUP - 1)).ravel()
    else:
        spread = 1 if c.task.policy == "dr_grpo" else grouped.std(1, keepdim=True) + 1e-4
        inputs["advantages"] = ((grouped - mean) / spread).ravel()

    class Trainer(kind):
        aux_loss_enabled, use_vllm, top_entropy_quantile, off_policy_mask_threshold = False, False, 1.0, None
        _entropy_bonus_enabled, current_gradient_accumulation_steps, beta = False, 1, c.task.beta
        epsilon_low, epsilon_high, max_completion_length = c.task.clip, c.task.clip_high or c.task.clip, LONGEST
        importance_sampling_level = "sequence" if c.task.policy == "gspo" else "token"
        loss_type = "grpo" if c.task.policy == "gspo" else c.task.policy

        def __init__(self):
            self.model, self.accelerator = (
                types.SimpleNamespace(training=True),
                types.SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **how: x),
            )
            self.args = types.SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
            self._metrics = {"train": collections.defaultdict(list)}

        def _get_per_token_logps_and_entropies(self, model, ids, attended, keep, **how):
            places = (attended.cumsum(1) - 1).clamp(min=0).long()
            logits = model(ids, attention_mask=attended.long(), position_ids=places).logits[:, -keep - 1 : -1]
            found = torch.log_softmax(logits / c.rollout.temperature, -1).gather(-1, ids[:, -keep:, None])[..., 0]
            return found, torch.zeros_like(found), None

    return Trainer()._compute_loss(tuned, inputs)


CASES = [
    ("grpo", {"task__beta": 0.3}), ("grpo", {"task__clip": 0.05, "task__clip_high": 0.1}), ("dr_grpo", {}),
    ("dapo", {"task__clip_high": 0.28, "rollout__temperature": 0.7}), ("gspo", {"task__clip": 0.01}),
    ("rloo", {}), ("rloo", {"task__beta": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize("loss, more", CASES)
def test_losses_and_gradients_are_those_of_trl(models, loss, more):
    """In the second update of a rollout, where ratios differ from 1."""
    pair, _, second, frozen, tuned = models
    c = config(task__policy=loss, task__updates=2, **more)
    drawn, rewards, (_, batch) = rolled(models, c)
    assert len({len(one.ids) for one in drawn}) > 1
    tuned.zero_grad()
    expected = theirs(tuned, drawn, rewards, batch, c)
    expected.backward()
    known = {n.replace(".default", ""): p.grad.numpy() for n, p in tuned.named_parameters() if p.grad is not None}
    value = tiny.jit(jax.value_and_grad(lambda t, b: ours(models, t, b, c), has_aux=True))
    (found, figures), gradient = value(second, batch)
    np.testing.assert_allclose(found, float(expected.detach()), rtol=1e-4, atol=1e-6)
    if "clip" in str(more):
        assert 0 < figures["clipped"] < 1
    tensors = METHODS["lora"].to_peft(gradient, frozen, pair.spec)[1]
    assert tensors.keys() == known.keys()
    for tensor, x in tensors.items():
        np.testing.assert_allclose(x, known[tensor], rtol=1e-3, atol=1e-5, err_msg=tensor)
    c.data.packing = True
    packed = rolled(models, c)[2][1]
    assert len(packed["tokens"]) < ROWS
    np.testing.assert_allclose(value(second, packed)[0][0], found, rtol=1e-5, atol=1e-7)


def test_reinforce_normalises_returns_over_all_tokens():
    distance = [np.array([0.1, 0.2]), np.array([-0.3]), np.zeros(3), np.array([0.5])]
    found = policy.advantages(np.array([1.0, 0.0, 2.0, 1.0]), "reinforce_pp", 2, 0.5, distance)
    returns = np.array([1 - 0.15, 1 - 0.1, 0.15, 2, 2, 2, 0.75])
    expected = (returns - returns.mean()) / (returns.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-12)
    np.testing.assert_allclose(policy.shares(np.array([2, 1, 3, 1]), "reinforce_pp", 9) * 7, 4)


SAMPLING = [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.7), (0.8, 12, 0.9)]


@pytest.mark.parametrize("temperature, top_k, top_p", SAMPLING)
def test_log_probabilities_are_those_of_the_distribution_that_was_drawn_from(models, temperature, top_k, top_p):
    pair, _, second, frozen, tuned = models
    variables = METHODS["lora"].variables(second, frozen, pair.spec)
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    drawn = generate(pair.model, variables, PROMPTS * 4, max_new_tokens=LONGEST, end_tokens=(7,), scored=True, **how)
    plain = generate(pair.model, variables, PROMPTS * 4, max_new_tokens=LONGEST, end_tokens=(7,), **how)
    assert [one.ids[: len(one.ids) - one.ended] for one in drawn] == plain
    for prompt, one in zip(PROMPTS * 4, drawn, strict=True):
        with torch.no_grad():
            logits = tuned(torch.tensor([prompt + one.ids])).logits[0, len(prompt) - 1 : -1] / temperature
        for at, token, found in zip(logits.double().numpy(), one.ids, one.log_probs, strict=True):
            order = np.argsort(-at)[: top_k or None]
            p = np.exp(at[order] - at[order].max())
            p /= p.sum()
            kept = order[: int(np.searchsorted(np.cumsum(p), top_p)) + 1] if top_p < 1 else order
            assert token in kept
            of = at - at[kept].max()
            np.testing.assert_allclose(found, of[token] - np.log(np.exp(of[kept]).sum()), atol=2e-5)


@pytest.mark.parametrize(
    "sampling, packing, updates, dtype",
    [
        (SAMPLING[1], False, 1, "float32"),
        (SAMPLING[2], True, 2, "float32"),
        (SAMPLING[3], True, 1, "float32"),
        (SAMPLING[4], False, 2, "float32"),
        (SAMPLING[4], True, 1, "bfloat16"),
    ],
)
def test_the_ratio_is_one_before_the_first_update(models, sampling, packing, updates, dtype):
    temperature, top_k, top_p = sampling
    c = config(
        rollout__temperature=temperature, rollout__top_k=top_k, rollout__top_p=top_p, data__packing=packing,
        task__updates=updates, task__beta=0.1,
    )  # fmt: skip
    batches = rolled(models, c, dtype=dtype)[2]
    f = tiny.jit(lambda t, b: ours(models, t, b, c)[1])
    for n, batch in enumerate(batches):  # without an update, the later batches give the ratio 1 too
        told = f(models[1], batch)
        assert abs(told["ratio"] - 1) < (1e-6 if dtype == "float32" else 1e-3), n
        assert told["clipped"] == 0
        assert told["gap"] < (3e-6 if dtype == "float32" else 0.1)


def test_denominators_do_not_depend_on_microbatches_and_devices(models):
    """Every loss of uneven answers, against sums over answers in float64, from one forward pass a program."""
    pair, _, second, frozen, _ = models
    variables, batches, options = functools.partial(METHODS["lora"].variables, spec=pair.spec), {}, {}
    for loss in policy.LOSSES:
        c = config(task__policy=loss, task__updates=2, task__beta=0.2)
        drawn, _, (_, batches[loss]) = rolled(models, c, rows=32)
        options[loss] = task.always(c) | {"rngs": None}
    lengths = np.array([len(one.ids) for one in drawn], float)
    shared = {name: x for name, x in batches["grpo"].items() if name not in ("shares", "advantages")}
    own = {f"{name} {loss}": b[name] for loss, b in batches.items() for name in ("shares", "advantages")}

    def sums(variables, batch, rngs=None):
        found = causal.log_probs(pair.model, variables, batch, head_chunk=16)
        totals = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy.causal, "log_probs", lambda *given, **how: found)
            for loss in policy.LOSSES:
                mine = batch | {name: batch[f"{name} {loss}"] for name in ("shares", "advantages")}
                totals[loss], weight, told = policy.sums(pair.model, variables, mine, **options[loss])
        return sum(totals.values()), weight, totals | {"length": told["length"]}

    new = tiny.jit(lambda t: causal.log_probs(pair.model, variables(t, frozen), shared, head_chunk=16))(second)
    new, there = np.asarray(new, np.float64), shared["weights"] > 0
    of_answers = lambda x: np.split(np.asarray(x, np.float64)[there], np.cumsum(lengths.astype(int))[:-1])  # noqa: E731
    divisors = {"dr_grpo": np.full(32, 32.0 * LONGEST), "dapo": np.full(32, lengths.sum())}
    divisors["reinforce_pp"] = divisors["dapo"]
    expected = {}
    for loss in policy.LOSSES:
        each = (of_answers(x) for x in (new, shared["old"], shared["reference"], own[f"advantages {loss}"]))
        expected[loss] = 0.0
        for log, old, base, A, divisor in zip(*each, divisors.get(loss, 32 * lengths), strict=True):
            rho = {"gspo": np.exp(np.mean(log - old)), "rloo": np.exp(np.sum(log - old))}.get(loss, np.exp(log - old))
            one = -np.minimum(rho * A, np.clip(rho, 0.8, 1.2) * A)
            kl = 0.0 if loss in policy.KL_IN_REWARD else 0.2 * (np.exp(base - log) - (base - log) - 1)
            expected[loss] += np.sum(one + kl) / divisor
    known = None
    for accumulate, devices in ((1, 1), (2, 2), (4, 8), (1, 8)):
        mesh = make_mesh({"data": devices}, jax.devices()[:devices])
        placed = place_batch(shared | own, mesh, 32, slice(0, 32))
        with jax.set_mesh(mesh):
            f = tiny.jit(lambda t, b, k=accumulate: step.gradients(sums, variables, t, frozen, b, jax.random.key(0), k))
            gradient, weight, told = jax.device_get(f(second, placed))
        assert (weight, told["length"]) == (32, lengths.sum())
        for loss in policy.LOSSES:
            np.testing.assert_allclose(told[loss] / weight, expected[loss], rtol=1e-4, atol=2e-6, err_msg=loss)
        known = known or gradient
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), gradient, known)


def test_the_config_knows_every_loss():
    assert set(configs.FIELDS["task.policy"].choices) == set(policy.LOSSES)
