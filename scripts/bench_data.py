"""What the data costs beside the training it feeds: `python scripts/bench_data.py`.

Loader: tokens a second of building batches against those of the starter model's training step, by turns in one run.
Packing: 100,000 rows with the lengths of rows in GSM8K, and how full the rows are. Tokenising: 100,000 rows the first
time and again. The last two read `--gsm8k`, GSM8K's train.jsonl, and need `--tokenizer` for its lengths.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from bench_common import add_arguments, report, restart_with_malloc

from ftjax import config as configs
from ftjax.data.batches import Batches, loader
from ftjax.data.pack import pack
from ftjax.data.prepare import prepare
from ftjax.data.read import read_table
from ftjax.hub import families, resolve, weights
from ftjax.hub import tokenizer as tokenizers
from ftjax.models.transformer import Transformer
from ftjax.objectives import causal
from ftjax.training.optimizer import optimizer, schedule
from ftjax.training.step import compile_step, init_state
from ftjax.tuning import METHODS, Spec

ROWS = 100_000
TURNS = 3


def starter_step(config, rows: int):
    """A function that takes a batch through one whole step of the starter model."""
    folder = resolve.resolve(config.model.path)
    family, shape = families.read_config(folder)
    method = METHODS[config.tuning.method]
    spec = Spec(shape, families.linear_names(family, shape), config.tuning)
    base = weights.read_params(folder, family, shape)
    trained, frozen = method.init(jax.random.key(0), base, spec)
    optim = optimizer(config.optim, schedule(config.optim, 1000, 1e-3))
    step = compile_step(
        None, sums=functools.partial(causal.sums, Transformer(shape, unroll=config.model.unroll)),
        variables=functools.partial(method.variables, spec=spec), optimizer=optim, seed=0,
    )  # fmt: skip
    state = init_state(optim, trained)

    def run(batch):
        nonlocal state
        state, said = step(state, frozen, batch)
        return said["loss"]

    return run


def bench_loader(method: str, packing: bool) -> dict:
    """The loader's rate and the step's, useful tokens a second."""
    config = configs.load(Path(__file__).parents[1] / "configs" / "quickstart.py")
    config.tuning.method, config.data.packing, config.data.cache = method, packing, ""
    rows = 32 if not packing else 8
    data = prepare(config, tokenizers.load_tokenizer(resolve.resolve(config.model.path)), 512)
    batches = Batches(data.train.examples, rows, data.max_length, packing=packing)
    step = starter_step(config, rows)
    for shape in batches.shapes():  # compile
        at = next(i for i in range(len(batches)) if batches[i]["tokens"].shape[1] == shape[1])
        jax.block_until_ready(step(batches[at]))
    next(loader(batches, 0, 1, config.data.workers))  # imports Grain
    built = trained = tokens = 0.0
    for turn in range(TURNS):
        begin, n = turn * 60, 60
        start = time.perf_counter()
        fed = list(loader(batches, begin, n, config.data.workers))
        built += time.perf_counter() - start
        start = time.perf_counter()
        for batch in fed:
            loss = step(batch)
        jax.block_until_ready(loss)
        trained += time.perf_counter() - start
        tokens += sum(np.count_nonzero(b["segment_ids"]) for b in fed)
    return {
        "case": f"the loader against the starter's step, {method}{', packed' if packing else ''}",
        "loader tokens/s": round(tokens / built),
        "step tokens/s": round(tokens / trained),
        "ratio": round(trained / built, 1),
    }


def gsm8k_rows(path: Path, out: Path) -> None:
    """100,000 rows of GSM8K, each with its number in front, so that none is another's copy."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    with open(out, "w") as file:
        for i, row in zip(range(ROWS), itertools.cycle(lines)):
            file.write(json.dumps({"question": f"{i}. {row['question']}", "answer": row["answer"]}) + "\n")


def bench_rows(path: Path, words) -> Iterator[dict]:
    """Preparing GSM8K's rows the first time and again, and packing them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        gsm8k_rows(path, source)
        config = configs.default()
        config.data.update(train=str(source), prompt="{question}\n", completion="{answer}", max_length=1024)
        config.data.update(split=(1.0, 0.0, 0.0), cache=str(Path(folder) / "cache"))
        for time_of in ("first", "second"):
            start = time.perf_counter()
            data = prepare(config, words, 1 << 20)
            yield {
                "case": f"preparing {ROWS:,} rows, the {time_of} time",
                "seconds": round(time.perf_counter() - start, 2),
            }
        start = time.perf_counter()
        read_table(str(source))
        yield {"case": "of which reading", "seconds": round(time.perf_counter() - start, 2)}
        lengths = data.train.examples.length
        for capacity in (512, 1024, 4096):
            start = time.perf_counter()
            rows = pack(np.minimum(lengths, capacity), capacity)
            seconds = time.perf_counter() - start
            share = np.minimum(lengths, capacity).sum() / (len(rows) * capacity)
            yield {
                "case": f"packing {ROWS:,} rows to {capacity:,} tokens",
                "seconds": round(seconds, 3),
                "efficiency": round(share, 4),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer")
    add_arguments(parser)
    args = parser.parse_args()
    restart_with_malloc(args.malloc)
    rows = (bench_loader(*case) for case in (("lora", False), ("full", False), ("lora", True)))
    if args.gsm8k and args.tokenizer:
        rows = itertools.chain(rows, bench_rows(args.gsm8k, tokenizers.load_tokenizer(args.tokenizer)))
    report(rows, args.out)


if __name__ == "__main__":
    main()
