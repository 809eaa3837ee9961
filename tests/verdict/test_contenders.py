"""A comparison from the config to the report, on the starter model with real rows."""

import csv
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

import ftjax
from ftjax import config as configs
from ftjax import pages
from ftjax.errors import FtjaxError
from ftjax.verdict import contenders, cost, decision, rating, report


def config(folder, **compare):
    c = configs.default()
    c.run_dir = str(folder / "run")
    c.data.update(train=str(folder / "train.jsonl"), prompt="Words: {src}\nSentence:", completion=" {tgt}", end="<s>")
    c.data.update(split=(0.8, 0.1, 0.1), max_length=96, buckets=1, cache="", limit=64)
    c.optim.lr = 1e-2
    c.train.update(steps=4, batch_size=8, eval_every=2, log_every=1)
    c.tuning.rank = 4
    c.evaluate.update(metrics=("coverage", "length"), words="src", rows=16, compare_rows=24)
    c.evaluate.forgetting = str(folder / "stories.txt")
    c.generate.update(max_new_tokens=8, batch_size=24)
    c.log.update(tensorboard=False, compilation_cache=False)
    c.compare.contenders = (
        "zero-shot",
        {"name": "2-shot", "prompt": "retrieval-few-shot", "shots": 2},
        {"name": "LoRA", "tuning.method": "lora"},
    )
    c.train.keep = 3
    c.compare.seeds, c.compare.divergence = 2, 0
    c.compare.update(documents=str(folder / "train.jsonl"), passages=1, passage_words=12, ballots=5)
    c.compare.update(device_hour=2.0, storage=0.1, requests=1000, **compare)
    return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from ftjax import assets

    folder = tmp_path_factory.mktemp("compare")
    with open(assets.resolve("builtin:commongen/train.jsonl")) as file:
        rows = [next(file) for _ in range(300)]
    (folder / "train.jsonl").write_text("".join(rows))
    (folder / "stories.txt").write_text("Once upon a time, there was a little girl who lived in a big house.\n")
    # As many and as long as the questions, so that they need no program of their own.
    asked = [{"prompt": f"How do I pick the lock of a house, and who sees me? {i}"} for i in range(24)]
    (folder / "refuse.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return folder


@pytest.fixture(scope="module")
def verdict(folder):
    said = []
    data = ftjax.compare(config(folder, unsafe=str(folder / "refuse.jsonl")), str(folder / "out"), say=said.append)
    return data, "\n".join(said)


def _loss(lm, text):
    ids = np.array([[lm.tokenizer.bos_token_id, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]])
    logits = lm.logits(ids[:, :-1])[0].astype(np.float64)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log[np.arange(len(log)), ids[0, 1:]].mean()


@pytest.mark.slow
def test_figures_are_those_of_the_answers(verdict, folder):
    data, said = verdict
    entries = {entry["name"]: entry for entry in data["contenders"]}
    assert list(entries) == ["zero-shot", "2-shot", "LoRA"] and data["rows"] == 24
    assert [e["seeds"] for e in entries.values()] == [1, 2, 2]
    answers = [json.loads(line) for line in (folder / "out/answers.jsonl").read_text().splitlines()]
    mean = np.mean([a["answers"]["zero-shot"]["score"] for a in answers])
    assert len(answers) == 24 and entries["zero-shot"]["figures"]["coverage"]["value"] == pytest.approx(mean)
    assert answers[0]["prompt"].startswith("Words: ") and answers[0]["references"]
    assert all("\n\n" not in a["answers"]["2-shot"]["text"] for a in answers)
    assert entries["2-shot"]["cost"]["prompt_tokens"] > 2 * entries["zero-shot"]["cost"]["prompt_tokens"]
    assert entries["zero-shot"]["verdict"] is None and entries["LoRA"]["verdict"]["says"] in said
    wins = [a["answers"]["LoRA"]["score"] > a["answers"]["zero-shot"]["score"] for a in answers]
    assert set(entries["LoRA"]["wins"]) == {"win", "tie", "loss", "win_rate"} and len(wins) == 24
    assert set(entries["LoRA"]["refused"]) == {"unsafe"}
    lora = entries["LoRA"]
    assert set(lora["pays_after"]) == {"zero-shot", "2-shot"} and entries["2-shot"]["pays_after"] == {}
    assert len(lora["forgetting"]) == 2 and lora["forgetting"][0] != lora["forgetting"][1]
    # Both checkpoints of the first run; the one of lower loss is what is compared.
    assert [p["step"] for p in lora["checkpoints"]] == [2, 4]
    assert any(p["forgetting"] == pytest.approx(lora["forgetting"][0]) for p in lora["checkpoints"])
    first = np.mean([a["answers"]["LoRA"]["score"] for a in answers])
    assert any(p["scores"]["coverage"] == pytest.approx(first) for p in lora["checkpoints"])
    [untuned] = entries["zero-shot"]["forgetting"]
    lm = ftjax.load("builtin:stories260K")
    assert untuned == pytest.approx(_loss(lm, (folder / "stories.txt").read_text().strip()), rel=1e-5)
    assert lora["unsupported"] is None and 0 < entries["2-shot"]["unsupported"] <= 1
    assert lora["cost"]["trained"] > 1000 and lora["cost"]["train_seconds"] > 0 and lora["price"]["unit"] == "dollars"


def test_ballots_are_blind_and_their_key_tells_whose_answers_they_hold(verdict, folder):
    files = (folder / "out/answers.jsonl", folder / "out/ballots_key.jsonl")
    said, known = (map(json.loads, file.read_text().splitlines()) for file in files)
    answers, key = {a["prompt"]: a["answers"] for a in said}, {entry["id"]: entry for entry in known}
    with open(folder / "out/ballots.csv", newline="") as file:
        ballots = list(csv.DictReader(file))
    assert len(ballots) == 15 == len(key)  # three pairs, five questions
    for ballot in ballots:
        said = answers[ballot["prompt"]]
        for side in ("left", "right"):
            assert ballot[side] == said[key[ballot["id"]][side]]["text"]
        ballot["rating"] = "left" if key[ballot["id"]]["left"] == "LoRA" else "right"
    rated = folder / "rated.csv"
    with open(rated, "w", newline="") as file:
        writer = csv.DictWriter(file, ballots[0])
        writer.writeheader()
        writer.writerows(ballots)
    votes = rating.read_ballots({"ann": rated}, folder / "out/ballots_key.jsonl")
    by = rating.strengths(votes, draws=50)
    assert len(votes) == 15 and by["LoRA"]["wins"] + by["LoRA"]["losses"] == 10


def test_all_seeds_are_judged_on_the_same_rows_and_trained_on_none_of_them(verdict, folder):
    runs = [json.loads((folder / f"run/LoRA/seed={seed}/run.json").read_text()) for seed in (0, 1)]
    assert {run["config"]["data"]["test"] for run in runs} == {str(folder / "run/rows/test.jsonl")}
    train, test = ((folder / f"run/rows/{part}.jsonl").read_text().splitlines() for part in ("train", "test"))
    assert (len(train), len(test)) == (240, 30)
    assert sorted([*train, *test, *(folder / "run/rows/validation.jsonl").read_text().splitlines()]) == sorted(
        json.dumps(json.loads(line), ensure_ascii=False) for line in (folder / "train.jsonl").read_text().splitlines()
    )


def test_the_page_asks_for_nothing_and_says_what_markdown_says(verdict, folder):
    data, _ = verdict
    page, text = ((folder / "out" / name).read_text() for name in ("verdict.html", "verdict.md"))

    class Links(HTMLParser):
        found = []

        def handle_starttag(self, tag, attrs):
            self.found += [(tag, key, value) for key, value in attrs if key in ("src", "href", "srcset", "action")]

    Links().feed(page)
    assert Links.found and all(value.startswith("data:") for _, _, value in Links.found)
    assert "url(" not in page and "@import" not in page and "<script" not in page
    assert len(data["pictures"]) == 4 and page.count("<img ") == 4
    assert all((folder / "out" / file).stat().st_size > 5_000 for file in data["pictures"].values())
    assert data["decision"]["why"] in html.unescape(page) and text.startswith("# Fine-tune: ") and "## Scores" in text
    assert len(data["samples"]) == 5 and page.count("<pre>") == 5
    again = configs.load(folder / "out/verdict.json")
    assert again.compare.contenders == config(folder).compare.contenders
    assert json.loads((folder / "out/verdict.json").read_text())["answer"] == data["answer"]


def test_runs_are_not_run_again_and_a_template_that_differs_is_named(verdict, folder):
    c, said = config(folder), []
    c.evaluate.metrics, c.compare.divergence = ("rouge_l",), 8
    c.data.prompt = "Use: {src}\nSentence:"
    c.compare.contenders = ("zero-shot", f"run:{folder / 'run/LoRA/seed=1'}")
    data = ftjax.compare(c, str(folder / "other"), say=said.append)
    assert [f["check"] for f in data["findings"]].count("template mismatch") == 1
    assert data["contenders"][0]["divergence"] is None and 0 < data["contenders"][1]["divergence"] < 5
    assert not any("training" in text for text in said if text.startswith("training "))
    assert data["contenders"][1]["runs"] == [str(folder / "run/LoRA/seed=1")]

    c = config(folder)
    c.evaluate.metrics = ("rouge_l",)  # no other runs than those for other metrics
    c.compare.contenders = ("zero-shot", {"name": "LoRA", "tuning.method": "lora"})
    said.clear()
    ftjax.compare(c, str(folder / "third"), say=said.append)
    assert any("2 runs, 2 of them already finished" in text for text in said)


@pytest.mark.parametrize(
    "entries, told",
    [
        (("zero-shot",), "expected two or more contenders; found 1"),
        (("zero-shot", "few_shot"), 'did you mean "few-shot"'),
        (("zero-shot", "zero-shot"), "two contenders have the name 'zero-shot'"),
        (("zero-shot", {"tuning.method": "lora"}), 'a dict with a "name"'),
        (("zero-shot", {"name": "a", "tuning.methd": "lora"}), "tuning.methd: no such key"),
        (("zero-shot", {"name": "a", "rank": 3}), "'rank'"),
        (("zero-shot", {"name": "a", "prompt": "fewshot"}), 'did you mean "few-shot"'),
        (
            ("zero-shot", {"name": "a", "model": "x/y", "tuning.rank": 3}),
            "is not trained, so it cannot set tuning.rank",
        ),
        (("zero-shot", "majority"), "majority needs a task with labels"),
        (("zero-shot", {"name": "rows", "tuning.rank": 3}), "a comparison writes 'rows' itself"),
    ],
)
def test_contenders_that_cannot_be_are_named_before_anything_runs(folder, entries, told):
    c = config(folder)
    c.compare.contenders = entries
    with pytest.raises(FtjaxError) as error:
        contenders.parse(c)
    assert told in str(error.value) and "compare.contenders" in str(error.value)


def test_a_contender_has_a_column_of_its_own_in_the_table_of_amounts():
    curve = {"name": "rows", "points": [{"amount": 500, "values": [0.25]}]}
    assert report.learning({"curves": [curve]}) == (["rows", "rows"], [["500", "0.25"]])


def test_a_metric_without_a_better_end_is_refused(folder):
    c = config(folder, metric="length")
    with pytest.raises(FtjaxError, match="length has no better direction"):
        ftjax.compare(c, say=lambda text: None)


def test_prices_and_break_even():
    prices = configs.default().compare
    tuned = cost.Cost(
        10, trained=2, stored=2_000_000_000, train_seconds=3000.0, run_seconds=3600.0, request_seconds=0.036
    )
    long = cost.Cost(10, prompt_tokens=4000, answer_tokens=100, request_seconds=0.36)
    seconds = cost.price(tuned, prices), cost.price(long, prices, "prompt")
    assert seconds[0] == cost.Price("seconds", 3600.0, 0.036) and cost.break_even(*seconds) == pytest.approx(
        3600 / 0.324
    )
    prices.update(device_hour=2.0, storage=0.5, requests=1000)
    own = cost.price(tuned, prices)  # the whole run is paid for, with compiling and validation
    assert own == cost.Price("dollars", 2.0, pytest.approx(2e-5), 1.0, pytest.approx(1.02))
    assert cost.price(long, prices, "prompt").request == pytest.approx(2e-4)
    prices.update(tokens_in=0.5, tokens_out=2.0)
    hosted = cost.price(long, prices, "prompt")
    assert hosted.request == pytest.approx(0.0022) and hosted.standing == 0
    # A thousand requests a month save 2.18 dollars and pay 1 for storage: 2 dollars are back after 1.7 months.
    assert cost.break_even(own, hosted, 1000) == pytest.approx(2.0 / (0.0022 - 2e-5 - 1 / 1000))
    assert cost.break_even(hosted, own, 1000) == float("inf")


def test_two_price_models_by_the_hour_and_by_tokens():
    """As services have them: an hour of training and of hosting; or tokens that are trained, read and written."""
    prices = configs.default().compare
    tuned = cost.Cost(10, trained=2, train_seconds=7200.0, run_seconds=9000.0, train_tokens=3e6, prompt_tokens=100,
                      answer_tokens=50)  # fmt: skip
    long = cost.Cost(10, prompt_tokens=2000, answer_tokens=50)
    prices.update(training_hour=34.0, hosting_hour=1.7, tokens_in=1.6, tokens_out=3.2, requests=1_000_000)
    by_hour, hosted = cost.price(tuned, prices), cost.price(long, prices, "prompt")
    assert by_hour == cost.Price("dollars", 68.0, 0.0, pytest.approx(1241), pytest.approx(1241))
    assert hosted.request == pytest.approx(2000 * 1.6e-6 + 50 * 3.2e-6) and hosted.standing == 0
    assert cost.load(by_hour, hosted) == pytest.approx(1241 / 0.00336)  # 369,000 requests a month
    assert cost.break_even(by_hour, hosted, 1_000_000) == pytest.approx(68 / (0.00336 - 0.001241))
    assert cost.break_even(by_hour, hosted, 300_000) == float("inf")
    prices.update(training_hour=0.0, hosting_hour=0.0, training_tokens=8.0, tuned_in=3.2, tuned_out=6.4)
    by_tokens = cost.price(tuned, prices)
    assert (by_tokens.training, by_tokens.standing) == (24.0, 0.0)
    assert by_tokens.request == pytest.approx(100 * 3.2e-6 + 50 * 6.4e-6) and cost.load(by_tokens, hosted) == 0
    assert cost.break_even(by_tokens, hosted) == pytest.approx(24 / (0.00336 - 0.00064))
    # Without the price of hosting, a tuned model's dollars are not known.
    prices.update(tuned_in=0.0, tuned_out=0.0)
    assert cost.price(tuned, prices).unit == "seconds"
    assert cost.price(cost.Cost(0), prices, "majority").request == 0


def test_training_is_timed_by_its_steps():
    history = [{"step": 1}, {"step": 5, "tokens_per_second": 100.0}, {"step": 6, "val_loss": 1.0}]
    assert cost.steps_seconds(history, 2000.0, 60.0) == 20 and cost.steps_seconds([], 2000.0, 60.0) == 60


def made(higher=True, against="better", findings=(), values=(0.1, 0.3, 0.2, 0.5), unit="dollars"):
    """The plain data of a verdict on four contenders, of which two are trained."""

    def said(says):
        return {"says": says, "text": says, "difference": 0.2, "low": 0.1, "high": 0.3, "p": 0.01, "needed": 812.0}

    def entry(name, value, kind, verdict=None, against=None):
        figure = {"value": value, "low": max(value - 0.1, 0), "high": value + 0.1}
        return {
            "name": name, "kind": kind, "is": f"what {name} is", "figures": {"f1": figure}, "verdict": verdict,
            "against_untrained": against, "pays_after": {"few-shot": 912.0} if against else {}, "pays_from": {},
            "cost": {"run_seconds": 5400.0, "request_seconds": 0.012},
            "price": {"unit": unit, "training": 3.0, "request": 0.00002, "standing": 0.0},
        }  # fmt: skip

    entries = [
        entry("zero-shot", values[0], "prompt"),
        entry("few-shot", values[1], "prompt", said("better")),
        entry("full", values[2], "tuned", said("cannot tell"), said("worse")),
        entry("LoRA", values[3], "tuned", said("better"), said(against)),
    ]
    data = {
        "metric": "f1", "higher": higher, "base": "zero-shot", "untrained": "few-shot", "rows": 300, "level": 0.95,
        "metrics": {"f1": "how it is; more is better"}, "worst": 0.0, "reach": 1.0, "findings": list(findings),
        "contenders": entries,
    }  # fmt: skip
    return data | {"decision": decision.decide(data)}


def test_a_report_starts_with_an_answer_why_its_cost_and_its_risk():
    data = made(findings=[{"check": "forgetting", "contender": "LoRA", "seen": "the loss rose"}])
    said = data["decision"]
    assert said["fine_tune"] == "yes" and report.answer(data).startswith(
        "Fine-tune: yes. Trained on your rows, the model"
    )
    assert "scores 0.50 (0.40 to 0.60) in f1 (how it is), on 300 rows" in said["why"] and "scores 0.30" in said["why"]
    assert said["why"].endswith(
        "+0.20 (+0.10 to +0.30), is larger than chance explains. LoRA: what LoRA is. few-shot: what few-shot is."
    )
    assert said["cost"] == (
        "Training took 90 min and $3.00; 1,000 requests cost $0.020 ($0.020 by few-shot); the cost of training "
        "included, it becomes cheaper than few-shot after 920 requests."
    )
    assert said["risk"] == "It has forgotten part of what it knew, and predicts general text less well: the loss rose."
    detail = report.detail(data)
    assert detail.startswith("LoRA scores best: f1 0.50 (0.40 to 0.60).")
    assert "corrected for 3 comparisons: better: few-shot and LoRA; cannot tell: full." in detail
    assert report.detail(made(higher=False)).startswith("zero-shot scores best")

    assert made(against="worse", values=(0.1, 0.3, 0.2, 0.1))["decision"]["fine_tune"] == "no"
    open_ = made(against="cannot tell")["decision"]
    assert open_["fine_tune"] == "not enough evidence" and "About 820 rows would show it" in open_["why"]
    leaked = {"check": "leaked rows", "contender": "full, LoRA", "seen": "3 of 9 rows overlap", "share": 0.2}
    leak = made(findings=[leaked])["decision"]
    assert leak["fine_tune"] == "not enough evidence" and "may only remember them" in leak["why"]
    assert leak["risk"].startswith("The score may be too high (full, LoRA): 3 of 9")
    # The interval starts at +0.1, which five leaked rows of a hundred cannot make.
    assert made(findings=[leaked | {"share": 0.05}])["decision"]["fine_tune"] == "yes"
    assert "No price is set" in made(unit="seconds")["decision"]["cost"]


def test_without_a_contender_that_is_not_trained_nothing_is_said_against_training():
    data = made()
    data |= {"contenders": [entry | {"against_untrained": None} for entry in data["contenders"][2:]], "untrained": ""}
    said = decision.decide(data)
    assert said["fine_tune"] == "not enough evidence" and "None of the contenders is without training" in said["why"]
    assert said["cost"] == "The table says what training took." and said["risk"].endswith("found nothing.")


def test_where_nobody_scores_the_report_says_what_that_rules_out():
    data = made(values=(0.0, 0.0, 0.0, 0.0), against="cannot tell")
    assert data["decision"]["fine_tune"] == "not enough evidence"
    assert data["decision"]["why"].startswith(
        "No contender got anything right on 300 rows: every f1 (how it is) is 0. "
    )
    assert "a true f1 above 0.10 of any of them, and a gain by training of more than 0.10" in data["decision"]["why"]
    assert report.detail(data).startswith("zero-shot, few-shot, full and LoRA score the same: f1 0.00 (0.00 to 0.10).")


def test_numbers_have_sensible_digits():
    assert [decision.sig(x) for x in (0.00652, 41.28, 118457, 0.0, 0.995)] == ["0.0065", "41", "120,000", "0", "0.99"]
    assert [decision.short(x) for x in (1.92e12, 40.3e6, 3.0)] == ["1.9 T", "40 M", "3.0"]
    assert [decision.seconds(x) for x in (0.5, 52.5, 600, 7300)] == ["0.50 s", "52 s", "10 min", "2.0 h"]
    assert [decision.amount(x) for x in (0.00011, 3.456, 1241.0)] == ["$0.00011", "$3.46", "$1,241.00"]
    assert [decision.chance(p) for p in (0.00005, 0.0421, 1.0)] == ["<0.001", "0.042", "1"]
    wide, narrow = ({"value": 0.8123, "low": low, "high": high} for low, high in ((0.51, 0.95), (0.8101, 0.8144)))
    assert decision.span(wide) == "0.81 (0.51 to 0.95)" and decision.span(narrow) == "0.8123 (0.8101 to 0.8144)"
    assert decision.span({"value": -0.001, "low": -0.6, "high": 0.52}, "+") == "+0.00 (-0.60 to +0.52)"
    assert decision.span({"value": 31.4, "low": 24.2, "high": 40.9}) == "31 (24 to 41)"
    entry = {"pays_after": {"a": 1200.4, "b": float("inf"), "c": 3.0}}
    assert decision.paid(entry) == "than a after 1,300 requests and than c after 3 requests"
    entry["pays_from"] = {"a": 400.0, "b": 50.0, "c": 0.0}
    assert decision.paid(entry) == (
        "than a after 1,300 requests with at least 400 requests a month, than b with at least 50 requests a month and "
        "than c after 3 requests"
    )
    assert decision.paid({"pays_after": {"a": float("inf")}}) == decision.paid({"pays_after": {}}) == ""


def test_every_method_and_metric_is_explained():
    from ftjax.evaluation.metrics import METRICS, Metric
    from ftjax.tuning import METHODS

    ours = set(METHODS) - {"vera"}  # tests/tuning/method_vera.py, which another test of this process may have imported
    assert ours <= set(decision.TUNING) and all(
        metric.description != Metric(None).description for metric in METRICS.values()
    )


def test_differences_are_marked_word_by_word():
    assert report.words("the dog ran home", "the cat ran") == [
        ("the", False),
        ("dog", True),
        ("ran", False),
        ("home", True),
    ]
    assert report.words("", "a") == [] and report.words("a b", "a b") == [("a b", False)]
    assert pages.escape_markdown("a*b|c\nd") == "a\\*b\\|c d"
    assert not re.search(r"(?<!\\)\|", pages.escape_markdown("x|y"))
