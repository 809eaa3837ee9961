"""Runs with a teacher, from files to files, on tiny random models and the starter."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import peft
import pytest
import tiny_models
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_labelled import WORDS, config, make, write

import ftjax
from ftjax.evaluation.run import answer
from ftjax.hub import families
from ftjax.hub.derived import student
from ftjax.training import features, loop, run_folder
from ftjax.training.job import prepared
from ftjax.training.report import read_metrics

quiet = {"say": lambda text: None}


def rows(count: int, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt = " ".join(rng.choice(["a", "the", "film", "it", "was", "of"], rng.integers(2, 5)))
        found.append({"prompt": prompt, "completion": " " + " ".join(rng.choice(WORDS["good"], rng.integers(1, 4)))})
    return found


@pytest.fixture
def setting(tmp_path):
    """setting(name of the run, **overrides) -> a config of a student of a random model, whose teacher is another."""
    base = make(tmp_path / "llama", "llama")
    teacher = make(tmp_path / "teacher", "llama")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(teacher)
    train, held = write(tmp_path / "rows.jsonl", rows(40, 0)), write(tmp_path / "held.jsonl", rows(10, 1))

    def made(name="run", **overrides):
        usual = {"task__kind": "causal", "task__reference": str(teacher), "data__max_length": "24", "train__steps": "4"}
        c = config(tmp_path, base, **{"generate__max_new_tokens": "4"} | usual | overrides)
        c.run_dir = str(tmp_path / name)
        c.data.update(train=train, validation=held, test="", split=(1.0, 0.0, 0.0), buckets=1)
        c.train.update(batch_size=8, log_every=1, eval_every=2)
        return c

    return made


def figures(c) -> list[float]:
    ftjax.train(c, **quiet)
    found = read_metrics(c.run_dir)
    return [row[key] for row in found for key in ("loss", "divergence", "grad_norm", "val_loss") if key in row]


@pytest.mark.parametrize("kind", ["causal", "gkd"])
def test_devices_accumulation_and_packing_change_nothing(setting, kind):
    """gkd writes the answers of half of the steps itself."""
    more = {"task__kind": kind, "distil__top_k": "4", "distil__beta": "0.5"}
    known = figures(setting("one", **more))
    assert len(known) == 4 * 3 + 2
    cuts = {"eight": {"mesh__data": "4", "mesh__fsdp": "2"}, "accumulated": {"train__accumulate": "4"}}
    cuts |= {} if kind == "gkd" else {"packed": {"data__packing": "True"}}
    for name, cut in cuts.items():
        if name == "packed":  # other batches: only that it trains to the same kind of figures
            assert np.isfinite(figures(setting(name, **more, **cut))).all()
        else:
            np.testing.assert_allclose(figures(setting(name, **more, **cut)), known, rtol=1e-5, err_msg=name)


def stop(c) -> None:
    """Start a run that is interrupted in its fourth step."""
    taken, take = [], loop.Profiler.__call__

    def once(self, *arguments):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        return take(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Profiler, "__call__", once)
        with pytest.raises(KeyboardInterrupt):
            ftjax.train(c, **quiet)


@pytest.mark.parametrize("kind", ["causal", "gkd"])
def test_a_resumed_run_has_the_same_bits(setting, kind):
    whole, stopped = (setting(name, task__kind=kind, train__save_every="2") for name in ("whole", "stopped"))
    ftjax.train(whole, **quiet)
    stop(stopped)
    result = ftjax.train(stopped, **quiet)
    assert result.resumed_from == 2
    keys = ("loss", "divergence", "grad_norm", "val_loss")
    one, other = ([[row.get(k) for k in keys] for row in read_metrics(c.run_dir)] for c in (whole, stopped))
    assert one == other


def test_what_a_teacher_computes_is_kept_and_believed_only_if_it_is_unchanged(setting, tmp_path, monkeypatch):
    calls, reference = [], features.reference

    def counting(*how):
        compute = reference(*how)
        return lambda batch: calls.append(len(batch["tokens"])) or compute(batch)

    monkeypatch.setattr(features, "reference", counting)

    def values(**overrides):
        """What the batches of a run hold of the teacher, and whether it was computed."""
        calls.clear()
        c = setting(**{"distil__top_k": "4", "data__cache": str(tmp_path / "cache")} | overrides)
        job = prepared(c, lambda line: None)
        (tmp_path / "run").mkdir(exist_ok=True)
        model = SimpleNamespace(config=SimpleNamespace(vocab_size=job.spec.model.vocab_size))
        with jax.set_mesh(job.mesh):
            keep, _ = features.keeper(job, SimpleNamespace(model=model, trained={"layers": {}}), {}, {})
            found = keep(job.batches)[0]["reference"]
        return found, bool(calls)

    known, computed = values()
    assert computed and np.count_nonzero(known) > 10
    for more, again in (({}, False), ({"optim__lr": "1e-4"}, False), ({"distil__top_k": "5"}, True)):
        found, computed = values(**more)
        assert computed == again and (again or np.array_equal(found, known))
    assert values(data__cache="")[1] and values(data__cache="")[1]
    for file in (tmp_path / "cache").glob("*/values"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.warns(UserWarning, match="these cached values of a reference model are damaged"):
        found, computed = values()
    assert computed and np.array_equal(found, known)
    weights = load_file(tmp_path / "teacher/model.safetensors")
    save_file({name: 0.5 * x for name, x in weights.items()}, tmp_path / "teacher/model.safetensors", {"format": "pt"})
    found, computed = values()
    assert computed and not np.array_equal(found, known)
    # An adapter of another program has no record of its base.
    taught = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    peft.get_peft_model(taught, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    lora = {"task__reference": str(tmp_path / "lora")}
    assert values(**lora)[1] and not values(**lora)[1]
    save_file(weights, tmp_path / "teacher/model.safetensors", {"format": "pt"})
    assert values(**lora)[1]


def test_a_student_comes_nearer_to_its_teacher(setting):
    """By the distance alone; and the tuned run folder of one student is the teacher of the next."""
    found = figures(setting("first", distil__labels="0", distil__top_k="0", train__steps="40", tuning__method="full"))
    c = setting("first")
    far = [row["divergence"] for row in read_metrics(c.run_dir) if "divergence" in row]
    assert far[-1] < 0.5 * far[0] and np.isfinite(found).all()
    second = setting("second", task__reference=str(c.run_dir), tuning__method="head", train__epochs="2")
    ftjax.train(second, **quiet)  # a head alone reads known states, but not with a teacher
    assert any("divergence" in row for row in read_metrics(second.run_dir))
    assert "divergence" not in ftjax.evaluate(second.run_dir, second.data.validation, **quiet)
    shutil.rmtree(c.run_dir)  # neither figures nor answers of a student need its teacher
    ftjax.evaluate(second.run_dir, second.data.validation, **quiet)
    assert len(answer(second.run_dir, ["it was"], max_new_tokens=2)) == 1


def test_what_cannot_teach_is_refused(setting, tmp_path):
    with pytest.raises(ftjax.FtjaxError, match="task.reference: task.kind gkd needs a teacher"):
        ftjax.train(setting(task__kind="gkd", task__reference=""), **quiet)
    # An own answer could be longer than a row, which was found out where it was drawn.
    with pytest.raises(ftjax.FtjaxError, match="rows.jsonl row .*: its prompt has . tokens, which leaves no ro"):
        ftjax.train(setting(task__kind="gkd", generate__max_new_tokens="22"), **quiet)
    prepared(setting(task__kind="gkd", generate__max_new_tokens="22", rollout__own="0"), lambda line: None)
    with pytest.raises(
        ftjax.FtjaxError, match=r"task.reference: .* has 512 tokens and .* has 19, and they differ, first"
    ):
        ftjax.train(setting(task__reference="builtin:stories260K"), **quiet)
    classifier = make(tmp_path / "bert", "bert")
    with pytest.raises(ftjax.FtjaxError, match="task.reference: expected a model of task.kind causal"):
        ftjax.train(setting(task__reference=str(classifier)), **quiet)
    wide = tmp_path / "teacher"
    model = transformers.AutoModelForCausalLM.from_pretrained(wide)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(wide)
    with pytest.raises(
        ftjax.FtjaxError, match="task.reference: .* gives logits for .* A teacher needs the same number"
    ):
        ftjax.train(setting(), **quiet)


@pytest.fixture
def encoders(tmp_path):
    """encoders(name of the run, **overrides) -> a config of an encoder whose teacher is wider and deeper."""
    base = make(tmp_path / "bert", "bert")
    shutil.copytree(base, tmp_path / "wide")
    torch.manual_seed(1)
    wide = transformers.AutoConfig.from_pretrained(base, hidden_size=48, num_hidden_layers=4)
    transformers.AutoModelForMaskedLM.from_config(wide).save_pretrained(tmp_path / "wide")

    def made(name="run", **overrides):
        usual = {"task__reference": str(tmp_path / "wide"), "distil__hidden": "0.5", "train__steps": "4"}
        usual |= {"train__log_every": "1", "train__eval_every": "2", "data__buckets": "1", "train__batch_size": "16"}
        c = config(tmp_path, base, **usual | overrides)
        c.run_dir = str(tmp_path / name)
        return c

    return made


def curve(c) -> list[float]:
    ftjax.train(c, **quiet)
    keys = ("loss", "hidden", "grad_norm", "val_loss")
    return [row[key] for row in read_metrics(c.run_dir) for key in keys if key in row]


CUTS = {"eight": {"mesh__data": "4", "mesh__fsdp": "2"}, "4": {"train__accumulate": "4"}}


@pytest.mark.parametrize(
    "kind, method, cuts", [("classify", "lora", ["4"]), ("masked", "full", CUTS), ("embed", "full", ["eight"])]
)
def test_hidden_states_are_learnt_alike_on_devices_and_in_microbatches(encoders, kind, method, cuts):
    more = {"task__kind": kind, "tuning__method": method, "train__steps": "2"}
    more |= {"task__pair": "label"} if kind == "embed" else {}
    known = curve(encoders("one", **more))
    assert len(known) == 2 * 3 + 1
    for name in cuts:
        np.testing.assert_allclose(curve(encoders(name, **more, **CUTS[name])), known, rtol=1e-5, err_msg=name)


def test_the_maps_of_hidden_states_are_resumed_and_not_exported(encoders, tmp_path):
    usual = {"tuning__method": "full", "train__save_every": "2", "train__ema": "0.5"}
    whole, stopped = (encoders(name, **usual) for name in ("whole", "stopped"))
    known = curve(whole)
    stop(stopped)
    assert curve(stopped) == known
    kept = [load_file(Path(c.run_dir) / "full/model.safetensors") for c in (whole, stopped)]
    assert kept[0].keys() == kept[1].keys() and not any("distil" in name for name in kept[0])
    assert all(np.array_equal(x, kept[1][name]) for name, x in kept[0].items())
    opened = [run_folder.open_run(c.run_dir, checkpoint="last") for c in (whole, stopped)]
    assert "distil" not in opened[0].trained
    shutil.rmtree(tmp_path / "wide")  # nobody needs the teacher any more
    found = ftjax.evaluate(whole.run_dir, whole.data.test, **quiet)
    assert found == ftjax.evaluate(stopped.run_dir, whole.data.test, **quiet)


def test_an_encoder_comes_nearer_to_the_states_of_its_teacher(encoders, tmp_path):
    """Of one layer; the loss of the labels is reported without the distance. The teacher may be a run folder."""
    more = {"distil__layers": "((2, 4),)", "distil__hidden": "10", "train__steps": "40", "tuning__method": "full"}
    curve(encoders("first", **more))
    far = [row["hidden"] for row in read_metrics(tmp_path / "first") if "hidden" in row]
    assert far[-1] < 0.6 * far[0] and len(far) == 40
    same = {"task__reference": str(tmp_path / "first"), "model__path": str(tmp_path / "first/full")}
    curve(encoders("second", **same))  # the same model: the adapter starts as no change
    rows = [row for row in read_metrics(tmp_path / "second") if "hidden" in row]
    assert rows[0]["hidden"] < 1e-9 < rows[-1]["hidden"] < 0.1


@pytest.mark.parametrize(
    "change, told",
    [
        ({"task__reference": ""}, "distil.hidden: expected 0 without a teacher in task.reference"),
        ({"distil__hidden": "0"}, "task.reference: is of task.kind"),
        ({"task__kind": "causal", "model__path": "builtin:stories260K"}, "distil.hidden: model.path is a decoder"),
        ({"task__reference": "builtin:stories260K"}, "distil.hidden: task.reference is a decoder"),
        ({"distil__layers": "((3, 4),)"}, r"the pair \(3, 4\) is of layers that are not there: .* 0 to 2, .* 0 to 4"),
        ({"distil__layers": "((1,),)"}, "distil.layers, entry 1: expected a pair"),
        ({"tuning__method": "head"}, "tuning.method head as set here trains nothing that the hidden states depend on"),
        ({"privacy__epsilon": "3", "export__checkpoint": "last"}, "task.reference: private training"),
    ],
)
def test_hidden_states_that_cannot_be_compared(change, told, encoders):
    with pytest.raises(ftjax.FtjaxError, match=told):
        ftjax.train(encoders(**change), **quiet)


def test_a_teacher_of_hidden_states_has_the_same_tokens(encoders, tmp_path):
    other = make(tmp_path / "other", "bert")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"film"', '"movie"'))
    with pytest.raises(ftjax.FtjaxError, match="task.reference: .* they differ, first in"):
        ftjax.train(encoders(task__reference=str(other)), **quiet)


MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [2]}


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mistral", "qwen2-window", "qwen3_moe", "qwen2_moe"])
def test_a_student_is_the_model_of_its_layers(name, tmp_path):
    """transformers without the other layers has the logits that transformers reads from the written directory."""
    more = {kind: (kind, tiny_models.SIZES | MIXED) for kind in ("qwen3_moe", "qwen2_moe")}
    kept, model = (0, 2), tiny_models.make(*(tiny_models.VARIANTS | more)[name])
    model.save_pretrained(tmp_path / "whole")
    out = student(str(tmp_path / "whole"), kept, tmp_path / "small")
    parts = model.transformer if name == "gpt2" else model.model
    blocks = "h" if name == "gpt2" else "layers"
    setattr(parts, blocks, torch.nn.ModuleList([getattr(parts, blocks)[i] for i in kept]))
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    model.config.num_hidden_layers = len(kept)
    ids = torch.arange(12)[None] + 3
    small = type(model).from_pretrained(out).eval()
    with torch.no_grad():
        np.testing.assert_allclose(small(ids).logits, model(ids, use_cache=False).logits, atol=1e-5)
    assert families.read_config(out)[1].layers == 2
    with pytest.raises(ftjax.FtjaxError, match="layers: expected some of the layers 0 to 2 of .*; found 2, 3"):
        student(str(tmp_path / "whole"), (2, 3), tmp_path / "none")
