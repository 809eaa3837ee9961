"""The config: overrides, files, and the one clear error for each way to get it wrong."""

import json
import math
from pathlib import Path

import pytest

import ftjax
from ftjax import config as configs
from ftjax import listing
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
        ("optim=3", "is a group of fields; set one of its keys:"),
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
        ("c.train.steps = 'many'", "steps: expected int; found 'many'"),
        ("return {}", "get_config() returned dict"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, line, told):
    file = written(tmp_path, line)
    with pytest.raises(FtjaxError) as error:
        configs.load(file)
    assert str(file) in str(error.value) and told in str(error.value)


# ---------------------------------------------------------------------------------------------- every field


def test_every_field_has_a_range_and_a_reason():
    """The comment behind a field's declaration, and the lines below it up to an empty comment, are its reason."""
    explained = listing.explained()
    assert explained.keys() == configs.FIELDS.keys() and all(text for _, text in explained.values())
    assert explained["compare.harmless"][0] == "ftjax compare" and "$" not in explained["compare.harmless"][1]
    assert explained["generate.top_k"][1] == "sample from the k most probable tokens only; 0: from all"
    assert configs.flat(configs.default()).keys() == configs.FIELDS.keys()
    for key, field in configs.FIELDS.items():
        assert field.expected and field.check(configs.default()[key], key) == field.default
        with pytest.raises(FtjaxError, match=f"{key}: expected"):
            field.check(object(), key)


ODD = [
    None,
    math.nan,
    math.inf,
    -math.inf,
    -1,
    0,
    1e999,
    -0.5,
    2.0,
    2.5,
    10**30,
    10**5000,
    "",
    "a",
    "1e5",
    "a\0b",
    b"a",
]
ODD += [
    (),
    [],
    {},
    ((),),
    ("",),
    ("a", 1),
    ("a", None),
    ((("a",),),),
    (math.nan,),
    (-1,),
    ({"a": 1},),
    {1: 2},
    True,
    1j,
]
ODD += [object(), (("a", -1),), (("a", math.inf),), (("(", 1),), ({"train": "a", 1: 2},), (10**5000,), {"a"}, range(3)]
TEXTS = [
    "None",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e999",
    "-0.5",
    "2.5",
    "9" * 30,
    "9" * 5000,
    "",
    "a",
    "1e5",
    "123e4567",
]
TEXTS += [
    "0123456",
    "007",
    "true",
    "()",
    "[]",
    "{}",
    "((),)",
    "('',)",
    "('a', 1)",
    "((('a',),),)",
    "(nan,)",
    "({'a': 1},)",
]
TEXTS += [
    "{[]: 1}",
    "(" * 300,
    "1+1j",
    "b'a'",
    "{1, 2}",
    "\ud800",
    "a\0b",
    "(('a', -1),)",
    "(('(', 1),)",
    "lambda: 1",
    "=",
]


@pytest.mark.parametrize("key", configs.FIELDS)
def test_a_value_is_kept_as_it_is_or_refused(key):
    def same(kept, given):
        if isinstance(given, list | tuple) and isinstance(kept, tuple):
            return len(kept) == len(given) and all(map(same, kept, given))
        return kept in (given, (given,)) or (isinstance(kept, float) and kept == float(given))

    field, refused = configs.FIELDS[key], []
    for value in ODD:
        try:
            assert same(field.check(value, key), value), value
        except FtjaxError as error:
            assert str(error).startswith(key) and len(str(error)) < 600
            refused.append(value)
    for text in TEXTS:
        try:
            kept = field.read(text, key)
        except FtjaxError as error:
            assert str(error).startswith(key) and len(str(error)) < 600
            continue
        if isinstance(kept, float):
            assert math.isfinite(kept) and kept == float(text)
        elif isinstance(kept, str) or (field.item in (configs.NAME, configs.WORD) and text[:1] not in ("(", "[")):
            assert kept in (text, (text,))
    config = configs.default()
    *groups, last = key.split(".")
    for value in (refused[0], refused[-1]):  # set in Python, past every check of ml_collections
        group = config
        for name in groups:
            group = group[name]
        group._fields[last] = value
        with pytest.raises(FtjaxError, match=last):
            configs.validate(config)
        with pytest.raises(FtjaxError, match=last):
            configs.from_dict({key: value})


