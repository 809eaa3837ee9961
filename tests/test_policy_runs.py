"""Runs that learn from rewards, from files to files, on a tiny random model."""

import re

import numpy as np
import pytest
import tiny_labelled
from safetensors.numpy import load_file
from tiny_labelled import WORDS, make, write

import ftjax
from ftjax import config as configs
from ftjax.data.prepare import prepare
from ftjax.hub.tokenizer import load_tokenizer
from ftjax.tasks import policy
from ftjax.training import run_folder, sharding
from ftjax.training.check import check
from ftjax.training.job import scheduled
from ftjax.training.report import read_metrics

REWARD = """
import pathlib

GOOD = {good}

def good(prediction, references, row):
    return sum(word in GOOD for word in prediction.split()) / 3

def edited(prediction, references, row):
    pathlib.Path(__file__).write_text("def edited(*given): return 9")
    return good(prediction, references, row)

def uneven(prediction, references, row):
    return 1 / row["n"] if row["n"] != 3 else {value}
"""


def chat(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.fixture
def setting(tmp_path):
    """setting(**overrides) -> a config of a run on prompts alone, rewarded for good words."""
    base = make(tmp_path / "llama", "llama")
    rng = np.random.default_rng(0)
    rows = [{"prompt": " ".join(rng.choice(["a", "the", "film", "it", "was"], 3)), "n": n} for n in range(1, 41)]

    def made(reward="good", value="1 / 0", **overrides):
        file = tmp_path / "reward.py"
        file.write_text(REWARD.format(good=set(WORDS["good"]), value=value))
        c = tiny_labelled.config(tmp_path, base, task__kind="policy", data__max_length="32", **overrides)
        c.data.update(train=write(tmp_path / "prompts.jsonl", rows), test="", split=(0.8, 0.2, 0.0))
        c.task.update(rewards=(f"{file}:{reward}",), beta=0.01)
        c.train.update(steps=12, batch_size=16, log_every=1, eval_every=6)
        c.generate.max_new_tokens, c.rollout.group = 3, 4
        return c

    return made


def test_a_run_learns_what_is_rewarded(setting, tmp_path):
    c = setting(optim__lr="3e-2")
    c.train.update(steps=30, eval_every=15)
    c.evaluate.update(compare=True, compare_on="validation", metrics=c.task.rewards)
    result = ftjax.train(c, say=lambda text: None)
    steps = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [abs(row["ratio"] - 1) < 1e-6 for row in steps] == [True] * 30
    assert max(row["gap"] for row in steps) < 1e-5
    assert np.mean([row["reward"] for row in steps[-5:]]) > 0.3 + np.mean([row["reward"] for row in steps[:5]])
    assert steps[-1]["kl"] > steps[0]["kl"] == 0
    assert all(row["length"] <= 3 for row in steps)
    measured = [row for row in read_metrics(tmp_path / "run") if "val_loss" in row][-1]
    assert measured["val_reward"] == -measured["val_loss"] == pytest.approx(result.results["after"][c.task.rewards[0]])
    # The reward of a run folder is code that only the user may name.
    with pytest.raises(ftjax.FtjaxError, match="task.rewards: names no reward"):
        ftjax.evaluate(c.run_dir, c.data.train, say=lambda text: None)
    named = [f"task.rewards={c.task.rewards[0]}", "evaluate.metrics=length"]
    again = ftjax.evaluate(c.run_dir, c.data.train, overrides=named, say=lambda text: None)
    assert again["reward"] > 0.3 and "samples" not in again
    again = ftjax.evaluate(c.run_dir, c.data.train, overrides=named, generate=True, say=lambda text: None)
    assert again["length"] <= 3 and len(again["samples"]) > 1
    # The run is bound to the function's file, and a check does not run it.
    file, said = tmp_path / "reward.py", []
    file.write_text(file.read_text() + f"\nopen({str(tmp_path / 'was run')!r}, 'w').close()\n")
    assert not check(c.run_dir, said.append)
    changed = r"of the files that the config names, task.rewards\[0\]/reward.py was \w{8}, is \w{8}"
    (told,) = (line for line in said if not line.endswith(": ok"))
    assert re.fullmatch(f"the files that the config names: {changed}", told)
    assert not (tmp_path / "was run").exists()
    with pytest.raises(ftjax.FtjaxError, match=f"holds another run: {changed}"):
        ftjax.train(c, say=lambda text: None)


def test_a_run_that_is_killed_between_two_updates_goes_on_to_the_same_bits(setting, tmp_path, monkeypatch):
    c = setting(task__policy="gspo", task__updates="2", data__packing="True", rollout__top_k="8")
    c.train.update(steps=7, save_every=1, eval_every=4)  # rounded up to whole rollouts
    placed, place, trained = [], sharding.place_batch, []

    def stopped(*given):
        placed.append(given)
        if len(placed) == 6:
            raise KeyboardInterrupt
        return place(*given)

    for killed in (False, True):
        c.run_dir = str(tmp_path / f"run {killed}")
        with monkeypatch.context() as patch:
            if killed:
                patch.setattr(sharding, "place_batch", stopped)
                with pytest.raises(KeyboardInterrupt, match="checkpoint is that of step 4 of 8"):
                    ftjax.train(c, say=lambda text: None)
        result = ftjax.train(c, say=lambda text: None)
        assert (result.steps, result.resumed_from) == (8, 4 if killed else 0)
        rates = ("tokens_per_second", "seconds_left")
        rows = [{k: x for k, x in row.items() if k not in rates} for row in read_metrics(c.run_dir)]
        trained.append((load_file(f"{c.run_dir}/adapter/adapter_model.safetensors"), rows))
    (one, rows), (other, again) = trained
    assert rows == again
    assert all((one[name] == other[name]).all() for name in one)
    assert [row["ratio"] == 1 for row in rows if "ratio" in row] == [True, False] * 4


def test_the_prompts_of_a_step_are_of_all_lengths(setting, tmp_path):
    """Rows of like length share a batch to save padding. For prompts that would save nothing, and a step would have
    easy prompts alone or hard ones alone where the two differ in length."""
    c = setting()
    lengths = [1, 4, 8, 12] * 16
    c.data.update(train=write(tmp_path / "lengths.jsonl", [{"prompt": "it " * n} for n in lengths]), split=(1, 0, 0))
    tokenizer = load_tokenizer(tmp_path / "llama")
    data = prepare(c, tokenizer, 64)
    batches = scheduled(c, data, sharding.make_mesh(c.mesh), tokenizer).batches
    steps = [data.train.examples.length[np.concatenate(batches.rows(step))] for step in range(16)]
    assert np.mean([len(set(found.tolist())) for found in steps]) > 2  # of 4 prompts


def test_groups_without_spread_are_named_or_drawn_again(setting, tmp_path):
    shares = []
    for times in (0, 3):
        # A function whose file is edited during the run is the one that the run began with.
        c = setting("edited", rollout__resample=str(times), train__steps="2", train__eval_every="2")
        c.run_dir = str(tmp_path / f"run{times}")
        ftjax.train(c, say=lambda text: None)
        found = read_metrics(c.run_dir)
        named = {row["step"]: row for row in found if "flat_groups" in row}
        for row in found:
            if "flat" in row:
                assert row["reward"] <= 1
                told = named.get(row["step"], {"flat_groups": 0, "rows": []})
                assert row["flat"] == told["flat_groups"] / 4 == len(told["rows"]) / 4
                assert all("prompts.jsonl row " in place for place in told["rows"])
        shares.append(np.mean([row["flat"] for row in found if "flat" in row]))
    assert shares[0] > shares[1]


@pytest.mark.parametrize(
    "value, message",
    [
        ("1 / 0", "reward.py:uneven' failed at line 14: ZeroDivisionError"),
        ("float('nan')", "reward.py:uneven' returned nan; expected a finite number of at most 1e.18 for each answer$"),
        ("1e19", "reward.py:uneven' returned 1e.19; expected a finite number of at most 1e.18"),
        (
            "[1.0, 2.0]",
            r"reward.py:uneven' returned \[1.0, 2.0\]; expected a finite number of at most 1e.18",
        ),
        ("None", "reward.py:uneven' returned None; expected a finite number for each answer$"),
    ],
)
def test_a_reward_that_fails_is_named_with_its_row(setting, value, message):
    c = setting("uneven", value, train__eval_every="20")
    c.data.split = (1.0, 0.0, 0.0)
    with pytest.raises(ftjax.FtjaxError, match=rf"prompts.jsonl row 3, answer '.*': task.rewards '.*{message}"):
        ftjax.train(c, say=lambda text: None)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task__rewards": "()"}, "task.rewards: names no reward"),
        ({"task__rewards": "('coverag',)"}, 'task.rewards: unknown metric .coverag. .did you mean "coverage"'),
        ({"task__reward_weights": "(1.0, 2.0)"}, "task.reward_weights: expected 1 numbers"),
        ({"task__rewards": "('unsupported',)"}, "task.reward_weights: less of unsupported is better, and a w"),
        ({"train__batch_size": "18"}, "train.batch_size: 18 answers cannot be split into groups of rollout.group=4"),
        ({"train__spike": "3"}, "train.spike: does not apply to task.kind policy; expected 0, found 3"),
        ({"tuning__method": "full"}, "tuning.method='full': changes parameters of the base model, which task.beta"),
        ({"generate__max_new_tokens": "30"}, "prompts.jsonl row 1: its prompt has . tokens, which leaves no room"),
        ({"task__rewards": "('rouge_l',)"}, "prompts.jsonl row .*: has no answer, with which the reward rouge_l"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(setting, settings, message):
    c = setting()
    ftjax.config.override(c, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])
    with pytest.raises(ftjax.FtjaxError, match=message):
        ftjax.train(c, say=lambda text: None)


def test_the_rule_for_worked_solutions_is_a_reward(setting, tmp_path, monkeypatch):
    rows = [{"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}, {"question": "1 + 1?", "answer": "#### 2"}]
    c = setting()
    c.task.update(rewards=("number_match", "length"), reward_weights=(2.0, 0.5))
    c.data.update(train=write(tmp_path / "sums.jsonl", rows), split=(1.0, 0.0, 0.0))
    tokenizer = load_tokenizer(c.model.path)
    part = prepare(c, tokenizer, 64).train
    texts = ["It is 5.", "#### 6", "two, so 2.0"]
    monkeypatch.setattr(policy, "continuations", lambda *given: texts)  # the tiny tokenizer has no numbers
    found = policy.rewards(c, part, np.array([0, 0, 1]), [[1]] * 3, [[1]] * 3, tokenizer)
    assert found["reward/number_match"].tolist() == [1, 0, 1]
    np.testing.assert_allclose(found["reward"], 2 * found["reward/number_match"] + 0.5 * found["reward/length"])


def test_a_source_of_a_mixture_is_rewarded_by_its_own_settings(setting, tmp_path, monkeypatch):
    """And as they are what a run trains on, they cannot change when it goes on."""
    files = [
        write(tmp_path / f"{name}.jsonl", [{"prompt": "it", name: word}]) for name, word in (("x", "a"), ("y", "b"))
    ]
    c = setting()
    c.task.rewards = ("coverage",)
    c.data.update(train="", split=(1.0, 0.0, 0.0))
    c.data.mixture = tuple({"train": file, "evaluate.words": name} for file, name in zip(files, "xy", strict=True))
    tokenizer = load_tokenizer(c.model.path)
    part = prepare(c, tokenizer, 64).train
    monkeypatch.setattr(policy, "continuations", lambda *given: ["a", "a", "b"])
    found = policy.rewards(c, part, np.array([0, 1, 1]), [[1]] * 3, [[1]] * 3, tokenizer)
    assert found["reward"].tolist() == [1, 0, 1]
    other = configs.copy(c)
    other.data.mixture[0]["evaluate.words"] = "y"
    record = {"base": {}, "rows": "same"}
    claimed = [record | {"config": config.to_dict()} for config in (c, other)]
    run_folder._same_run(claimed[0], claimed[0], tmp_path)
    with pytest.raises(ftjax.FtjaxError, match="data.mixture was .*'x'.*, is .*'y'"):
        run_folder._same_run(*claimed, tmp_path)


@pytest.mark.parametrize(
    "row, settings, prompt",
    [
        ({"prompt": "it was"}, {}, "it was"),
        ({"prompt": "it was", "completion": " fine"}, {}, "it was"),
        ({"a": "film", "b": "x"}, {"data__prompt": "the {a}"}, "the film"),
        ({"messages": [{"role": "user", "content": "a"}]}, {"data__template": "plain"}, "a"),
        ({"messages": chat("a", "fine")}, {"data__template": "plain"}, "a"),
        ({"prompt": chat("a", "")[:1]}, {"data__template": "plain"}, "a"),
        ({"messages": chat("a", "fine") + chat("it was", "")[:1]}, {"data__template": "plain"}, "a fine it was"),
        ({"prompt": "a", "chosen": " fine", "rejected": " dull"}, {}, "a"),
        ({"a": "film", "system": "it was"}, {"data__prompt": "the {a}", "data__template": "plain"}, "it was"),
    ],
)
def test_rows_with_and_without_answers_give_prompts(setting, tmp_path, row, settings, prompt):
    c = setting(**settings)
    c.data.update(train=write(tmp_path / "rows.jsonl", [row]), split=(1.0, 0.0, 0.0))
    tokenizer = load_tokenizer(c.model.path)
    part = prepare(c, tokenizer, 64).train
    assert tokenizer.decode(part.examples[0].ids, skip_special_tokens=True).startswith(prompt)
    assert not part.examples[0].trained.any()
    np.testing.assert_array_equal(next(part.prompts(tokenizer)), part.examples[0].ids)
    answered = {"completion", "chosen"} & row.keys() or row.get("messages") == chat("a", "fine")
    assert part.reference(0, tokenizer) == ("fine" if answered else "")  # an answer within a prompt is none to compare
