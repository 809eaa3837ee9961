"""Episodes of several turns with an environment of the user, on a tiny random model."""

import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_labelled
from safetensors.numpy import load_file
from tiny_labelled import WORDS, make, write

import ftjax
from ftjax import user_code
from ftjax.data.prepare import prepare
from ftjax.lm import stop_tokens
from ftjax.objectives import policy as objective
from ftjax.tasks import policy
from ftjax.training.report import read_metrics

WORLD = """
class World:
    def __init__(self):
        self.turn = 0

    def reset(self, row):
        self.n = row.pop("n")
        return {prompt}

    def step(self, text):
        self.turn += 1
        if self.n == 3 and self.turn == {faulty}:
            return {fault}
        return {reply}, sum(word in {good} for word in text.split()) / 4, self.turn == {turns}
"""
PARTS = {"prompt": "None", "reply": "' film it was'", "turns": "3", "faulty": 0, "fault": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture
def setting(base, tmp_path):
    """setting(parts of WORLD, **overrides) -> the config of a run with an environment."""
    rows = [{"prompt": "the film it was", "n": n} for n in range(1, 13)]

    def made(parts=(), **overrides):
        file = tmp_path / "world.py"
        file.write_text(
            WORLD.format(good=set(WORDS["good"]), **(PARTS | {"faulty": 2 if "fault" in parts else 0} | dict(parts)))
        )
        c = tiny_labelled.config(tmp_path, base, task__kind="policy", **{"data__max_length": "32"} | overrides)
        c.data.update(train=write(tmp_path / "rows.jsonl", rows), test="", split=(0.5, 0.5, 0.0))
        c.task.update(environment=f"{file}:World", beta=0.01)
        c.train.update(steps=4, batch_size=12, log_every=1, eval_every=2)
        c.generate.max_new_tokens, c.rollout.group = 4, 4
        return c

    return made


@pytest.fixture(scope="module")
def lm(base):
    return ftjax.load(base)


def played(lm, c, how=None):
    """(the rows, the episodes of the first six of them)."""
    data = prepare(c, lm.tokenizer, 64)
    c.data.split = (1.0, 0.0, 0.0)
    every = prepare(c, lm.tokenizer, 64)
    found = policy.episodes(lm, lm.variables, every.train, np.arange(6), c, (1, 2), how or c.rollout)
    return data, found


def runs(one):
    """(whether the model drew them, ids) of each text of an episode."""
    for own in np.split(np.arange(len(one.ids)), 1 + np.flatnonzero(np.diff(one.own))):
        yield bool(one.own[own[0]]), [one.ids[i] for i in own]


@pytest.mark.parametrize("sampling", [(1.0, 0, 1.0, False), (0.8, 6, 0.9, True)])
def test_only_drawn_tokens_are_trained_with_the_probabilities_they_were_drawn_with(lm, base, setting, sampling):
    import torch
    from transformers import AutoModelForCausalLM

    c = setting()
    c.rollout.temperature, c.rollout.top_k, c.rollout.top_p, c.data.packing = sampling
    c.task.update(updates=2, beta=0.0)
    c.train.batch_size, c.rollout.group = 6, 2
    data, found = played(lm, c)
    theirs = AutoModelForCausalLM.from_pretrained(base).double()
    reply = lm.tokenizer(" film it was", add_special_tokens=False)["input_ids"]
    for prompt, one, _ in found:
        texts = list(runs(one))
        assert [own for own, _ in texts] == [True, False] * (one.turns - 1) + [True]
        assert all(ids == reply for own, ids in texts if not own)
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + one.ids])).logits[0, len(prompt) - 1 : -1] / sampling[0]
        V = len(lm.tokenizer)  # the model's table has further rows, which are never drawn
        logits = logits.numpy()[one.own, :V]
        if sampling[1]:
            kept = np.unpackbits(one.kept, axis=1)[:, :V].astype(bool)
            assert (kept.sum(1) <= sampling[1]).all()
            logits = np.where(kept, logits, -np.inf)
        drawn = np.array(one.ids)[one.own]
        expected = logits[np.arange(len(drawn)), drawn] - np.log(np.exp(logits).sum(1))
        np.testing.assert_allclose(one.log_probs, expected, atol=2e-5)
    prompts, answers, rewards = zip(*found)
    batches = policy.updates(lm, lm.variables, data, c, list(prompts), list(answers), {"reward": np.array(rewards)})
    for batch in batches:
        there = batch["weights"] > 0
        assert there.sum() == sum(one.own.sum() for one in answers) < (batch["segment_ids"] > 0).sum()
        labels = sorted(batch["labels"][there].tolist())
        assert labels == sorted(np.concatenate([np.array(one.ids)[one.own] for one in answers]).tolist())
        told = jax.jit(lambda b: objective.sums(lm.model, lm.variables, b, **policy.always(c)))(batch)
        assert told[1] == 6
        figures = {name: float(x) / 6 for name, x in told[2].items()}
        assert abs(figures["ratio"] - 1) < 1e-6 and figures["gap"] < 3e-6
        assert figures["length"] == pytest.approx(there.sum() / 6)


