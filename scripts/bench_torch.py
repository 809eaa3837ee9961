"""Training steps beside transformers and peft, by turns in one process: `python scripts/bench_torch.py`.

The same weights, rows, dtype and optimizer (AdamW, clipping); every token trained. `40m`: a LLaMA of 40 million
parameters with a vocabulary of 32,000, 4 rows of 512; `starter`: the starter model, 64 rows of 72. Prints tokens a
second of the best turn on either side, and their ratio. `--malloc` restarts with the allocator that `ftjax` takes
on a CPU, for both sides.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPES = {"40m": (4, 512), "starter": (64, 72)}
CASES = [(model, method, dtype) for model in SHAPES for method in ("lora", "full") for dtype in ("float32", "bfloat16")]


def folder_of(model: str, scratch: Path) -> Path:
    """A model directory that both sides read."""
    from ftjax.hub import resolve

    if model == "starter":
        return Path(resolve.resolve("builtin:stories260K"))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32_000, hidden_size=384, intermediate_size=1024, num_hidden_layers=9, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    if not (scratch / "config.json").is_file():
        LlamaForCausalLM(shape).save_pretrained(scratch)
    return scratch


def ours(folder: Path, method: str, dtype: str, unroll: int):
    """A function that takes ids (B, T) through one step and returns its loss, on the device."""
    import jax
    import jax.numpy as jnp

    from ftjax import config as configs
    from ftjax.hub import families, weights
    from ftjax.models.transformer import Transformer
    from ftjax.objectives import causal
    from ftjax.training.optimizer import optimizer, schedule
    from ftjax.training.step import compile_step, init_state
    from ftjax.tuning import METHODS, Spec

    config, row = configs.default(), METHODS[method]
    config.tuning.method = method
    family, shape = families.read_config(folder)
    spec = Spec(shape, families.linear_names(family, shape), config.tuning)
    base = weights.read_params(
        folder, family, shape, dtype=lambda path: jnp.dtype(dtype if method == "lora" else "float32")
    )
    trained, frozen = row.init(jax.random.key(0), base, spec)
    trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trained)
    optim = optimizer(config.optim, schedule(config.optim, 10_000, 1e-4))
    step = compile_step(
        None, sums=functools.partial(causal.sums, Transformer(shape, jnp.dtype(dtype), unroll=unroll)),
        variables=functools.partial(row.variables, spec=spec), optimizer=optim, seed=0,
    )  # fmt: skip
    state = init_state(optim, trained)

    def run(ids):
        nonlocal state
        B, T = ids.shape
        batch = {
            "tokens": ids,
            "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
            "segment_ids": np.ones((B, T), np.int32),
            "loss_index": np.broadcast_to(np.arange(T - 1, dtype=np.int32), (B, T - 1)),
            "labels": ids[:, 1:],
            "weights": np.ones((B, T - 1), np.float32),
        }
        state, report = step(state, frozen, batch)
        return report["loss"]

    return run


def theirs(folder: Path, method: str, dtype: str):
    """The same by transformers and peft, weights in `dtype`; what is trained stays in float32 for LoRA."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    if method == "lora":
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def run(ids):
        ids = torch.tensor(ids).long()
        loss = model(ids, labels=ids).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        return loss

    return run


def bench(model: str, method: str, dtype: str, turns: int, seconds: float, unroll: int, scratch: Path) -> dict:
    """Best tokens a second of either side over `turns` turns of about `seconds` each."""
    folder, (B, T) = folder_of(model, scratch), SHAPES[model]
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(3, vocab, (B, T)).astype(np.int32)
    sides = {"ftjax": ours(folder, method, dtype, unroll), "torch": theirs(folder, method, dtype)}
    for run in sides.values():
        for _ in range(2):
            float(run(ids))
    best = dict.fromkeys(sides, 0.0)
    for _ in range(turns):
        for name, run in sides.items():
            start, steps = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                loss = run(ids)
                float(loss)
                steps += 1
            best[name] = max(best[name], steps * B * T / (time.perf_counter() - start))
    return {f"{name}_tokens_s": round(rate) for name, rate in best.items()} | {
        "ratio": round(best["ftjax"] / best["torch"], 2)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", default=[], help="MODEL-METHOD-DTYPE, such as 40m-lora-float32; default: all"
    )
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn")
    parser.add_argument("--unroll", type=int, default=0, help="layers a scan iteration, 0: all")
    parser.add_argument("--malloc", action="store_true", help="with the allocator that ftjax gives itself")
    args = parser.parse_args()
    if args.malloc and "GLIBC_TUNABLES" not in os.environ:
        from ftjax.cli import MALLOC

        os.environ["GLIBC_TUNABLES"] = MALLOC
        os.execv(sys.executable, [sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            if not args.only or "-".join(case) in args.only:
                found = bench(*case, args.turns, args.seconds, args.unroll, Path(scratch))
                row = dict(zip(("model", "method", "dtype"), case)) | found
                row |= {"malloc": args.malloc, "machine": f"{platform.machine()} x {os.cpu_count()}"}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
