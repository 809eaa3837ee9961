"""Error messages that no other test reads: one row for each, with the call that provokes it and what it must say."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import ftjax
from ftjax import assets, check_model, cli, tasks
from ftjax import config as configs
from ftjax.data import augment, masks, spans, tags, template
from ftjax.data.labelled import Labelled
from ftjax.errors import FtjaxError
from ftjax.evaluation import best, classification, labelled, metrics, preferred, run
from ftjax.hub import derived, families, peft, pooling, resolve, weights
from ftjax.lm import LM
from ftjax.plan import devices
from ftjax.tasks import preference, regress
from ftjax.training import checkpoint, export, features, privacy, profile, program, report, run_folder
from ftjax.tuning import METHODS, Spec, adapters, lora_peft, prefix, prompt
from ftjax.verdict import amounts, contenders, forgetting, measure, search, setting, sweep

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import fuzz  # noqa: E402
import messages  # noqa: E402

BASE = Path(assets.resolve("builtin:stories260K"))
WINDOW = SimpleNamespace(name=profile.WINDOW, start_ns=0, duration_ns=1, stats={})
SLOW = SimpleNamespace(is_fast=False)  # a tokenizer without a tokenizer.json


def config(**fields):
    """The defaults with fields set, `__` for a dot."""
    return configs.from_dict({key.replace("__", "."): value for key, value in fields.items()})


def how(form: str, **fields) -> Labelled:
    """How labelled rows of a task are read."""
    return Labelled(
        form, *({"text": "text", "pair": "", "label": "label", "names": ("a", "b")} | fields).values(), "first", 0
    )


def read_config(**fields):
    """Read a config.json with these fields."""
    families.from_hf(json.loads((BASE / "config.json").read_text()) | fields)


def staged(first=None, **second):
    """The stages of a config whose two have these fields."""
    rows = {"data.train": "a.jsonl", "data.test": "b.jsonl"}
    configs.staged(config(stages=(rows | {"name": "a"} | (first or {}), rows | {"name": "b"} | second)))


def spec(method: str, **tuning) -> Spec:
    family, shape = families.read_config(BASE)
    c = config(tuning__method=method, **{f"tuning__{key}": value for key, value in tuning.items()})
    return Spec(shape, families.linear_names(family, shape), c.tuning, family)


def other_vocabularies():
    lm = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(vocab_size=5)))
    other = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(vocab_size=6)))
    forgetting.divergence(lm, other, [], 1)


CALLS = {
    "stages: b: replay: the rows of stage b are a mixture; remove this setting, or make": lambda: staged(
        replay=0.5, **{"data.mixture": ({"train": "a.jsonl", "weight": 1.0},), "data.train": ""}
    ),
    "run/tokenizer: the run itself uses tokenizer in its folder; choose another one, such as run/adapter": lambda: (
        export.export("run", "run/tokenizer")
    ),
    "run/checkpoints/4: the run itself uses checkpoints in its folder; choose": lambda: export.export(
        "run", "run/checkpoints/4"
    ),
    "stages: b: replay: the rows of stage a are for task.kind causal, and this stage trains": lambda: staged(
        replay=0.5, **{"task.kind": "policy"}
    ),
    "stages: b: optim.ewc: the rows of stage a are for task.kind policy, and this stage trains": lambda: staged(
        {"task.kind": "policy"}, **{"optim.ewc": 1.0}
    ),
    "data.mixture entry 1: 'workers' applies to all sources and cannot be set for one; set data.workers": lambda: (
        configs.sources(config(data__mixture=({"train": "a.jsonl", "weight": 1.0, "workers": 2},)))
    ),
    "data.augment.prompts: the template '{a}' occurs twice and would repeat every row; remove one": lambda: (
        augment._check_prompts(
            SimpleNamespace(columns=["a", "b"]),
            config(data__prompt="{a}", data__completion="{b}", data__augment__prompts=("{a}",)).data,
        )
    ),
    "task.kind: the model has the task classify, found 'regress'; leave task.kind out": lambda: run._rows(
        SimpleNamespace(kind="classify"), None, config(task__kind="regress"), print, ("task.kind=regress",)
    ),
    "here: column 'label' holds no label": lambda: how("classify").sides({"text": "x", "label": None}, "here"),
    "task.kind: this tokenizer does not map tokens to words; a tokenizer.json is needed": lambda: masks.encode(
        how("masked"), SLOW, [], []
    ),
    "task.kind: this tokenizer does not map tokens to characters; a tokenizer.json is needed": lambda: spans.windows(
        how("span"), SLOW, [], []
    ),
    "task.kind: this tokenizer does not map tokens to characters; a tokenizer.json is needed ": lambda: tags.in_words(
        SLOW, [], 0
    ),
    "here: column 'ranks' ranks all answers alike; remove the row": lambda: template.pairs(
        "ranked", {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 1]}, "here"
    ),
    "here: the conversations in 'chosen' and 'rejected' differ before their last message; expected two": lambda: (
        preference._check(template.Rendered(prompt="a", completion="x"), template.Rendered(prompt="b"), "here")
    ),
    "embed: unknown pool 'maen' (did you mean \"mean\"?); expected one of ": lambda: LM.embed(None, [], pool="maen"),
    "tuning.method: unknown method 'lroa' (did you mean \"lora\"?); expected one of ": lambda: program.fill_defaults(
        config(tuning__method="lroa")
    ),
    "data.form: unknown form 'promt' (did you mean \"prompt\"?); expected one of ": lambda: template.renderer("promt"),
    "data.prompt: '{a': expected '}' before end of string; a literal brace is written {{ or }}": lambda: template.parse(
        "{a", "data.prompt"
    ),
    "expected probabilities (rows, classes) of a float type; found (2,) int64": lambda: classification._probabilities(
        [0, 1]
    ),
    "threshold: unknown metric 'mcx' (did you mean \"mcc\"?); expected one of ": lambda: classification.best_threshold(
        [1], [0.5], "mcx"
    ),
    "names: expected 2 different names, one a class; found ['a']": lambda: labelled.report(
        "single_label", [0, 1], [[0.5, 0.5], [0.1, 0.9]], names=["a"]
    ),
    "expected two finite scores for each pair; found (2,) and (1,)": lambda: preferred.pair_rows([1, 2], [1]),
    "rope_type 'linear' needs 'factor', which is missing": lambda: read_config(
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0}
    ),
    "rope_theta of the rotary embedding is given twice: 10000.0 and 5.0": lambda: read_config(
        rope_theta=10000.0, rope_parameters={"rope_theta": 5.0}
    ),
    "layer_types has sliding_attention, but sliding_window is off": lambda: read_config(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], layer_types=["sliding_attention"] * 5
    ),
    "--devices v5p:2x2: expected 3 sides of the slice, such as v5p:2x2x2, or gcloud's name of it": lambda: (
        devices.parse("v5p:2x2")
    ),
    '--devices h300x8: unknown device (did you mean "h200"?); expected something like v6e-8': lambda: devices.parse(
        "h300x8"
    ),
    "here: column 'label' holds 'x'; expected a number between -1e18 and 1e18": lambda: regress.target(
        how("regress", names=("label",)), {"label": "x"}, "here"
    ),
    "export format 'adaptor': lora can be written as adapter or merged or full (did you mean \"adapter\"?)": lambda: (
        export.resolve_format("lora", "adaptor")
    ),
    "privacy.epsilon: task.kind embed cannot be trained privately, because its loss may compare": lambda: privacy.check(
        config(task__kind="embed", privacy__epsilon=1.0, train__accumulate=1)
    ),
    "data.packing: private training (privacy.epsilon) needs False, found True: a packed row": lambda: privacy.check(
        config(privacy__epsilon=1.0, seed=3, data__packing=True)
    ),
    "adapter tensor base_model.model.x: expected MODULE.lora_A.weight or MODULE.lora_B.weight": lambda: (
        lora_peft.lora_from_peft(
            {"r": 2, "peft_type": "LORA"}, {"base_model.model.x": np.zeros(1)}, *spec("lora")[1::-1]
        )
    ),
    "adapter_config.json: num_transformer_submodules is for models with encoder and decoder; expected 1": lambda: (
        prompt.from_peft({"num_transformer_submodules": 2}, {}, {}, spec("prompt"))
    ),
    "adapter_config.json: num_transformer_submodules is for models with encoder and decoder; expected 1 ": lambda: (
        prefix.from_peft({"num_transformer_submodules": 2}, {}, {}, spec("prefix"))
    ),
    "tuning.init: pissa changes W, which dora needs unchanged; use one of ": lambda: METHODS["dora"].init(
        None, {}, spec("dora", init="pissa")
    ),
    "model.quantise: int8 quantises kernels that must stay frozen, but tuning.method full as set here trains": lambda: (
        program.build(
            config(model__quantise="int8", tuning__method="full"),
            spec("full"),
            jax.sharding.AbstractMesh((1,), ("data",)),
            jnp.float32,
            2,
        )
    ),
    "--layers: expected numbers with commas between them, such as 0,2,4; found '0,b'": lambda: cli._student(
        SimpleNamespace(layers="0,b"), []
    ),
    "train.router_z: 0.1, but this model has no experts; set it to 0": lambda: tasks.objective(
        config(train__router_z=0.1), SimpleNamespace(config=SimpleNamespace(experts=0, balance=0.0, balanced=False))
    ),
    "compare.curve_of: no trained contender 'tunde' (did you mean \"tuned\"?); expected one of tuned": lambda: (
        amounts.with_curves(contenders.parse(c := config(compare__curve=(5,), compare__curve_of=("tunde",))), c)
    ),
    "compare.ballots needs generated answers, and task.kind classify has labels; set compare.ballots=0": lambda: (
        contenders.parse(
            config(task__kind="classify", compare__ballots=3, compare__contenders=("majority", {"name": "tuned"}))
        )
    ),
    "divergence: the two models' vocabularies have 5 and 6 tokens; expected equal sizes": other_vocabularies,
    "--grid 'tuning.rank=2': the key tuning.rank occurs twice; write all its values in one --grid": lambda: search.axes(
        ["tuning.rank=1", "tuning.rank=2"], False
    ),
    "--halving sets train.steps itself, so train.steps cannot be an axis of --grid; remove it": lambda: sweep._halved(
        config(train__steps=4), [("train.steps=2",)], None, None, print
    ),
    "compare: rows of plain text have no question; set data.prompt and data.completion": lambda: setting.questions(
        SimpleNamespace(each=lambda: [(template.Rendered(completion="x"), {})]), None, 0
    ),
    "the trace holds no operation of a device; its planes are /host:CPU": lambda: profile.operations(
        SimpleNamespace(planes=[SimpleNamespace(name="/host:CPU", lines=[SimpleNamespace(name="", events=[WINDOW])])])
    ),
}


@pytest.mark.parametrize("message", CALLS)
def test_the_message_of_a_call(message):
    with pytest.raises(FtjaxError, match=re.escape(message.strip())):
        CALLS[message]()


def torn_weights(folder):
    (folder / "model.safetensors").write_bytes(b"123")
    weights._read_into(np.zeros(4, np.uint8), folder / "model.safetensors", 0)


def unsupported_vectors(folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Dense", "path": "2_Dense"}]))
    pooling.read(folder)


def a_bad_line(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n')
    report.read_metrics(folder)


def no_whole_checkpoint(folder):
    (folder / "checkpoints" / "7" / "trained").mkdir(parents=True)
    checkpoint.Checkpoints(folder)


def another_start(folder):
    save_file({"x": np.zeros(2, np.float32)}, folder / "start.safetensors")
    run_folder.with_start(SimpleNamespace(start=lambda frozen: frozen), {"x": jnp.zeros(3)}, folder)


def no_prompt(folder):
    (folder / "a.jsonl").write_text('{"text": "x"}\n')
    setting._asked(str(folder / "a.jsonl"), "compare.unsafe", config().data)


def too_long(folder):
    ftjax.load(BASE).logits(np.zeros((1, 513), int))


def too_long_to_score(folder):
    tokenizer = SimpleNamespace(chat_template=None)
    judge = SimpleNamespace(end_tokens=(1,), max_tokens=3, tokenizer=tokenizer)
    best.scores(judge, [[1, 2, 3]], [[4]], 1, 1, "generate.reward")


def tags_of_other_words(folder):
    rows = [{"text": ["a", "b"], "label": ["O"]}]
    tags.encode(how("tag", names=("O",)), ftjax.load(BASE).tokenizer, rows, ["here"])


def other_layers(folder):
    derived.averaged(BASE, derived.student(BASE, (0, 1), folder / "two"), 0.5, folder / "out")


FILES = {
    " differ in the parameter layers/attn/k_proj/kernel, so they have no average": other_layers,
    "model.safetensors: ends before its last tensor; fetch it again": torn_weights,
    "modules.json: vectors by Dense are not supported": unsupported_vectors,
    "line 2: expected an object with a step; found '{\"loss\": 2}'. Mend the line, or delete it": a_bad_line,
    "checkpoints: holds no whole checkpoint: the checkpoint of step 7 is damaged: ": no_whole_checkpoint,
    "start.safetensors: expected a tensor x of shape (3,), found (2,)": another_start,
    "a.jsonl row 1: compare.unsafe: expected a column `prompt` or `messages`; found text": no_prompt,
    "logits: rows of 513 tokens exceed the model's 512 positions": too_long,
    "generate.reward: a prompt with its answer has 4 tokens, and the reward model 3 positions": too_long_to_score,
    "here: column 'label' holds 1 tags; expected 2 tags, one a word": tags_of_other_words,
}


@pytest.mark.parametrize("message", FILES)
def test_the_message_about_a_file_or_a_row(message, tmp_path):
    with pytest.raises(FtjaxError, match=re.escape(message)):
        FILES[message](tmp_path)


def test_an_adapter_without_weights_names_the_conversion(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(
        FtjaxError, match=r"no adapter_model.safetensors \(adapter_model.bin is a pickle.*to convert, where"
    ):
        peft.read_adapter(tmp_path)


@pytest.mark.parametrize(
    "error, message",
    [
        ("GatedRepoError", "a/b: a gated repository: accept its terms on the hub, then run `hf auth login`"),
        ("RevisionNotFoundError", "a/b: the repository has no revision 'c'"),
        ("HFValidationError", "a/b: download from the Hugging Face hub failed: "),
    ],
)
def test_what_the_hub_refuses(error, message, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def download(*args, **how):
        kind = getattr(errors, error)
        made = kind.__new__(kind)
        raise made

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FtjaxError, match=re.escape(message)):
        resolve.resolve("a/b", "c")


def test_packages_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(FtjaxError, match="evaluate.metrics: bleu and chrf need sacrebleu; pip install sacrebleu"):
        metrics.score("bleu", ["a"], [["b"]], [{}], None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FtjaxError, match="check-model needs transformers with torch: "):
        check_model.check(BASE)


def test_check_model_says_what_transformers_refuses(monkeypatch):
    import transformers

    def refuse(*args, **how):
        raise RuntimeError("no\nsuch model")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(FtjaxError, match="stories260K: transformers cannot compute this model: no such model"):
        check_model.check(BASE)


def test_only_vectors_are_written_as_an_array(monkeypatch, capsys):
    monkeypatch.setattr(run, "predict", lambda *args, **how: [{"label": "a"}])
    assert cli.main(["predict", "--model", "m", "--data", "d", "--out", "a.npy"]) == 2
    assert "--out a.npy: only vectors of texts are written as .npy; name a .jsonl file" in capsys.readouterr().err


def test_a_contender_whose_runs_all_fail_names_the_first_reason(monkeypatch):
    failed = SimpleNamespace(seed=3, failed="no rows")
    monkeypatch.setattr(measure, "sweep", lambda *args: [failed])
    monkeypatch.setattr(measure, "train_config", lambda *args: None)
    with pytest.raises(FtjaxError, match="tuned: all its runs failed; the first reason: seed 3: no rows"):
        measure._models(
            SimpleNamespace(name="tuned", kind="tuned"), SimpleNamespace(config=config()), lambda line: None
        )


def test_a_reference_with_fewer_positions_than_a_text(monkeypatch):
    tokenizer = SimpleNamespace(get_vocab=dict)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=8))
    lm = SimpleNamespace(kind="causal", tokenizer=tokenizer, variables={}, max_tokens=4, model=model)
    monkeypatch.setattr(features, "load", lambda *args, **how: lm)
    reference = features.reference("there", "float32", print, tokenizer)
    with pytest.raises(
        FtjaxError, match="task.reference: there has 4 positions, and a text has 5 tokens; lower data.max"
    ):
        reference({"positions": np.arange(5)[None]})


def test_layers_of_a_student_keep_their_positions(tmp_path, monkeypatch):
    """Every fourth layer of SmolLM3 has no rotary positions; config.json says so of the kept layers one by one."""
    said = {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 4}
    fuzz.write_model(tmp_path / "base", said)
    out = derived.student(str(tmp_path / "base"), (2, 3), tmp_path / "two")
    assert families.read_config(tmp_path / "base")[1].rotary == (True, True, True, False)
    assert families.read_config(out)[1].rotary == (True, False)
    read = derived.read_json
    monkeypatch.setattr(derived, "read_json", lambda file: read(file) | {"rms_norm_eps": 0.5})
    with pytest.raises(FtjaxError, match="two: not written: which layers of a smollm3 model have a window or rotary"):
        derived.student(str(tmp_path / "base"), (2, 3), tmp_path / "two")


def test_an_adapter_with_other_tensors_than_the_run_trains():
    start = object.__new__(adapters.Start)
    start.folder, start.adapter_config, start.tensors = Path("there"), {}, {}
    start.method = SimpleNamespace(from_peft=lambda *args: ({"x": np.zeros(2)}, {}))
    with pytest.raises(FtjaxError, match="tuning.init_from: there has different tensors than the config trains; set "):
        start.trained({}, None, {"x": np.zeros(3)})


def test_every_message_is_read_by_a_test_and_listed():
    found, _ = messages.unread()
    assert not found, "\n".join(f"{file}:{line}: {text}" for file, line, text in found)
    assert (ROOT / "docs/errors.md").read_text() == messages.page(), "run python scripts/messages.py --write"
