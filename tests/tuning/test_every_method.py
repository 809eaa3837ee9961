"""What holds for every row of METHODS: what is remembered of what is trained, and what the documentation says."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import ftjax
from ftjax import assets
from ftjax import config as configs
from ftjax.objectives import causal
from ftjax.training.optimizer import multipliers, optimizer, schedule
from ftjax.training.step import compile_step, init_state
from ftjax.tree import flatten
from ftjax.tuning import METHODS, begun, ignored

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


@pytest.mark.parametrize("method", [*OWN, "pissa"])
def test_what_a_run_began_with_is_found_without_drawing_what_it_trained(method):
    own = {"init": method, "method": "lora"} if method == "pissa" else {"method": method}
    pair = tiny.tuned(tiny.pair("gpt2"), **TUNING | own)
    row, trained, frozen = tiny.start(pair)
    shapes, again = begun(row, jax.random.key(0), pair.params, pair.spec)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), trained)
    base, frozen, again = flatten(pair.params), flatten(frozen), flatten(again)
    assert again.keys() == frozen.keys() and any("initial" in path for path in again) == (method == "pissa")
    for path, x in again.items():
        np.testing.assert_allclose(x, frozen[path], rtol=1e-6, err_msg=path)
        whole = path in base and x.shape == base[path].shape  # not only some of its rows
        assert (x is base.get(path)) == whole, path  # not copied


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


@pytest.mark.slow
def test_a_checkpoint_is_at_most_four_times_its_adapter(tmp_path):
    """Trained tensors and two moments of each, whatever the base: here one of 0.07 and one of 8 MB.

    Of an adapter of 130 kB; below that, the few kB that any checkpoint takes for the names of its tensors would show.
    """
    sizes, bases = {}, {}
    for vocabulary in (512, 80_000):
        folder = tmp_path / str(vocabulary)
        model = tiny.tiny_models.make(
            "llama", tiny.tiny_models.SIZES | {"vocab_size": vocabulary, "max_position_embeddings": 64}
        )
        model.save_pretrained(folder / "base")
        starter = Path(assets.resolve("builtin:stories260K"))
        shutil.copy(starter / "tokenizer.json", folder / "base")
        words = json.loads((starter / "tokenizer_config.json").read_text())
        words |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "base" / "tokenizer_config.json").write_text(json.dumps(words))
        c = configs.default()
        c.run_dir, c.model.path = str(folder / "run"), str(folder / "base")
        c.tuning.rank = 32
        c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", end="<s>", limit=16, buckets=1, cache="")
        c.data.max_length = 64
        c.train.update(steps=2, batch_size=4, eval_every=2)
        c.evaluate.rows = 4
        c.log.update(tensorboard=False, compilation_cache=False)
        ftjax.train(c, say=lambda line: None)
        (adapter,) = (folder / "run" / "adapter").glob("*.safetensors")
        steps = [step for step in (folder / "run" / "checkpoints").iterdir() if step.name.isdigit()]
        assert steps
        for step in steps:
            sizes[vocabulary] = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
            assert 2 * adapter.stat().st_size < sizes[vocabulary] <= 4 * adapter.stat().st_size
        bases[vocabulary] = (folder / "base" / "model.safetensors").stat().st_size
    assert bases[80_000] > 50 * bases[512]
    assert sizes[80_000] == pytest.approx(sizes[512], rel=0.02)


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


def test_settings_that_a_method_does_not_read_are_named():
    """Every field of the group belongs to the methods that name it, or to all of them."""
    of_all = {"method", "init_from", "prompt_ids", "token_ids"}
    assert {key for row in OWN.values() for key in row.takes} == set(configs.default().tuning) - of_all
    c = configs.default()
    configs.override(c, ["tuning.rank=4", "tuning.virtual_tokens=3", "tuning.layers=2"])
    named = {}
    for name in OWN:
        c.tuning.method = name
        named[name] = [key.removeprefix("tuning.") for key in ignored(c.tuning)]
    assert named["lora"] == named["dora"] == ["layers", "virtual_tokens"]
    assert named["prompt"] == named["prefix"] == named["ptuning"] == ["layers", "rank"]
    assert named["last_layers"] == ["rank", "virtual_tokens"]
    assert named["full"] == named["bitfit"] == named["ia3"] == ["layers", "rank", "virtual_tokens"]
    assert ignored(configs.default().tuning) == []
