"""A method of one's own: one short file, no other touched, and the whole run works with it."""

from pathlib import Path

import method_vera  # noqa: F401  registers itself
import numpy as np
import pytest

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
