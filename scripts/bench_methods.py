"""Every tuning method on one real task, one command a task:

    python scripts/bench_methods.py --out commongen.json
    python scripts/bench_methods.py --task sst2 --model DIR --data DIR --out sst2.json

commongen: the starter model learns to write a sentence from given words (configs/quickstart.py's rows, fewer steps,
AdamW). Quality on held-out words: perplexity, share of the words used, ROUGE-L; forgetting: nats a token on five
stories. sst2: an encoder such as all-MiniLM-L6-v2 learns whether a film review is kind, in one epoch over rows that the
seed draws, without dropout. Quality: accuracy on the rows of dev.tsv; forgetting, since such an encoder brings no head
of its own that could be asked again: the mean cosine between its vectors (means of its last states) of 200 sentences
of CommonGen before and after, 1 where nothing has moved.

Each method with each seed is a process of its own, one after another, and each finished one is kept in --out, where the
same command goes on. `torch-full` and `torch-lora` train the same batches with transformers and peft. `seconds` are
those of a whole run, compilation among them; `peak_mb` is the process's, with the allocator that ftjax gives itself.
Prints a Markdown table of means and standard deviations over the seeds, ours less PyTorch's, and whether each method
beats the untuned model; exit status 1 where one does not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench_common import told

ROOT = Path(__file__).resolve().parents[1]
COST = ("trained", "seconds", "peak_mb")
TORCH = {"torch-full": "full", "torch-lora": "lora"}

# What sets each run apart, and its learning rate: the defaults of the methods are for billions of parameters, these
# are for the starter's 260,000 and 250 steps. It has no biases: nothing for bitfit.
COMMONGEN = {
    "untuned": {},
    "full": {"tuning.method": "full", "optim.lr": 4e-3},
    "last_layers": {"tuning.method": "last_layers", "tuning.layers": 2, "optim.lr": 4e-3},
    "pattern, attention": {"tuning.method": "pattern", "tuning.pattern": ("layers/attn/.*",), "optim.lr": 4e-3},
    "norms": {"tuning.method": "norms", "optim.lr": 2e-2},
    "head": {"tuning.method": "head", "optim.lr": 4e-3},
    "lora": {"optim.lr": 1e-2},
    "lora, rslora": {"tuning.rslora": True, "optim.lr": 5e-3},
    "lora, plus": {"optim.lora_plus": 4.0, "optim.lr": 5e-3},
    "lora, pissa": {"tuning.init": "pissa", "optim.lr": 5e-3},
    "lora on int8": {"model.quantise": "int8", "optim.lr": 1e-2},
    "lora on nf4": {"model.quantise": "nf4", "optim.lr": 1e-2},
    "lora, neftune": {"train.neftune": 5.0, "optim.lr": 1e-2},
    "lora, ema": {"train.ema": 0.98, "optim.lr": 1e-2},
    "dora": {"tuning.method": "dora", "optim.lr": 1e-2},
    "ia3": {"tuning.method": "ia3", "optim.lr": 3e-2},
    "prompt": {"tuning.method": "prompt", "optim.lr": 3e-2},
    "prefix": {"tuning.method": "prefix", "optim.lr": 3e-2},
    "ptuning": {"tuning.method": "ptuning", "optim.lr": 1e-2},
}
# The same for MiniLM's 22.7 million and 94 steps; the head over labels is trained by every one of them.
SST2 = {
    "untuned": {},
    "full": {"tuning.method": "full", "optim.lr": 1e-4},
    "last_layers": {"tuning.method": "last_layers", "tuning.layers": 2, "optim.lr": 5e-4},
    "pattern, attention": {"tuning.method": "pattern", "tuning.pattern": ("layers/attn/.*",), "optim.lr": 5e-4},
    "norms": {"tuning.method": "norms", "optim.lr": 5e-3},
    "bitfit": {"tuning.method": "bitfit", "optim.lr": 3e-3},
    "head": {"tuning.method": "head", "optim.lr": 5e-3},
    "lora": {"optim.lr": 1e-3},
    "lora, rslora": {"tuning.rslora": True, "optim.lr": 5e-4},
    "lora, plus": {"optim.lora_plus": 4.0, "optim.lr": 5e-4},
    "lora, pissa": {"tuning.init": "pissa", "optim.lr": 3e-4},
    "lora on int8": {"model.quantise": "int8", "optim.lr": 1e-3},
    "lora on nf4": {"model.quantise": "nf4", "optim.lr": 1e-3},
    "lora, neftune": {"train.neftune": 5.0, "optim.lr": 1e-3},
    "lora, ema": {"train.ema": 0.95, "optim.lr": 1e-3},
    "dora": {"tuning.method": "dora", "optim.lr": 1e-3},
    "ia3": {"tuning.method": "ia3", "optim.lr": 1e-2},
}


# ---- the two tasks -----------------------------------------------------------------------------------------------


def commongen(args, seed: int):
    """The config of a run on CommonGen."""
    from ftjax import config as configs

    c = configs.load(ROOT / "configs" / "quickstart.py")
    c.seed, c.optim.name = seed, "adamw"
    c.train.update(steps=args.steps, eval_every=args.steps)
    c.evaluate.update(compare=False, compare_rows=100)
    return c


def measure_commongen(lm, c) -> dict:
    """Quality and forgetting on what was held out of CommonGen, and on stories."""
    from ftjax.data.prepare import prepare
    from ftjax.evaluation.compare import measure

    return measure(lm, lm.variables, prepare(c, lm.tokenizer, lm.max_tokens), c)


def sst2(args, seed: int):
    """The config of a run on SST-2."""
    from ftjax import config as configs

    if not (args.model and args.data):
        sys.exit("--task sst2: needs --model, an encoder's directory, and --data, a folder of train.tsv and dev.tsv")
    c = configs.load(ROOT / "configs" / "sst2_minilm_full.py")
    c.seed, c.model.path = seed, str(args.model)
    c.data.update(train=str(args.data / "train.tsv"), test="", limit=args.rows, buckets=2)
    c.train.update(dropout=0.0, save_every=10**6)
    c.optim.update(warmup=0.06, weight_decay=0.0)
    return c


def measure_sst2(lm, c) -> dict:
    """Accuracy on dev, and how alike the vectors of other sentences still are to the base's."""
    import numpy as np

    import ftjax
    from ftjax import assets
    from ftjax.data.read import read_table
    from ftjax.evaluation.run import evaluate

    report = evaluate(lm, str(Path(c.data.train).with_name("dev.tsv")), c)
    table = read_table(str(assets.resolve("builtin:commongen/test.jsonl")))
    texts = list(dict.fromkeys(table.row(i)["tgt"] for i in range(len(table))))[:200]
    base = ftjax.load(c.model.path, dtype="float32")
    before, after = (x.embed(texts, pool="mean", max_length=128) for x in (base, lm))
    return {"accuracy": report["metrics"]["accuracy"]["value"], "cosine": float(np.mean(np.sum(before * after, 1)))}


