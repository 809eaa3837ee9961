"""Whose a run folder is."""

import pytest

from ftjax import config
from ftjax.assets import resolve
from ftjax.errors import FtjaxError
from ftjax.training.run_folder import claim

BASE = resolve("builtin:stories260K")


def test_a_run_that_never_took_a_step_gives_way_to_another(tmp_path):
    c = config.default()
    c.run_dir = str(tmp_path / "run")
    assert not claim(c, BASE, "rows")
    (tmp_path / "run" / "before.json").write_text("{}")
    c.optim.lr = 0.5
    assert not claim(c, BASE, "rows") and not (tmp_path / "run" / "before.json").exists()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert claim(c, BASE, "rows")
    c.optim.lr = 0.25
    with pytest.raises(FtjaxError, match="holds another run: optim.lr was 0.5, is 0.25"):
        claim(c, BASE, "rows")
    c.optim.lr = 0.5
    with pytest.raises(FtjaxError, match="the rows in its data files are not those that it was started on"):
        claim(c, BASE, "other rows")
