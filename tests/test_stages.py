"""Runs one after another: where each starts, what it does to the others, and how a stopped one goes on."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_labelled
from safetensors.numpy import load_file

import ftjax
from ftjax import assets, stages
from ftjax import config as configs
from ftjax.data import prepare
from ftjax.errors import FtjaxError
from ftjax.hub import derived, families, pooling, resolve
from ftjax.hub import weights as weights_of
from ftjax.lm import recipe_in
from ftjax.training.report import Progress, read_metrics

WORDS = {"data.prompt": "Words: {src}\nSentence:", "data.completion": " {tgt}"}
BACK = {"data.prompt": "Sentence: {tgt}\nWords:", "data.completion": " {src}"}
FILE = "model.safetensors"
ROWS = {"data.train": "train.jsonl", "data.validation": "held_out.jsonl"}


def settings(folder: Path, **changed):
    c = configs.default()
    c.run_dir = str(folder / "run")
    c.tuning.rank = 4
    c.data.update(buckets=1, end="<s>")
    c.optim.lr = 1e-2
    c.train.update(steps=4, batch_size=8, eval_every=4, log_every=1)
    c.log.update(tensorboard=False, compilation_cache=False)
    rows = {key: str(folder / name) for key, name in ROWS.items()}
    c.stages = ({"name": "words", **rows, **WORDS}, {"name": "back", "replay": 0.25, **rows, **BACK, **changed})
    return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = Path(ftjax.__file__).parent / "assets/commongen"
    for name, source in (("train.jsonl", "train.jsonl"), ("held_out.jsonl", "validation.jsonl")):
        lines = (rows / source).read_text().splitlines()[: 64 if name == "train.jsonl" else 16]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@functools.cache
def trained(folder):
    return ftjax.train(settings(folder), say=lambda line: None)


@pytest.fixture
def done(folder, small_mesh):
    """The Result of both stages, on the devices that the other runs here have."""
    return trained(folder)


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "merged/model.safetensors")


@pytest.mark.slow
def test_a_stage_starts_from_the_model_of_the_one_before(done, folder):
    run = folder / "run"
    record = json.loads((run / "back/run.json").read_text())
    assert Path(record["base"]["path"]) == run / "words/merged"
    # The same stage as a run of its own: a run folder as model.path is its whole model.
    alone = settings(folder)
    back = configs.staged(alone)[1]
    config = configs.copy(back.config)
    config.run_dir, config.model.path = str(folder / "alone"), str(run / "words")
    config.data.mixture = stages._mixed(configs.staged(alone)[:1], back)
    config.export.formats = ("merged",)
    ftjax.train(config, say=lambda line: None)
    for name, x in weights(folder / "alone").items():
        np.testing.assert_array_equal(x, weights(run / "back")[name])
    assert np.isfinite(ftjax.evaluate(str(folder / "alone"), str(folder / "held_out.jsonl"), say=print)["loss"])


@pytest.mark.slow
def test_every_stage_is_scored_after_every_stage(done, folder):
    scores = done.results["scores"]
    assert list(scores) == ["before", "words", "back"] and all(
        list(row) == ["words", "back"] for row in scores.values()
    )
    models = {"before": "builtin:stories260K", "words": folder / "run/words", "back": folder / "run/back"}
    for model, path in models.items():
        for stage, template in (("words", WORDS), ("back", BACK)):
            overrides = ["data.end=<s>", *(f"{key}={json.dumps(value)}" for key, value in template.items())]
            held_out = str(folder / "held_out.jsonl")
            alone = ftjax.evaluate(str(path), held_out, configs.default(), overrides=overrides, say=lambda line: None)
            assert scores[model][stage]["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    loss = {model: {stage: cell["loss"] for stage, cell in row.items()} for model, row in scores.items()}
    lowest = min(loss["words"]["words"], loss["back"]["words"])
    assert done.results["forgotten"] == {"words": pytest.approx(loss["back"]["words"] - lowest)}
    assert done.results["transferred"] == {"back": pytest.approx(loss["words"]["back"] - loss["before"]["back"])}
    assert json.loads((folder / "run/stages.json").read_text()) == done.results
    assert (folder / "run/stages.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_stage_of_rewards_is_scored_before_it_too(tmp_path, folder, small_mesh):
    more = {"task.kind": "policy", "task.rewards": ("length",), "rollout.group": 4, "generate.max_new_tokens": 4}
    c = settings(folder, **more, replay=0.0)
    c.run_dir, c.train.steps, c.train.eval_every = str(tmp_path / "run"), 2, 2
    told = ftjax.train(c, say=lambda line: None).results
    assert all(told["scores"][model]["back"]["answers"] == 16 for model in ("before", "words", "back"))
    assert stages._main(told["scores"]["words"]["back"])[0] == "reward"
    assert list(told["forgotten"]) == ["words"] and not told["transferred"]  # rewards are no nats a token


def test_a_stopped_run_goes_on_in_its_stage(done, folder, monkeypatch):
    """The same bits as without the stop, and no score is computed twice."""
    whole = folder / "whole"
    shutil.move(folder / "run", whole)
    try:
        count = Progress.count

        def stop(self, tokens):
            count(self, tokens)
            if (folder / "run/back/checkpoints").is_dir():
                raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Progress, "count", stop)
            ftjax.train(settings(folder), say=lambda line: None)
        assert (folder / "run/words/merged").is_dir() and not (folder / "run/back/merged").exists()
        scored = []
        monkeypatch.setattr(
            stages, "evaluate", lambda model, *a, f=stages.evaluate, **k: scored.append(model) or f(model, *a, **k)
        )
        again = ftjax.train(settings(folder), say=lambda line: None)
        assert scored == [str(folder / "run/back/merged")] * 2
        for name, x in weights(folder / "run/back").items():
            np.testing.assert_array_equal(x, weights(whole / "back")[name])
        for model, row in done.results["scores"].items():
            for stage, cell in row.items():
                assert again.results["scores"][model][stage]["loss"] == cell["loss"]
    finally:
        shutil.rmtree(folder / "run", ignore_errors=True)
        shutil.move(whole, folder / "run")


@pytest.mark.slow
def test_means_against_forgetting_leave_more_of_the_stage_before(done, folder, tmp_path):
    """EWC, L2 to the start and the average of both models, each against the same stage without replay."""
    losses = {}
    for name, changed in {
        "none": {}, "ewc": {"optim.ewc": 3e3}, "l2": {"optim.start_l2": 10.0}, "average": {"average": (0.25, 1.0)},
    }.items():  # fmt: skip
        c = settings(folder, replay=0.0, **changed)
        c.run_dir = str(tmp_path / name)
        lines = []
        result = ftjax.train(c, say=lines.append)
        losses[name] = result.results["scores"]["back"]["words"]["loss"]
        if name == "average":
            assert any("mean loss by factor 0.25: " in line for line in lines)
            base, tuned, mean = (
                load_file(tmp_path / name / part / "model.safetensors")
                for part in ("words/merged", "back/merged", "back-average-0.25")
            )
            for key, x in mean.items():
                np.testing.assert_allclose(x, 0.75 * base[key] + 0.25 * tuned[key], atol=1e-6)
    assert all(losses[name] < losses["none"] for name in losses if name != "none"), losses


def test_an_average_predicts_as_the_model_after_its_stage(tmp_path):
    """It makes vectors in the same way, and reads rows by the same recipe; so does a student of some of its layers."""
    base = tiny_labelled.make(tmp_path / "base", "bert")
    family, shape = families.read_config(base)
    recipe = {"data.max_length": 9, "task.text": "review"}
    vectors = pooling.Pooling("cls", 12)
    weights_of.write_model(
        tmp_path / "after", weights_of.read_params(base, family, shape), base, family, shape,
        record={"recipe": recipe, "privacy": {"epsilon": 3.0}, "config": {}},
        beside=lambda folder: pooling.write(folder, vectors, shape.width),
    )  # fmt: skip
    derived.averaged(base, tmp_path / "after", 0.5, tmp_path / "average")
    derived.student(str(tmp_path / "after"), (1,), tmp_path / "student")
    for made in ("average", "student"):
        assert pooling.read(tmp_path / made) == vectors
        assert recipe_in(tmp_path / made) == recipe_in(tmp_path / "after")
        assert recipe_in(tmp_path / made)["task.text"] == "review"
        assert resolve.written(tmp_path / made)["privacy"] == {"epsilon": 3.0}


def test_an_average_has_new_rows_and_a_new_head_as_they_were_before_the_stage(tmp_path):
    base = Path(assets.resolve("builtin:stories260K"))
    family, shape = families.read_config(base)
    before = weights_of.read_params(base, family, families.with_rows(shape, (shape.vocab_size,)), new_rows=5)
    assert shape.tied and len(before["embed"]["embedding"]) == shape.vocab_size + 1
    after = before | {"lm_head": {"kernel": before["embed"]["embedding"] + 1.0}}
    grown = dataclasses.replace(shape, vocab_size=shape.vocab_size + 1, tied=False)
    weights_of.write_model(tmp_path / "after", after, base, family, grown)
    found = weights_of.read_params(
        derived.averaged(base, tmp_path / "after", 0.25, tmp_path / "average", 5), family, grown
    )
    np.testing.assert_array_equal(found["embed"]["embedding"], before["embed"]["embedding"])
    np.testing.assert_allclose(found["lm_head"]["kernel"], before["embed"]["embedding"] + 0.25, atol=1e-6)


def test_a_new_head_is_averaged_with_its_values_before_the_first_step(tmp_path):
    c = tiny_labelled.config(tmp_path, tiny_labelled.make(tmp_path / "llama", "llama"))
    c.train.update(steps=2, batch_size=8, eval_every=2)
    c.optim.lr = 1e-12  # nothing moves, so that the average must be the model itself
    rows = {"data.train": c.data.train, "data.validation": c.data.test, "data.test": c.data.test}
    c.stages = ({"name": "one", **rows, "average": 0.25},)
    ftjax.train(c, say=lambda line: None)
    end, mean = (load_file(tmp_path / "run" / at / FILE) for at in ("one/merged", "one-average-0.25"))
    assert end.keys() == mean.keys() and np.abs(end["score.weight"]).min() > 0
    for name, x in end.items():
        np.testing.assert_allclose(mean[name], x, atol=1e-6)
    c.stages = ({**c.stages[0], "average": (0.25, 0.5)},)
    with pytest.raises(FtjaxError, match="stages: one: average: its factor is chosen by the mean loss per token on "):
        ftjax.train(c, say=lambda line: None)


def test_an_adapter_is_not_added_in_two_stages(folder):
    c = settings(folder)
    c.tuning.init_from = "adapter"
    with pytest.raises(FtjaxError, match="stages: back: tuning.init_from: an earlier stage starts from this adapter"):
        configs.staged(c)
    c.stages = (c.stages[0], {**c.stages[1], "tuning.init_from": ""})
    assert [stage.config.tuning.init_from for stage in configs.staged(c)] == ["adapter", ""]


def test_ewc_needs_earlier_rows_and_an_average_a_whole_model(folder):
    c = configs.copy(configs.staged(settings(folder))[0].config)
    c.optim.ewc = 1.0
    with pytest.raises(FtjaxError, match="data.earlier: optim.ewc needs rows of earlier stages"):
        ftjax.train(c, say=lambda line: None)
    c = settings(folder, average=(0.5,), **{"tuning.method": "prompt"})
    with pytest.raises(FtjaxError, match="stages: back: prompt makes no whole model .* to be averaged"):
        ftjax.train(c, say=lambda line: None)


@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_a_stage_of_preferences_is_compared_with_the_model_before_it(tmp_path, quantise):
    """The merged model of a stage has no adapter that a reference could be without; a quantised base is the reference
    as it is in training."""
    pairs = [{"prompt": "it was", "chosen": " fine", "rejected": " dull"}] * 8
    c = tiny_labelled.config(tmp_path, tiny_labelled.make(tmp_path / "llama", "llama"), task__kind="preference")
    c.train.update(steps=2, batch_size=8, eval_every=2)
    c.model.quantise = quantise
    file = tiny_labelled.write(tmp_path / "pairs.jsonl", pairs)
    c.stages = ({"name": "pairs", "data.train": file, "data.validation": file, "data.test": file},)
    said: list[str] = []
    found = ftjax.train(c, say=said.append).results["scores"]["pairs"]["pairs"]
    assert any("before is the base as its files have it" in line for line in said) == (quantise == "nf4")
    known = ftjax.evaluate(str(tmp_path / "run/pairs"), file, say=lambda line: None)  # the adapter beside its base
    assert found["loss"] == pytest.approx(known["loss"], abs=1e-5)
    assert found["margin"] == pytest.approx(known["margin"], abs=1e-5)
    assert found["margin"] > 0
    rows = read_metrics(tmp_path / "run/pairs")
    assert found["margin"] == pytest.approx(rows[-1]["val_margin"], abs=1e-5)


def test_a_factor_of_a_private_stage_is_not_chosen_on_rows(folder):
    c = settings(folder, average=(0.5, 1.0), **{"privacy.epsilon": 3.0})
    with pytest.raises(FtjaxError, match="stages: back: average: private training .* needs one factor"):
        ftjax.train(c, say=lambda line: None)


def test_a_factor_is_chosen_on_validation_rows_of_all_stages(folder):
    c = settings(folder, average=(0.5, 1.0), **{"data.validation": "", "data.test": str(folder / "held_out.jsonl")})
    with pytest.raises(FtjaxError, match="stages: back: average: its factor is chosen by the mean loss per token on "):
        ftjax.train(c, say=lambda line: None)


def test_replayed_rows_are_a_share_of_a_stage(folder):
    first, second = configs.staged(settings(folder, **{"evaluate.metrics": ("length",)}))
    mixed = configs.copy(second.config)
    mixed.data.mixture = stages._mixed([first], second)
    found = configs.sources(mixed)
    assert [(one.name, one.weight) for one in found] == [("words", 0.25), ("back", 0.75)]
    assert [one.data.prompt for one in found] == [WORDS["data.prompt"], BACK["data.prompt"]]
    assert [one.config.evaluate.metrics for one in found] == [("rouge_l",), ("length",)]  # each by its own


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"name": "words"}, "two of them have the name 'words'"),
        ({"name": "a/b"}, "a name that can be a folder's"),
        ({"name": "before"}, "stages: before: is a name that a run of stages uses itself"),
        ({"replay": 1.0}, "stages: back: replay: expected a number at least 0 and below 1"),
        ({"data.trian": "x"}, "stages: back: data.trian: no such key"),
        ({"model.path": "x"}, "'model.path' follows from the order of the stages"),
        ({"run_dir": "x"}, "'run_dir' follows from the order of the stages"),
        ({"data.validation": ""}, "name held-out rows in data.validation or data.test"),
        ({"train.spike": 0.5}, "stages: back: train.spike: expected 0 or a number above 1"),
    ],
)
def test_a_stage_that_cannot_be_is_named(changed, told, folder):
    with pytest.raises(FtjaxError, match=told):
        ftjax.train(settings(folder, **changed))


def test_an_epoch_with_replay_is_a_pass_over_the_rows_of_the_stage(folder, monkeypatch):
    """However many rows the earlier stages have."""
    few = folder / "few.jsonl"
    few.write_text("".join((folder / "train.jsonl").read_text().splitlines(keepends=True)[:8]))
    first, second = configs.staged(settings(folder, **{"data.train": str(few), "train.epochs": 2.0}))
    seen = []
    monkeypatch.setattr(stages.loop, "train", lambda config, say: seen.append(config))
    stages._run([first], second, folder, print)
    others, own = (len(source.tables["train"]) for source in prepare.rows(seen[0])[0])
    assert own <= 8 < others / 4
    assert 0.75 * (others + own) * seen[0].train.epochs == pytest.approx(2.0 * own)


@pytest.mark.parametrize("change", [{}, {"replay": 0.0, "optim.ewc": 1.0}])
def test_rows_of_a_mixture_are_not_read_again(folder, change):
    c = settings(folder, **change)
    c.stages = ({**c.stages[0], "data.mixture": ({"train": str(folder / "train.jsonl")},)}, c.stages[1])
    with pytest.raises(FtjaxError, match="stages: back: (replay|optim.ewc): the rows of stage words are a mixture"):
        configs.staged(c)


@pytest.mark.parametrize("name", ["x1.jsonl", "x1.jsonl,x2.jsonl", "x?.jsonl", "x2.jsonl"])
def test_other_held_out_rows_or_other_metrics_are_scored_anew(name, tmp_path, monkeypatch):
    c, found = configs.default(), []
    c.evaluate.metrics = (f"{tmp_path}/own.py:score",) * (name == "x2.jsonl")
    c.data.test = ",".join(str(tmp_path / part) for part in name.split(","))
    stage = dataclasses.make_dataclass("Stage", ["name", "config"])("words", c)
    monkeypatch.setattr(stages, "evaluate", lambda *_, **how: {"loss": 1.0})
    monkeypatch.setattr(stages.fingerprint, "weights_digests", lambda model: {"model": "same"})
    (tmp_path / "x2.jsonl").write_text('{"text": "b"}\n')
    for text in "abb":
        (tmp_path / "x1.jsonl").write_text(json.dumps({"text": text}) + "\n")
        (tmp_path / "own.py").write_text(text)
        found.append(stages._scored(tmp_path, stage, {})["key"])
    assert found[0] != found[1] == found[2]


def test_a_model_is_scored_on_the_rows_whose_tokens_it_has(folder, tmp_path, monkeypatch):
    """A model without them would read other tokens, and have no token that ends an answer."""
    c = settings(folder, **{"data.add_tokens": ("<|end|>",), "data.end": "<|end|>"})
    c.run_dir = str(tmp_path / "run")
    result = dataclasses.make_dataclass("Result", ["results", "files"])(None, {})
    monkeypatch.setattr(stages, "_run", lambda *_: (result, tmp_path))
    monkeypatch.setattr(stages, "_scored", lambda *_: {"loss": 1.0, "key": ""})
    told = ftjax.train(c, say=lambda line: None).results["scores"]
    assert {model: list(row) for model, row in told.items()} == {
        "before": ["words"], "words": ["words"], "back": ["words", "back"],
    }  # fmt: skip


def test_a_stage_without_a_whole_model_comes_last(folder):
    c = settings(folder)
    c.stages = tuple({**stage, "tuning.method": "prefix"} for stage in c.stages)
    with pytest.raises(FtjaxError, match="stages: words: prefix makes no whole model for the next stage"):
        ftjax.train(c)


def test_a_run_folder_without_a_whole_model_is_no_base(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    c = configs.default()
    c.model.path = str(tmp_path)
    with pytest.raises(FtjaxError, match="a run folder without a whole model.*ftjax export --run"):
        ftjax.train(c)
