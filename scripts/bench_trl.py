"""A training run beside TRL's SFTTrainer, by turns of processes: `python scripts/bench_trl.py --data train.jsonl`.

The same model and rows of GSM8K (`question`, `answer`; answers are trained, questions read), LoRA of rank 16 on all
linear maps, float32, 8 examples a step. TRL as it stands by its defaults (padding to the longest of a batch, gradient
checkpointing); ours by `ftjax.train` as it stands (batches of like length). Useful tokens a second, those that are no
padding, over the steps that compile nothing; the best turn of either side. `--packing`: ours packs 8 rows of 512.
TRL is no dependency of this project: pip install trl. `40m` is the model of scripts/bench_torch.py with a vocabulary of
50,257, and needs --tokenizer, GPT-2's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import bench_common
import bench_torch
import numpy as np

WARM = 2  # first steps that are not counted


def ours(args, folder: Path, out: str) -> tuple[list, list]:
    """(seconds at the end of each step, useful tokens of each; 0 for one that compiled) of a run of ours."""
    import jax

    from ftjax import config as configs
    from ftjax.training import loop

    ends, tokens, seen = [], [], set()

    class Timed(loop.Profiler):
        def __call__(self, state, frozen, batch):
            done = super().__call__(state, frozen, batch)
            jax.block_until_ready(done)
            new = batch["tokens"].shape + batch["labels"].shape not in seen
            seen.add(batch["tokens"].shape + batch["labels"].shape)
            ends.append(time.perf_counter())
            tokens.append(0 if new else int(np.count_nonzero(batch["segment_ids"])))
            return done

    loop.Profiler = Timed
    c = configs.default()
    c.run_dir, c.model.path = out, str(folder)
    c.data.update(train=str(args.data), prompt="{question}\n", completion="{answer}", split=(1.0, 0.0, 0.0))
    c.data.packing, c.data.long = args.packing, "drop"  # one row is longer than the starter reads
    c.train.update(steps=args.steps, batch_size=8, save_every=10**6)
    c.export.formats, c.log.tensorboard = (), False
    loop.train(c, lambda text: None)
    return ends, tokens


def theirs(args, folder: Path, out: str) -> tuple[list, list]:
    """The same of TRL's SFTTrainer."""
    import peft
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends, tokens = [], []

    class Timed(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    rows = load_dataset("json", data_files=str(args.data), split="train")
    rows = rows.map(
        lambda row: {"prompt": row["question"] + "\n", "completion": row["answer"]}, remove_columns=rows.column_names
    )
    settings = SFTConfig(
        output_dir=out, max_steps=args.steps, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(str(folder), args=settings, train_dataset=rows, peft_config=lora, callbacks=[Timed()])
    collate = trainer.data_collator

    def counted(examples):
        batch = collate(examples)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = counted
    trainer.train()
    return ends, tokens[: len(ends)]


def alone(args, side: str, folder: Path) -> dict:
    """Useful tokens a second of a run of one side in this process."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        ends, tokens = {"ftjax": ours, "torch": theirs}[side](args, folder, f"{scratch}/run")
    steps = [(n, b - a) for n, a, b in zip(tokens[1:], ends, ends[1:])][WARM - 1 :]
    steps = [(n, s) for n, s in steps if n]
    return {"rate": sum(n for n, _ in steps) / sum(s for _, s in steps), "steps": len(steps)}


def folder_of(args, scratch: Path) -> Path:
    """The model's directory, with a tokenizer."""
    if args.model == "starter":
        return bench_torch.folder_of("starter", scratch)
    if not args.tokenizer:
        raise SystemExit("--model 40m has no tokenizer of its own: --tokenizer DIR, GPT-2's")
    folder = bench_torch.folder_of("40m", scratch, vocab=50_257)
    for file in Path(args.tokenizer).iterdir():
        if file.name.startswith(("tokenizer", "vocab", "merges", "special_tokens")):
            shutil.copy(file, folder)
    return folder


def rows(args):
    """One row: both sides by turns."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, found = folder_of(args, Path(scratch)), {"ftjax": [], "torch": []}
        for _ in range(args.turns):
            for side, runs in found.items():
                asked = ["--alone", side, str(folder), "--data", str(args.data), "--steps", str(args.steps)]
                runs.append(bench_common.in_a_process(asked + ["--packing"] * args.packing))
        best = bench_torch.ratios({side: max(run["rate"] for run in runs) for side, runs in found.items()})
        counted = {f"{side}_steps": runs[0]["steps"] for side, runs in found.items()}
        yield {"model": args.model, "packing": args.packing} | best | counted | {"must": 1.8, "goal": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--model", choices=("starter", "40m"), default="starter")
    parser.add_argument("--tokenizer", type=Path, help="directory of GPT-2's, for 40m")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--steps", type=int, default=30, help="of a run")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    bench_common.add_arguments(parser)
    args = parser.parse_args()
    if find_spec("trl") is None:
        raise SystemExit("TRL is not installed: pip install trl")
    bench_common.restart_with_malloc(args.malloc)
    if args.alone:
        print(json.dumps(alone(args, args.alone[0], Path(args.alone[1]))), flush=True)
    else:
        bench_common.report(rows(args), args.out)


if __name__ == "__main__":
    main()
