"""Damage what ftjax reads, and see that nothing but FtjaxError leaves it.

    python scripts/fuzz.py                       every target, 60 seconds each
    python scripts/fuzz.py config adapter --seconds 600 --keep tests/hostile.jsonl

A damage is plain JSON, so that one which ended in another error can be kept and replayed: {"target": ..., "file": ...}
with one of `set` [path, value], `drop` path, `text`, `bytes` [[place from 0 to 1, byte], ...], `cut` (the share that
stays) or, for a safetensors file, `header` [tensor, field, value]. Targets and their files are in TARGETS.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

import ftjax
from ftjax import assets
from ftjax import config as configs
from ftjax.errors import FtjaxError
from ftjax.files import replace_json

HANG = 60  # seconds

RUN = {
    "data.limit": 40, "data.buckets": 1, "train.steps": 2, "train.batch_size": 4, "train.save_every": 1,
    "train.keep": 2, "evaluate.rows": 8, "evaluate.compare": True, "evaluate.compare_rows": 2,
    "evaluate.forgetting": "", "generate.max_new_tokens": 4, "export.formats": ("adapter",), "log.tensorboard": False,
    "log.compilation_cache": False, "tuning.rank": 4, "tuning.alpha": 8.0,
    "data.train": "builtin:commongen/train.jsonl",
    "data.validation": "builtin:commongen/validation.jsonl", "data.prompt": "{src}", "data.completion": "{tgt}",
}  # fmt: skip


def settings(folder: Path, **fields):
    """The config of a short run in a folder, with its cache beside it."""
    flat = RUN | {"run_dir": str(folder / "run"), "data.cache": str(folder / "cache")} | fields
    return configs.from_dict(flat)


def quiet(text: str) -> None:
    """Say nothing."""


# -------------------------------------------------------------------------------------------------------- the targets


def make_model(folder: Path) -> None:
    """The starter model, with a chat template."""
    shutil.copytree(assets.resolve("builtin:stories260K"), folder, dirs_exist_ok=True)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    replace_json(folder / "tokenizer_config.json", settings)


def make_sharded(folder: Path) -> None:
    """The same with an index."""
    make_model(folder)
    from safetensors import safe_open

    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with safe_open(folder / "model-00001-of-00001.safetensors", "numpy") as f:
        index = dict.fromkeys(f.keys(), "model-00001-of-00001.safetensors")
    replace_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def read_model(folder: Path) -> None:
    """Load it, and use its tokenizer and its template."""
    lm = ftjax.load(folder)
    lm.tokenizer.decode(lm.tokenizer("A dog, Ünïcode ☃ 12\n")["input_ids"])


def make_adapter(folder: Path) -> None:
    """A LoRA adapter on the starter model, whose base is named."""
    from safetensors.numpy import save_file

    start, rng = "base_model.model.model.layers.{}.self_attn.q_proj", np.random.default_rng(0)
    tensors = {}
    for layer in range(5):
        tensors[f"{start.format(layer)}.lora_A.weight"] = rng.normal(size=(4, 64)).astype(np.float32)
        tensors[f"{start.format(layer)}.lora_B.weight"] = rng.normal(size=(64, 4)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "builtin:stories260K", "r": 4}
    said |= {"lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {"q_proj": 16}, "target_modules": ["q_proj"]}
    said |= {"modules_to_save": None, "bias": "none", "use_rslora": False, "trainable_token_indices": None}
    replace_json(folder / "adapter_config.json", said | {"revision": None, "init_lora_weights": True})


def make_encoder(folder: Path) -> None:
    """A tiny BERT with modules of sentence-transformers, made by numpy alone."""
    from safetensors.numpy import save_file

    from ftjax.hub import families

    folder.mkdir(parents=True, exist_ok=True)
    said = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 512, "hidden_size": 16}
    said |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    family, shape = families.from_hf(said)
    expected, rng = families.shapes(shape), np.random.default_rng(0)
    tensors = {}
    for path, (names, *_) in families.tensor_names(family, shape, files=True).items():
        size = expected[path][1:] if path.startswith("layers/") else expected[path]
        tensors |= {name: rng.normal(size=size).astype(np.float32) for name in names}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    replace_json(folder / "config.json", said | {"id2label": {"0": "a", "1": "b"}, "hidden_act": "gelu"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(assets.resolve("builtin:stories260K")) / name, folder / name)
    from ftjax.hub import pooling

    pooling.write(folder, pooling.Pooling("mean", 32), 16)


def write_model(folder: Path, said: dict) -> None:
    """A tiny random decoder with this config.json and the starter model's tokenizer, made by numpy alone."""
    from safetensors.numpy import save_file

    from ftjax.hub import families

    folder.mkdir(parents=True, exist_ok=True)
    tiny = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    tiny |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    family, shape = families.from_hf(tiny | said)
    expected, rng = families.shapes(shape), np.random.default_rng(0)
    tensors = {}
    for path, (names, *_) in families.tensor_names(family, shape, files=True).items():
        apart = path.startswith("layers/") + ("{e}" not in path and path.endswith("/experts"))
        tensors |= {name: rng.normal(size=expected[path][apart:]).astype(np.float32) for name in names}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    replace_json(folder / "config.json", tiny | said)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(assets.resolve("builtin:stories260K")) / name, folder / name)


