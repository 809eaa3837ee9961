"""Parts of a model that are trained as they are: which, what for, and the same in PEFT's and whole directories."""

from __future__ import annotations

import copy
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch

import ftjax
from ftjax import config as configs
from ftjax.decoding import generate
from ftjax.errors import FtjaxError
from ftjax.hub import families, weights
from ftjax.hub import peft as peft_files
from ftjax.objectives import causal
from ftjax.training import program as programs
from ftjax.training.auto_mesh import ONE_DEVICE
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.optimizer import multipliers, optimizer, schedule
from ftjax.training.sharding import abstract_mesh
from ftjax.training.step import compile_step, init_state
from ftjax.tree import flatten
from ftjax.tuning import METHODS, of_peft
from ftjax.tuning.parts import layer_ids, matches

IDS = np.stack(tiny.documents((12, 12)))

# name -> (model, fields of config.tuning, a regular expression of the tensors that are trained)
CASES = {
    "a layer": ("llama2", {"method": "last_layers"}, r"model\.layers\.2\..*|model\.norm\.weight"),
    "two layers and the head": (
        "gpt2-untied",
        {"method": "last_layers", "layers": 2, "layers_with": ("final_norm", "lm_head")},
        r"transformer\.h\.[12]\..*|transformer\.ln_f\..*|lm_head\.weight",
    ),
    "biases of gpt2": ("gpt2", {"method": "bitfit"}, r".*\.bias"),
    "norms of qwen3": ("qwen3", {"method": "norms"}, r".*(norm|layernorm)\.weight"),
    "tied head": ("gpt2", {"method": "head"}, r"lm_head\.weight"),
    "pattern with gaps": (
        "gpt2",
        {"method": "pattern", "pattern": (r".*\.h\.[02]\.mlp\..*", "layers/attn/o_proj/kernel")},
        r".*\.h\.[02]\.mlp\..*|.*attn\.c_proj\.weight",
    ),
    "pattern with gaps above": (
        "llama2",
        {"method": "pattern", "pattern": (r".*layers\.1\..*(q|k)_proj.*", r".*layers\.2\..*q_proj.*")},
        r".*layers\.[12]\..*q_proj\.weight|.*layers\.1\..*k_proj\.weight",
    ),
    "pattern of embeddings": ("llama2", {"method": "pattern", "pattern": ("embed/embedding",)}, r".*embed_tokens.*"),
}  # fmt: skip


def case(name):
    model, tuning, tensors = CASES[name]
    return tiny.tuned(tiny.pair(model), **tuning), tensors


def trained_torch(pair, tensors):
    """A copy of the torch model in which the tensors that the expression matches are trained."""
    import re

    model = copy.deepcopy(pair.torch)
    if re.fullmatch(tensors, "lm_head.weight") and model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    for tensor, p in model.named_parameters():
        p.requires_grad_(re.fullmatch(tensors, tensor) is not None)
    return model


def by_tensor(pair, params) -> dict[str, np.ndarray]:
    """A plain tree of parameters by the names and in the layout of the model's files."""
    import dataclasses

    leaves, out = flatten(params), {}
    shape = dataclasses.replace(pair.model.config, tied="lm_head/kernel" not in leaves)
    for path, (names, transposed, _) in families.tensor_names(pair.family, shape).items():
        layers = np.asarray(leaves[path]) if path.startswith("layers/") else [np.asarray(leaves[path])]
        out |= {name: x.T if transposed else x for name, x in zip(names, layers, strict=True)}
    return out


STEPS, B, T, DECAY = 30, 3, 12, 0.1


def rows():
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        lengths = rng.integers(4, T + 1, B)
        yield tiny.documents(lengths, seed=step), rng.integers(1, lengths - 1)


