"""Reward models: trained on pairs of answers, written for transformers, and choosing the best of several answers."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_preference_runs import chat, rows
from tiny_labelled import config, make, write

import ftjax
from ftjax import user_code
from ftjax.evaluation import best
from ftjax.lm import continue_tokens
from ftjax.training.report import read_metrics


def margins(count: int, seed: int) -> list[dict]:
    return [row | {"margin": 0.25 * (i % 3)} for i, row in enumerate(rows(count, seed))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, folder) of a reward model that was trained whole."""
    folder = tmp_path_factory.mktemp("reward")
    c = config(folder, make(folder / "llama", "llama"), task__kind="reward", tuning__method="full")
    c.data.update(train=write(folder / "pairs.jsonl", margins(64, 0)), test=write(folder / "held.jsonl", rows(40, 1)))
    c.data.update(max_length=32, buckets=1)
    c.train.update(steps=40, eval_every=40)
    c.optim.lr = 3e-3
    ftjax.train(c, say=lambda text: None)
    return c, folder


def test_a_reward_model_gives_the_score_of_transformers(run):
    import torch
    import transformers

    c, folder = run
    results = json.loads((folder / "run" / "results.json").read_text())["test"]["metrics"]
    assert results["accuracy"]["low"] < 0.95 < results["accuracy"]["value"]
    answers = [
        {"prompt": row["prompt"], "completion": row[side]} for row in rows(6, 2) for side in ("chosen", "rejected")
    ]
    answers += [{"prompt": "it was", "completion": " fine" * 40}]  # cut to data.max_length
    found = ftjax.predict(str(folder / "run"), write(folder / "answers.jsonl", answers), say=lambda text: None)
    pairs = ftjax.predict(str(folder / "run"), write(folder / "more.jsonl", rows(6, 2)), say=lambda text: None)
    again = ftjax.predict(str(folder / "run" / "full"), str(folder / "answers.jsonl"), say=lambda text: None)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "run" / "full")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "run" / "full")
    assert model.config.num_labels == 1
    texts = [f"{row['prompt']}{row['completion']}{tokenizer.eos_token}" for row in answers]
    with torch.no_grad():
        cut = {"truncation": True, "max_length": c.data.max_length}
        theirs = model(**tokenizer(texts, padding=True, return_tensors="pt", **cut)).logits[:, 0].numpy()
    for mine in (
        [row["score"] for row in found],
        [row["score"] for row in again],
        [row[side] for row in pairs for side in ("chosen", "rejected")],
    ):
        np.testing.assert_allclose(mine, theirs[: len(mine)], rtol=1e-4, atol=1e-4)
    told = ftjax.evaluate(str(folder / "run"), str(folder / "held.jsonl"), say=lambda text: None)
    assert told["metrics"]["accuracy"] == results["accuracy"]
    assert told["rows"] == 40


