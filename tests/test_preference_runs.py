"""Runs on preferences, from files to files, on a tiny random model."""

import json
import math
import shutil

import numpy as np
import pytest
from tiny_labelled import WORDS, config, make, write

import ftjax
from ftjax.training.report import read_metrics


def rows(count: int, seed: int) -> list[dict]:
    """Prompts whose better answer has a good word."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        prompt = " ".join(rng.choice(["a", "the", "film", "it", "was", "of"], rng.integers(2, 5)))
        out.append(
            {"prompt": prompt, "chosen": f" {rng.choice(WORDS['good'])}", "rejected": f" {rng.choice(WORDS['bad'])}"}
        )
    return out


def answers(count: int, seed: int) -> list[dict]:
    """The same prompts with one answer each, and whether it is desirable."""
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 3 == 2 else "chosen"], "label": i % 3 != 2}
        for i, row in enumerate(rows(count, seed))
    ]


@pytest.fixture
def setting(tmp_path):
    """setting(rows of train, **overrides) -> a config of a run on preferences."""
    base = make(tmp_path / "llama", "llama")

    def made(train, **overrides):
        usual = {"task__kind": "preference", "data__max_length": "32", "train__eval_every": "20"}
        c = config(tmp_path, base, **usual | overrides)
        c.data.update(train=write(tmp_path / "pairs.jsonl", train), test=write(tmp_path / "held.jsonl", rows(40, 1)))
        c.evaluate.update(samples=2, compare_rows=8)
        return c

    return made


def test_a_run_learns_which_answer_is_better(setting, tmp_path):
    c = setting(
        rows(200, 0),
        export__formats='("adapter",)',
        evaluate__compare="True",
        generate__max_new_tokens="4",
        train__log_every="1",
    )
    result = ftjax.train(c, say=lambda text: None)
    found = read_metrics(tmp_path / "run")
    first = next(row for row in found if "loss" in row)
    assert math.isclose(first["loss"], math.log(2), abs_tol=1e-5)  # the model is the reference
    assert first["margin"] == 0
    last = [row for row in found if "val_loss" in row][-1]
    assert last["val_loss"] < 0.4  # ln 2 before
    assert last["val_margin"] > 0.5
    assert last["val_reward_chosen"] > last["val_reward_rejected"]
    # what was trained is compared with the same base again when it is loaded
    again = ftjax.evaluate(str(tmp_path / "run"), str(tmp_path / "held.jsonl"), say=lambda text: None)
    assert again["accuracy"] > 0.9
    assert again["pairs"] == 40
    assert "perplexity" not in again
    # the perplexity is that of the chosen answers
    plain = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(40, 1)]
    known = ftjax.evaluate(ftjax.load(c.model.path), write(tmp_path / "plain.jsonl", plain), say=lambda text: None)
    compared = json.loads((tmp_path / "run" / "results.json").read_text())
    assert math.isclose(compared["before"]["perplexity"], known["perplexity"], rel_tol=1e-5)
    held = [row["prompt"] for row in rows(5, 1)]
    answers = ftjax.load(str(result.run_dir)).generate(held, max_new_tokens=1)
    assert all(answer.split()[-1] in WORDS["good"] for answer in answers)


@pytest.mark.parametrize("packing", [False, True])
def test_accumulation_and_packing_change_nothing(setting, tmp_path, packing):
    losses = []
    for accumulate in (1, 4):
        c = setting(rows(64, 0), train__steps="4", train__accumulate=str(accumulate), data__packing=str(packing))
        c.run_dir = str(tmp_path / f"run{accumulate}")
        c.train.update(batch_size=8, log_every=1)
        ftjax.train(c, say=lambda text: None)
        losses.append([row["loss"] for row in read_metrics(c.run_dir) if "loss" in row])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def chat(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    "form",
    [
        lambda p, a, b: {"prompt": chat(p, "")[:1], "chosen": chat("", a)[1:], "rejected": chat("", b)[1:]},
        lambda p, a, b: {"chosen": chat(p, a), "rejected": chat(p, b)},
        lambda p, a, b: {"prompt": p, "chosen": {"role": "assistant", "content": a}, "rejected": chat("", b)[1]},
        lambda p, a, b: {
            "conversations": [{"from": "human", "value": p}],
            "chosen": {"from": "gpt", "value": a}, "rejected": {"from": "gpt", "value": b},
        },
        lambda p, a, b: {name: f"\n\nHuman: {p}\n\nAssistant: {x}" for name, x in (("chosen", a), ("rejected", b))},
        lambda p, a, b: {"chosen": f"{p} {a}", "rejected": f"{p} {b}"},
        lambda p, a, b: {"prompt": p, "responses": [b, a], "scores": [0.5, 2]},
        lambda p, a, b: {"prompt": p, "answers": [chat("", b)[1], chat("", a)[1]], "ranks": [2, 1]},
        lambda p, a, b: {"id": "1", "prompt": p, "left": b, "right": a, "rating": "Right"},
    ],
    ids=["messages", "whole conversations", "a message each", "ShareGPT", "HH-RLHF", "a common beginning", "scores",
         "ranks", "ballots"],
)  # fmt: skip
def test_every_usual_form_gives_the_same_pairs(setting, form):
    from ftjax.data.prepare import prepare
    from ftjax.hub.tokenizer import load_tokenizer

    plain = [{name: cell.strip() for name, cell in row.items()} for row in rows(9, 0)]
    made = []
    for found in (plain, [form(*row.values()) for row in plain]):
        c = setting(found, data__template="plain")
        c.data.update(test="", split=(1.0, 0.0, 0.0))
        made.append(prepare(c, load_tokenizer(c.model.path), 64).train.examples)
    for one, other in zip(*made, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.trained, other.trained)
        assert one.second == other.second
        assert one.trained[: one.second].any()
        assert one.trained[one.second :].any()


def examples(c):
    """The examples of train of a config."""
    from ftjax.data.prepare import prepare
    from ftjax.hub.tokenizer import load_tokenizer

    c.data.update(test="", split=(1.0, 0.0, 0.0))
    return prepare(c, load_tokenizer(c.model.path), 64).train.examples


def test_a_ranked_list_is_a_pair_of_every_two_answers_that_differ_in_rank(setting):
    c = setting([{"prompt": "it was", "completions": [" dull", " fine", " warm", " flat"], "ranks": [3, 1, 2, 3]}])
    found, again = examples(c), setting(
        [{"prompt": "it was", "chosen": f" {a}", "rejected": f" {b}"} for a, b in
         (("fine", "warm"), ("fine", "dull"), ("fine", "flat"), ("warm", "dull"), ("warm", "flat"))]
    )  # fmt: skip
    for one, other in zip(found, examples(again), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
    best_first = setting([{"prompt": "it was", "answers": [" fine", " dull"]}], data__form="ranked")
    (one,) = examples(best_first)
    np.testing.assert_array_equal(one.ids, found[1].ids)


def test_an_answer_of_a_ballot_follows_its_prompt_after_a_space(setting):
    c = setting([{"prompt": "it was", "left": "fine", "right": "dull", "rating": "left"}] * 2 + [
        {"prompt": "it was", "left": "fine", "right": "dull", "rating": "tie"}])  # fmt: skip
    with pytest.raises(ftjax.FtjaxError, match="pairs.jsonl row 3: column 'rating' holds 'tie'; expected left or"):
        examples(c)
    c.data.clean.empty = True
    found = examples(c)
    again = setting([{"prompt": "it was", "chosen": " fine", "rejected": " dull"}])
    assert len(found) == 2
    np.testing.assert_array_equal(found[0].ids, examples(again)[0].ids)


def test_rows_that_training_would_refuse_are_left_out(setting):
    """data.clean.empty looks at both answers of a pair, and at the label of a single one."""
    pair = {"prompt": "it was", "chosen": " fine", "rejected": " dull"}
    one = {"prompt": "it was", "completion": " fine", "label": True}
    for good, bad, more in (
        (pair, {"rejected": ""}, {}),
        (pair, {"rejected": None}, {}),
        (pair, {"rejected": " fine"}, {}),
        (pair | {"margin": 1.0}, {"margin": None}, {"task__kind": "reward"}),
        ({"prompt": "it was", "answers": [" fine", " dull"], "ranks": [1, 2]}, {"answers": [" fine", None]}, {}),
        (one, {"label": None}, {"task__loss": "kto"}),
    ):
        c = setting([good, good | bad], **more)
        with pytest.raises(ftjax.FtjaxError, match="row 2"):
            examples(c)
        c.data.clean.empty = True
        assert len(examples(c)) == 1


def test_columns_of_pairs_that_nothing_reads_are_named(setting):
    from ftjax.data.prepare import prepare
    from ftjax.hub.tokenizer import load_tokenizer

    row = {"system": "a", "prompt": "it was", "chosen": " fine", "rejected": " dull", "margin": 1.0}
    one = {"prompt": "it was", "completion": " fine", "label": True}
    for train, more, left in (
        ([row], {}, "system, margin"), ([row], {"task__kind": "reward"}, "system"), ([one], {"task__loss": "kto"}, ""),
    ):  # fmt: skip
        c = setting(train, **more)
        c.data.update(test="", split=(1.0, 0.0, 0.0))
        (*notes,) = prepare(c, load_tokenizer(c.model.path), 64).notes
        assert notes == [f"columns that are no part of the texts or labels: {left}"] * bool(left)


def test_an_answer_to_another_prompt_does_not_decide_what_is_left_of_an_answer(setting):
    """For KTO, each answer has at least half of data.max_length, however long the answer of the row before it is."""
    short = {"prompt": "it was", "completion": " fine film", "label": True}
    long = {"prompt": "a film", "completion": " dull" * 40, "label": False}
    for policy, kept in (("truncate", [5, 27]), ("drop", [5])):
        found = examples(setting([short, long], task__loss="kto", data__long=policy))
        assert [e.second for e in found] == kept
        assert found[0].ids[4] == 3 and len(found[0].ids) == 5 + 27  # its end; the rest of the room is the other's


def test_pairs_are_desirable_and_undesirable_answers(setting):
    """A pair gives KTO two answers; the second text of each is the same prompt with an answer to another one."""
    pairs = rows(3, 0)
    apart = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    found, again = (examples(setting(train, task__loss="kto")) for train in (pairs, apart))
    for one, other in zip(found, again, strict=True):
        assert [x.tolist() for x in one[:4:2]] == [x.tolist() for x in other[:4:2]]
        assert one.second == other.second
    assert [e.targets[0] for e in found] == [1, 0] * 3
    for n, e in enumerate(found):
        prompt = e.ids[: e.trained.argmax()]
        np.testing.assert_array_equal(e.ids[e.second :][: len(prompt)], prompt)
        before = found[(n - 1) % 6 if n % 2 == 0 else n - 2]
        answer = before.ids[: before.second][before.trained[: before.second]]
        np.testing.assert_array_equal(e.ids[e.second + len(prompt) :], answer)
    with pytest.raises(ftjax.FtjaxError, match="pairs.jsonl row 1: column 'label' holds 'good'; expected true or 1"):
        examples(setting([apart[0] | {"label": "good"}], task__loss="kto"))


BAD = {
    "same": ({"prompt": "it was", "chosen": " fine", "rejected": " fine"}, "pairs.jsonl row 4: .* the same answer"),
    "unknown": ({"prompt": "it was", "chosen": " Fine", "rejected": " Flat"}, "row 4: .* become the same 4 tokens"),
    "empty": ({"prompt": "it was", "chosen": " fine", "rejected": ""}, "row 4, column 'rejected': the answer is empty"),
    "number": ({"prompt": "it was", "chosen": 4, "rejected": 5}, "row 4: .* become the same 4 tokens"),
    "missing": ({"prompt": "it was", "chosen": " fine", "rejected": None}, "pairs.jsonl row 4: column 'rejected' is"),
    "ranks": ({"prompt": "it was", "answers": [" fine", " flat"], "scores": None}, "row 4: column 'scores' holds None"),
    "ends": (
        {side: [*chat("it", "fine"), *chat(text, "")[:1]] for side, text in (("chosen", "a"), ("rejected", "the"))},
        "row 4: the conversations .* do not both end in a message of the assistant",
    ),
    "twice": (
        {"prompt": chat("it", "fine"), "chosen": chat("a", "fine"), "rejected": chat("a", "flat")},
        "row 4: column 'chosen' begins with a message of the user, and not with those of 'prompt'",
    ),
    "prompts": (
        {"chosen": chat("it", "fine"), "rejected": chat("a film", "flat")}, "row 4: the conversations .* differ"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_is_named(setting, name):
    bad, message = BAD[name]
    good = rows(20, 0)
    if name in ("prompts", "ends"):
        good = [{k: chat(row["prompt"], row[k]) for k in ("chosen", "rejected")} for row in good]
    if name == "twice":
        good = [
            {"prompt": chat("it", "")[:1]} | {k: chat("", row[k])[1:] for k in ("chosen", "rejected")} for row in good
        ]
    if name == "ranks":
        good = [
            {"prompt": row["prompt"], "answers": [row["rejected"], row["chosen"]], "scores": [1, 2]} for row in good
        ]
    c = setting([*good[:3], bad, *good[3:]], data__template="plain" if name in ("prompts", "ends", "twice") else "")
    with pytest.raises(ftjax.FtjaxError, match=message):
        ftjax.train(c, say=lambda text: None)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tuning__method": "full"}, "tuning.method='full': changes parameters of the base model, which"),
        ({"tuning__init": "pissa"}, "tuning.init='pissa': changes parameters"),
        ({"task__loss": "robust", "train__label_smoothing": "0.5"}, "train.label_smoothing: expected less than 0.5"),
        ({"task__loss": "hinge", "train__label_smoothing": "0.1"}, "train.label_smoothing: task.loss=hinge has none"),
        ({"task__loss": "hinge", "train__spike": "3"}, "train.spike: task.loss=hinge may fall to 0 or below"),
        (
            {"task__loss": "robust", "train__spike": "3", "train__label_smoothing": "0.1"},
            "train.spike: task.loss=robust may fall to 0 or below",
        ),
        ({"task__loss": "kto", "train__accumulate": "2"}, "train.accumulate: expected 1 for task.loss=kto"),
        ({"task__loss": "orpo", "task__reference": "x"}, "task.reference: is of task.loss sigmoid, hinge, ipo"),
        ({"task__margin": "0.5"}, "task.margin: is of task.loss simpo; this one is sigmoid"),
        ({"task__kind": "causal", "task__loss": "ipo"}, "task.loss: is of task.kind preference; this one is causal"),
        ({"task__kind": "reward", "train__label_smoothing": "0.1"}, "label_smoothing: is of task.kind causal and"),
        ({"task__loss": "orpo", "task__nll_weight": "0.5"}, "task.nll_weight: is always 1 for task.loss=orpo"),
        ({"data__prompt": "{prompt}!"}, "data.prompt: does not apply to the columns chosen and rejected, whose prompt"),
        ({"data__form": "prompt"}, "task.kind=preference: rows need the columns chosen and rejected"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(setting, settings, message):
    with pytest.raises(ftjax.FtjaxError, match=message):
        ftjax.train(setting(rows(20, 0), **settings), say=lambda text: None)


@pytest.mark.parametrize("template", ["", "plain"])
def test_a_prompt_is_not_read_twice(setting, template):
    """Where all answers begin with their prompts, as rows with whole texts in both columns do."""
    whole = [row | {side: f"{row['prompt']}{row[side]}" for side in ("chosen", "rejected")} for row in rows(6, 0)]
    with pytest.raises(ftjax.FtjaxError, match="pairs.jsonl row 1: both answers begin with the text of the prompt"):
        examples(setting(whole, data__template=template))
    assert len(examples(setting([*whole[:5], *rows(1, 1)], data__template=template))) == 6  # so it may be meant


def test_a_loss_without_a_reference_trains_all_parameters(setting, tmp_path):
    c = setting(rows(100, 0), tuning__method="full", task__loss="orpo", optim__lr="3e-3")
    ftjax.train(c, say=lambda text: None)
    last = [row for row in read_metrics(tmp_path / "run") if "val_loss" in row][-1]
    assert last["val_margin"] > 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["task"]["loss"] == "orpo"


@pytest.mark.parametrize("packing", [False, True])
def test_a_reference_of_its_own_is_read_once(setting, tmp_path, packing):
    """With the base as the named reference, each loss is that of a run that compares with its base at every step."""
    losses = []
    for name in ("", "base"):
        c = setting(rows(24, 0), train__steps="8", data__packing=str(packing), data__buckets="1", task__loss="ipo")
        c.run_dir, c.task.reference = str(tmp_path / f"run{name}"), c.model.path if name else ""
        c.train.update(batch_size=8, log_every=1, eval_every=8)
        ftjax.train(c, say=lambda text: None)
        found = read_metrics(c.run_dir)
        losses.append([row[key] for row in found for key in ("loss", "val_loss") if key in row])
        told = ftjax.evaluate(c.run_dir, str(tmp_path / "held.jsonl"), say=lambda text: None)
        losses[-1].append(told["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_model_is_not_compared_with_itself(setting, tmp_path):
    """All parameters are trained against a reference of its own; the written model has no adapter to be without."""
    c = setting(rows(32, 0), tuning__method="full", optim__lr="3e-3", train__steps="8", data__buckets="1")
    c.task.reference = c.model.path
    c.train.update(batch_size=8, eval_every=8)
    ftjax.train(c, say=lambda text: None)
    held, how = str(tmp_path / "held.jsonl"), {"say": lambda text: None}
    told = ftjax.evaluate(str(tmp_path / "run"), held, **how)
    assert told["loss"] < 0.68
    whole = str(tmp_path / "run" / "full")
    again = ftjax.evaluate(whole, held, overrides=["task.kind=preference", f"task.reference={c.model.path}"], **how)
    np.testing.assert_allclose(again["loss"], told["loss"], rtol=1e-5)
    with pytest.raises(ftjax.FtjaxError, match="this one has none, so it would be compared with itself"):
        ftjax.evaluate(whole, held, overrides=["task.kind=preference"], **how)
    moved = shutil.copytree(c.model.path, tmp_path / "moved")  # the same model under another name
    c.task.reference = str(moved)
    ftjax.train(c, say=lambda text: None)
    (moved / "generation_config.json").write_text("{}")
    with pytest.raises(ftjax.FtjaxError, match="of the files that the config names, task.reference/generation_config"):
        ftjax.train(c, say=lambda text: None)
    with pytest.raises(ftjax.FtjaxError, match="task.reference/generation_config.*, so that figures would"):
        ftjax.evaluate(str(tmp_path / "run"), held, **how)
    ftjax.evaluate(str(tmp_path / "run"), held, overrides=[f"task.reference={c.model.path}"], **how)
    c.run_dir, c.task.reference = str(tmp_path / "other"), "builtin:stories260K"
    with pytest.raises(ftjax.FtjaxError, match="task.reference: builtin:stories260K has 512 tokens and the"):
        ftjax.train(c, **how)


def test_a_pair_that_is_too_long_is_cut_in_both_texts_or_left_out(setting, tmp_path):
    from ftjax.data.prepare import prepare
    from ftjax.hub.tokenizer import load_tokenizer

    long = {"prompt": "it was a film", "chosen": " fine" * 30, "rejected": " dull" * 3}
    other = {"prompt": "it was a film", "chosen": " fine" * 3, "rejected": " dull" * 30}
    # Of 35 trained tokens of such a pair, 24 are left: 20 and an answer of 4, its end included.
    cut = "truncate", [(24, 8), (8, 24)], 22
    for policy, kept, lost in (cut, cut, ("drop", [], 70)):  # the second one reads its tokens from the cache
        c = setting([long, other, *rows(10, 0)], data__long=policy, data__cache=str(tmp_path / "cache"))
        c.data.update(test="", split=(1.0, 0.0, 0.0))
        part = prepare(c, load_tokenizer(c.model.path), 64).train
        found = [e for e in part.examples if len(e.ids) > 20]
        assert [(e.second, len(e.ids) - e.second) for e in found] == kept
        assert all(e.trained[: e.second].any() and e.trained[e.second :].any() for e in found)
        assert [(report.long, report.lost) for report in part.reports.values()] == [(2, lost)]
    c = setting([{"prompt": "it " * 40, "chosen": " fine", "rejected": " dull"}], data__long="truncate")
    c.data.update(test="", split=(1.0, 0.0, 0.0))
    with pytest.raises(ftjax.FtjaxError, match="row 1: of its .* tokens only 32 are kept"):
        prepare(c, load_tokenizer(c.model.path), 64)


@pytest.mark.parametrize("loss", ["robust", "ipo", "kto"])
def test_twenty_steps_are_those_of_trl(setting, tmp_path, loss):
    """The same adapter, rows and AdamW in TRL's DPOTrainer or KTOTrainer: the losses of all steps."""
    import datasets
    import peft
    import transformers
    import trl

    train = answers(8, 0) if loss == "kto" else rows(8, 0)
    smoothing = 0.1 if loss == "robust" else 0.0
    c = setting(train, task__loss=loss, train__steps="1", optim__lr="1e-30", export__formats='("adapter",)')
    c.data.update(test="", split=(1.0, 0.0, 0.0))
    c.run_dir = str(tmp_path / "start")
    c.train.update(batch_size=8, eval_every=1, log_every=1, dropout=0.0)
    if loss == "kto":
        c.task.update(desirable_weight=1.5, undesirable_weight=0.5)
    c.tuning.dropout = 0.0
    ftjax.train(c, say=lambda text: None)  # a step that changes nothing writes the adapter that both start from

    c.run_dir = str(tmp_path / "ours")
    c.tuning.init_from = str(tmp_path / "start" / "adapter")
    c.train.update(steps=20, eval_every=20, label_smoothing=smoothing)
    c.optim.update(lr=1e-2, schedule="constant", warmup=0, weight_decay=0.0, clip_norm=0.0)
    ftjax.train(c, say=lambda text: None)
    ours = [row["loss"] for row in read_metrics(c.run_dir) if "loss" in row]

    base = transformers.AutoModelForCausalLM.from_pretrained(c.model.path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(c.model.path)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "start" / "adapter", is_trainable=True)
    own = {"loss_type": loss, "label_smoothing": smoothing}
    if loss == "kto":
        own = {"desirable_weight": c.task.desirable_weight, "undesirable_weight": c.task.undesirable_weight}
    arguments = (trl.KTOConfig if loss == "kto" else trl.DPOConfig)(
        output_dir=str(tmp_path / "trl"), **own, beta=c.task.beta, max_steps=20,
        per_device_train_batch_size=8, learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.0,
        adam_beta1=c.optim.b1, adam_beta2=c.optim.b2, adam_epsilon=c.optim.eps, max_grad_norm=0.0, logging_steps=1,
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    trainer = (trl.KTOTrainer if loss == "kto" else trl.DPOTrainer)(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(train), processing_class=tokenizer
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == len(theirs) == 20
    assert min(ours) < (0.8 if loss == "kto" else 0.5) * ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_pair_is_previewed_as_the_model_gets_it(setting, tmp_path, capsys):
    from ftjax.data import verbs

    c = setting(rows(3, 0), data__packing="True")
    c.data.update(test="", split=(1.0, 0.0, 0.0))
    verbs.show(c, 1)
    printed = capsys.readouterr().out
    assert "in 6 segments" in printed
    for row in rows(3, 0):
        assert f"[[{row['chosen']}" in printed
        assert f"[[{row['rejected']}" in printed


def test_answers_of_a_prompt_are_no_part_of_what_follows_it(setting):
    """Of a pair with messages as its prompt, the answers in the prompt are not trained by any task; a result of a tool
    may begin what follows."""
    asked = [*chat("a", "the"), *chat("film", "")[:1]]
    row = {"prompt": asked, "chosen": chat("", "fine")[1:], "rejected": chat("", "dull")[1:]}
    how = {"task__kind": "causal", "data__template": "plain"}
    (other,) = examples(setting([{"messages": asked + row["chosen"]}], data__train_on="last", **how))
    for found in (row, row | {side: asked + row[side] for side in ("chosen", "rejected")}):
        (one,) = examples(setting([found], **how))
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.trained, other.trained)


@pytest.mark.parametrize("kind, left", [("preference", 2), ("reward", 2), ("causal", 1)])
def test_pairs_with_different_rejected_answers_are_not_the_same(setting, kind, left):
    pair = {"prompt": "it was", "chosen": " fine"}
    c = setting([pair | {"rejected": f" {x}"} for x in ("dull", "flat", "dull")], task__kind=kind)
    c.data.clean.exact = True
    assert len(examples(c)) == left