@functools.cache
def run(name, layer_decay=1.0):
    """(losses, trained, frozen) after STEPS steps of AdamW with weight decay and clipping."""
    pair, _ = case(name)
    method, trained, frozen = tiny.start(pair)
    config = configs.default().optim
    config.update(weight_decay=DECAY, schedule="constant", warmup=0, layer_decay=layer_decay)
    ids = functools.partial(method.layer_ids, spec=pair.spec)
    by_leaf = multipliers(config, pair.model.config.layers, method.lr_scale, ids)
    optim = optimizer(config, schedule(config, STEPS, 3e-3), by_leaf)
    step = compile_step(
        None, sums=lambda variables, batch, rngs: causal.sums(pair.model, variables, batch, rngs=rngs),
        variables=functools.partial(method.variables, spec=pair.spec), optimizer=optim, seed=0,
    )  # fmt: skip
    state, losses, compiled = init_state(optim, jax.tree.map(jnp.array, trained)), [], None
    for docs, prompts in rows():
        batch = tiny.batch([[doc] for doc in docs], [[p] for p in prompts], T)
        missing = [(0, 0), (0, T - batch["labels"].shape[1])]
        batch |= {key: np.pad(batch[key], missing) for key in ("loss_index", "labels", "weights")}
        compiled = compiled or step.lower(state, frozen, batch).compile(tiny.HASTE)
        state, report = compiled(state, frozen, batch)
        losses.append(float(report["loss"]))
    sizes = {x.size for x in jax.tree.leaves(state.optimizer) if x.ndim}
    assert sizes <= {x.size for x in jax.tree.leaves(trained)}  # moments of what is trained alone
    return np.array(losses), state.trained, frozen


def torch_run(model, rate=lambda tensor: 1.0):
    groups = [
        {"params": [p], "weight_decay": 0.0 if p.ndim <= 1 else DECAY, "lr": 3e-3 * rate(tensor)}
        for tensor, p in model.named_parameters() if p.requires_grad
    ]  # fmt: skip
    adam, losses = torch.optim.AdamW(groups), []
    for docs, prompts in rows():
        total, count = tiny.torch_loss(model, docs, prompts)
        adam.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        adam.step()
        losses.append(float(total.detach()) / count)
    return np.array(losses)


def logits(pair, variables, ids=IDS):
    return np.asarray(tiny.jit(lambda variables: pair.model.apply(variables, ids))(variables))


@pytest.mark.parametrize("name", CASES)
def test_training_is_torchs_with_the_other_tensors_frozen(name):
    """The same losses, and in the end the same tensors, the frozen ones to the bit."""
    pair, tensors = case(name)
    losses, trained, frozen = run(name)
    model = trained_torch(pair, tensors)
    np.testing.assert_allclose(losses, torch_run(model.double()), rtol=2e-5)
    ours = by_tensor(pair, METHODS[pair.spec.tuning.method].merge(trained, frozen, pair.spec))
    before, moved = by_tensor(pair, pair.params), set()
    for tensor, p in model.named_parameters():
        # A key's bias changes no attention: its gradient is rounding, which Adam makes a step of.
        atol = 4e-2 if tensor.endswith("c_attn.bias") else 2e-4
        np.testing.assert_allclose(ours[tensor], p.detach(), rtol=0, atol=atol, err_msg=tensor)
        start = before.get(tensor, before.get("transformer.wte.weight"))
        if p.requires_grad:
            moved.add(tensor)
            assert np.abs(ours[tensor] - start).max() > 1e-3, tensor
        else:
            np.testing.assert_array_equal(ours[tensor], start, err_msg=tensor)
    assert moved