def test_twenty_steps_are_those_of_trl(run, tmp_path):
    """The same model, rows with margins and AdamW in TRL's RewardTrainer: the losses of all steps."""
    import datasets
    import transformers
    import trl

    c, folder = run
    train = margins(8, 3)
    c = ftjax.config.copy(c)
    c.model.path, c.run_dir = str(folder / "run" / "full"), str(tmp_path / "ours")
    c.data.update(train=write(tmp_path / "pairs.jsonl", train), test="", split=(1.0, 0.0, 0.0))
    c.train.update(steps=20, eval_every=20, batch_size=8, log_every=1, dropout=0.0)
    c.optim.update(lr=1e-3, schedule="constant", warmup=0, weight_decay=0.0, clip_norm=0.0)
    c.export.formats = ()
    ftjax.train(c, say=lambda text: None)
    ours = [row["loss"] for row in read_metrics(c.run_dir) if "loss" in row]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(c.model.path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(c.model.path)
    arguments = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"), max_steps=20, per_device_train_batch_size=8, learning_rate=1e-3,
        lr_scheduler_type="constant", weight_decay=0.0, adam_beta1=c.optim.b1, adam_beta2=c.optim.b2,
        adam_epsilon=c.optim.eps, max_grad_norm=0.0, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    trainer = trl.RewardTrainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(train), processing_class=tokenizer
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == len(theirs) == 20
    assert ours[-1] < 0.8 * ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rows_without_pairs_or_margins_are_refused(run, tmp_path):
    c = ftjax.config.copy(run[0])
    c.run_dir = str(tmp_path / "run")
    for train, message in (
        ([{"prompt": "it was", "completion": " fine"}] * 20, "task.kind=reward: rows need the columns chosen and"),
        (margins(20, 0)[:-1] + rows(1, 9), "pairs.jsonl row 20: column 'margin' holds None; expected a number"),
    ):
        c.data.train = write(tmp_path / "pairs.jsonl", train)
        with pytest.raises(ftjax.FtjaxError, match=message):
            ftjax.train(c, say=lambda text: None)


def test_the_best_of_several_answers_has_the_highest_score(run, tmp_path, capsys):
    """The answers that are drawn, scored one by one without padding; the first of the best ones is chosen."""
    from ftjax.cli import main

    c, folder = run
    lm, judge = ftjax.load(c.model.path), ftjax.load(str(folder / "run"))
    prompts = [row["prompt"] for row in rows(5, 4)]
    ids = [lm.tokenizer(prompt)["input_ids"] for prompt in prompts]
    how = {"temperature": 1.0, "max_new_tokens": 3, "seed": 1, "batch_size": 32}
    drawn = continue_tokens(lm, lm.variables, [prompt for prompt in ids for _ in range(4)], **how)
    expected, better = [], 0
    for n, prompt in enumerate(ids):
        mine = drawn[4 * n :][:4]
        texts = [prompt + answer + [lm.tokenizer.eos_token_id] * (len(answer) < 3) for answer in mine]
        scores = [float(judge.logits([text])[0, -1, 0]) for text in texts]
        expected.append(lm.tokenizer.decode(mine[int(np.argmax(scores))], skip_special_tokens=True))
        better += np.argmax(scores) > 0
    assert better
    found = best.continued(lm, lm.variables, ids, best_of=4, reward=str(folder / "run"), **how)
    assert [text.split() for text in found] == [text.split() for text in expected]
    asked = ["generate", "--model", c.model.path, "--max-new-tokens=3", "--temperature=1", "--seed=1", "--best-of=4"]
    asked += [f"--prompt={prompt}" for prompt in prompts]
    assert main([*asked, f"--reward={folder / 'run'}"]) == 0
    assert [text.split() for text in capsys.readouterr().out.splitlines()] == [
        f"{prompt} {text}".split() for prompt, text in zip(prompts, expected)
    ]
    for arguments, message in (
        ([], "generate.reward: expected the directory of a reward model where generate.best_of is set"),
        (
            ["--best-of=1", f"--reward={folder / 'run'}"],
            "generate.best_of: expected 2 or more where generate.reward is",
        ),
        (["--temperature=0", f"--reward={folder / 'run'}"], "generate.temperature: expected more than 0"),
        ([f"--reward={c.model.path}"], "is no reward model; expected a head with one label"),
    ):
        assert main([*asked, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_reward_model_rewards_the_answers_of_a_policy(run, tmp_path):
    from ftjax.data.prepare import prepare
    from ftjax.hub.tokenizer import load_tokenizer
    from ftjax.tasks import policy

    _, folder = run
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(6, 2)]
    c = config(tmp_path, folder / "llama", task__kind="policy", tuning__method="lora", data__max_length="32")
    c.data.update(train=write(tmp_path / "answers.jsonl", answers), test="", split=(1.0, 0.0, 0.0))
    judge = shutil.copytree(folder / "run" / "full", tmp_path / "judge", ignore=lambda *_: ["ftjax.json"])
    c.task.update(rewards=(str(judge),), beta=0.0)
    c.rollout.group, c.generate.max_new_tokens = 4, 3
    c.train.update(steps=2, batch_size=8, log_every=1)
    ftjax.train(c, say=lambda text: None)
    steps = [row for row in read_metrics(c.run_dir) if "reward" in row]
    assert len(steps) == 2
    assert all(row["reward"] != 0 and row["flat"] < 1 for row in steps)
    tokenizer = load_tokenizer(c.model.path)
    part = prepare(c, tokenizer, 64).train
    prompts = [part.examples[i].ids.tolist() for i in range(6)]
    new = [tokenizer(row["completion"], add_special_tokens=False)["input_ids"] for row in answers]
    found = policy.rewards(c, part, np.arange(6), prompts, new, tokenizer)["reward"]
    known = ftjax.predict(str(folder / "run"), str(tmp_path / "answers.jsonl"), say=lambda text: None)
    np.testing.assert_allclose(found, [row["score"] for row in known], rtol=1e-5, atol=1e-5)
    # A reward model that is trained again stays what it was in the run that reads it, and in no other.
    with user_code.held():
        ours = [policy.rewards(c, part, np.arange(6), prompts, new, tokenizer)["reward"]]
        tensors = load_file(file := judge / "model.safetensors")
        save_file(tensors | {"score.weight": 2 * tensors["score.weight"]}, file, {"format": "pt"})
        ours.append(policy.rewards(c, part, np.arange(6), prompts, new, tokenizer)["reward"])
    later = policy.rewards(c, part, np.arange(6), prompts, new, tokenizer)["reward"]
    np.testing.assert_allclose([*ours, later / 2], [found] * 3, rtol=1e-5, atol=1e-5)


def test_a_chat_is_scored_as_it_was_trained(tmp_path):
    """With all that a template writes behind an answer that has ended, at which the score is read."""
    from transformers import AutoTokenizer

    from ftjax.data.template import asked
    from ftjax.data.tokenise import encode_prompts

    base = make(tmp_path / "llama", "llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[MASK] ' + ('film ' if m.role == 'user' else 'it ') + m.content + ' [SEP] of ' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[MASK] it ' }}{% endif %}"
    )
    tokenizer.save_pretrained(base)
    chats = [{side: chat(row["prompt"], row[side]) for side in ("chosen", "rejected")} for row in rows(16, 0)]
    c = config(tmp_path, base, task__kind="reward", tuning__method="full", data__max_length="32")
    c.data.update(train=write(tmp_path / "pairs.jsonl", chats), test="", split=(1.0, 0.0, 0.0), buckets=1)
    c.train.update(steps=1, eval_every=1)
    ftjax.train(c, say=lambda text: None)
    found = ftjax.predict(c.run_dir, str(tmp_path / "pairs.jsonl"), say=lambda text: None)
    judge = best.reward_model(c.run_dir, tokenizer, "generate.reward")
    prompts = encode_prompts([asked({"messages": pair["chosen"][:1]}, "row") for pair in chats], tokenizer)
    new = [tokenizer(pair["chosen"][1]["content"])["input_ids"] for pair in chats]
    ours = best.scores(judge, [ids.tolist() for ids in prompts], new, 8, 16, "generate.reward")
    np.testing.assert_allclose(ours, [row["chosen"] for row in found], rtol=1e-5, atol=1e-5)
