"""Methods on encoders with a head over labels beside peft and torch: files both ways, and 30 steps of training.

B rows a step, T tokens, C labels.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import tiny_encoders
import torch

from ftjax import config as configs
from ftjax.hub import peft as peft_files
from ftjax.models.transformer import Transformer
from ftjax.objectives import classify
from ftjax.training.optimizer import optimizer, schedule
from ftjax.training.step import compile_step, init_state
from ftjax.tree import flatten, unflatten
from ftjax.tuning import METHODS, adapters, of_peft

STEPS, B, T, C, LR = 30, 4, 12, 3, 5e-3

# name -> (encoder, fields of config.tuning, a regular expression of the base's tensors that are trained)
HEAD = r"classifier\..*|bert\.pooler\..*"
CASES = {
    "lora": ("bert", {"method": "lora"}, HEAD),
    "rslora of modernbert": ("modernbert", {"method": "lora", "rslora": True}, r"classifier\..*|head\..*"),
    "lora of distilbert": ("distilbert", {"method": "lora", "targets": ("q_lin", "lin2")}, r"(pre_)?classifier\..*"),
    "dora": ("bert", {"method": "dora"}, HEAD),
    "ia3": ("bert", {"method": "ia3"}, HEAD),
    "bitfit": ("bert", {"method": "bitfit"}, rf"{HEAD}|.*\.bias"),
    "norms": ("bert", {"method": "norms"}, rf"{HEAD}|.*LayerNorm\..*"),
    "last layer": ("bert", {"method": "last_layers", "layers": 1}, rf"{HEAD}|bert\.encoder\.layer\.2\..*"),
    "head": ("bert", {"method": "head"}, HEAD),
}
SHAPES = {"rank": 4, "alpha": 6.0}


@functools.cache
def encoder(name):
    """A tiny random encoder for C labels as a Pair."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model, family, shape, params = tiny_encoders.make(name, "sequence", folder)
    return tiny.Pair(model, family, Transformer(shape), params, tiny.spec(family, shape))


@functools.cache
def batches():
    """STEPS batches of padded rows, with labels that hang on their words."""
    rng, out = np.random.default_rng(0), []
    for step in range(STEPS):
        docs = tiny.documents(rng.integers(4, T + 1, B), seed=step)
        batch = {name: np.zeros((B, T), np.int32) for name in ("tokens", "positions", "segment_ids")}
        for b, doc in enumerate(docs):
            batch["tokens"][b, : len(doc)], batch["segment_ids"][b, : len(doc)] = doc, 1
            batch["positions"][b, : len(doc)] = np.arange(len(doc))
        batch |= {"loss_index": np.zeros((B, 1), np.int32), "weights": np.ones((B, 1), np.float32)}
        out.append(batch | {"labels": np.array([[doc.sum() % C] for doc in docs], np.int32)})
    return out


def start(case):
    name, tuning, trained = CASES[case]
    pair = tiny.tuned(encoder(name), **SHAPES, **tuning)
    return pair, trained, *tiny.start(pair)


def logits(pair, variables):
    """(B, C) of the first batch."""
    f = tiny.jit(lambda variables, batch: classify.logits(pair.model, variables, batch))
    return np.asarray(f(variables, batches()[0]))[:, 0]


def their_logits(model, batch):
    ids, mask = (torch.tensor(x).long() for x in (batch["tokens"], batch["segment_ids"]))
    return model(input_ids=ids, attention_mask=mask).logits


def in_peft(pair, method, trained, frozen, folder, trainable=False):
    adapter_config, tensors = method.to_peft(trained, frozen, pair.spec)
    peft_files.write_adapter(folder, tensors, adapter_config, None, "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), folder, is_trainable=trainable).eval()


@pytest.mark.parametrize("case", CASES)
def test_exported_adapters_have_our_logits(case, tmp_path):
    pair, _, method, trained, frozen = start(case)
    rng = np.random.default_rng(0)
    moved = {path: x + 0.2 * rng.standard_normal(x.shape, np.float32) for path, x in flatten(trained).items()}
    moved = unflatten(moved)
    ours = logits(pair, method.variables(moved, frozen, pair.spec))
    assert np.abs(ours - logits(pair, {"params": pair.params})).max() > 0.1
    model = in_peft(pair, method, moved, frozen, tmp_path / "adapter")
    with torch.no_grad():
        theirs = their_logits(model, batches()[0]).numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
    merged = tiny.jit(lambda trained, frozen: method.merge(trained, frozen, pair.spec))(moved, frozen)
    np.testing.assert_allclose(logits(pair, {"params": merged}), ours, rtol=0, atol=1e-4)


# name -> peft's config
MADE = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "intermediate.dense"]),
    "dora": peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["query", "attention.output.dense"]),
    "ia3": peft.IA3Config(target_modules=["key", "value", "intermediate.dense"], feedforward_modules=[]),
    "lora and pooler": peft.LoraConfig(target_modules=["value"], modules_to_save=["pooler.dense", "classifier"]),
    "lora of rank one": peft.LoraConfig(r=1, lora_alpha=1, target_modules=["query"]),
    "lora of the pooler": peft.LoraConfig(target_modules=["pooler.dense"], bias="lora_only"),
    "lora of all, modernbert": peft.LoraConfig(target_modules="all-linear"),
    "lora and more": peft.LoraConfig(target_modules=["dense"], bias="all", modules_to_save=["bert.embeddings"]),
    "ia3 of the pooler": peft.IA3Config(target_modules=["value", "pooler.dense"], feedforward_modules=[]),
}


