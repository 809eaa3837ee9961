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


def test_models_and_functions_that_a_config_names_are_known_by_their_content(base, tmp_path):
    other, code, run = shutil.copytree(base, tmp_path / "b"), tmp_path / "reward.py", tmp_path / "run"
    code.write_text("def f(*given): return 1")
    sums = run / "checkpoints" / "2" / "checksums.json"
    sums.parent.mkdir(parents=True)
    sums.write_text("{}")
    (run / "run.json").write_text("{}")

    def found(reference=base):
        named = {"task.reference": str(reference), "task.rewards[0]": f"{code}:f", "task.rewards[1]": str(run)}
        return {"others": fingerprint.of_named(named)}

    kept = found()
    assert fingerprint.changes(kept, found(other)) == []
    (run / "run.json").write_text('{"starts": []}')  # a run that is started again and has nothing to do
    assert fingerprint.changes(kept, found()) == []
    for file, name in (
        (other / "model.safetensors", "task.reference/model.safetensors"),
        (other / "tokenizer.json", "task.reference/tokenizer.json"),
        (code, "task.rewards[0]/reward.py"),
        (sums, "task.rewards[1]/checkpoints/2/checksums.json"),
    ):
        whole = file.read_bytes()
        file.write_bytes(whole + b" ")
        (told,) = fingerprint.changes(kept, found(other))
        assert told.startswith(f"of the files that the config names, {name} was ")
        file.write_bytes(whole)
    with pytest.raises(FtjaxError, match="^task.reference: .*nowhere: no such folder"):
        found(tmp_path / "nowhere")
    code.unlink()
    with pytest.raises(FtjaxError, match=r"^task.rewards\[0\]: .*reward.py: no such file"):
        found()


def test_a_run_whose_checkpoints_may_not_be_read_is_not_one_without_any(tmp_path, bound_by_permissions):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    named = {"task.reference": str(tmp_path / "run")}
    assert fingerprint.of_named(named) == {}
    sums = tmp_path / "run/checkpoints/2/checksums.json"
    sums.parent.mkdir(parents=True)
    sums.write_text("{}")
    assert list(fingerprint.of_named(named)) == ["task.reference/checkpoints/2/checksums.json"]
    for folder in (sums.parent, sums.parent.parent):
        folder.chmod(0)
        with pytest.raises(PermissionError, match=str(folder)):
            fingerprint.of_named(named)
        folder.chmod(0o755)


def test_the_modules_beside_a_function_that_it_imports_are_part_of_it(tmp_path):
    for name, text in {
        "reward.py": "import json, numpy as np\nfrom near import f\ndef g():\n    import pack.deep.low as low",
        "near.py": "from pack import other\nimport reward",
        "pack/__init__.py": "",
        "pack/other.py": "from . import one\nfrom .deep import *\nfrom ..far import x",
        "pack/one.py": "def (",  # it is refused where it is run
        "pack/deep/__init__.py": "",
        "pack/deep/low.py": "",
        "pack/unused.py": "",
        "far.py": "",
        "unused.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    named = {"task.environment": f"{tmp_path / 'reward.py'}:g"}
    before = fingerprint.of_named(named)
    names = ("reward", "near", "pack/__init__", "pack/other", "pack/one", "pack/deep/__init__", "pack/deep/low", "far")
    assert before.keys() == {f"task.environment/{name}.py" for name in names}
    (tmp_path / "pack/one.py").write_text("")
    assert fingerprint.changes({"others": before}, {"others": fingerprint.of_named(named)}) == [
        f"of the files that the config names, task.environment/pack/one.py was "
        f"{before['task.environment/pack/one.py'][:8]}, is e3b0c442"
    ]
