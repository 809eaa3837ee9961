"""Runs that tag words, find answers, guess masked tokens and embed texts, from files to files, and what PyTorch makes
of the results."""

import json

import numpy as np
import pytest
from tiny_labelled import WORDS, config, make, write

import ftjax
from ftjax.errors import FtjaxError

FILL = ("a", "the", "film", "it", "was", "of")


def settings(tmp_path, found: list[dict], kind: str, model, **overrides):
    """A config for rows, of which the last fifth is the test part, the fifth before it validation."""
    n = len(found) // 5
    c = config(tmp_path, model, **{"task__kind": kind, "data__max_length": 24} | overrides)
    parts = {"train": found[: 3 * n], "validation": found[3 * n : 4 * n], "test": found[4 * n :]}
    c.data.update({part: write(tmp_path / f"{part}.jsonl", rows) for part, rows in parts.items()})
    return c


def tagged(count: int, seed: int) -> list[dict]:
    """Sentences in which good words are a GOOD thing with the word behind them, and bad ones BAD."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        words, tags = [], []
        for _ in range(int(rng.integers(1, 4))):
            words += list(rng.choice(FILL, 2))
            tags += ["O", "O"]
            name = str(rng.choice(list(WORDS)))
            words += [str(rng.choice(WORDS[name])), "film"]
            tags += [f"B-{name.upper()}", f"I-{name.upper()}"]
        out.append({"tokens": words, "tags": tags})
    return out


def records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]


def quiet(text):
    pass


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_tags_are_those_that_torch_predicts(kind, tmp_path):
    import peft
    import torch
    import transformers

    base = make(tmp_path / "base", kind)
    overrides = {"export__formats": '("adapter", "merged")', "data__packing": kind == "bert"}
    overrides |= {"train__steps": 150} if kind == "bert" else {}  # packed rows are fewer
    c = settings(tmp_path, tagged(300, 0), "tag", base, **overrides)
    result = ftjax.train(c, say=quiet)
    assert result.results["labels"] == ["O", "B-BAD", "I-BAD", "B-GOOD", "I-GOOD"]
    figures = result.results["test"]["metrics"]
    assert figures["f1"]["value"] > 0.9 and set(result.results["test"]["per_type"]) == {"BAD", "GOOD"}

    names, found = result.results["labels"], records(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    plain = transformers.AutoModelForTokenClassification.from_pretrained(base, num_labels=5)
    tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").eval()
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    whole = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "merged").eval()
    assert whole.config.id2label == dict(enumerate(names))
    for record in found[:20]:
        batch = tokenizer([record["words"]], is_split_into_words=True, return_tensors="pt", return_token_type_ids=False)
        at = [i for i, word in enumerate(batch.word_ids(0)) if word is not None]
        with torch.no_grad():
            one, two = tuned(**batch).logits[0], whole(**batch).logits[0]
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)
        assert [names[i] for i in one[at].argmax(-1)] == record["predicted"]
    bare = write(tmp_path / "bare.jsonl", [{"tokens": record["words"]} for record in found])
    for path in ("run", "run/adapter", "run/merged"):
        again = ftjax.predict(str(tmp_path / path), bare)
        assert [row["predicted"] for row in again] == [row["predicted"] for row in found]
        report = ftjax.evaluate(str(tmp_path / path), str(tmp_path / "test.jsonl"), overrides=["data.max_length=24"])
        assert report["metrics"]["f1"]["value"] == figures["f1"]["value"]


def test_words_cut_off_count_as_outside_and_are_told(tmp_path):
    base = make(tmp_path / "base", "bert")
    c = settings(tmp_path, tagged(300, 1), "tag", base, data__max_length=8, train__label_smoothing=0.1)
    c.task.update(class_weights=("balanced",), focal=1.0, subwords="all")
    result = ftjax.train(c, say=quiet)
    report, found = result.results["test"], records(tmp_path)
    cut = sum(max(0, len(row["words"]) - 6) for row in found)
    assert cut and report["note"].startswith(f"{cut:,} words")
    for row in found:
        assert set(row["predicted"][6:]) <= {"O"}
    assert 0.3 < report["metrics"]["recall"]["value"] < 0.9 and report["metrics"]["precision"]["value"] > 0.9


def asked(count: int, seed: int) -> list[dict]:
    """The answer to `fine` is the good words of a text, that to `dull` the bad ones."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        parts = []
        for name in rng.permutation(list(WORDS)):
            parts += list(rng.choice(FILL, int(rng.integers(2, 9))))
            parts.append(" ".join(rng.choice(WORDS[name], int(rng.integers(1, 3)))))
        text = " ".join([*parts, "it"])
        name = str(rng.choice(list(WORDS)))
        answer = next(part for part in parts if part.split()[0] in WORDS[name])
        found = {"text": [answer], "answer_start": [text.index(answer)]}
        out.append({"question": {"good": "fine", "bad": "dull"}[name], "context": text, "answers": found})
    return out