@pytest.mark.parametrize(
    "override",
    ["evaluate.rows=-5", "mesh.fsdp=0", "mesh.tensor=-2", "optim.b1=2.0", "optim.b1=1", "optim.eps=0", "seed=-1",
     "seed=4294967296", "train.epochs=1e999", "optim.clip_norm=None", "optim.lr=nan", "data.workers=0", "run_dir=",
     "data.cache_size=-1", "compare.curve=(100, 0)", "tuning.alpha=0", "data.split=(nan, 0.5, 0.5)", "data.prompt=None",
     "tuning.rank_pattern=(('q', 0),)", "task.class_weights=(1, -1)", "evaluate.compare_rows=-1", "model.path=''"],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(override):
    with pytest.raises(FtjaxError, match=f"--config.{override.split('=')[0]}.*: expected "):
        configs.override(configs.default(), [override])


def test_several_values_are_separated_by_commas_or_a_tuple():
    c = configs.default()
    configs.override(c, ["tuning.targets=q_proj,v_proj", "export.formats=adapter,merged", "compare.curve=500,1000"])
    assert c.tuning.targets == ("q_proj", "v_proj") and c.export.formats == ("adapter", "merged")
    configs.override(
        c, ["task.labels=('good, bad', 'x')", "generate.stop=,", "data.clean.drop=a{1,2}", "data.group=a b,c"]
    )
    assert (c.task.labels, c.generate.stop) == (("good, bad", "x"), (",",))
    assert (c.data.clean.drop, c.data.group, c.compare.curve) == (("a{1,2}",), ("a b,c",), (500, 1000))
    with pytest.raises(
        FtjaxError, match="export.formats: expected one of .*found 'mergd' \\(did you mean \"merged\"\\?"
    ):
        configs.override(c, ["export.formats=adapter,mergd"])


def test_a_text_that_looks_like_a_number_stays_a_text():
    texts = ["model.revision=123e4567", "data.label=1e5", "task.labels=0123", "data.system=True", "data.test='007'"]
    config = configs.default()
    configs.override(config, texts)
    assert config.model.revision == "123e4567" and config.data.label == "1e5" and config.task.labels == ("0123",)
    assert config.data.system == "True" and config.data.test == "007"


# ---------------------------------------------------------------------------------------------- what leads to a field


@pytest.mark.parametrize(
    "name, key",
    [("lr", "optim.lr"), ("learning_rate", "optim.lr"), ("optim.learning_rate", "optim.lr"), ("train.seed", "seed"),
     ("lora_r", "tuning.rank"), ("lora-r", "tuning.rank"), ("num_train_epochs", "train.epochs"),
     ("per_device_train_batch_size", "train.batch_size"), ("max_seq_length", "data.max_length"),
     ("optim.lrr", "optim.lr"), ("output_dir", "run_dir"),
     ("optim.batch_size", 'train.batch_size" or "evaluate.batch_size" or "generate.batch_size')],
)  # fmt: skip
def test_the_names_of_other_projects_lead_to_the_key(name, key):
    with pytest.raises(FtjaxError) as error:
        configs.override(configs.default(), [f"{name}=1"])
    assert str(error.value) == f'--config.{name}: no such key (did you mean "{key}"?)'


def test_no_two_fields_have_a_name_of_other_projects_in_common():
    names = [name for field in configs.FIELDS.values() for name in field.also.split()]
    assert len(names) == len(set(names)) and not set(names) & configs.FIELDS.keys()


def test_a_wrong_key_in_python_is_told_without_the_group():
    c = configs.default()
    with pytest.raises(FtjaxError) as error:
        c.optim.learning_rate = 1e-4
    assert str(error.value) == 'learning_rate: no such key (did you mean "optim.lr"?)'
    with pytest.raises(FtjaxError, match="zzz: no such key; this group has b1, b2"):
        c.optim.update(zzz=1)


@pytest.mark.parametrize("call", [ftjax.train, ftjax.sweep, ftjax.compare, configs.copy, configs.validate])
@pytest.mark.parametrize(
    "given, told",
    [
        ({"optim": {"lr": 1e-4}}, 'Pass ftjax.config.from_dict(...), which takes {"optim.lr": 1e-4}'),
        ("configs/quickstart.py", "Pass ftjax.config.load('configs/quickstart.py')"),
        (Path("some") / "run.json", "Pass ftjax.config.load('some/run.json')"),
        (None, "Pass ftjax.config.default()"),
    ],
)
def test_what_is_no_config_is_refused_with_what_to_pass(call, given, told):
    with pytest.raises(FtjaxError) as error:
        call(given)
    assert "expected a config; found " in str(error.value) and told in str(error.value)


def test_fields_that_another_field_makes_idle_are_named():
    assert configs.idle(configs.default()) == []
    c = configs.default()
    configs.override(c, ["task.stride=64", "rollout.group=4", "optim.decay=0.5", "distil.beta=1.0", "optim.b1=0.8"])
    told = {
        "task.kind='causal': rollout.group",
        "task.kind='causal': task.stride",
        "optim.schedule='cosine': optim.decay",
    }
    assert set(configs.idle(c)) == {f"no effect with {line}" for line in told | {"task.reference='': distil.beta"}}
    configs.override(c, ["task.kind=span", "optim.schedule=wsd", "task.reference=teacher", "optim.name=adafactor"])
    assert configs.idle(c) == [
        "no effect with task.kind='span': rollout.group",
        "no effect with optim.name='adafactor': optim.b1",
    ]
    c = configs.default()
    configs.override(c, ["data.temperature=2.0", "data.augment.ops=('typos',)", "data.mixture=({'train': 'a.jsonl'},)"])
    assert configs.idle(c) == ["no effect with data.augment.copies=0: data.augment.ops"]
    c.data.mixture = ({"train": "a.jsonl"}, {"train": "b.jsonl", "augment.copies": 1})
    assert configs.idle(c) == []  # it has one in an entry
    c.data.mixture = ({"train": "a.jsonl", "augment.rate": 0.5}, {"train": "b.jsonl", "augment.copies": 1})
    assert configs.idle(c) == ["no effect with data.augment.copies=0: data.augment.rate"]
    c = configs.default()
    configs.override(c, ["task.kind=reward", "task.pool=mean"])  # its head pools, too
    assert configs.idle(c) == []
    for keys, by, values in configs.ONLY:
        assert not configs.FIELDS[by].choices or set(values) <= set(configs.FIELDS[by].choices), keys


def test_a_rate_for_another_method_is_warned_of(tmp_path, capsys):
    file = written(tmp_path, "c.optim.lr = 5e-4")
    for overrides in ([], ["tuning.method=lora"], ["tuning.method=full", "optim.lr=1e-5"]):
        configs.load(file, overrides)
    configs.load(file, ["optim.lr=None", "tuning.method=full"])
    assert capsys.readouterr().err == ""
    configs.load(file, ["tuning.method=full"])
    assert "optim.lr=0.0005 was chosen for tuning.method=lora, and the method is full" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("a.py", "def get_config():\n    return cnfig.default()\n", "failed at line 2: NameError: name 'cnfig'"),
        ("a.py", "def get_config(:\n", "failed at line 1: SyntaxError"),
        ("a.py", "\nimport nosuchmodule\n", "failed at line 2: ModuleNotFoundError"),
        ("a.py", "def get_config():\n    raise ValueError('mine')\n", "failed at line 2: ValueError: mine"),
        ("a.py", "x = 1\n", "has no function 'get_config'"),
        (
            "a.py",
            BODY.format("c.optim.lr = 1; c.optim.lrr = 1"),
            'at line 5: lrr: no such key (did you mean "optim.lr"?)',
        ),
        ("a.json", "[]", "expected the fields of a config as a JSON object; found []"),
        ("a.json", '{"config": null}', "found None"),
        ("a.json", '{"optim": {"lr": -1}}', "optim.lr: expected a number above 0 or None; found -1"),
        ("a.json", '{"seed": {}}', "seed: expected a whole number"),
        ("a.json", '{"optim": NaN}', "optim is a group of fields"),
        ("a.json", "\xff", "a.json"),
        ("a.json", "[" * 100_000, "a.json: invalid JSON"),
        ("a.txt", "x", "a.txt: expected a .py file with get_config(), or the run.json of a run"),
    ],
)
def test_a_file_with_an_error_is_named_with_its_line(tmp_path, monkeypatch, name, text, told):
    monkeypatch.chdir(tmp_path)
    file = Path(name)  # as most people name it; frames of Python name the absolute path
    file.write_text(text, encoding="latin-1")
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
