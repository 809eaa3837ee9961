"""Generation beside transformers' `generate`, by turns in one process: `python scripts/bench_generate.py`.

The same weights in one dtype, 16 random prompts of 32 tokens, 128 new tokens each, greedy, no end token: tokens a
second of the best turn on either side, and their ratio. Both must say the same tokens in float32; the share of tokens
before they part is told, which a draw between two all but equal logits can make them. `starter`, `40m`: see
scripts/bench_torch.py.

`bandwidth_share`: the bytes that a token must read (kernels of the blocks and the head, and the keys and values of the
tokens so far) over the bytes that this machine reads in the time that a token takes beyond the first, by a sum over a
large array in the same turns. Parameters that fit its caches make it large, and mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import bench_common
import bench_torch
import numpy as np

from ftjax import cpus
from ftjax.tree import flatten

SUMMED = 1 << 29  # bytes of an array that no cache holds


def ours(folder: Path, prompts: np.ndarray, new: int, dtype: str, rounded: str = "model") -> Callable[[], np.ndarray]:
    """A function that answers all prompts: (B, new) ids; rounded: what generate.weights names."""
    import jax.numpy as jnp

    from ftjax.decoding import generate
    from ftjax.hub import families, weights
    from ftjax.models.transformer import Transformer

    family, shape = families.read_config(folder)
    variables = {"params": weights.read_params(folder, family, shape, dtype=lambda path: jnp.dtype(dtype))}
    model = Transformer(shape, jnp.dtype(dtype))
    rows, how = prompts.tolist(), {"batch_size": len(prompts), "weights": rounded}
    return lambda: np.array(generate(model, variables, rows, max_new_tokens=new, **how))


def token_bytes(folder: Path, args) -> float:
    """Bytes that the decoding of one token of every row must read, on average over an answer."""
    from ftjax.hub import families, weights

    _, shape = families.read_config(folder)
    head = "embed/embedding" if shape.tied else "lm_head/kernel"
    sizes = {path: float(np.prod(x.shape)) for path, x in flatten(weights.param_shapes(shape)).items()}
    read = sum(size for path, size in sizes.items() if path == head or path.startswith("layers/"))
    kept = 2 * args.batch * shape.layers * shape.kv_heads * shape.head_dim * (args.prompt + args.new / 2)
    width = {"float32": 4, "bfloat16": 2}
    return read * min(width[args.dtype], width.get(args.weights, 4)) + kept * width[args.dtype]


def reading() -> Callable[[], float]:
    """A function that reads SUMMED bytes by all cores, and returns how many."""
    import jax
    import jax.numpy as jnp

    x = jax.block_until_ready(jnp.ones((os.cpu_count(), SUMMED // 4 // os.cpu_count()), jnp.float32))
    total = jax.jit(lambda x: x.sum(axis=1))

    def read() -> float:
        jax.block_until_ready(total(x))
        return x.nbytes

    return read


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
                "ftjax": ours(folder, prompts, args.new, args.dtype, args.weights),
                "torch": theirs(folder, prompts, args.new, args.dtype),
            }
            first = ours(folder, prompts, 1, args.dtype, args.weights)
            first()
            answers = {name: run() for name, run in runs.items()}
            same = np.cumprod(answers["ftjax"] == answers["torch"], axis=1)

            def piece(run):
                return lambda: run().size

            pieces = {name: piece(run) for name, run in runs.items()} | {"first": piece(first), "bytes": reading()}
            best = bench_common.in_turn(pieces, args.turns, args.seconds)
            seconds = args.batch * (args.new / best["ftjax"] - 1 / best["first"]) / (args.new - 1)  # of a further token
            share = token_bytes(folder, args) / best["bytes"] / seconds
            yield (
                {"model": model, "dtype": args.dtype, "weights": args.weights, "batch": args.batch}
                | {"prompt": args.prompt, "new": args.new}
                | bench_torch.ratios({side: best[side] for side in runs})
                | {"milliseconds_a_token": round(1000 * seconds, 3), "bandwidth_gb_s": round(best["bytes"] / 1e9, 1)}
                | {"bandwidth_share": round(share, 3), "same_until_they_part": round(float(same.mean()), 4)}
                | {"must": {"starter": 5, "40m": 1.8}[model], "goal": {"starter": 10, "40m": 3}[model]}
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=sorted(bench_torch.SHAPES), default=[])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights and compute")
    parser.add_argument("--weights", choices=("model", "bfloat16"), default="model", help="ours: see generate.weights")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn, at least")
    bench_common.add_arguments(parser)
    args = parser.parse_args()
    bench_common.restart_with_malloc(args.malloc)
    cpus.offer()
    bench_common.report(rows(args), args.out)


if __name__ == "__main__":
    main()