@pytest.mark.parametrize("case", MADE)
def test_adapters_made_by_peft_have_its_logits(case, tmp_path):
    """With the pooler among what it trained, and with the base's own, as peft leaves it by default."""
    pair, config = encoder("modernbert" if "modernbert" in case else "bert"), copy.deepcopy(MADE[case])
    config.task_type = "SEQ_CLS"
    model = peft.get_peft_model(copy.deepcopy(pair.torch), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
        want = their_logits(model, batches()[0]).numpy()
    model.save_pretrained(tmp_path / "theirs")
    assert np.abs(want - logits(pair, {"params": pair.params})).max() > 0.1
    adapter_config, tensors = peft_files.read_adapter(tmp_path / "theirs")
    method = of_peft(adapter_config)
    assert method is METHODS[case.split(" ")[0]]
    trained, fields = method.from_peft(adapter_config, tensors, pair.params, pair.spec)
    spec = tiny.tuned(pair, **fields).spec
    _, frozen = method.init(jax.random.key(0), pair.params, spec)
    variables = method.variables(jax.tree.map(jnp.asarray, trained), frozen, spec)
    np.testing.assert_allclose(logits(pair, variables), want, rtol=0, atol=1e-4)
    again = in_peft(pair._replace(spec=spec), method, trained, frozen, tmp_path / "ours")
    with torch.no_grad():
        np.testing.assert_allclose(their_logits(again, batches()[0]).numpy(), want, rtol=0, atol=1e-4)


def test_a_prompt_carries_a_head_as_peft_does(tmp_path):
    """Both ways, on rows of one length: under a prompt transformers takes a row's last place, padding or not."""
    pair = encoder("llama-tied")
    batch = {name: x[:, : min(x.shape[1], 4)] for name, x in batches()[0].items()}
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    base = copy.deepcopy(pair.torch)
    base.config.pad_token_id = 0
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
        want = their_logits(model, batch).numpy()
    model.save_pretrained(tmp_path / "theirs")
    method, adapter_config, tensors = adapters.read(tmp_path / "theirs")
    trained, fields = method.from_peft(adapter_config, tensors, pair.params, pair.spec)
    pair = tiny.tuned(pair, **fields)._replace(torch=base)
    _, frozen = method.init(jax.random.key(0), pair.params, pair.spec)
    variables = method.variables(jax.tree.map(jnp.asarray, trained), frozen, pair.spec)
    got = classify.logits(pair.model, variables, batch | {"loss_index": np.full((B, 1), 3, np.int32)})
    np.testing.assert_allclose(np.asarray(got)[:, 0], want, rtol=0, atol=1e-4)
    again = in_peft(pair, method, trained, frozen, tmp_path / "ours")
    with torch.no_grad():
        np.testing.assert_allclose(their_logits(again, batch).numpy(), want, rtol=0, atol=1e-4)


# In float64 transformers' ModernBERT gives NaN for padded rows longer than its window.
@pytest.mark.parametrize("case", [case for case in CASES if "modernbert" not in case])
def test_thirty_steps_equal_torch(case, tmp_path):
    """Losses, and logits in the end: of peft where an adapter is trained, of torch where tensors of the model are."""
    pair, names, method, trained, frozen = start(case)
    optim = configs.default().optim
    optim.update(schedule="constant", warmup=0, clip_norm=0.0)
    optim = optimizer(optim, schedule(optim, STEPS, LR))
    step = compile_step(
        None, sums=lambda variables, batch, rngs: classify.one_class(pair.model, variables, batch, rngs=rngs),
        variables=functools.partial(method.variables, spec=pair.spec), optimizer=optim, seed=0,
    )  # fmt: skip
    state = init_state(optim, jax.tree.map(lambda x: jnp.array(x, copy=True), trained))
    step, ours = step.lower(state, frozen, batches()[0]).compile(tiny.HASTE), []
    for batch in batches():
        state, report = step(state, frozen, batch)
        ours.append(float(report["loss"]))

    if pair.spec.tuning.method in ("lora", "dora", "ia3"):
        model = in_peft(pair, method, trained, frozen, tmp_path / "adapter", trainable=True)
    else:
        model = copy.deepcopy(pair.torch)
        for name, p in model.named_parameters():
            p.requires_grad_(re.fullmatch(names, name) is not None)
    model, theirs = model.double(), []
    learned = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learned) == sum(x.size for x in jax.tree.leaves(trained))
    adam = torch.optim.AdamW(learned, lr=LR, weight_decay=0.0)
    for batch in batches():
        loss = torch.nn.functional.cross_entropy(their_logits(model, batch), torch.tensor(batch["labels"][:, 0]).long())
        adam.zero_grad()
        loss.backward()
        adam.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    with torch.no_grad():
        end = their_logits(model, batches()[0]).numpy()
    assert np.abs(end - logits(pair, {"params": pair.params})).max() > 0.1
    got = logits(pair, method.variables(state.trained, frozen, pair.spec))
    np.testing.assert_allclose(got, end, rtol=0, atol=5e-3 * np.abs(end).max())
