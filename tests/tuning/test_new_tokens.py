"""Tokens that a run adds: rows as transformers makes them, trained as peft trains them, and read by both."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
from transformers.optimization import Adafactor

import ftjax
from ftjax import assets, tasks
from ftjax import config as configs
from ftjax.data.prepare import given
from ftjax.data.store import Examples
from ftjax.data.tokenise import Example
from ftjax.data.verbs import show
from ftjax.errors import FtjaxError
from ftjax.evaluation.run import evaluate
from ftjax.hub import families, weights
from ftjax.hub import peft as peft_files
from ftjax.hub import tokenizer as tokenizers
from ftjax.lm import with_tokens
from ftjax.models.layers import neftune
from ftjax.models.transformer import Transformer
from ftjax.objectives import causal
from ftjax.plan.run import plan
from ftjax.training import optimizer as optimizers
from ftjax.training import program as programs
from ftjax.training import run_folder, start, step
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.job import prepared
from ftjax.tree import flatten
from ftjax.tuning import METHODS, adapters
from ftjax.verdict.audit import audit, drawn

BASE = Path(assets.resolve("builtin:stories260K"))
IDS = (7, 50, 51, 52)  # the first has a row in the files
ROWS = np.array([[3, 50, 7, 51, 9, 52, 50, 4], [51, 51, 8, 52, 7, 6, 5, 50]])


def read(folder: Path, rows: int, dtype=np.float32, **how):
    family, shape = families.read_config(folder)
    shape = families.with_rows(shape, range(rows))
    return family, shape, weights.read_params(folder, family, shape, dtype=lambda path: np.dtype(dtype), **how)


@functools.cache
def grown(name: str, folder: Path) -> tiny.Pair:
    """A variant whose torch model is resized by transformers, and which we read with three new rows."""
    model = tiny.tiny_models.make(*tiny.VARIANTS[name])
    model.save_pretrained(folder)
    family, shape, params = read(folder, 53, new_rows=3)
    model.resize_token_embeddings(53)
    return tiny.Pair(model, family, Transformer(shape), params, tiny.spec(family, shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.mark.parametrize(("name", "method"), [("llama-tied", "lora"), ("llama2", "dora"), ("gpt2", "lora")])
def test_as_peft_trains_them(name, method, folder, tmp_path):
    """Logits and gradients are those of peft on the resized base; only rows of the tokens change."""
    pair = grown(name, folder / name)
    pair = tiny.tuned(pair, method=method, rank=2, alpha=4, token_ids=IDS)
    method, trained, frozen = tiny.start(pair)
    keys = iter(jax.random.split(jax.random.key(7), 100))
    trained = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), trained)
    tables = {"embed/embedding"} | (set() if pair.model.config.tied else {"lm_head/kernel"})
    leaves = flatten(trained)
    assert {path for path, x in leaves.items() if x.shape == (4, 16)} == tables  # so the moments are of four rows

    def loss(trained):
        y = pair.model.apply(method.variables(trained, frozen, pair.spec), jnp.asarray(ROWS))
        p = jax.nn.log_softmax(y[:, :-1])
        return -jnp.take_along_axis(p, jnp.asarray(ROWS[:, 1:, None]), 2).mean(), y

    (_, logits), gradient = tiny.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    config, tensors = method.to_peft(trained, frozen, pair.spec)
    peft_files.write_adapter(tmp_path, tensors, config, None, "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), tmp_path, is_trainable=True).eval()
    ids = torch.tensor(ROWS)
    y = theirs(ids).logits
    np.testing.assert_allclose(np.asarray(logits), y.detach().numpy(), rtol=0, atol=1e-4)
    torch.nn.functional.cross_entropy(y[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    names = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.requires_grad}
    want = {name.replace("vector.default.weight", "vector").replace(".default", ""): x for name, x in names.items()}
    got = method.to_peft(gradient, frozen, pair.spec)[1]
    assert got.keys() == want.keys()
    for tensor, expected in want.items():
        np.testing.assert_allclose(got[tensor], expected, rtol=0, atol=1e-4 * max(np.abs(expected).max(), 1e-3))
        assert np.abs(expected).max() > 1e-4

    merged = flatten(method.merge(trained, frozen, pair.spec))
    for path in tables:
        changed = np.flatnonzero((np.asarray(merged[path]) != np.asarray(flatten(pair.params)[path])).any(1))
        assert tuple(changed) == IDS

    _, shape, base = read(folder / name, 0)
    spec = pair.spec._replace(model=shape, tuning=configs.default().tuning)
    variables = adapters.variables(adapters.read(tmp_path), base, spec)
    model = pair.model.clone(config=families.with_rows(shape, IDS))
    np.testing.assert_allclose(np.asarray(model.apply(variables, ROWS)), np.asarray(logits), rtol=0, atol=1e-5)
    tensors = {key: x for key, x in tensors.items() if "delta" not in key}
    for ids in ((50, 52), (51,)):
        message = f"names the token {ids[-1]}, but the base has 50 rows, and the adapter does not have all rows"
        rows = {key: np.ones((len(ids), 16), np.float32) for key in got if "delta" in key}
        said = config | {"trainable_token_indices": dict.fromkeys(config["trainable_token_indices"], ids)}
        with pytest.raises(FtjaxError, match=message):
            adapters.variables((method, said, tensors | rows), base, spec)


@pytest.mark.parametrize(("optimizer", "noise"), [("adamw", 5.0), ("muon", 0.0), ("adafactor", 0.0)])
def test_every_optimizer_trains_the_rows_that_peft_does(optimizer, noise, folder, tmp_path):
    """On packed rows, with a moving average, and with the noise of NEFTune: the rows go where torch's optimizer takes
    PEFT's. The matrices of LoRA are set to ours before each step, because torch's Muon is one of bfloat16."""
    pair = tiny.tuned(grown("llama-tied", folder / "llama-tied"), method="lora", rank=2, alpha=4, token_ids=IDS)
    method, trained, frozen = tiny.start(pair)
    keys = iter(jax.random.split(jax.random.key(7), 100))
    trained = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), trained)
    config = configs.default().optim
    config.update(name=optimizer, weight_decay=0.1, clip_norm=0.0)
    optim, model = optimizers.optimizer(config, lambda step: 1e-2), pair.model.clone(neftune=noise)
    compiled = step.compile_step(
        None, options=tiny.HASTE, sums=lambda variables, batch, rngs: causal.sums(model, variables, batch, rngs=rngs),
        variables=functools.partial(method.variables, spec=pair.spec), optimizer=optim, seed=3, ema=0.8,
    )  # fmt: skip
    docs, (said, tensors) = list(ROWS), method.to_peft(trained, frozen, pair.spec)
    batch = tiny.batch([docs], [[0] * len(docs)], ROWS.size)
    peft_files.write_adapter(tmp_path, tensors, said, None, "base")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch), tmp_path, is_trainable=True).eval()
    named = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    (rows,) = (p for name, p in named.items() if "trainable_tokens" in name)
    # optax does not factor a table with fewer than 128 rows, and torch never factors a vector.
    flat = torch.nn.Parameter(rows.detach().clone().flatten())
    before = flat.detach().numpy().copy()
    if optimizer == "adafactor":
        fixed = {"scale_parameter": False, "relative_step": False, "eps": (1e-30, 1e-3), "weight_decay": 0.1}
        torch_optim = Adafactor([flat], lr=1e-2, **fixed)
    else:
        torch_optim = torch.optim.AdamW([flat], 1e-2, (config.b1, config.b2), config.eps, weight_decay=0.1)
    average = torch.optim.swa_utils.AveragedModel(
        torch.nn.ParameterList([flat]), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    )
    state = step.init_state(optim, trained, ema=0.8)
    for at in range(3):
        with torch.no_grad():
            for name, x in method.to_peft(state.trained, frozen, pair.spec)[1].items():
                if "lora_" in name:
                    named[name].copy_(torch.tensor(np.asarray(x)))
            rows.copy_(flat.view_as(rows))
        key = step.rngs(jax.random.fold_in(jax.random.key(3), at))["noise"]
        added = model.apply(
            {}, jnp.zeros((1, ROWS.size, 16)), rngs={"noise": key},
            method=lambda self, x: neftune(self, x, noise, batch["segment_ids"]),
        )  # fmt: skip
        added = torch.tensor(np.asarray(added)).reshape(*ROWS.shape, 16)
        assert (added.abs().max() > 0) == (noise > 0)
        hook = theirs.get_input_embeddings().register_forward_hook(lambda module, given, y, added=added: y + added)
        y = theirs(torch.tensor(ROWS)).logits
        hook.remove()
        torch.nn.functional.cross_entropy(y[:, :-1].flatten(0, 1), torch.tensor(ROWS)[:, 1:].flatten()).backward()
        flat.grad, rows.grad = rows.grad.flatten(), None
        torch_optim.step()
        average.update_parameters(torch.nn.ParameterList([flat]))
        state, _ = compiled(state, frozen, batch)
        for tree, want in ((state.trained, flat), (state.ema, average.module[0])):
            got, want = np.asarray(tree["embed"]["embedding"]).ravel(), want.detach().numpy()
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    assert np.abs(flat.detach().numpy() - before).mean() > 5e-3


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_new_rows_made_by_peft(tied, folder, tmp_path):
    """Peft may save a resized table beside them, or the rows alone."""
    name = "llama-tied" if tied else "llama2"
    pair, kept = grown(name, folder / name), {}
    for save in (True, False):
        indices = {"embed_tokens": [50, 51, 52]} | ({} if tied else {"lm_head": [50, 51, 52]})
        torch.manual_seed(3)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], trainable_token_indices=indices)
        model = peft.get_peft_model(copy.deepcopy(pair.torch), lora).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.2)
        model.save_pretrained(tmp_path / str(save), save_embedding_layers=save)
        _, shape, base = read(folder / name, 0)
        read_back = adapters.read(tmp_path / str(save))
        kept[save] = len(read_back[2])
        variables = adapters.variables(read_back, base, pair.spec._replace(model=shape))
        got = pair.model.apply(variables, ROWS)
        np.testing.assert_allclose(np.asarray(got), tiny.torch_logits(model, ROWS), rtol=0, atol=1e-4)
    assert kept[True] > kept[False]


def test_new_rows_have_the_distribution_of_transformers(folder):
    """The mean of the table, and noise with 1e-9 times its covariance, by the seed and not by the dtype or device."""
    pair = grown("llama2", folder / "llama2")
    _, _, params = read(folder / "llama2", 50 + 4000, new_rows=1)
    model = tiny.tiny_models.make(*tiny.VARIANTS["llama2"])
    torch.manual_seed(0)
    model.resize_token_embeddings(50 + 4000)
    for ours, theirs in (
        (params["embed"]["embedding"], model.model.embed_tokens),
        (params["lm_head"]["kernel"], model.lm_head),
    ):
        ours, theirs = np.float64(ours), np.float64(theirs.weight.detach().numpy())
        np.testing.assert_array_equal(ours[:50], theirs[:50])
        spread = np.cov(theirs[:50].T, bias=True)
        for rows in (ours[50:], theirs[50:]):
            np.testing.assert_allclose(rows.mean(0), theirs[:50].mean(0), rtol=0, atol=1e-6)
            found = np.cov(rows.T) / 1e-9
            assert np.linalg.norm(found - spread) < 0.12 * np.linalg.norm(spread)
    cuts = []
    weights._new_rows(lambda at: cuts.append(at) or np.zeros([b - a for a, b in at]), 5000, (5001, 2), [0])
    assert len(cuts) == 4  # a table is read twice, thousands of rows at a time
    again = read(folder / "llama2", 53, new_rows=3, dtype="bfloat16")[2]["embed"]["embedding"]
    np.testing.assert_array_equal(again, pair.params["embed"]["embedding"].astype("bfloat16"))
    other = read(folder / "llama2", 53, new_rows=4)[2]["embed"]["embedding"]
    assert (np.asarray(other)[50:] != np.asarray(pair.params["embed"]["embedding"])[50:]).any()
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data",), "fsdp"))
    nowhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    places = jax.tree.map(lambda x: nowhere, pair.params) | {"embed": {"embedding": place}}
    wide = read(folder / "llama2", 56, new_rows=3, shardings=places, given_away=True)[2]["embed"]["embedding"]
    assert wide.sharding == place and wide.shape == (56, 16)
    np.testing.assert_array_equal(wide, read(folder / "llama2", 56, new_rows=3)[2]["embed"]["embedding"])
    with pytest.raises(FtjaxError, match=r"embed_tokens.weight has shape \(50, 16\), expected \(53, 16\)"):
        read(folder / "llama2", 53)


def test_an_end_that_a_frozen_head_cannot_tell_from_other_tokens_is_found():
    table = np.random.default_rng(0).normal(size=(9, 4)).astype("float32")
    table[[2, 5, 7]] = table[2] * np.array([[1], [1 + 1e-4], [1 + 1e-2]])
    ids = [np.array([1, 2], np.int32), np.array([4, 3], np.int32)]
    examples = Examples.of([Example(i, np.array([False, True])) for i in ids])
    assert start.indistinct_ends({"embed": {"embedding": table}}, examples) == {2: 1}
    both = {"embed": {"embedding": table[::-1]}, "lm_head": {"kernel": table}}
    assert start.indistinct_ends(both, examples) == {2: 1}
    assert start.indistinct_ends({}, examples) == {}


TOKENS = ("<|user|>", "<|end|>")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    said = [{"prompt": f"<|user|>A {w}?<|end|>", "completion": f" The {w}.<|end|>"} for w in ("dog", "cat", "sun")] * 8
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    config = configs.default()
    config.update_from_flattened_dict({
        "run_dir": str(folder / "a"), "data.train": str(folder / "rows.jsonl"), "data.add_tokens": TOKENS,
        "data.end": "<|end|>",
        "data.max_length": 32, "data.buckets": 1, "train.steps": 4, "train.batch_size": 4, "train.eval_every": 2,
        "train.keep": 2,
        "tuning.rank": 2, "evaluate.compare": False, "export.formats": ("adapter", "merged"), "log.tensorboard": False,
    })  # fmt: skip
    return config


def changed(config, **fields):
    new = configs.copy(config)
    new.update_from_flattened_dict({key.replace("__", "."): value for key, value in fields.items()})
    return new


@pytest.mark.slow
def test_a_run_with_new_tokens(config):
    """Its folder, its adapter and its merged model give the same logits here, in peft and in transformers, which read
    the same tokens; it goes on to the bit."""
    from sklearn.metrics import roc_auc_score
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said, run = [], Path(config.run_dir)
    ftjax.train(config, say=said.append)
    told = "2 rows of a table of embeddings are trained, 2 of them new; for PEFT, resize the base first: base.resize_t"
    assert told in "\n".join(said)
    assert "never pretrained" not in "\n".join(said)  # the rows that answers end with are trained
    mine = ftjax.load(run)
    text = "<|user|>A dog?<|end|> The dog.<|end|>"
    ids = np.array([mine.tokenizer(text)["input_ids"]])
    assert [int((ids == i).sum()) for i in (512, 513)] == [1, 2]
    want = mine.logits(ids)
    assert want.shape[-1] == 514 and mine.generate([text], max_new_tokens=2)
    for name in ("adapter", "merged"):
        other = ftjax.load(run / name)
        np.testing.assert_allclose(other.logits(ids), want, rtol=0, atol=1e-4)
        assert other.tokenizer(text)["input_ids"] == ids[0].tolist()
        assert AutoTokenizer.from_pretrained(run / name)(text)["input_ids"] == ids[0].tolist()
    theirs = AutoModelForCausalLM.from_pretrained(run / "merged")
    np.testing.assert_allclose(tiny.torch_logits(theirs, ids), want, rtol=0, atol=1e-4)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter")  # it resizes the base by itself
    np.testing.assert_allclose(tiny.torch_logits(adapted, ids), want, rtol=0, atol=1e-4)
    rows = np.asarray(mine.params["embed"]["embedding"])
    np.testing.assert_array_equal(rows[:512], ftjax.load(BASE).params["embed"]["embedding"])
    report = evaluate(str(run), config.data.train, None, generate=False, say=lambda line: None)
    assert np.isfinite(report["loss"])
    said_of_others = [{"prompt": f"<|user|>A {w}?<|end|>", "completion": f" The {w}.<|end|>"} for w in ("ball", "tree")]
    others = run.parent / "others.jsonl"
    others.write_text("".join(json.dumps(row) + "\n" for row in said_of_others))
    attacked = audit(run, str(others), say=lambda line: None)  # the base has rows for these tokens too
    job = prepared(configs.copy(config), said.append)
    steps = Checkpoints(run, read_only=True).best()
    trained_on = job.data.train.examples.select(drawn(job.config, job.data, job.tokenizer, steps))
    own = given(config, str(others), tokenizer=mine.tokenizer, max_positions=mine.max_tokens).test.examples

    @functools.cache
    def score(ids, trained):
        found = tiny.torch.log_softmax(tiny.torch.tensor(tiny.torch_logits(theirs, np.array([ids]))[0]), -1).numpy()
        at = np.flatnonzero(trained)
        return found[at - 1, np.array(ids)[at]].mean()

    found = [score(tuple(one.ids.tolist()), tuple(one.trained.tolist())) for side in (trained_on, own) for one in side]
    labels = [1] * len(trained_on) + [0] * len(own)
    assert score.cache_info().currsize == 5 and len(own) == 2
    assert attacked["attacks"]["loss"]["auc"] == pytest.approx(roc_auc_score(labels, found), abs=1e-6)

    shutil.rmtree(run / "checkpoints" / "4")
    ftjax.train(config, say=said.append)
    assert "going on after step 2 of 4" in "\n".join(said)
    again = ftjax.load(run)
    for ours, other in zip(jax.tree.leaves(again.variables), jax.tree.leaves(mine.variables), strict=True):
        np.testing.assert_array_equal(ours, other)
    with pytest.raises(FtjaxError, match="data.add_tokens was .*, is "):
        ftjax.train(changed(config, data__add_tokens=(*TOKENS, "<x>")))

    # A further stage on the merged model: its tokens are known, and their rows go on.
    stage = prepared(changed(config, model__path=str(run / "merged")), said.append)
    assert stage.config.tuning.token_ids == (512, 513) and stage.spec.model.vocab_size == 514
    assert "2 rows of a table of embeddings are trained, 0 of them new" in said[-1]


def test_padding_previews_and_plans(config, capsys):
    job = prepared(changed(config, data__pad_vocabulary_to=8), lambda line: None)
    assert job.config.tuning.token_ids == tuple(range(512, 520)) and job.spec.model.vocab_size == 520
    show(config)
    assert "<|user|>A dog?<|end|>" in capsys.readouterr().out.replace("<|user|> A", "<|user|>A")
    found = plan(changed(config, data__pad_vocabulary_to=8), choices=False)["asked"]["parameters"]["trained"]
    alone = tiny.spec(*families.read_config(BASE), rank=2)
    base = weights.param_shapes(alone.model)
    shapes = jax.eval_shape(lambda key: METHODS["lora"].init(key, base, alone)[0], jax.random.key(0))
    assert found == programs.count(shapes) + 8 * alone.model.width


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__add_tokens": ("<a>", "<a>")}, "data.add_tokens: '<a>' is given twice; name each token once"),
        (
            {"data__add_tokens": ("▁the",)},
            "data.add_tokens: '▁the' is an ordinary token of this tokenizer, with the id",
        ),
        ({"data__add_tokens": ("",)}, "data.add_tokens, entry 1: expected a text that is not empty"),
        ({"data__add_tokens": (), "tuning__token_ids": (5,)}, "tuning.token_ids: a run fills it in; leave it out, and"),
        ({"task__kind": "preference"}, "data.add_tokens: changes parameters of the base model, which task.loss="),
        (
            {"task__kind": "policy", "task__beta": 0.1, "task__rewards": ("length",), "rollout__group": 4},
            "data.add_tokens: changes parameters of the base model, which task.",
        ),
        (
            {"tuning__method": "ia3"},
            "data.add_tokens: PEFT has no form for rows of new tokens beside ia3; set tuning.met",
        ),
        ({"task__kind": "masked"}, "data.add_tokens: a head for task.kind masked has a bias for each token"),
        (
            {"tuning__init_from": "there"},
            "data.add_tokens: a run that starts from an adapter .* cannot add rows to its",
        ),
        (
            {"model__quantise": "int8", "model__quantise_tables": True},
            "data.add_tokens: rows of a quantised table cannot be trained; set model.quantise_tables to False",
        ),
        (
            {"tuning__method": "last_layers"},
            "last_layers as set here would not train the rows of new tokens in embed/emb",
        ),
        ({"tuning__method": "head"}, "head as set here would not train the rows of new tokens in embed/embedding"),
        (
            {"tuning__modules_to_save": ("embed_tokens",)},
            "rows of new tokens need both of model.embed_tokens and lm_head",
        ),
        (
            {"tuning__targets": ("embed_tokens",)},
            "embed/embedding has rows of new tokens, and cannot have an adapter as",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(config, fields, message):
    new = changed(config, **fields)
    with pytest.raises(FtjaxError, match=message):
        configs.validate(new)
        programs.fill_defaults(new)
        family, shape = families.read_config(BASE)
        programs.check_method(new, family, shape)
        shape = with_tokens(new, shape, tokenizers.of_run(new, BASE)[0])
        spec = tiny.spec(family, shape)._replace(tuning=new.tuning)
        tasks.find(new.task.kind).check(new, METHODS[new.tuning.method], spec, None)
        programs.build(new, spec, programs.sharding.make_mesh(new.mesh), np.dtype("float32"), 2)


def test_a_comparison_gives_the_base_the_new_tokens_too(config, tmp_path):
    """With their rows as they are before training: answers end with one, and both models are comparable."""
    asked = [{"prompt": f"<|user|>A {w}?<|end|>", "completion": f" The {w}.<|end|>"} for w in ("dog", "cat")]
    rows = tmp_path / "test.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "text.txt").write_text("Once upon a time there was a girl.\n")
    new = changed(
        config, run_dir=str(tmp_path / "run"), data__validation=str(rows), data__test=str(rows), train__steps=2,
        evaluate__metrics=("exact_match",), evaluate__forgetting=str(tmp_path / "text.txt"), compare__seeds=1,
        data__pad_vocabulary_to=8, generate__max_new_tokens=2, log__compilation_cache=False,
    )  # fmt: skip
    own = {"name": "named", "model": "builtin:stories260K"}
    new.compare.contenders = ("zero-shot", {"name": "tuned", "tuning.method": "lora"}, own)
    found = {entry["name"]: entry for entry in ftjax.compare(new, say=lambda line: None)["contenders"]}
    base, tuned, named = found["zero-shot"], found["tuned"], found["named"]
    assert named["figures"] == base["figures"] and named["forgetting"] == base["forgetting"]
    assert len(base["forgetting"]) == len(tuned["forgetting"]) == 1 and tuned["divergence"] > 0
    lm = ftjax.load(tmp_path / "run/tuned/seed=0")
    assert lm.model.config.vocab_size == 520
    shapes = flatten(run_folder.open_run(tmp_path / "run/tuned/seed=0").trained)
    assert tuned["cost"]["trained"] == sum(x.size for x in shapes.values())
    assert base["cost"]["prompt_tokens"] == tuned["cost"]["prompt_tokens"] == np.mean(
        [len(lm.tokenizer(row["prompt"])["input_ids"]) for row in asked]
    )  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora"])
def test_whole_tables_hold_the_new_rows_too(config, method):
    """Full training, and both tables in modules_to_save: then no single rows are trained beside them."""
    saved = ("embed_tokens", "lm_head") if method == "lora" else ()
    new = changed(config, tuning__method=method, tuning__modules_to_save=saved)
    programs.fill_defaults(new)
    family, shape = families.read_config(BASE)
    shape = with_tokens(new, shape, tokenizers.of_run(new, BASE)[0])
    spec = tiny.spec(family, shape)._replace(tuning=new.tuning)
    program = programs.build(new, spec, programs.sharding.make_mesh(new.mesh), np.dtype("float32"), 2)
    assert program.trained["embed"]["embedding"].shape == (514, 64)


def test_a_tokenizer_with_more_tokens_than_the_table(config):
    """Tokens that no one added are not given rows in silence."""
    family, shape = families.read_config(BASE)
    with pytest.raises(
        FtjaxError, match="the tokenizer is larger than the embedding: token .* has id 511, the embedding"
    ):
        with_tokens(config, dataclasses.replace(shape, vocab_size=500), tokenizers.of_run(config, BASE)[0])


def test_a_model_with_a_second_table_of_embeddings_gets_no_new_rows():
    _, shape = families.from_hf({"model_type": "gemma4_text", "vocab_size_per_layer_input": 9, "vocab_size": 9})
    with pytest.raises(FtjaxError, match=r"data\.add_tokens, data\.pad_vocabulary_to: this model has a second ta"):
        families.with_rows(shape, [9])
    assert families.with_rows(shape, [8]) == shape


def test_tokenizers_of_other_files(config, tmp_path):
    """A vocabulary in older files gets a tokenizer.json; a list of added tokens as transformers 4 keeps one is kept."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    letters = [chr(i) for i in range(33, 127)] + ["Ġ"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer, out = tokenizers.of_run(config, tmp_path)
    new = tokenizer.convert_tokens_to_ids(list(TOKENS))
    assert min(new) >= len(letters)
    assert tokenizer("a<|end|>b")["input_ids"] == [letters.index("a"), new[1], letters.index("b")]
    assert tokenizer.decode(new, skip_special_tokens=True) == "<|user|><|end|>"
    assert (out / "tokenizer.json").is_file() and not (tmp_path / "tokenizer.json").exists()
    older = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"2": {"content": "</s>"}}}
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((BASE / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(older))
    _, out = tokenizers.of_run(config, tmp_path)
    kept = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {i: entry["content"] for i, entry in kept.items()} == {"2": "</s>", "512": TOKENS[0], "513": TOKENS[1]}
    gaps = json.loads((BASE / "tokenizer.json").read_text())
    gaps["model"]["vocab"]["Z"] = 513  # not 511 or less, though there are 512 entries
    (tmp_path / "tokenizer.json").write_text(json.dumps(gaps))
    with pytest.raises(FtjaxError, match=r"have gaps, so that '<\|end\|>' would get the id 513 of another token"):
        tokenizers.of_run(config, tmp_path)
    slow = SimpleNamespace(get_vocab=dict, get_added_vocab=dict)
    with pytest.raises(FtjaxError, match="there: tokens can only be added to a tokenizer that has a tokenizer.json"):
        tokenizers.extended(slow, Path("there"), TOKENS)
