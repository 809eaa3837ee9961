"""Tiny random models made by transformers, on disk: the referee's own files."""

from __future__ import annotations

import pytest
from tiny_models import VARIANTS, make, saved  # noqa: F401  a fixture


@pytest.fixture(params=VARIANTS)
def variant(request, tmp_path):
    """(folder as transformers saves it, the torch model in memory)."""
    model = make(*VARIANTS[request.param])
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source", model
