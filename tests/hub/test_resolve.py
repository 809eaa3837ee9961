"""Names of models -> folders, without a network."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from ftjax import seals
from ftjax.data import read
from ftjax.errors import FtjaxError
from ftjax.hub import pooling
from ftjax.hub.resolve import check_out, new_folder, resolve, resolve_model
from ftjax.training.checkpoint import Checkpoints, damage


def test_folders_and_their_near_misses(tmp_path):
    (tmp_path / "llama-3").mkdir()
    assert resolve(str(tmp_path / "llama-3")) == tmp_path / "llama-3"
    with pytest.raises(FtjaxError, match='llama_3: no such folder .did you mean "llama-3"'):
        resolve(str(tmp_path / "llama_3"))
    (tmp_path / "file.bin").write_text("")
    with pytest.raises(FtjaxError, match="expected a model directory, found a file"):
        resolve(str(tmp_path / "file.bin"))
    with pytest.raises(FtjaxError, match="ftjax carries no such file"):
        resolve("builtin:nothing")


def test_an_adapter_is_no_base_model_even_beside_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FtjaxError, match="holds a PEFT adapter, and here a base model is needed: name the base"):
        resolve_model(str(tmp_path))


def test_hub_name_comes_from_the_cache(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("owner/model", "v1") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/model", "v1")
    files = ["model.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    unwanted = ["pytorch_model.bin", "consolidated.safetensors", "original/x.json", "modeling.py", "model.gguf"]
    from huggingface_hub.utils import filter_repo_objects

    kept = filter_repo_objects(
        files + unwanted, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == files


def test_hub_name_without_a_network(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FtjaxError, match="nobody/nothing: no such folder here; .*cannot be reached"):
        resolve("nobody/nothing")


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder_to_write_to(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FtjaxError, match="expected a folder to write to, found a file"), new_folder(tmp_path / "out"):
        pass


def test_a_folder_that_may_not_be_read_is_not_replaced(tmp_path, bound_by_permissions):
    with new_folder(tmp_path / "out") as draft:
        (draft / "weights").write_text("")
    (tmp_path / "out/notes").mkdir()
    (tmp_path / "out/notes/mine.txt").write_text("")
    (tmp_path / "out/notes").chmod(0)
    try:
        with pytest.raises(PermissionError, match="notes"):
            check_out(tmp_path / "out")
    finally:
        (tmp_path / "out/notes").chmod(0o755)


def best(folder):
    return Checkpoints.best(types.SimpleNamespace(folder=folder, steps=lambda: [1, 4], latest=lambda: 4))


@pytest.mark.parametrize(
    "look, closed",
    [
        (lambda: resolve("closed/model"), "closed"),  # it has the form of a name on the hub
        (lambda: read.read_table("closed/rows"), "closed"),
        (lambda: read.read_table("rows"), "rows/train"),
        (lambda: pooling.read(Path("model")), "model/1_Pooling"),
        (lambda: best(Path("steps")), "steps/1/metrics"),
        (lambda: damage(Path("steps/1"), True), "steps/1"),
        (lambda: seals.changed(Path("steps/1"), {"trained/array": 0}), "steps/1/trained"),
    ],
)
def test_what_lies_in_a_closed_folder_is_not_absent(tmp_path, monkeypatch, bound_by_permissions, look, closed):
    monkeypatch.chdir(tmp_path)
    for file, text in {
        "closed/model/config.json": "{}", "closed/rows/train.jsonl": "{}", "rows/train/a.jsonl": '{"a": 1}\n',
        "rows/data/train.jsonl": '{"a": 2}\n', "model/1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
        "model/modules.json": '[{"type": "a.Pooling", "path": "1_Pooling"}]', "steps/1/trained/array": "",
        "steps/1/metrics/metrics": '{"rank": 2, "step": 1}', "steps/4/metrics/metrics": '{"rank": 1, "step": 4}',
    }.items():  # fmt: skip
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(text)
    Path(closed).chmod(0o400)  # its names can be listed
    try:
        with pytest.raises((PermissionError, FtjaxError), match="Permission denied"):
            look()
    finally:
        Path(closed).chmod(0o755)