@pytest.mark.parametrize(
    "overrides, most, turns, ended",
    [
        ({}, 29, 3, True),
        ({"rollout__turns": "2"}, 29, 2, False),
        ({"data__max_length": "18"}, 18, 2, False),  # five tokens of the prompt, then 4 + 3 and 4
    ],
)
def test_an_episode_ends_by_itself_or_at_the_limits_of_turns_and_tokens(lm, setting, overrides, most, turns, ended):
    _, found = played(lm, setting(generate__stop="()", **overrides))
    full = [(p, one) for p, one, _ in found if len(one.log_probs) == 4 * one.turns]  # no turn ended early
    assert full
    for prompt, one in full:
        assert (one.turns, one.ended) == (turns, ended)
        assert len(prompt) + len(one.ids) <= most
        assert one.own[-1]  # the last reply, which nothing follows, is left out
    assert all(one.turns <= turns for _, one, _ in found if not ended)


def test_the_rewards_of_the_turns_add_up_and_greedy_episodes_are_measured(lm, setting):
    c = setting()
    c.generate.temperature = 0.0
    _, found = played(lm, c, c.generate)
    for prompt, one, reward in found:
        words = [lm.tokenizer.decode(i) for i, own in zip(one.ids, one.own) if own]
        expected = sum(word in WORDS["good"] for word in words) / 4
        assert one.turns == 3 and reward == pytest.approx(expected)
        for at in np.flatnonzero(one.own):  # every own token is the most probable one
            logits = lm.logits([prompt + one.ids[:at]])[0, -1, : len(lm.tokenizer)]
            assert logits.argmax() == one.ids[at]
    part = prepare(c, lm.tokenizer, 64).train
    told = policy.measure(lm, lm.variables, part, c)
    assert told["reward"] == -told["loss"] == pytest.approx(np.mean([r for _, _, r in found]))  # all have one prompt


def test_an_environment_may_give_the_prompt(lm, setting):
    for shown, one, _ in played(lm, setting({"prompt": "'a film'", "reply": "'it'"}))[1]:
        assert shown == lm.tokenizer("a film")["input_ids"]
        assert all(lm.tokenizer.decode(ids) == "it" for own, ids in runs(one) if not own)


