"""One state of the starter model measured on real rows; what two of them are told as; the picture."""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from ftjax import config as configs
from ftjax.assets import resolve
from ftjax.errors import FtjaxError
from ftjax.evaluation import compare
from ftjax.evaluation.pictures import plot_losses

ROWS = [
    {"src": "dog run", "tgt": "A dog runs."},
    {"src": "dog run", "tgt": "The dog was running."},
    {"src": "ball play park", "tgt": "They play with a ball in the park."},
]


@pytest.fixture(scope="module")
def settings(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = configs.default()
    config.data.update(train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"), split=(1.0, 0.0, 0.0))
    config.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", max_length=128)
    config.train.batch_size = 4
    config.generate.max_new_tokens = 16
    config.evaluate.metrics, config.evaluate.words = ("rouge_l", "coverage"), "src"
    config.evaluate.forgetting = str(shared / "data/tinystories/tinystories_sample.txt")
    return config


@pytest.fixture(scope="module")
def lm(shared):
    from ftjax.lm import open_base

    return open_base(shared / "models/stories260K", "float32")[0]


@pytest.fixture(scope="module")
def data(settings, lm):
    from ftjax.data.prepare import prepare

    return prepare(settings, lm.tokenizer, 512)


@pytest.fixture(scope="module")
def measured(lm, data, settings):
    return compare.measure(lm, lm.variables, data, settings)


def test_figures_equal_those_of_torch(measured, data, shared):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(shared / "models/stories260K").eval()
    total = count = 0
    for example in data.test.examples:
        with torch.no_grad():
            logits = model(torch.tensor(example.ids)[None].long()).logits[0].double()
        chosen = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(example.ids[1:]).long()[:, None])[:, 0]
        total -= chosen[torch.tensor(example.trained[1:])].sum().item()
        count += example.trained[1:].sum()
    assert measured["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)
    assert round(measured["forgetting_loss"], 3) == 1.266

    first, second = measured["samples"]  # of three rows two ask the same
    assert first["references"] == ["A dog runs.", "The dog was running."]
    assert second["references"] == ["They play with a ball in the park."]
    assert first["prompt"].endswith("Words: dog run\nSentence:")
    assert measured["coverage"] == pytest.approx(np.mean([s["scores"]["coverage"] for s in measured["samples"]]))
    last = data.test.examples[2]
    ids = torch.tensor(last.ids[~last.trained])[None].long()
    model.generation_config.eos_token_id = [1, 2]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0)
    words = transformers.AutoTokenizer.from_pretrained(shared / "models/stories260K")
    assert words.decode(new[0], skip_special_tokens=True).endswith(second["prediction"])
    assert second["prediction"]


def test_what_is_measured_belongs_to_the_variables_given(measured, lm, data, settings):
    changed = compare.measure(lm, jax.tree.map(lambda x: 0.5 * x, lm.variables), data, settings)
    for name in ("perplexity", "forgetting_loss"):
        assert changed[name] > measured[name]
    assert [s["prediction"] for s in changed["samples"]] != [s["prediction"] for s in measured["samples"]]


def test_settings_name_all_that_figures_depend_on(lm, data, settings, tmp_path):
    """What changes a figure changes them: fields, rows, how rows are shown, the content of files, the tokenizer."""

    def made_by(part=data.test, words=lm.tokenizer, **changed):
        config = settings.copy_and_resolve_references()
        for key, value in changed.items():
            group, _, name = key.partition("__")
            config[group][name] = value
        return json.dumps(compare.settings(words, (1, 2), part, 128, config), sort_keys=True)

    def with_piece(**changed):
        (piece,) = data.test.pieces
        return dataclasses.replace(data.test, pieces=(piece._replace(**changed),))

    metric, text = tmp_path / "mine.py", tmp_path / "general.txt"
    metric.write_text("def one(prediction, references, row):\n    return 1.0\n")
    text.write_text("Once upon a time.")
    files = {"evaluate__metrics": (f"{metric}:one",), "evaluate__forgetting": str(text)}
    (piece,) = data.test.pieces
    found = [made_by(), made_by(**files), made_by(generate__max_new_tokens=17), made_by(evaluate__words="tgt")]
    templated = copy.copy(lm.tokenizer)
    templated.chat_template = "{{ messages }}"
    found += [made_by(words=templated), made_by(with_piece(digest="other")), made_by(with_piece(kept=piece.kept[:2]))]
    found.append(made_by(with_piece(recipe=dataclasses.replace(piece.recipe, end="<s>"))))
    metric.write_text("def one(prediction, references, row):\n    return 0.5\n")
    found.append(made_by(**files))
    text.write_text("Twice upon a time.")
    found.append(made_by(**files))
    judge = shutil.copytree(resolve("builtin:stories260K"), tmp_path / "judge")
    for other in (b"{}", b"{ }"):
        (judge / "generation_config.json").write_bytes(other)
        found.append(made_by(generate__reward=str(judge)))
    found.append(made_by(model__quantise="nf4"))
    assert len(set(found)) == len(found)
    assert made_by(evaluate__samples=9, evaluate__rows=3) == found[0]


def test_fewer_prompts_on_demand(lm, data, settings):
    few = settings.copy_and_resolve_references()
    few.evaluate.compare_rows = 1
    [only] = compare.measure(lm, lm.variables, data, few)["samples"]
    assert only["prompt"] == "Words: dog run\nSentence:"


def test_a_part_without_rows_and_an_unknown_metric_are_named(lm, data, settings):
    empty = dataclasses.replace(data, test=type(data.test)())
    with pytest.raises(FtjaxError, match="evaluate.compare_on: the part test has no rows"):
        compare.measure(lm, lm.variables, empty, settings)
    typo = settings.copy_and_resolve_references()
    typo.evaluate.metrics = ("coverge",)
    with pytest.raises(FtjaxError, match='did you mean "coverage"'):
        compare.measure(lm, lm.variables, data, typo)


def state(perplexity, rouge_l, text):
    scores = {"rouge_l": rouge_l}
    samples = [
        {"prompt": f"[red]{i}", "references": ["r"], "prediction": f"{text} {i}", "scores": scores} for i in range(7)
    ]
    return {"perplexity": perplexity, "rouge_l": rouge_l, "forgetting_loss": 1.5, "samples": samples}


def test_table_says_which_way_is_better():
    out = compare.table(state(20.0, 0.25, "old"), state(10.0, 0.125, "new"), 42.4)
    lines = {line.split()[1]: line for line in out.splitlines() if "│" in line and line.split()[1:]}
    assert all(word in lines["perplexity"] for word in ("↓", "20", "10", "-10", "better"))
    assert all(word in lines["rouge_l"] for word in ("↑", "0.25", "0.125", "-0.125", "worse"))
    assert all(word in lines["forgetting_loss"] for word in ("↓", "+0", "same"))
    assert "42 s" in out and "7 prompts" in out and "base" not in out
    assert "both with the base in nf4" in compare.table(state(2.0, 0.2, "old"), state(1.0, 0.1, "new"), 1.0, "nf4")


def test_side_by_side_spreads_over_the_samples_and_reads_no_markup():
    out = compare.side_by_side(state(1, 1, "old"), state(1, 1, "new"), 3)
    assert [i for i in range(7) if f"[red]{i}" in out] == [0, 2, 4]
    assert "old 2" in out and "new 2" in out
    assert compare.side_by_side(state(1, 1, "old"), state(1, 1, "new"), 99).count("[red]") == 7


def test_results_are_read_back(tmp_path):
    results = compare.write_results(tmp_path, state(20.0, 0.25, "old"), state(10.0, 0.5, "new"), 3.0, {"seed": 0})
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results == {
        "before": {"perplexity": 20.0, "rouge_l": 0.25, "forgetting_loss": 1.5},
        "after": {"perplexity": 10.0, "rouge_l": 0.5, "forgetting_loss": 1.5},
        "seconds": 3.0,
        "settings": {"seed": 0},
    }
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 7
    assert rows[3]["before"] == "old 3" and rows[3]["after"] == "new 3"
    assert rows[3]["scores"] == {"before": {"rouge_l": 0.25}, "after": {"rouge_l": 0.5}}
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "samples.jsonl"}


@pytest.mark.parametrize(
    "history",
    [
        [{"step": s, "loss": 3 / s + 1} for s in range(1, 50)] + [{"step": s, "val_loss": s / 20} for s in (25, 49)],
        [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}],
        [{"step": 1, "val_loss": None}],
        [],
    ],
)
def test_the_picture_is_drawn_from_whatever_was_logged(history, tmp_path):
    from matplotlib.image import imread

    picture = imread(plot_losses(history, tmp_path / "loss.png"))
    assert picture.shape[1] > 1000
    assert (picture[..., :3] < 0.5).any()