class Task(NamedTuple):
    """A row of TASKS. config(args, seed); measure(lm, config) -> figures, of which the first judges; lower: whether
    less of it is better; labels: those of its head."""

    runs: dict[str, dict]
    config: Callable
    measure: Callable
    figures: tuple[str, ...]
    lower: bool
    note: Callable
    labels: tuple[str, ...] = ()


TASKS = {
    "commongen": Task(
        COMMONGEN, commongen, measure_commongen, ("perplexity", "coverage", "rouge_l", "forgetting_loss"), True,
        lambda args: f"{args.steps} steps of 32 rows. The starter has no biases: nothing for bitfit.",
    ),
    "sst2": Task(
        SST2, sst2, measure_sst2, ("accuracy", "cosine"), False,
        lambda args: f"One epoch over {args.rows:,} rows, 32 a step. Untuned: the encoder under a head as it is drawn. "
        "cosine: of vectors of other sentences before and after. Virtual tokens need a causal model.",
        ("negative", "positive"),
    ),
}  # fmt: skip


# ---- one run -------------------------------------------------------------------------------------------------------


def one(task: Task, name: str, seed: int, args) -> dict:
    """Train one method with one seed and measure what came of it."""
    from ftjax import config as configs
    from ftjax.lm import open_base
    from ftjax.loading import load
    from ftjax.training.compiling import use_compilation_cache
    from ftjax.training.loop import train

    with tempfile.TemporaryDirectory() as folder:
        c = task.config(args, seed)
        c.run_dir = folder + "/run"
        c.tuning.update(method="lora", rank=16, alpha=32.0)
        c.export.formats = ()
        c.log.update(tensorboard=False, compilation_cache=False)  # the figure holds for the first run on a machine
        configs.override(c, [f"{key}={value}" for key, value in task.runs[TORCH.get(name, name)].items()])
        start, trained = time.perf_counter(), 0
        if name in TORCH:
            path, trained = by_torch(TORCH[name], c, task, folder)
        elif name == "untuned":
            path = c.model.path
        else:
            said = []
            train(c, say=said.append)
            line = next(line for line in said if line.startswith("training "))
            path, trained = c.run_dir, int(line.split()[1].replace(",", ""))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        use_compilation_cache()
        if name == "untuned" and task.labels:
            lm, _ = open_base(Path(path), "float32", c, task=(c.task.kind, task.labels))
        else:
            lm = load(path, dtype="float32")
        figures = task.measure(lm, c)
    figures |= {"trained": trained, "seconds": seconds, "peak_mb": peak}
    return {name: figures[name] for name in (*task.figures, *COST)}


