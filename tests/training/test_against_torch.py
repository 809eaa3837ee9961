"""Fifty steps of training, full and LoRA, beside transformers, peft and torch: the same losses.

Same weights, rows and order; rows of unequal length, trained on their completions alone; AdamW with weight decay,
cosine with warm-up, clipping. The referee computes in float64: in float32 it strays further from itself than we do.
B rows a step, T tokens.
"""

from __future__ import annotations

import copy
import functools
import math

import jax
import numpy as np
import pytest
import tiny
import torch

from ftjax import config as configs
from ftjax.hub import peft as peft_files
from ftjax.objectives import causal
from ftjax.training.optimizer import optimizer, schedule
from ftjax.training.step import compile_step, init_state

STEPS, WARMUP, B, DECAY = 50, 5, 4, 0.1
LR = {"full": 1e-3, "lora": 2e-3, "dora": 2e-3, "ia3": 2e-2}


def random_rows(vocab, T):
    """For each step the documents of its rows, and the length of each one's prompt."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, T + 1, (STEPS, B))
    prompts = rng.integers(1, lengths - 1)
    return [(tiny.documents(n, vocab, seed=s), p) for s, (n, p) in enumerate(zip(lengths, prompts, strict=True))]


def our_losses(pair, rows, T):
    """Losses, gradient norms and the trained tree, before and after, by compile_step."""
    method, trained, frozen = tiny.start(pair)
    before = jax.tree.map(np.asarray, trained)
    config = configs.default().optim
    config.update(weight_decay=DECAY, clip_norm=1.0, schedule="cosine", warmup=WARMUP)
    optim = optimizer(config, schedule(config, STEPS, LR[pair.spec.tuning.method]))
    compiled, step = compile_step(
        None, sums=lambda variables, batch, rngs: causal.sums(pair.model, variables, batch, rngs=rngs),
        variables=functools.partial(method.variables, spec=pair.spec), optimizer=optim, seed=0,
    ), None  # fmt: skip
    # The step gives its state away; the base of `pair` is other tests' too.
    state, reports = init_state(optim, jax.tree.map(lambda x: x.copy(), trained)), []
    for docs, prompts in rows:
        batch = tiny.batch([[doc] for doc in docs], [[p] for p in prompts], T)
        # Every batch as wide as the widest: one compilation.
        missing = [(0, 0), (0, T - batch["labels"].shape[1])]
        batch |= {name: np.pad(batch[name], missing) for name in ("loss_index", "labels", "weights")}
        step = step or compiled.lower(state, frozen, batch).compile(tiny.HASTE)
        state, report = step(state, frozen, batch)
        reports.append((float(report["loss"]), float(report["grad_norm"])))
    return np.array(reports), before, state.trained


def their_losses(model, rows, peak):
    """The same by torch: no dropout, decay on matrices alone."""
    model.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.squeeze().ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in trained if p.squeeze().ndim <= 1], "weight_decay": 0.0},
    ]
    adam, reports = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), eps=1e-8), []
    for step, (docs, prompts) in enumerate(rows):
        for group in adam.param_groups:
            past = (step - WARMUP) / (STEPS - WARMUP)
            group["lr"] = peak * ((step + 1) / WARMUP if step < WARMUP else 0.5 * (1 + math.cos(math.pi * past)))
        total, count = tiny.torch_loss(model, docs, prompts)
        adam.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        reports.append((float(total.detach()) / count, float(norm)))
    return np.array(reports)


def with_our_adapter(pair, trained, frozen, folder, to_peft):
    """A copy of the torch model with our adapter, through files that peft reads."""
    import peft

    adapter_config, tensors = to_peft(trained, frozen, pair.spec)
    peft_files.write_adapter(folder, tensors, adapter_config, None, "base")
    return peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), folder, is_trainable=True)


def compare(pair, method, rows, T, tmp_path):
    """Our (loss, gradient norm) of each step; asserts that they and the final logits are torch's."""
    tuning = {"rank": 4, "alpha": 8.0} if method == "lora" else {}
    pair = tiny.tuned(pair, method=method, **tuning)
    ours, before, after = our_losses(pair, rows, T)
    row, trained, frozen = tiny.start(pair)
    if method == "lora":
        model = with_our_adapter(pair, before, frozen, tmp_path, row.to_peft)
    else:
        model = copy.deepcopy(pair.torch)
    theirs = their_losses(model.double(), rows, LR[method])
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=2e-5, err_msg="loss")
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=1e-4, err_msg="gradient norm")
    assert (ours[:, 1] > 1.0).any()  # clipping was at work
    ids = rows[0][0][0][None]
    base = tiny.torch_logits(pair.torch, ids)
    end = tiny.torch_logits(model, ids)
    apply = tiny.jit(lambda trained: pair.model.apply(row.variables(trained, frozen, pair.spec), ids))
    assert np.abs(end - base).max() > 0.1
    np.testing.assert_allclose(apply(after), end, rtol=0, atol=1e-3 * np.abs(end - base).max())
    return ours


@pytest.mark.parametrize("name", ["llama-biases", "gpt2"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_fifty_steps_equal_torch(name, method, tmp_path):
    compare(tiny.pair(name), method, random_rows(50, 16), 16, tmp_path)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_fifty_steps_of_the_starter_model_equal_torch(method, shared, tmp_path):
    """A pretrained model on real text, twice over the same rows: the loss falls."""
    import transformers

    folder = shared / "models" / "stories260K"
    pair = tiny.read(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (shared / "data" / "commongen" / "commongen.dev.tgt.txt").read_text().splitlines()
    ids = [np.array(tokenizer(line)["input_ids"][:40]) for line in text[: 25 * B]]
    rows = [(ids[s * B : (s + 1) * B], [3, 1, 5, 4]) for s in range(25)] * 2
    ours = compare(pair, method, rows, 40, tmp_path)
    assert ours[25:, 0].mean() < 0.95 * ours[:25, 0].mean()
