"""Tiny random models made by transformers, on disk: the referee's own files."""

from __future__ import annotations

import pytest
from tiny_models import VARIANTS, make


@pytest.fixture(params=VARIANTS)
def variant(request, tmp_path):
    """(folder as transformers saves it, the torch model in memory)."""
    model = make(*VARIANTS[request.param])
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source", model


@pytest.fixture
def saved(tmp_path):
    """name of a variant -> (folder, torch model)."""

    def save(name, folder="source", **options):
        model = make(*VARIANTS[name])
        model.save_pretrained(tmp_path / folder, **options)
        return tmp_path / folder, model

    return save