def test_an_environment_talks_by_the_chat_template(lm, setting, monkeypatch):
    template = "{% for m in messages %}[CLS] {{ m.content }} [SEP] {% endfor %}"
    monkeypatch.setattr(lm.tokenizer, "chat_template", template + "{% if add_generation_prompt %}[CLS]{% endif %}")
    prompt, closed = "[{'role': 'user', 'content': 'a film'}]", set()
    for reply in ("'it was'", "[{'role': 'tool', 'content': 'it was'}]"):
        for shown, one, _ in played(lm, setting({"prompt": prompt, "reply": reply}))[1]:
            assert lm.tokenizer.decode(shown) == "[CLS] a film [SEP] [CLS]"
            before: list = []
            for own, ids in runs(one):
                if not own:  # the end of the answer is the template's where the model did not write it
                    closed.add(before[-1] == lm.tokenizer.sep_token_id)
                    open_ = "" if before[-1] == lm.tokenizer.sep_token_id else "[SEP] "
                    assert lm.tokenizer.decode(ids) == open_ + "[CLS] it was [SEP] [CLS]"
                before = ids
    assert closed == {True, False}


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"fault": "1 / 0, 0.0, True"}, r"turn 2, text '.*': task.environment '.*' failed at line 13: ZeroDivisionErr"),
        ({"fault": "'', float('nan'), True"}, r"turn 2, text '.*': task.environment '.*' returned \('', nan, True\)"),
        ({"fault": "'', 10**400, True"}, r"turn 2, text '.*' returned \('', 10{160,200}; expected three values"),
        ({"fault": "None"}, r"turn 2, text '.*' returned None; expected three values"),
        ({"fault": "'', 1.0"}, r"turn 2, .*; expected three values"),
        (
            {"fault": "[{'role': 'tool', 'content': 'x'}], 1.0, False"},
            r"turn 2, .*; expected three values: .* of a chat",
        ),
        ({"fault": "None, 1.0, True"}, r"turn 2, .*; expected three values"),
        ({"fault": "'', 1.0, 'no'"}, r"turn 2, .*; expected three values"),
        (
            {"prompt": "1 / 0 if self.n == 3 else None"},
            "reset: task.environment '.*' failed at line 8: ZeroDivisionError",
        ),
        ({"prompt": "3 if self.n == 3 else None"}, "reset: task.environment '.*' returned 3; expected a prompt"),
        ({"prompt": "'a ' * 40 if self.n == 3 else None"}, "its prompt has 4. tokens, which leaves no room"),
    ],
)
def test_an_environment_that_fails_is_named_with_row_and_turn(lm, setting, parts, message):
    with pytest.raises(ftjax.FtjaxError, match=rf"rows.jsonl row 3[,:] {message}"):
        played(lm, setting(parts))


def test_a_run_learns_in_an_environment_and_a_run_folder_names_no_code(setting, tmp_path):
    c = setting(optim__lr="3e-2", data__packing="True", task__updates="2", rollout__top_k="12")
    c.train.update(steps=16, batch_size=24, eval_every=16)
    ftjax.train(c, say=lambda text: None)
    steps = [row for row in read_metrics(c.run_dir) if "loss" in row]
    assert [abs(row["ratio"] - 1) < 1e-6 for row in steps] == [True, False] * 8
    assert max(row["gap"] for row in steps) < 1e-5
    assert np.mean([row["reward"] for row in steps[-6:]]) > 0.3 + np.mean([row["reward"] for row in steps[:6]])
    with pytest.raises(ftjax.FtjaxError, match="task.rewards: names no reward"):
        ftjax.evaluate(c.run_dir, c.data.train, say=lambda text: None)
    named = [f"task.environment={c.task.environment}"]
    again = ftjax.evaluate(c.run_dir, c.data.train, overrides=named, say=lambda text: None)
    assert again["reward"] > 0.5 and again["turns"] == 3
    with pytest.raises(ftjax.FtjaxError, match="generate.best_of: does not apply to task.environment"):
        ftjax.evaluate(c.run_dir, c.data.train, overrides=[*named, "generate.best_of=2"], say=lambda text: None)
    with pytest.raises(ftjax.FtjaxError, match="--generate answers every prompt once, and this model plays whole epis"):
        ftjax.evaluate(c.run_dir, c.data.train, overrides=named, generate=True, say=lambda text: None)


HIT = """
def hit():
    import os, pathlib, sys
    frame, left = sys._getframe(), pathlib.Path({left!r})
    while frame and frame.f_code.co_name != "collect":
        frame = frame.f_back
    if frame and left.exists():
        left.write_text(str(n := int(left.read_text()) - 1))
        if not n:
            left.unlink()
            os.kill(os.getpid(), 9)
    return " film it was"
"""


