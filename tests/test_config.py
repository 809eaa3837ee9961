"""The config: overrides, files, and the one clear error for each way to get it wrong."""

import json
from pathlib import Path

import pytest

from ftjax import config as configs
from ftjax.errors import FtjaxError

BODY = "from ftjax import config\n\ndef get_config():\n    c = config.default()\n    {}\n    return c\n"


def written(tmp_path, line="c.seed = 3"):
    file = tmp_path / "some.py"
    file.write_text(BODY.format(line))
    return file


def test_a_file_and_overrides_are_applied_in_order(tmp_path):
    overrides = ["optim.lr=3e-4", "train.batch_size=8", "tuning.targets=q_proj", "log.tensorboard=false", "optim.lr=1"]
    config = configs.load(written(tmp_path), overrides)
    assert (config.seed, config.optim.lr, config.train.batch_size) == (3, 1.0, 8)
    assert (
        configs.load(written(tmp_path), [r"data.prompt=Words: {src}\nSentence:"]).data.prompt
        == "Words: {src}\nSentence:"
    )
    assert config.tuning.targets == ("q_proj",) and config.log.tensorboard is False


def test_a_config_survives_json(tmp_path):
    config = configs.load(written(tmp_path), ["tuning.rank_pattern=(('q_proj', 8), ('mlp.*', 4))", "optim.lr=0.1"])
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"config": config.to_dict()}))
    assert configs.load(file).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "override, told",
    [
        ("optm.lr=1", 'no such key (did you mean "optim.lr"?)'),
        ("optim.lr", "expected --config.optim.lr=VALUE"),
        ("optim.lr=fast", "expected a number above 0 or None; found 'fast'"),
        ("optim.lr=-1", "expected a number above 0 or None; found -1"),
        ("seed=1.5", "expected a whole number at least 0 and at most 2,147,483,647; found 1.5"),
        ("seed=True", "expected a whole number at least 0 and at most 2,147,483,647; found True"),
        ("overwrite=1", "expected True or False; found 1"),
        ("optim=3", "names a group; its keys are"),
        ("optim.name=adam", "one of adamw, adafactor, lion, sgd, muon; found 'adam' (did you mean \"adamw\"?)"),
        ("data.split=(0.5, 0.1, 0.1)", "three shares that add up to 1"),
        ("tuning.rank=0", "expected a whole number at least 1"),
        ("tuning.rank_pattern=('q_proj', 8)", "entry 1: expected a pair (pattern, number above 0)"),
    ],
)
def test_a_wrong_override_says_what_was_expected(tmp_path, override, told):
    with pytest.raises(FtjaxError) as error:
        configs.load(written(tmp_path), [override])
    assert told in str(error.value) and override.split("=")[0] in str(error.value)


@pytest.mark.parametrize(
    "line, told",
    [
        ("c.optim.learning_rate = 1.0", "learning_rate"),
        ("c.optim.name = 3", "line 5"),
        ("c.train.steps = 'many'", "cannot be casted"),
        ("return {}", "get_config() returned dict"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, line, told):
    file = written(tmp_path, line)
    with pytest.raises(FtjaxError) as error:
        configs.load(file)
    assert str(file) in str(error.value) and told in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    written(tmp_path)
    with pytest.raises(FtjaxError, match="did you mean .*some.py"):
        configs.load(tmp_path / "sme.py")


def test_every_config_of_the_project_is_valid():
    files = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
    assert files
    for file in files:
        configs.load(file)
