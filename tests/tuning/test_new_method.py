"""A method of one's own: one short file, no other touched, and the whole run works with it."""

import json
from pathlib import Path

import method_vera  # noqa: F401  registers itself
import numpy as np
import pytest
import tiny_labelled

import ftjax
from ftjax import config
from ftjax.training.report import read_metrics


@pytest.mark.slow
def test_a_method_is_one_file_of_under_sixty_lines(tmp_path):
    assert len(Path(method_vera.__file__).read_text().splitlines()) < 60
    c = config.default()
    c.update(run_dir=str(tmp_path / "run"))
    c.tuning.update(method="vera", rank=16)
    c.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", limit=64, buckets=1, cache="")
    c.train.update(steps=12, batch_size=16, eval_every=12)
    c.train.log_every = 1
    c.evaluate.rows = 8
    c.export.formats = ("merged",)
    c.log.update(tensorboard=False, compilation_cache=False)
    result = ftjax.train(c, say=lambda line: None)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert result.steps == 12 and np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.05
    ids = [[1, 403, 407, 261, 378]]
    trained, merged, base = (
        ftjax.load(p).logits(ids) for p in (tmp_path / "run", tmp_path / "run/merged", c.model.path)
    )
    np.testing.assert_allclose(trained, merged, atol=1e-4)
    assert np.abs(trained - base).max() > 1e-2


@pytest.mark.slow
def test_the_same_file_tunes_an_encoder(tmp_path):
    """Its head over labels is trained beside what the method trains, and both are in the model that is written."""
    import transformers

    c = tiny_labelled.config(tmp_path, tiny_labelled.make(tmp_path / "bert", "bert"), export__formats='("full",)')
    c.tuning.update(method="vera", rank=16)
    result = ftjax.train(c, say=lambda line: None)
    assert result.val_loss < 0.66
    records = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    ours = np.array([[record["probabilities"][name] for name in ("bad", "good")] for record in records])
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "full").eval()
    texts = [record["text"] for record in records]
    np.testing.assert_allclose(tiny_labelled.theirs(whole, tmp_path / "bert", texts), ours, atol=1e-4)
    moved = ftjax.load(tmp_path / "run").variables["adapter"]["layers"]["attn"]["q_proj"]["vera"]["b"]
    assert np.abs(moved).max() > 1e-3
