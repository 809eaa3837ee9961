"""Whatever a person gets wrong, `ftjax.train` stops before the first step with one error: where, and what to do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ftjax
from ftjax import assets
from ftjax import config as configs
from ftjax.errors import FtjaxError

ROW = {"src": "dog park run", "tgt": "A dog runs in the park."}


def model(tmp_path) -> Path:
    """A copy of the starter model that a case may damage."""
    folder = tmp_path / "model"
    shutil.copytree(assets.resolve("builtin:stories260K"), folder)
    return folder


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rows(config, tmp_path, text: str, name="rows.jsonl") -> None:
    file = tmp_path / name
    file.write_text(text)
    config.data.train = str(file)


def missing_file(c, tmp):
    rows(c, tmp, json.dumps(ROW))
    c.data.train = str(tmp / "row.jsonl")


def empty_file(c, tmp):
    rows(c, tmp, "")


def row_without_the_column(c, tmp):
    rows(c, tmp, "\n".join(json.dumps(r) for r in (ROW, ROW, {"src": "x"}, ROW)))


def invalid_json(c, tmp):
    rows(c, tmp, json.dumps(ROW) + "\n" + '{"src": "dog", "tgt": \n' + json.dumps(ROW))


def every_label_masked(c, tmp):
    rows(c, tmp, "\n".join(json.dumps(r) for r in (ROW, ROW | {"tgt": " "}, ROW)))


def answer_cut_away(c, tmp):
    rows(c, tmp, "\n".join(json.dumps(r) for r in (ROW, ROW | {"src": "dog " * 400}, ROW)))


def longer_than_positions(c, tmp):
    c.data.max_length = 513


def long_row_refused(c, tmp):
    rows(c, tmp, "\n".join(json.dumps(r) for r in (ROW, ROW | {"tgt": "dog " * 400}, ROW)))
    c.data.long = "raise"


def unknown_method(c, tmp):
    c.tuning.method = "lorra"


def unknown_architecture(c, tmp):
    c.model.path = str(model(tmp))
    edit_json(Path(c.model.path) / "config.json", model_type="lama")


def shard_missing_from_the_index(c, tmp):
    folder = model(tmp)
    names = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = [f"model-0000{1 + i % 2}-of-00002.safetensors" for i in range(len(names))]
    index = {"metadata": {}, "weight_map": dict(zip(names, files))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    c.model.path = str(folder)


def index_that_leaves_the_folder(c, tmp):
    folder = model(tmp)
    names = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors").rename(tmp / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    c.model.path = str(folder)


def tensor_of_the_wrong_shape(c, tmp):
    folder = model(tmp)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((172, 63), np.float32)
    save_file(tensors, folder / "model.safetensors")
    c.model.path = str(folder)


def pickled_weights(c, tmp):
    folder = model(tmp)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    c.model.path = str(folder)


def target_that_matches_nothing(c, tmp):
    c.tuning.targets = ("q_porj",)


def tokenizer_larger_than_the_embedding(c, tmp):
    folder = model(tmp)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:500]
    save_file(tensors, folder / "model.safetensors")
    edit_json(folder / "config.json", vocab_size=500)
    c.model.path = str(folder)


def batch_that_cannot_be_split(c, tmp):
    c.train.batch_size = 10
    c.train.accumulate = 4


def mesh_of_another_size(c, tmp):
    c.mesh.tensor = 3


def metric_without_its_column(c, tmp):
    c.evaluate.update(compare=True, metrics=("coverage",), words="wrods")


TABLE = [
    (missing_file, ["data.train", "row.jsonl", "rows.jsonl"]),
    (empty_file, ["rows.jsonl", "empty"]),
    (row_without_the_column, ["rows.jsonl row 3", "'tgt'"]),
    (invalid_json, ["rows.jsonl line 2", "invalid JSON"]),
    (every_label_masked, ["rows.jsonl row 2", "nothing to train on"]),
    (answer_cut_away, ["rows.jsonl row 2", "no trained token is left", "data.max_length"]),
    (longer_than_positions, ["data.max_length=513", "512 positions"]),
    (long_row_refused, ["rows.jsonl row 2", "data.long"]),
    (unknown_method, ["tuning.method", 'did you mean "lora"']),
    (unknown_architecture, ["config.json", "'lama'", 'did you mean "llama"']),
    (shard_missing_from_the_index, ["model.safetensors.index.json", "model-00002-of-00002.safetensors"]),
    (index_that_leaves_the_folder, ["model.safetensors.index.json", "'../outside.safetensors'", "in this folder"]),
    (tensor_of_the_wrong_shape, ["model.layers.2.mlp.up_proj.weight", "(172, 63)", "(172, 64)"]),
    (pickled_weights, ["pytorch_model.bin", "save_pretrained"]),
    (target_that_matches_nothing, ["tuning.targets", 'did you mean "q_proj"']),
    (tokenizer_larger_than_the_embedding, ["larger than the embedding", "500 rows"]),
    (batch_that_cannot_be_split, ["train.batch_size", "4 microbatches"]),
    (mesh_of_another_size, ["mesh", "tensor=3", "8 devices"]),
    (metric_without_its_column, ["evaluate.words", "'wrods'"]),
]


@pytest.mark.parametrize("spoil, told", TABLE, ids=lambda x: getattr(x, "__name__", ""))
def test_one_clear_error(spoil, told, tmp_path):
    config = configs.default()
    config.run_dir = str(tmp_path / "run")
    config.data.update(prompt="Words: {src}\nSentence:", completion=" {tgt}", split=(1.0, 0.0, 0.0), limit=64)
    config.train.update(steps=1, batch_size=8)
    config.data.test = "builtin:commongen/validation.jsonl"
    config.log.update(tensorboard=False, compilation_cache=False)
    spoil(config, tmp_path)
    with pytest.raises(FtjaxError) as error:
        ftjax.train(config, say=lambda line: None)
    message = str(error.value)
    assert all(part in message for part in told), message
    assert "\n" not in message.replace("\\n", "")
