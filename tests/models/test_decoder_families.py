"""Every family of decoders, on a tiny random model each, against transformers and peft.

`scripts/check_families.py` draws the models, and more of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import pytest
from tiny_models import TRANSFORMERS_5, VARIANTS, make

from ftjax import check_model
from ftjax.hub import weights

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import check_families  # noqa: E402

pytestmark = pytest.mark.skipif(not TRANSFORMERS_5, reason="the configs are those of Transformers 5")
# Decoding adds little to what the others show, and takes long to compile.
ANSWERS = ("gemma2", "cohere2", "gpt_neox")


@pytest.mark.parametrize("name", check_families.DRAWS)
def test_a_random_model_is_that_of_transformers_and_peft(name):
    found = check_families.check(name, seed=0, answers=name in ANSWERS)
    assert found.pop("leak") == 0 and found.pop("answers", 0) == 0
    assert all(x < 1e-4 for x in found.values()), found


def test_check_model_names_the_block_where_a_model_parts_from_transformers(tmp_path, capsys, monkeypatch):
    make(*VARIANTS["mistral"]).save_pretrained(tmp_path)
    assert check_model.check(tmp_path)
    assert "differ" in capsys.readouterr().out
    read = weights.read_params

    def spoilt(*arguments, **more):
        params = read(*arguments, **more)
        layers = params["layers"]
        return params | {"layers": jax.tree.map(lambda x: x.at[1].multiply(1.1), layers)}

    monkeypatch.setattr(weights, "read_params", spoilt)
    assert not check_model.check(tmp_path)
    assert "they part in block 1 (from 0)\n" in capsys.readouterr().out
