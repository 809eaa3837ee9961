"""Digests of a base's files: equal wherever they lie, and other ones for any change that matters."""

import json
import shutil

import ml_dtypes  # noqa: F401  gives numpy the name bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftjax.assets import resolve
from ftjax.errors import FtjaxError
from ftjax.hub import fingerprint


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(resolve("builtin:stories260K"), tmp_path / "base")


def test_a_copy_elsewhere_is_the_same(base, tmp_path):
    kept = fingerprint.record(base, "base")
    other = shutil.copytree(base, tmp_path / "a" / "b")
    found = fingerprint.record(other, "b")
    assert fingerprint.changes(kept, found) == [] and kept["path"] != found["path"]
    (other / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"rope_theta": 5e5}))
    (told,) = fingerprint.changes(kept, fingerprint.record(other, "b"))
    assert told.startswith("of the base's files, config.json was ")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight"]
)
def test_samples_notice_other_values_of_any_tensor(base, monkeypatch, name):
    """Of files that are too large to be read whole, with weights as another training leaves them: of equal size."""
    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK", 64)
    before = fingerprint.weights_digests(base)
    assert fingerprint.weights_digests(base) == before
    tensors = load_file(base / "model.safetensors")
    size = (base / "model.safetensors").stat().st_size
    tensors[name] = tensors[name] + np.float32(1e-3)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert (base / "model.safetensors").stat().st_size == size
    after = fingerprint.weights_digests(base)
    assert {file for file in after if after[file] != before[file]} == {"model.safetensors"}


def test_an_adapter_made_elsewhere_says_nothing_of_its_base(base, tmp_path):
    (tmp_path / "adapter").mkdir()
    assert fingerprint.of_adapter(tmp_path / "adapter") is None
    fingerprint.check_adapter(tmp_path / "adapter", base)


def test_a_base_that_is_nowhere(tmp_path, base):
    kept = fingerprint.record(base, str(base)) | {"relative": "../base"}
    assert fingerprint.find(kept, tmp_path / "run", "gone/base", "", "key") == base
    shutil.rmtree(base)
    with pytest.raises(
        FtjaxError, match="run: its base gone/base is at none of gone/base, .*base. Put it back, or set"
    ):
        fingerprint.find(kept, tmp_path / "run", "gone/base", "", "model.path in run.json")