def test_answers_are_those_that_torch_scores_highest(tmp_path):
    import peft
    import torch
    import transformers

    base = make(tmp_path / "base", "bert")
    overrides = {"task__stride": 4, "task__max_answer": 3, "export__formats": '("adapter", "merged")'}
    overrides |= {"data__max_length": 16, "train__steps": 150, "tuning__rank": 8}
    c = settings(tmp_path, asked(400, 0), "span", base, **overrides)
    result = ftjax.train(c, say=quiet)
    figures, found = result.results["test"]["metrics"], records(tmp_path)
    assert figures["f1"]["value"] > 0.6  # by chance about 0.1

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    plain = transformers.AutoModelForQuestionAnswering.from_pretrained(base)
    # Merged, for PEFT's own class for answers does not hand token types on to the model.
    tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").merge_and_unload().eval()
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["task_type"] == "QUESTION_ANS"
    whole = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run" / "merged").eval()
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    several = 0
    for row, record in zip(rows[:25], found):
        batch = tokenizer(
            row["question"], row["context"], truncation="only_second", max_length=16, stride=4, padding=True,
            return_overflowing_tokens=True, return_offsets_mapping=True, return_tensors="pt",
        )  # fmt: skip
        offsets, _ = batch.pop("offset_mapping"), batch.pop("overflow_to_sample_mapping")
        several += len(offsets) > 1
        with torch.no_grad():
            out, other = tuned(**batch), whole(**batch)
        torch.testing.assert_close(out.start_logits, other.start_logits, atol=1e-4, rtol=0)
        best = (-np.inf, "")
        for w in range(len(offsets)):
            text = [i for i, side in enumerate(batch.sequence_ids(w)) if side == 1]
            for i in text:
                for j in text:
                    if i <= j < i + 3:
                        score = float(out.start_logits[w, i] + out.end_logits[w, j])
                        best = max(best, (score, row["context"][offsets[w, i, 0] : offsets[w, j, 1]]))
        assert best[1] == record["prediction"]
        np.testing.assert_allclose(record["score"], best[0], atol=1e-3)
    assert several > 5
    for path in ("run", "run/adapter", "run/merged"):
        again = ftjax.predict(str(tmp_path / path), str(tmp_path / "test.jsonl"))
        assert [row["prediction"] for row in again] == [row["prediction"] for row in found]
        assert "answers" not in again[0]
        report = ftjax.evaluate(ftjax.load(tmp_path / path), str(tmp_path / "test.jsonl"))
        assert report["metrics"]["f1"]["value"] == figures["f1"]["value"]


def test_questions_without_an_answer(tmp_path):
    found = asked(300, 2)
    for row in found[::3]:
        row.update(question="moving" if "fine" in row["question"] else "flat", answers={"text": [], "answer_start": []})
    base = make(tmp_path / "base", "bert")
    how = {"tuning__method": "full", "optim__lr": 5e-3, "train__steps": 120, "task__stride": 4, "data__max_length": 32}
    with pytest.raises(FtjaxError, match="train.jsonl row 1: .*set task.no_answer"):
        ftjax.train(settings(tmp_path, found, "span", base, **how), say=quiet)
    result = ftjax.train(settings(tmp_path, found, "span", base, task__no_answer=True, **how), say=quiet)
    assert result.results["test"]["metrics"]["no_answer"]["value"] > 0.6