def make_experts(folder: Path) -> None:
    """Two mixtures of experts."""
    routed = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
    one = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    two = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4}
    two |= {"moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    write_model(folder / "mixtral", one | routed)
    write_model(folder / "qwen3", two | routed)


def read_experts(folder: Path) -> None:
    """Load both, and compute with them."""
    for name in ("mixtral", "qwen3"):
        lm = ftjax.load(folder / name)
        finite(lm.model.apply(lm.variables, np.array([[5, 6, 7]], np.int32)))


def make_ropes(folder: Path) -> None:
    """A config.json for each way to scale rotary embeddings."""
    from ftjax.hub import families

    for kind, (needed, others) in families.ROPE.items():
        values = dict.fromkeys((*needed, *others), 2.0) | {"rope_type": kind, "truncate": True, "low_freq_factor": 1.0}
        values |= {families.ORIGINAL: 32, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        scaling = {key: value for key, value in values.items() if key in (*needed, *others, "rope_type")}
        said = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0}
        write_model(folder / kind, said | {"rope_scaling": scaling})


def read_ropes(folder: Path) -> None:
    """Read each config.json, and compute the frequencies."""
    from ftjax.hub import families
    from ftjax.models.layers import rotary_frequencies

    for kind in families.ROPE:
        shape = families.read_config(folder / kind)[1]
        turned = int(shape.head_dim * shape.rotary_share)
        for x in rotary_frequencies(turned, shape.rope_theta, shape.rope_scaling):
            finite(x)


def finite(x) -> None:
    """Raise an AssertionError, which is a fault, for numbers that are not finite."""
    assert np.isfinite(np.asarray(x)).all(), "not finite"


def make_reward(folder: Path) -> None:
    """A reward model."""
    from safetensors.numpy import load_file, save_file

    make_model(folder)
    said = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    replace_json(folder / "config.json", said | {"id2label": {"0": "score"}, "label2id": {"score": 0}})
    score = np.random.default_rng(0).normal(size=(1, said["hidden_size"])).astype(np.float32)
    tensors = load_file(folder / "model.safetensors") | {"score.weight": score}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def read_reward(folder: Path) -> None:
    """Score answers by it."""
    from ftjax.evaluation import best

    judge = best.reward_model(str(folder), ftjax.load("builtin:stories260K").tokenizer, "task.rewards")
    finite(best.scores(judge, [[5, 6], [7]], [[8], [9]], 2, 2, "task.rewards"))


def make_run(folder: Path) -> None:
    """A run that was stopped after its last step but one, with its cache of tokens."""
    ftjax.train(settings(folder), say=quiet)


def read_run(folder: Path) -> None:
    """Load it, and go on with it."""
    ftjax.load(folder / "run")
    ftjax.train(settings(folder), say=quiet)


def read_override(damage: dict) -> None:
    """Set a field of the config by a text."""
    configs.override(configs.default(), [damage["text"]])


def checked(folder: Path) -> None:
    """Check a run."""
    from ftjax.training.check import check

    check(folder / "run", quiet)


def staged(folder: Path):
    """The config of two stages."""
    rows = {key: RUN[key] for key in ("data.train", "data.validation", "data.prompt", "data.completion")}
    each = tuple(rows | {"name": name, "train.save_every": 2, "evaluate.compare": False} for name in ("one", "two"))
    return settings(folder, stages=each)


def train_stages(folder: Path) -> None:
    """Train both stages, or what is left of them."""
    ftjax.train(staged(folder), say=quiet)


def prepare_rows(folder: Path, name: str, **fields) -> None:
    """Prepare rows as a run does, to the first batch."""
    from ftjax.training.job import prepared

    fields |= {"data.train": str(folder / name), "data.validation": "", "data.cache": ""}
    prepared(settings(folder, **fields), quiet)


def read_rows(folder: Path) -> None:
    """Prepare every file of rows in a folder."""
    for file in sorted(folder.glob("rows.*")):
        prepare_rows(folder, file.name)


def make_table(suffix: str, folder: Path) -> None:
    """Rows as a table."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    rows = pd.DataFrame({"src": [f"dog {i}" for i in range(8)], "tgt": [f'A "dog", {i}.\n' for i in range(8)]})
    file = folder / f"rows.{suffix}"
    rows.to_csv(file, index=False) if suffix == "csv" else rows.to_parquet(file)


ANSWERS = {  # file -> (its rows, fields of the config)
    "pairs.jsonl": ({"prompt": "dog {i}", "chosen": "good {i}", "rejected": "bad"}, {}),
    "ranked.jsonl": ({"prompt": "dog {i}", "responses": ["a {i}", "b", "c"], "ranks": [1, 2, 3]}, {}),
    "kto.jsonl": ({"prompt": "dog {i}", "completion": "good {i}", "label": True}, {"task.loss": "kto"}),
    "margin.jsonl": ({"prompt": "{i}", "chosen": "a", "rejected": "b", "margin": 0.5}, {"task.kind": "reward"}),
    "chats.jsonl": (
        {"chosen": [{"role": "user", "content": "a {i}"}, {"role": "assistant", "content": "b"}],
         "rejected": [{"role": "user", "content": "a {i}"}, {"role": "assistant", "content": "c"}]},
        {"data.template": "plain"},
    ),
}  # fmt: skip


def make_answers(folder: Path) -> None:
    """Rows with answers that are compared."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (row, _) in ANSWERS.items():
        text = json.dumps(row) + "\n"
        (folder / name).write_text("".join(text.replace("{i}", str(i)) for i in range(8)))


def read_answers(folder: Path) -> None:
    """Prepare each file."""
    for name, (_, fields) in ANSWERS.items():
        kind = {"task.kind": "preference", "data.prompt": "", "data.completion": ""}
        prepare_rows(folder, name, **kind | fields)


CODE = """from ftjax import config


def get_config():
    return config.default()


def worth(prediction, references, row):
    return 1.0


def change(row, rng):
    return row | {"src": "cat"}
"""
LINES = (
    "raise SystemExit", "raise ValueError('no')", "raise KeyError", "import nothere", "from . import x", "x = (",
    "def get_config(): return 3", "def get_config(): return config.ConfigDict()", "def get_config(x): return x",
    "def get_config(): c = config.default(); c.nothere = 1; return c", "get_config = worth = change = 3",
    "def get_config(): c = config.default(); c.train.steps = 'x'; return c", "del get_config, worth, change",
    "def get_config(): c = config.default(); c.optim = None; return c", "def get_config(): raise SystemExit(3)",
    "def get_config(): c = config.default(); del c.model.path; return c", "def get_config(): return get_config()",
    *(f"def worth(*given): {line}" for line in (
        "return 'x'", "return None", "return float('nan')", "return [1, 2]", "raise KeyError", "raise SystemExit",
        "return 1j", "return 10**400", "return {}", "return worth(*given)", "import numpy; return numpy.ones(2)",
    )),
    *(f"def change(row, rng): {line}" for line in (
        "return 'x'", "return {}", "return [row]", "raise KeyError", "return row | {'src': 3}", "raise SystemExit",
        "return row | {'src': object()}", "return row | {'x': 1}", "row.clear(); return row", "return change(row, rng)",
    )),
)  # fmt: skip


def make_code(folder: Path) -> None:
    """A config and functions of a user."""
    make_rows(folder)
    (folder / "code.py").write_text(CODE)


def read_code(folder: Path) -> None:
    """Load the config, ask the reward, and augment rows."""
    from ftjax.evaluation import metrics

    code = str(folder / "code.py")
    configs.load(code)
    metrics.score(f"{code}:worth", ["a"], [["b"]], [{}], configs.default().evaluate)
    prepare_rows(
        folder,
        "rows.jsonl",
        **{"data.augment.function": f"{code}:change", "data.augment.copies": 1, "data.augment.ops": ()},
    )


def read_options(damage: dict) -> None:
    """Prepare a run with a few fields of the config set by texts."""
    from ftjax.training.job import prepared

    # A field may name a relative folder.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        config = settings(Path(folder))
        configs.override(config, damage["texts"])
        config.run_dir = folder
        prepared(config, quiet)


def check_model(folder: Path) -> None:
    """Compare a model with transformers."""
    from ftjax.check_model import check

    check(folder)


def make_rows(folder: Path) -> None:
    """Rows of text."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"src": f"dog {i}", "tgt": f"A dog runs {i} times."} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


WHOLE = ("config.json", "model.safetensors")
MODEL = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
# name -> (what makes a whole folder, what reads it, the files that are damaged)
TARGETS = {
    "config": (make_model, read_model, MODEL),
    "tokenizer": (make_model, read_model, (*MODEL[2:], "tokenizer.json", "chat_template.jinja")),
    "weights": (make_model, read_model, ("model.safetensors",)),
    "index": (make_sharded, read_model, ("model.safetensors.index.json",)),
    "adapter": (make_adapter, ftjax.load, ("adapter_config.json", "adapter_model.safetensors")),
    "encoder": (
        make_encoder,
        ftjax.load,
        ("config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"),
    ),
    "run": (make_run, read_run, ("run/run.json", "run/metrics.jsonl", "run/before.json")),
    "check": (make_run, checked, ("run/run.json", "run/metrics.jsonl", "run/adapter/ftjax.json")),
    "export": (make_run, lambda folder: ftjax.load(folder / "run/adapter"), ("run/adapter/ftjax.json",)),
    "stages": (train_stages, train_stages, ("run/stages.json", "run/one/run.json", "run/one/merged/ftjax.json")),
    "experts": (make_experts, read_experts, tuple(f"{m}/{f}" for m in ("mixtral", "qwen3") for f in WHOLE)),
    "rope": (make_ropes, read_ropes, tuple(f"{kind}/config.json" for kind in ("linear", "llama3", "yarn", "longrope"))),
    "reward": (make_reward, read_reward, WHOLE),
    "check-model": (make_model, check_model, WHOLE),
    "rows": (make_rows, read_rows, ("rows.jsonl",)),
    "csv": (functools.partial(make_table, "csv"), read_rows, ("rows.csv",)),
    "parquet": (functools.partial(make_table, "parquet"), read_rows, ("rows.parquet",)),
    "answers": (make_answers, read_answers, tuple(ANSWERS)),
    "code": (make_code, read_code, ("code.py",)),
    "override": (None, read_override, ()),
    "options": (None, read_options, ()),
}

TEMPLATES = (
    "{{ 1 / 0 }}",
    "{{ messages[7].content }}",
    "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
    "{{ raise_exception('no') }}",
    "{% for m in messages %}",
    "{{ messages | map(attribute='content') | sum }}",
    "{% macro a(x) %}{{ a(x) }}{% endmacro %}{{ a(1) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ 'x' * 10 ** 13 }}",
)


# -------------------------------------------------------------------------------------------------------- the damages


def apply(damage: dict, folder: Path) -> None:
    """Damage one file of a folder, as the module's docstring says."""
    file = folder / damage["file"]
    if "text" in damage:
        file.write_text(damage["text"], encoding="utf-8", errors="surrogatepass")
    elif "set" in damage or "drop" in damage:
        lines = file.suffix == ".jsonl"
        value = [json.loads(line) for line in file.read_text().splitlines()] if lines else json.loads(file.read_text())
        path = damage["set"][0] if "set" in damage else damage["drop"]
        node = value
        for key in path[:-1]:
            node = node[key]
        if "drop" in damage:
            del node[path[-1]]
        else:
            node[path[-1]] = damage["set"][1]
        file.write_text("".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value))
    elif "header" in damage:
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        tensor, field, value = damage["header"]
        header.setdefault(tensor, {})[field] = value
        new = json.dumps(header).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])
    else:
        data = bytearray(file.read_bytes())
        for place, byte in damage.get("bytes", ()):
            data[int(place * (len(data) - 1))] = byte
        file.write_bytes(data[: int(damage.get("cut", 1) * len(data))])


