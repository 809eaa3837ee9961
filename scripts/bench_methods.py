"""Every tuning method on one real task: `python scripts/bench_methods.py --out methods.json`.

The starter model learns to write a sentence from given words (configs/quickstart.py's rows, fewer steps, AdamW), each
method with each seed in a process of its own, one after another. Quality is measured on held-out words: perplexity,
ROUGE-L, share of the words used; cost by trained parameters, seconds of training and peak memory; forgetting by nats a
token on five stories. `torch-full` and `torch-lora` train the same batches with transformers and peft, for comparison.
Prints a Markdown table of means and standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# What sets each run apart, and its learning rate for this model of 260,000 parameters: the defaults of the methods are
# for billions.
RUNS = {
    "untuned": {},
    "full": {"tuning.method": "full", "optim.lr": 4e-3},
    "last_layers": {"tuning.method": "last_layers", "tuning.layers": 2, "optim.lr": 4e-3},
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
TORCH = {"torch-full": "full", "torch-lora": "lora"}
FIGURES = ("perplexity", "coverage", "rouge_l", "forgetting_loss", "trained", "seconds", "peak_mb")
ROOT = Path(__file__).resolve().parents[1]


def settings(name: str, seed: int, steps: int, folder: str):
    """The run of one method and seed."""
    from ftjax import config as configs

    c = configs.load(ROOT / "configs" / "quickstart.py")
    c.update(run_dir=folder, seed=seed)
    c.optim.name = "adamw"
    c.tuning.update(rank=16, alpha=32.0)
    c.train.update(steps=steps, eval_every=steps)
    c.evaluate.update(compare=False, compare_rows=100)
    c.export.formats = ("auto",)
    c.log.tensorboard = False
    configs.override(c, [f"{key}={value}" for key, value in RUNS[TORCH.get(name, name)].items()])
    return c


def one(name: str, seed: int, steps: int) -> dict:
    """Train one method with one seed and measure what came of it."""
    from ftjax.data.prepare import prepare
    from ftjax.evaluation.compare import measure
    from ftjax.loading import load

    with tempfile.TemporaryDirectory() as folder:
        c = settings(name, seed, steps, folder + "/run")
        start = time.perf_counter()
        trained = 0
        path = c.model.path
        if name in TORCH:
            path, trained = by_torch(TORCH[name], c, folder)
        elif name != "untuned":
            from ftjax.training.loop import train

            said = []
            train(c, say=said.append)
            line = next(line for line in said if line.startswith("training "))
            path, trained = c.run_dir, int(line.split()[1].replace(",", ""))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        lm = load(path, dtype="float32")
        figures = measure(lm, lm.variables, prepare(c, lm.tokenizer, lm.model.config.max_positions), c)
    figures |= {"trained": trained, "seconds": seconds, "peak_mb": peak}
    return {name: figures[name] for name in FIGURES}


def by_torch(method: str, c, folder: str) -> tuple[str, int]:
    """The same batches, optimizer and schedule by transformers and peft; the folder of the whole model."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from ftjax.data.batches import Batches
    from ftjax.data.prepare import prepare
    from ftjax.hub import resolve, tokenizer
    from ftjax.training.optimizer import schedule

    torch.manual_seed(c.seed)
    base = resolve.resolve(c.model.path)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    data = prepare(c, tokenizer.load_tokenizer(base), 512)
    batches = Batches(data.train.examples, c.train.batch_size, data.max_length, buckets=c.data.buckets, seed=c.seed)
    if method == "lora":
        import peft

        lora = peft.LoraConfig(
            r=c.tuning.rank, lora_alpha=c.tuning.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=c.optim.lr, weight_decay=0.0)
    rate = schedule(c.optim, c.train.steps, c.optim.lr)
    for step in range(c.train.steps):
        batch = batches[step]
        for group in adam.param_groups:
            group["lr"] = float(rate(step))
        labels = np.full(batch["tokens"].shape, -100)
        row, nth = np.nonzero(batch["weights"])
        labels[row, batch["loss_index"][row, nth]] = batch["labels"][row, nth]
        ids, mask = (torch.tensor(x).long() for x in (batch["tokens"], batch["segment_ids"] > 0))
        logits = model(ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten())
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, c.optim.clip_norm)
        adam.step()
    whole = model.merge_and_unload() if method == "lora" else model
    whole.save_pretrained(folder + "/torch")
    tokenizer.copy_tokenizer(base, Path(folder) / "torch")
    return folder + "/torch", sum(p.numel() for p in parameters)


def table(found: dict[str, list[dict]]) -> str:
    """Mean ± standard deviation over the seeds, a row a method."""
    lines = ["| method | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for name, runs in found.items():
        cells = []
        for figure in FIGURES:
            values = [run[figure] for run in runs]
            mean = statistics.fmean(values)
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 and len(set(values)) > 1 else ""
            cells.append(f"{mean:,.0f}" if figure in ("trained", "seconds", "peak_mb") else f"{mean:.4g}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=[*RUNS, *TORCH])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", type=Path, help="JSON with every run; runs that it holds are not run again")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]), args.steps)))
        return
    found = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    for name in args.methods:
        for seed in range(len(found.get(name, [])), 1 if name == "untuned" else args.seeds):
            command = [sys.executable, __file__, "--one", name, str(seed), "--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}, seed {seed}:\n{done.stderr}")
            run = json.loads(done.stdout.splitlines()[-1])
            assert all(math.isfinite(value) for value in run.values())
            found.setdefault(name, []).append(run)
            print(json.dumps({"method": name, "seed": seed} | run), flush=True)
            if args.out:
                args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    print(f"\n{args.steps} steps; {platform.processor() or platform.machine()} x {os.cpu_count()}")


if __name__ == "__main__":
    main()