def test_masked_tokens_are_learned_and_the_decoder_stays_tied(tmp_path):
    import torch
    import transformers

    base = make(tmp_path / "base", "bert")
    rng = np.random.default_rng(0)
    cycle = [word for group in WORDS.values() for word in group]  # each word says which comes next
    found = []
    for _ in range(300):
        start = int(rng.integers(8))
        found.append({"text": " ".join(cycle[(start + i) % 8] for i in range(int(rng.integers(8, 40))))})
    how = {"tuning__method": "full", "optim__lr": 1e-2, "train__steps": 400, "data__max_length": 16}
    how |= {"task__mask_rate": 0.2, "data__packing": True}
    c = settings(tmp_path, found, "masked", base, **how)
    result = ftjax.train(c, say=quiet)
    figures = result.results["test"]
    assert figures["accuracy"] > 0.5 and figures["loss"] < 1.3  # by chance 1/8 and 2.1
    assert result.val_loss == pytest.approx(result.results["validation"]["loss"], rel=1e-5)
    again = ftjax.evaluate(str(tmp_path / "run" / "full"), str(tmp_path / "test.jsonl"), overrides=[
        "task.mask_rate=0.2", "data.max_length=16", "data.packing=True"])  # fmt: skip
    assert again["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "full", output_loading_info=True)
    assert type(model).__name__ == "BertForMaskedLM" and not info["missing_keys"]
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    ids = np.array([[2, 11, 12, 4, 14, 15, 3]])
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ftjax.load(tmp_path / "run").logits(ids), theirs, atol=1e-4)
    with pytest.raises(FtjaxError, match="task masked makes no prediction"):
        ftjax.predict(str(tmp_path / "run"), str(tmp_path / "test.jsonl"))
    with pytest.raises(FtjaxError, match="tuning.method: lora would not train head/dense"):
        ftjax.train(settings(tmp_path, found, "masked", base, overwrite=True, data__max_length=16), say=quiet)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_texts_that_belong_together_come_near(pool, tmp_path):
    import peft
    import torch
    import transformers

    base = make(tmp_path / "base", "bert")
    rng = np.random.default_rng(0)
    partner = dict(zip(WORDS["good"] + WORDS["bad"], WORDS["bad"] + WORDS["good"]))
    found = []
    for _ in range(300):
        words = list(rng.choice(list(partner), int(rng.integers(2, 4)), replace=False))
        texts = [
            " ".join(rng.permutation([*group, *rng.choice(FILL, 2)])) for group in (words, map(partner.get, words))
        ]
        found.append(dict(zip(("anchor", "positive"), texts)))
    full = pool == "cls"
    how = {"task__pool": pool, "train__steps": 100, "train__batch_size": 32, "data__packing": not full}
    how |= {"tuning__method": "full", "optim__lr": 5e-3} if full else {"export__formats": '("adapter", "merged")'}
    how["data__max_length"] = 32
    result = ftjax.train(settings(tmp_path, found, "embed", base, **how), say=quiet)
    figures = result.results["test"]["metrics"]
    assert figures["recall_at_10"]["value"] > 0.6  # by chance 10 of 60
    assert 0 < figures["mrr"]["value"] <= 1 <= figures["mean_rank"]["value"]

    texts = [row["anchor"] for row in found[:9]]
    ours = ftjax.load(tmp_path / "run").embed(texts)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    folder = tmp_path / "run" / ("full" if full else "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    models = [transformers.AutoModel.from_pretrained(folder)]
    source = transformers.AutoModel.from_pretrained(base)
    np.testing.assert_array_equal(*(m.pooler.dense.weight.detach() for m in (models[0], source)))
    if not full:
        models.append(peft.PeftModel.from_pretrained(source, tmp_path / "run" / "adapter"))
    for model in models:
        with torch.no_grad():
            states = model.eval()(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        vectors = states[:, 0] if full else (states * mask).sum(1) / mask.sum(1)
        np.testing.assert_allclose(torch.nn.functional.normalize(vectors, dim=1).numpy(), ours, atol=1e-5)
    alone = write(tmp_path / "alone.jsonl", [{"text": text} for text in texts])
    for path in (tmp_path / "run", folder, tmp_path / "run" / "adapter")[: 2 if full else 3]:
        lm = ftjax.load(path)
        assert lm.kind == "embed" and lm.pooling == (pool, 16)
        np.testing.assert_allclose(lm.embed(texts), ours, atol=1e-5)
        said = ftjax.predict(str(path), alone)
        np.testing.assert_allclose([row["vector"] for row in said], ours, atol=1e-5)
        report = ftjax.evaluate(str(path), str(tmp_path / "test.jsonl"))
        assert report["metrics"]["mrr"]["value"] == pytest.approx(figures["mrr"]["value"], rel=1e-3)
    told = []  # the run's texts are in the column `anchor`: another one is told, and never guessed among several
    ftjax.predict(str(tmp_path / "run"), alone, say=told.append)
    assert [line for line in told if "has no column 'anchor'; texts are read from 'text'" in line]
    several = write(tmp_path / "several.jsonl", [{"text": "a", "sentence": "b"}])
    with pytest.raises(FtjaxError, match="task.text: .*several.jsonl: no column 'anchor'; .* text, sentence"):
        ftjax.predict(str(tmp_path / "run"), several)
    with pytest.raises(FtjaxError, match="train.accumulate: expected 1: each text is compared with all others"):
        ftjax.train(settings(tmp_path, found, "embed", base, train__accumulate=2), say=quiet)


def test_vectors_are_written_as_numpy_too(tmp_path, capsys):
    from ftjax.cli import main

    base = make(tmp_path / "base", "bert")
    alone = write(tmp_path / "alone.jsonl", [{"text": "the film was fine"}, {"text": "it was dull"}])
    out = tmp_path / "vectors.npy"
    assert main(["predict", "--model", str(base), "--data", alone, "--out", str(out)]) == 0
    np.testing.assert_allclose(np.load(out), ftjax.load(base).embed(["the film was fine", "it was dull"]), atol=1e-6)
