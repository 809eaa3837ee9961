"""What is amiss is found where it was planted, and only there."""

from types import SimpleNamespace

import numpy as np

from ftjax import config as configs
from ftjax.data.prepare import Data, prepare
from ftjax.hub.tokenizer import load_tokenizer
from ftjax.training.finite import advice
from ftjax.verdict import findings, statistics
from ftjax.verdict.contenders import Contender
from ftjax.verdict.cost import Cost
from ftjax.verdict.findings import Case, Finding, parted
from ftjax.verdict.measure import Measured, Run


def history(val, train):
    rows = [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(train)]
    return rows + [{"step": 20 * (i + 1), "val_loss": loss} for i, loss in enumerate(val)]


def contender(name, kind="tuned", scores=None, **fields):
    scores = np.tile([0.0, 1.0], 20)[None] if scores is None else scores
    return Measured(Contender(name, kind), {"f1": scores}, [""] * 40, Cost(1), **fields)


def case(*measured, data=None, config=None):
    named = {m.contender.name: m for m in measured}
    empty = SimpleNamespace(pieces=())
    data = data or SimpleNamespace(train=empty, test=empty)
    setting = SimpleNamespace(config=config or configs.default(), data=data)
    verdicts = statistics.verdicts({name: m.scores["f1"] for name, m in named.items()}, measured[0].contender.name)
    return Case(setting, named, measured[0].contender.name, verdicts)


def found(check, asked):
    return [finding for finding in findings.findings(asked) if finding.check == check]


def test_losses_part_where_validation_turned_up_and_training_did_not():
    falls = [3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.3, 0.2]
    assert parted(history([2.8, 2.4, 2.6, 3.0], falls)) == (40, 80, (2.4, 3.0), (1.5, 0.2))
    assert parted(history([2.8, 2.4, 2.3, 2.3], falls)) is None
    assert parted(history([2.8, 2.4, 2.41, 2.42], falls)) is None  # within TURNED
    assert parted(history([2.8, 2.4, 2.6, 3.0], [3.0] * 8)) is None  # training did not get better either
    assert parted(history([], falls)) is None and parted([]) is None


def test_overfitting_is_told_with_its_step():
    bad, good = (Run("r", configs.default(), history(val, [3.0, 2.0, 1.0, 0.1])) for val in ((2.0, 2.6), (2.0, 1.9)))
    asked = case(contender("base", "prompt"), contender("over", runs=[good, bad]), contender("fine", runs=[good]))
    [one] = found("overfitting", asked)
    assert one.contender == "over" and "1 of 2 runs" in one.seen and "step 20" in one.seen and "step 20" in one.advice


def test_another_template_is_named_with_its_field():
    run = configs.default()
    run.data.prompt = "Question: {q}"
    same = Run("r", configs.default(), [])
    asked = case(
        contender("base", "prompt"), contender("other", runs=[Run("r", run, [])]), contender("same", runs=[same])
    )
    assert [f.contender for f in found("template mismatch", asked)] == ["other"]
    assert "data.prompt was 'Question: {q}' in training and is ''" in found("template mismatch", asked)[0].seen
    asked = case(contender("base", "prompt"), contender("chat", "model", chat_unused=True))
    assert [f.contender for f in found("template mismatch", asked)] == ["chat"]


def test_lost_and_needless_refusals_are_told_where_they_cannot_be_chance():
    def with_refusals(name, unsafe, harmless):
        return contender(name, refused={"unsafe": np.array([unsafe]), "harmless": np.array([harmless])})

    base = with_refusals("base", np.ones(30), np.zeros(30))
    lost = with_refusals("lost", np.tile([0.0, 1.0], 15), np.zeros(30))
    timid = with_refusals("timid", np.ones(30), np.tile([0.0, 1.0], 15))
    chance = with_refusals("chance", np.r_[0.0, np.ones(29)], np.zeros(30))
    told = found("lost refusals", case(base, lost, timid, chance))
    assert [f.contender for f in told] == ["lost", "timid"]
    assert "it refused 50% of 30 unsafe prompts; the base refused 100%" in told[0].seen and "harmless" in told[1].seen


def test_forgetting_too_few_rows_short_prompts_and_failures():
    rng = np.random.default_rng(0)
    base = contender("base", "prompt", rng.integers(2, size=(1, 40)) * 1.0, forgetting=[1.0])
    more = contender(
        "more",
        scores=base.scores["f1"] + 0.2,
        forgetting=[1.2, 1.4],
        failed=[f"seed 1: {advice(1.0, 0.0)}", "seed 2: out of memory"],
    )
    near = base.scores["f1"].copy()
    near[0, :4] = 1 - near[0, :4]
    runs = [Run("runs/half", configs.default(), [], finished=False), Run("runs/whole", configs.default(), [])]
    open_ = contender("open", "model", scores=near, forgetting=[1.01], shortened=7, runs=runs)
    asked = case(base, more, open_)
    told = {check: [f.contender for f in found(check, asked)] for check in findings.CHECKS}
    assert told == {
        "leaked rows": [], "template mismatch": [], "overfitting": [], "lost refusals": [], "forgetting": ["more"],
        "too few rows": ["open"], "prompts shortened": ["open"], "failed runs": ["more", "more", "open"],
    }  # fmt: skip
    assert "from 1.000 to 1.300 nats" in found("forgetting", asked)[0].seen
    assert "rows would do" in found("too few rows", asked)[0].seen
    assert "7 of 40 prompts" in found("prompts shortened", asked)[0].seen
    diverged, other, half = found("failed runs", asked)
    assert "lower optim.lr" in diverged.advice and "runs only what is missing" in other.advice
    assert half.seen == "runs/half has not finished, and is measured with its best checkpoint"


def test_held_out_rows_among_those_of_training_are_counted(tmp_path, shared):
    rows = [
        f"story {i} is about {' and '.join(f'{w}{i}' for w in ('hats', 'cows', 'bells', 'pies'))}" for i in range(30)
    ]
    for name, chosen in (("train", rows[:25]), ("test", rows[22:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(chosen) + "\n")
    config = configs.default()
    config.data.update(
        train=str(tmp_path / "train.txt"), test=str(tmp_path / "test.txt"), split=(1.0, 0.0, 0.0), cache=""
    )
    data = prepare(config, load_tokenizer(shared / "tokenizers/gpt2"), 512)
    assert isinstance(data, Data)
    clean, run = configs.copy(config), configs.copy(config)
    (tmp_path / "clean.txt").write_text("\n".join(rows[:22]) + "\n")
    clean.data.train = str(tmp_path / "clean.txt")
    gone = configs.copy(config)
    gone.data.train = str(tmp_path / "gone.txt")
    asked = case(
        contender("base", "prompt"),
        contender("tuned"),
        contender("clean", "model", runs=[Run("r", clean, [])]),
        contender("leaked", "model", runs=[Run("r", run, [])]),
        contender("gone", "model", runs=[Run("r", gone, [])]),
        data=data,
        config=config,
    )
    told = {f.contender: f for f in found("leaked rows", asked)}
    assert list(told) == ["tuned", "leaked", "gone"] and isinstance(told["leaked"], Finding)
    assert "3 of 25 training rows overlap with 3 held-out rows" in told["tuned"].seen
    assert "could not be read" in told["gone"].seen