def by_torch(method: str, c, task: Task, folder: str) -> tuple[str, int]:
    """The same batches, optimizer and schedule by transformers and peft; the folder of the whole model."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from ftjax.data.batches import Batches
    from ftjax.data.prepare import prepare
    from ftjax.hub import resolve
    from ftjax.hub import tokenizer as tokenizers
    from ftjax.training.optimizer import schedule

    torch.manual_seed(c.seed)
    base = resolve.resolve(c.model.path)
    names = dict(enumerate(task.labels))
    if names:
        more = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
        model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, **more)
        model.eval()  # without dropout
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    data = prepare(c, tokenizers.load_tokenizer(base), 512)
    batches = Batches(data.train.examples, c.train.batch_size, data.max_length, buckets=c.data.buckets, seed=c.seed)
    if method == "lora":
        import peft

        where = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        if names:  # as ours: on the blocks, pooler and classifier trained whole
            where = {
                "target_modules": ["query", "key", "value", "intermediate.dense", "output.dense"],
                "modules_to_save": ["pooler.dense", "classifier"],
                "task_type": "SEQ_CLS",
            }
        model = peft.get_peft_model(model, peft.LoraConfig(r=c.tuning.rank, lora_alpha=c.tuning.alpha, **where))
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=c.optim.lr, weight_decay=0.0)
    steps = c.train.steps or math.ceil(c.train.epochs * len(batches))
    rate = schedule(c.optim, steps, c.optim.lr)
    for step in range(steps):
        batch = batches[step]
        for group in adam.param_groups:
            group["lr"] = float(rate(step))
        batch = {key: x[np.any(batch["weights"], 1)] for key, x in batch.items()}  # rows that fill up a batch
        row, nth = np.nonzero(batch["weights"])
        ids, mask = (torch.tensor(x).long() for x in (batch["tokens"], batch["segment_ids"] > 0))
        logits = model(ids, attention_mask=mask).logits
        logits = logits[row] if names else logits[row, batch["loss_index"][row, nth]]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(batch["labels"][row, nth]).long())
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, c.optim.clip_norm)
        adam.step()
    whole = model.merge_and_unload() if method == "lora" else model
    whole.save_pretrained(folder + "/torch")
    tokenizers.copy_tokenizer(base, Path(folder) / "torch")
    return folder + "/torch", sum(p.numel() for p in parameters)


# ---- all of them ----------------------------------------------------------------------------------------------------


def table(found: dict[str, list[dict]], task: Task) -> str:
    """Mean ± standard deviation over the seeds, a row a method."""
    names = (*task.figures, *COST)
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, runs in found.items():
        cells = []
        for figure in names:
            values = [run[figure] for run in runs]
            mean = statistics.fmean(values)
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 and len(set(values)) > 1 else ""
            cells.append(f"{mean:,.0f}" if figure in COST else f"{mean:.4g}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_torch(found: dict[str, list[dict]], figure: str) -> list[str]:
    """Our mean less PyTorch's of a figure, with Welch's 95 % interval."""
    from scipy.stats import ttest_ind

    lines = []
    for theirs, ours in TORCH.items():
        a, b = ([run[figure] for run in found.get(name, [])] for name in (ours, theirs))
        if min(len(a), len(b)) > 1:
            low, high = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
            said = "within noise" if low <= 0 <= high else "beyond noise"
            difference = statistics.fmean(a) - statistics.fmean(b)
            lines.append(f"{ours} less {theirs}, {figure}: {difference:+.4f} ({low:+.4f} to {high:+.4f}), {said}")
    return lines


def no_better(found: dict[str, list[dict]], task: Task) -> list[str]:
    """The methods whose mean is no better than the untuned model's."""
    figure, sign = task.figures[0], -1 if task.lower else 1
    means = {name: sign * statistics.fmean(run[figure] for run in runs) for name, runs in found.items()}
    return [name for name, mean in means.items() if name != "untuned" and mean <= means["untuned"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task", choices=TASKS, default="commongen")
    parser.add_argument("--model", type=Path, help="sst2: directory of an encoder")
    parser.add_argument("--data", type=Path, help="sst2: folder of train.tsv and dev.tsv")
    parser.add_argument("--methods", nargs="*", help="default: all; `untuned` is always there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250, help="commongen: of a run")
    parser.add_argument("--rows", type=int, default=3000, help="sst2: of train, drawn by the seed")
    parser.add_argument("--out", type=Path, help="JSON with every run; runs that it holds are not run again")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    task = TASKS[args.task]
    if args.one:
        print(json.dumps(one(task, args.one[0], int(args.one[1]), args)))
        return
    task.config(args, 0)  # refuses what is missing before anything runs
    if unknown := set(args.methods or ()) - {*task.runs, *TORCH}:
        sys.exit(f"--methods: {', '.join(sorted(unknown))}: unknown; known: {', '.join([*task.runs, *TORCH])}")
    # A run's length is part of its name in the file, so that no file mixes two.
    length = f"{args.task}, {args.steps} steps" if args.task == "commongen" else f"{args.task}, {args.rows} rows"
    from ftjax.cli import MALLOC

    environment = {"GLIBC_TUNABLES": MALLOC} | os.environ  # as `ftjax train` sets it, on either side
    kept = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    found = kept.setdefault(length, {})
    for name in ["untuned", *(n for n in args.methods or [*task.runs, *TORCH] if n != "untuned")]:
        same = name == "untuned" and not task.labels  # a new head differs by seed
        for seed in range(len(found.get(name, [])), 1 if same else args.seeds):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name, str(seed)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(f"{name}, seed {seed}:\n{done.stderr}")
            run = json.loads(done.stdout.splitlines()[-1])
            assert all(math.isfinite(value) for value in run.values())
            found.setdefault(name, []).append(run)
            print(json.dumps({"method": name, "seed": seed} | run), flush=True)
            if args.out:
                args.out.write_text(json.dumps(kept, indent=2) + "\n")
    print("\n" + table(found, task))
    machine = "{cores} cores of {cpu}".format(**told()["machine"])
    print(f"\n{task.note(args)} {args.seeds} seeds; {machine}")
    print("\n".join(against_torch(found, task.figures[0])))
    if worse := no_better(found, task):
        sys.exit(f"no better than the untuned model by {task.figures[0]}: {', '.join(worse)}")
    print(f"every method beats the untuned model by {task.figures[0]}")


if __name__ == "__main__":
    main()