def test_layer_decay_goes_by_the_layers_that_are_trained():
    name = "pattern with gaps above"
    pair, tensors = case(name)
    assert layer_ids("top_layers/attn/q_proj/kernel", pair.spec, matches).tolist() == [1, 2]
    assert layer_ids("top_layers/attn/k_proj/kernel", pair.spec, matches).tolist() == [1]
    want = torch_run(trained_torch(pair, tensors).double(), lambda tensor: 0.5 if ".layers.1." in tensor else 1.0)
    np.testing.assert_allclose(run(name, layer_decay=0.5)[0], want, rtol=2e-5)
    assert np.abs(run(name)[0] - want).max() > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_merged_and_written_it_is_the_same_model(name, tmp_path):
    pair, _ = case(name)
    _, trained, frozen = run(name)
    method = METHODS[pair.spec.tuning.method]
    ours = logits(pair, method.variables(trained, frozen, pair.spec))
    assert np.abs(ours - logits(pair, {"params": pair.params})).max() > 1e-2
    merged = method.merge(trained, frozen, pair.spec)
    np.testing.assert_allclose(logits(pair, {"params": merged}), ours, rtol=0, atol=1e-5)
    weights.write_model(tmp_path / "whole", merged, None, pair.family, pair.model.config)
    np.testing.assert_allclose(
        tiny.torch_logits(tiny.tiny_models.load(tmp_path / "whole"), IDS), ours, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", [name for name, (_, tuning, _) in CASES.items() if METHODS[tuning["method"]].to_peft])
def test_peft_carries_what_was_trained(name, tmp_path):
    """Its logits, merged by it too; and read from its files, it is the same here."""
    pair, _ = case(name)
    _, trained, frozen = run(name)
    method = METHODS[pair.spec.tuning.method]
    ours = logits(pair, method.variables(trained, frozen, pair.spec))
    adapter_config, tensors = method.to_peft(trained, frozen, pair.spec)
    peft_files.write_adapter(tmp_path / "adapter", tensors, adapter_config, None, "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), tmp_path / "adapter")
    np.testing.assert_allclose(tiny.torch_logits(model, IDS), ours, rtol=0, atol=1e-4)
    assert_reads(pair, tmp_path / "adapter", ours)
    np.testing.assert_allclose(tiny.torch_logits(model.merge_and_unload(), IDS), ours, rtol=0, atol=1e-4)


def assert_reads(pair, folder, want):
    """What we make of an adapter's files has the logits `want`."""
    adapter_config, tensors = peft_files.read_adapter(folder)
    method = of_peft(adapter_config)
    assert method is METHODS["lora"]
    back, fields = method.from_peft(adapter_config, tensors, pair.params, pair.spec)
    spec = tiny.spec(pair.family, pair.model.config, **fields)
    start, rest = method.init(jax.random.key(0), pair.params, spec)
    assert jax.tree.map(np.shape, start) == jax.tree.map(np.shape, back)
    got = logits(pair, method.variables(jax.tree.map(jnp.asarray, back), rest, spec))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["two layers and the head", "tied head"])
def test_packing_padding_and_cache_give_what_plain_rows_give(name):
    pair, _ = case(name)
    _, trained, frozen = run(name)
    variables = METHODS[pair.spec.tuning.method].variables(trained, frozen, pair.spec)
    docs = tiny.documents((5, 6, 7))
    new = generate(pair.model, variables, [doc.tolist() for doc in docs], max_new_tokens=4)
    whole = [np.concatenate([doc, answer]).astype(int) for doc, answer in zip(docs, new, strict=True)]
    apply = tiny.jit(lambda v, b: pair.model.apply(v, b["tokens"], b["positions"], b["segment_ids"]))
    padded = apply(variables, tiny.batch([[doc] for doc in whole], [[1]] * 3, 24))
    packed = apply(variables, tiny.batch([whole[:2], whole[2:], []], [[1, 1], [1], []], 24))
    at = ((0, 0), (0, len(whole[0])), (1, 0))
    for doc, answer, row, (r, start) in zip(whole, new, padded, at, strict=True):
        np.testing.assert_allclose(packed[r, start : start + len(doc)], row[: len(doc)], rtol=0, atol=1e-5)
        greedy = np.asarray(row).argmax(-1)[: len(doc) - 1]
        assert len(answer) == 4 and greedy[-4:].tolist() == answer


@pytest.mark.parametrize("method", ["full", "last_layers", "norms", "lora"])
def test_the_count_of_parameters_is_that_of_torch_and_peft(method):
    pair, config = tiny.pair("llama-tied"), configs.default()
    config.tuning.update(method=method, rank=4)
    programs.fill_defaults(config)
    spec, mesh = tiny.spec(pair.family, pair.model.config, method=method, rank=4), abstract_mesh(ONE_DEVICE)
    with jax.sharding.use_abstract_mesh(mesh):
        program = programs.build(config, spec, mesh, jnp.float32, 1)
    found = programs.count(program.trained), programs.total(program)
    if method == "lora":
        theirs = peft.get_peft_model(copy.deepcopy(pair.torch), peft.LoraConfig(r=4, target_modules="all-linear"))
        assert found == theirs.get_nb_trainable_parameters()
    else:
        assert found[0] <= found[1] == pair.torch.num_parameters()


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_run_of_the_last_layers(tmp_path, monkeypatch):
    """Killed and gone on with, it ends in the same bits; its folder, adapter and whole model are one model."""

    def config(run_dir):
        c = configs.default()
        c.update(run_dir=str(run_dir))
        c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", limit=60, buckets=1, cache="")
        c.tuning.update(method="last_layers", layers=2)
        c.optim.update(lr=1e-3, layer_decay=0.8)
        c.train.update(steps=6, batch_size=8, eval_every=3, log_every=1)
        c.evaluate.rows = 8
        c.export.update(formats=("adapter", "merged"), checkpoint="last")
        c.log.update(tensorboard=False, compilation_cache=False)
        return c

    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ftjax.train(config(tmp_path / "whole"), say=lines.append)
    # Two of five layers, and the final norm; the share is of the model's own parameters.
    assert any("training 90,944 of 260,032 parameters (34.97%)" in line for line in lines), lines
    save = Checkpoints.save

    def die(self, state, record, val_loss):
        save(self, state, record, val_loss)
        self.close()
        raise Killed

    monkeypatch.setattr(Checkpoints, "save", die)
    with pytest.raises(Killed):
        ftjax.train(config(tmp_path / "killed"), say=lambda line: None)
    monkeypatch.undo()
    assert ftjax.train(config(tmp_path / "killed"), say=lambda line: None).resumed_from == 3

    lms = {name: ftjax.load(tmp_path / "whole" / name, checkpoint="last") for name in ("", "adapter", "merged")}
    ids = [[1, 403, 407, 261, 378]]
    logits = {name: lm.logits(ids) for name, lm in lms.items()}
    assert np.abs(logits[""] - ftjax.load("builtin:stories260K").logits(ids)).max() > 1e-2
    np.testing.assert_array_equal(ftjax.load(tmp_path / "killed", checkpoint="last").logits(ids), logits[""])
    for name in ("adapter", "merged"):
        np.testing.assert_allclose(logits[name], logits[""], rtol=0, atol=1e-4)
    answers = {name: lm.generate(["Words: dog, ball\nSentence:"], max_new_tokens=12) for name, lm in lms.items()}
    assert answers[""] == answers["adapter"] == answers["merged"]


# -- bad input, each with its message


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("llama2", {"method": "bitfit"}, "bitfit trains biases, and this model has none"),
        ("llama2", {"method": "last_layers", "layers": 4}, "tuning.layers: .* up to 3; found 4"),
        ("llama2", {"method": "last_layers", "layers": 1.5}, "tuning.layers: .* a whole number"),
        ("llama2", {"method": "pattern"}, "tuning.pattern: no parameter is matched"),
        ("llama2", {"method": "pattern", "pattern": ("mlp",)}, r"must match a whole name such as model\.embed_tokens"),
        ("llama-tied", {"method": "pattern", "pattern": ("lm.head",)}, "no parameter is matched"),
        ("llama2", {"method": "pattern", "pattern": ("(",)}, r"tuning.pattern: '\(' is not a regular expression"),
    ],
)
def test_what_cannot_be_trained(model, fields, message):
    with pytest.raises(FtjaxError, match=message):
        tiny.start(tiny.tuned(tiny.pair(model), **fields))