def test_a_run_killed_between_the_turns_of_its_episodes_ends_in_the_same_bits(setting, tmp_path, forks):
    c = setting({"reply": "hit()"})
    c.export.formats = ("adapter",)
    world, left = tmp_path / "world.py", tmp_path / "left"
    world.write_text(world.read_text() + HIT.format(left=str(left)))
    ends = []
    for name in ("whole", "killed"):
        c.run_dir = str(tmp_path / name)
        if name == "killed":
            left.write_text(str(3 * 36 + 12 + 6))  # of the last step's 12 episodes, half have their second reply
            (tmp_path / "config.json").write_text(c.to_json_best_effort())
            code = "import json, ftjax, sys; ftjax.train(ftjax.config.from_dict(json.load(open(sys.argv[1]))))"
            status, said = forks.run(tmp_path, [str(tmp_path / "config.json")], program=code)
            assert status == -signal.SIGKILL and not left.exists(), said
        said = []
        ftjax.train(c, say=said.append)
        steps = [
            [row[k] for k in ("step", "loss", "reward", "turns")] for row in read_metrics(c.run_dir) if "loss" in row
        ]
        ends.append((steps, load_file(Path(c.run_dir) / "adapter/adapter_model.safetensors")))
        assert any("going on after step 2" in line for line in said) == (name == "killed")
    (steps, whole), (again, killed) = ends
    assert steps == again and [step for step, *_ in steps] == [1, 2, 3, 4]
    assert whole.keys() == killed.keys() and all(np.array_equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task.environment": "world.py:World"}, "task.environment: 'world.py:World': expected \"file.py:name\""),
        ({"task.environment": f"{__file__}:played"}, "has no methods reset and step; expected a class with both"),
        ({"task.rewards": "('length',)"}, "task.rewards: does not apply to task.environment"),
        ({"task.reward_weights": "(2.0,)"}, "task.reward_weights: does not apply to task.environment"),
        ({"evaluate.compare": "True"}, "evaluate.compare: does not apply to task.environment"),
        ({"generate.best_of": "2"}, "generate.best_of: does not apply to task.environment"),
    ],
)
def test_what_cannot_be_used_with_an_environment_is_refused(setting, settings, message):
    c = setting()
    ftjax.config.override(c, [f"{key}={value}" for key, value in settings.items()])
    with pytest.raises(ftjax.FtjaxError, match=message):
        policy.check(c, None, None, None)


def test_a_stop_string_is_the_token_that_follows_other_text():
    tokenizer = ftjax.load("builtin:stories260K").tokenizer
    (token,) = stop_tokens(tokenizer, ("=",))
    assert token in tokenizer("2+3=5")["input_ids"]
    (space,) = tokenizer.convert_tokens_to_ids(["▁ha"])
    assert stop_tokens(tokenizer, (" ha",)) == (space,)
    with pytest.raises(ftjax.FtjaxError, match="stop: the tokenizer makes 2 tokens of '2='"):
        stop_tokens(tokenizer, ("2=",))


def test_the_calculator_works_out_a_solution_of_gsm8k():
    """The first row of GSM8K's training rows, with the calculator's annotations as they are there."""
    answer = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
    made = user_code.load(f"{Path(__file__).parents[1] / 'configs/grpo_calculator.py'}:Calculator", "task.environment")
    for end, reward in (("#### 72", 1.0), ("#### 27", 0.0)):
        world, at = made(), 0
        assert world.reset({"answer": answer}) is None
        for turn in ("Natalia sold 48/2 = <<48/2", "24 clips in May.\nNatalia sold 48+24 = <<48+24"):
            reply, nothing, done = world.step(turn)
            assert (nothing, done) == (0.0, False)
            assert f"{turn}={reply}" in answer[at:]
            at = answer.index(turn) + len(turn)
        assert world.step(f"72 clips.\n{end}") == ("", reward, True)
    assert [world.step(f"<<{text}")[0] for text in ("7/2", "8/0", "2**9", "__import__('os')")] == [
        "3.5>>", "error>>", "error>>", "error>>"
    ]  # fmt: skip