def attempt(damage: dict, whole: Path | None, work: Path) -> str:
    """What a damage comes to: `read`, `refused: ...`, or a traceback.

    Args:
        damage: see the module's docstring.
        whole: the folder that its target made.
        work: a folder for the damaged copy, which is replaced.
    """
    _, read, files = TARGETS[damage["target"]]

    def stop(number, frame):
        raise TimeoutError(f"still running after {HANG} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        if not files:
            read(damage)
            return "read"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        try:
            apply(damage, work)
        except (KeyError, IndexError, TypeError, ValueError):
            return "read"  # a path that the file does not have
        read(work)
        return "read"
    except FtjaxError as error:
        return f"refused: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return traceback.format_exc()
    finally:
        signal.signal(signal.SIGALRM, before)


def paths(value, start=()) -> list[list]:
    """Every path into plain JSON, a few of each long list or object."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(items)[:40]:
        found += [[*start, key], *paths(entry, (*start, key))]
    return found


def strategy(target: str, whole: Path | None):
    """Damages of a target, for hypothesis."""
    from hypothesis import strategies as st

    if not TARGETS[target][2]:
        keys = st.sampled_from(sorted(configs.FIELDS)) | st.text(max_size=8)
        scalars = st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=8)
        values = st.recursive(
            scalars, lambda x: st.lists(x, max_size=3) | st.tuples(x, x) | st.dictionaries(scalars, x, max_size=2)
        )
        texts = (
            st.text(max_size=12) | values.map(repr) | st.sampled_from(("()", "{[]:1}", "(" * 200, "9" * 5000, "1e999"))
        )
        one = st.tuples(keys, texts).map("=".join)
        if target == "override":
            return one.map(lambda text: {"target": target, "text": text})
        known = st.sampled_from(sorted(set(configs.FIELDS) - {"run_dir", "overwrite"})).flatmap(valid)
        return st.lists(known, min_size=1, max_size=3).map(lambda texts: {"target": target, "texts": texts})
    edges = (-1, 0, 1, 2, 3, 2**31 - 1, 2**31, 2**63, 10**30, 1e-300, 1e300, float("nan"), float("inf"), True, None)
    edges += ("", "a", "../x", "/etc/passwd", "\x00", "\ud800", "8", "all", [], {}, [[]], [None], {"a": {}}, [1, "a"])
    scalars = st.sampled_from(edges) | st.integers() | st.floats() | st.text(max_size=6)
    values = st.recursive(
        scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3)
    )
    places = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)
    each = []
    for name in TARGETS[target][2]:
        file, start = whole / name, {"target": target, "file": name}
        texts = (
            st.text(max_size=20) | values.map(json.dumps) | st.sampled_from(("[" * 100_000, "[]", "{}", "null", "1"))
        )
        if name.endswith(".jinja"):
            each.append((st.sampled_from(TEMPLATES) | st.text(max_size=30)).map(lambda x, s=start: s | {"text": x}))
            continue
        each.append(places.map(lambda x, s=start: s | {"bytes": x}))
        each.append(st.floats(0, 1).map(lambda x, s=start: s | {"cut": x}))
        if name.endswith(".parquet"):
            continue
        if name.endswith(".csv"):
            cells = st.text(max_size=9) | st.sampled_from(
                ('"', '""', "\n", "\x00", "\ufeff", ",", '"a\nb"', "9" * 200_000)
            )
            lines = st.lists(st.lists(cells, max_size=3).map(",".join), max_size=4).map("\n".join)
            each.append(lines.map(lambda x, s=start: s | {"text": x}))
            each.append(lines.map(lambda x, s=start: s | {"text": f"src,tgt\na,b\n{x}"}))
            continue
        if name.endswith(".py"):
            each += [st.sampled_from(LINES).map(lambda x, s=start: s | {"text": f"{CODE}\n\n{x}\n"})] * 3
            continue
        if name.endswith(".safetensors"):
            names = [n for n in _header(file) if n != "__metadata__"]
            dtypes = ("F8_E4M3", "F8_E5M2", "I8", "U8", "I64", "BOOL", "C64", "F16", "BF16", "F64", "F4", "XX", 3)
            fields = st.tuples(st.just("dtype"), st.sampled_from(dtypes)) | st.tuples(st.just("shape"), values)
            fields |= st.tuples(
                st.just("data_offsets"), values | st.lists(st.integers(0, 10**6), min_size=2, max_size=2)
            )
            header = st.tuples(st.sampled_from([*names, "new", "__metadata__"]), fields)
            each.append(header.map(lambda x, s=start: s | {"header": [x[0], *x[1]]}))
            continue
        each.append(texts.map(lambda x, s=start: s | {"text": x}))
        lines = name.endswith(".jsonl")
        content = [json.loads(x) for x in file.read_text().splitlines()] if lines else json.loads(file.read_text())
        known = st.sampled_from(paths(content) or [["a"]])
        each += [st.tuples(known, values).map(lambda x, s=start: s | {"set": list(x)})] * 4
        each.append(known.map(lambda x, s=start: s | {"drop": x}))
    return st.one_of(each)


def valid(key: str):
    """Texts `key=value` that the field takes more often than not, for hypothesis."""
    from hypothesis import strategies as st

    default, choices = configs.FIELDS[key].default, configs.FIELDS[key].choices
    numbers = st.sampled_from((0, 1, 2, 3, 7, 64, 10**6, -1, 1e-9, 0.5, 1.0, 1e9))
    words = st.sampled_from(
        ("", "a", "src", "tgt", "{src}", "/etc/passwd", "builtin:stories260K", "none", "x.py:f", "val_loss")
    )
    values = st.sampled_from(choices) if choices else st.booleans() if isinstance(default, bool) else numbers
    if not choices and isinstance(default, str | tuple):
        values = words if isinstance(default, str) else st.lists(words | numbers, max_size=3).map(tuple)
    return values.map(lambda value: f"{key}={value}")


def _header(file: Path) -> dict:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def fuzz(target: str, seconds: float, work: Path, seed: int = 0) -> list[dict]:
    """Damage a target for some time; returns the damages that ended in another error, one a kind of error."""
    import time

    from hypothesis import HealthCheck, Phase, given
    from hypothesis import seed as seeded
    from hypothesis import settings as hypothesis_settings

    whole = None
    if make := TARGETS[target][0]:
        make(whole := work / f"whole-{target}")
        plain = {"target": target, "file": TARGETS[target][2][0], "cut": 1}
        assert (came := attempt(plain, whole, work / "damaged")) == "read", f"{target} without a damage: {came}"
    end, tried, found = time.monotonic() + seconds, [0, 0], {}

    @seeded(seed)
    @hypothesis_settings(
        max_examples=10**6,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy(target, whole))
    def one(damage):
        if time.monotonic() > end:
            raise SystemExit
        outcome = attempt(damage, whole, work / "damaged")
        tried[0] += 1
        tried[1] += outcome.startswith("refused")
        if outcome.startswith("Traceback"):
            where = [line.strip() for line in outcome.splitlines() if "/ftjax/" in line][-1:]
            kind = str((where, outcome.strip().splitlines()[-1][:60]))
            if kind not in found:
                found[kind] = damage
                print(f"{target}: {json.dumps(damage)[:400]}\n  {kind}", flush=True)

    try:
        one()
    except SystemExit:
        pass
    print(f"{target}: {tried[0]:,} damages, {tried[1]:,} refused, {len(found)} kinds of other errors", flush=True)
    return list(found.values())


def main(argv=None) -> int:
    """Exit status: how many kinds of other errors were found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--keep", type=Path, help="a .jsonl file to which the damages found are added")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        found = [d for target in args.targets for d in fuzz(target, args.seconds, Path(work), args.seed)]
    if args.keep and found:
        with args.keep.open("a") as file:
            file.writelines(json.dumps(damage) + "\n" for damage in found)
    return min(len(found), 100)


if __name__ == "__main__":
    sys.exit(main())
