"""Generation beside transformers' `generate`, by turns in one process: `python scripts/bench_generate.py`.

The same weights in one dtype, 16 random prompts of 32 tokens, 128 new tokens each, greedy, no end token: tokens a
second of the best turn on either side, and their ratio. Both must say the same tokens in float32; the share of tokens
before they part is told, which a draw between two all but equal logits can make them. `starter`, `40m`: see
scripts/bench_torch.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import bench_common
import bench_torch
import numpy as np


def ours(folder: Path, prompts: np.ndarray, new: int, dtype: str) -> Callable[[], np.ndarray]:
    """A function that answers all prompts: (B, new) ids."""
    import jax.numpy as jnp

    from ftjax.evaluation.generate import generate
    from ftjax.hub import families, weights
    from ftjax.models.transformer import Transformer

    family, shape = families.read_config(folder)
    variables = {"params": weights.read_params(folder, family, shape, dtype=lambda path: jnp.dtype(dtype))}
    model = Transformer(shape, jnp.dtype(dtype))
    rows = prompts.tolist()
    return lambda: np.array(generate(model, variables, rows, max_new_tokens=new, batch_size=len(rows)))


def theirs(folder: Path, prompts: np.ndarray, new: int, dtype: str) -> Callable[[], np.ndarray]:
    """The same by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts).long()
    settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)

    def run():
        with torch.inference_mode():
            return model.generate(ids, **settings)[:, ids.shape[1] :].numpy()

    return run


def rows(args):
    """A row for each model."""

    with tempfile.TemporaryDirectory() as scratch:
        for model in args.only or bench_torch.SHAPES:
            folder = bench_torch.folder_of(model, Path(scratch))
            vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
            prompts = np.random.default_rng(0).integers(3, vocab, (args.batch, args.prompt)).astype(np.int32)
            runs = {
                name: side(folder, prompts, args.new, args.dtype) for name, side in (("ftjax", ours), ("torch", theirs))
            }
            answers = {name: run() for name, run in runs.items()}
            same = np.cumprod(answers["ftjax"] == answers["torch"], axis=1)

            def piece(run):
                return lambda: run().size

            pieces = {name: piece(run) for name, run in runs.items()}
            best = bench_common.in_turn(pieces, args.turns, args.seconds)
            yield (
                {"model": model, "dtype": args.dtype, "batch": args.batch, "prompt": args.prompt, "new": args.new}
                | bench_torch.ratios(best)
                | {"same_until_they_part": round(float(same.mean()), 4), "must": 3, "goal": 10}
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=sorted(bench_torch.SHAPES), default=[])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights and compute")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn, at least")
    bench_common.add_arguments(parser)
    args = parser.parse_args()
    bench_common.restart_with_malloc(args.malloc)
    bench_common.report(rows(args), args.out)


if __name__ == "__main__":
    main()
