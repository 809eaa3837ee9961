"""Training steps beside transformers and peft: `python scripts/bench_torch.py`.

The same weights, rows, dtype and optimizer (AdamW, clipping); every token trained. `40m`: a LLaMA of 40 million
parameters with a vocabulary of 32,000, 4 rows of 512; `starter`: the starter model, 64 rows of 72. Each side in a
process of its own, by turns of such processes. Prints tokens a second of the best turn, their ratio, and the most
memory above what a process held with its libraries imported, and in all. `--malloc`: on both sides the allocator that
`ftjax` takes on a CPU. `--as-started`: that allocator on our side alone, as `ftjax train` and a PyTorch script start.
`--lean`: ours by scanned and wholly recomputed layers and small chunks of the head, torch's by gradient checkpointing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import bench_common
import numpy as np

SHAPES = {"40m": (4, 512), "starter": (64, 72)}
CHUNK = 256  # tokens whose logits are held at once, with --lean
CASES = [(model, method, dtype) for model in SHAPES for method in ("lora", "full") for dtype in ("float32", "bfloat16")]


def folder_of(model: str, scratch: Path, vocab: int = 32_000) -> Path:
    """A model directory that both sides read."""
    from ftjax.hub import resolve

    if model == "starter":
        return Path(resolve.resolve("builtin:stories260K"))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocab, hidden_size=384, intermediate_size=1024, num_hidden_layers=9, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    if not (scratch / "config.json").is_file():
        LlamaForCausalLM(shape).save_pretrained(scratch)
    return scratch


def batch_of(ids: np.ndarray, documents: int = 1) -> dict[str, np.ndarray]:
    """A batch of rows (B, T) of so many documents, all tokens but a row's last trained."""
    B, T = ids.shape
    size = -(-T // documents)
    place = np.arange(T, dtype=np.int32)
    arrays = {"positions": place % size, "segment_ids": 1 + place // size, "loss_index": place[:-1]}
    arrays = {name: np.ascontiguousarray(np.broadcast_to(x, (B, len(x)))) for name, x in arrays.items()}
    return arrays | {"tokens": ids, "labels": ids[:, 1:], "weights": np.ones((B, T - 1), np.float32)}


def ours(folder: Path, method: str, dtype: str, rows: int, T: int, unroll=0, lean=False, devices=0, single=None):
    """A function that takes ids (rows, T) through one step, as `ftjax train` does, and returns its loss, on the device.

    devices: so many; 0: as many as a run takes; single: whether each has one thread; None: as in a run.
    """
    import jax
    import jax.numpy as jnp

    from ftjax import config as configs
    from ftjax import xla
    from ftjax.hub import families, weights
    from ftjax.training import auto_mesh, sharding
    from ftjax.training import program as programs
    from ftjax.training.compiling import trim_after_compiling
    from ftjax.tuning import Spec

    trim_after_compiling()
    config = configs.default()
    config.tuning.method, config.train.batch_size, config.optim.lr = method, rows, 1e-4
    config.model.update(remat="full" if lean else "none", unroll=1 if lean else unroll, head_chunk=CHUNK * lean)
    family, shape = families.read_config(folder)
    spec = Spec(shape, families.linear_names(family, shape), config.tuning, family)
    devices = devices or auto_mesh.cpu_devices(config, spec, T, jnp.dtype(dtype))
    mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = programs.build(config, spec, mesh, jnp.dtype(dtype), 10_000)
        base = weights.read_params(
            folder, family, shape, program.base_places, lambda path: program.read_dtype, given_away=True
        )
        trained, frozen = program.begin(jax.random.key(0), base)
        state, step = program.init_state(trained), program.step
        del base, trained
        if single is not None:
            arguments = (
                state,
                frozen,
                sharding.place_batch(batch_of(np.zeros((rows, T), np.int32)), mesh, rows, slice(0, rows)),
            )
            step = step.lower(*arguments).compile(xla.SINGLE if single else None)

    def run(ids):
        nonlocal state
        with jax.set_mesh(mesh):
            batch = sharding.place_batch(batch_of(ids), mesh, rows, slice(0, rows))
            state, report = step(state, frozen, batch)
        return report["loss"]

    return run


def theirs(folder: Path, method: str, dtype: str, lean: bool = False):
    """The same by transformers and peft, weights in `dtype`; what is trained stays in float32 for LoRA."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    if method == "lora":
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    if lean:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
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


def ratios(best: dict[str, float]) -> dict:
    """Rates by side, and ours over theirs."""
    rates = {f"{name}_tokens_s": round(rate) for name, rate in best.items()}
    return rates | {"ratio": round(best["ftjax"] / best["torch"], 2)}


def alone(side: str, case: tuple, args, scratch: Path, shape=None) -> dict:
    """One side of a step in this process: its tokens a second and its memory in bytes; shape: (rows, tokens of each),
    None: the model's own."""
    model, method, dtype = case
    folder, (B, T) = folder_of(model, scratch), shape or SHAPES[model]
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(3, vocab, (B, T)).astype(np.int32)
    if side == "ftjax":
        import ftjax.training.program  # noqa: F401
        from ftjax import cpus
    else:
        import peft  # noqa: F401
    before = bench_common.memory()["now"]
    bench_common.forget_peak()
    if side == "ftjax":
        cpus.offer()
        run = ours(folder, method, dtype, B, T, args.unroll, args.lean)
    else:
        run = theirs(folder, method, dtype, args.lean)

    def step() -> int:
        float(run(ids))
        return B * T

    step(), step()
    rate = bench_common.in_turn({side: step}, 1, args.seconds)[side]
    peak = bench_common.memory()["peak"]
    return {"tokens_s": rate, "above": peak - before, "peak": peak}


def beside(asked: list[str], args) -> dict:
    """Both sides, by turns of processes that are told `--alone SIDE` and what is asked: the best rate, the least
    memory."""
    asked = [*asked, "--seconds", str(args.seconds), "--unroll", str(args.unroll), *["--lean"] * args.lean]
    found = {side: [] for side in ("ftjax", "torch")}
    for _ in range(args.turns):
        for side, runs in found.items():
            malloc = ["--malloc"] * (args.as_started and side == "ftjax")
            runs.append(bench_common.in_a_process(["--alone", side, *asked, *malloc]))
    out = ratios({side: max(run["tokens_s"] for run in runs) for side, runs in found.items()})
    for what in ("above", "peak"):
        least = {side: min(run[what] for run in runs) for side, runs in found.items()}
        out |= {f"{side}_{what}_gb": round(bytes / 1e9, 3) for side, bytes in least.items()}
        out |= {f"{what}_ratio": round(least["ftjax"] / least["torch"], 3)}
    return out


def rows(args):
    """A row for each case that is asked for."""
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            if not args.only or "-".join(case) in args.only:
                folder_of(case[0], Path(scratch))
                found = beside([*case, scratch], args)
                malloc = "ftjax" if args.as_started else args.malloc
                yield dict(zip(("model", "method", "dtype"), case)) | found | {"malloc": malloc}


def arguments(parser) -> None:
    """The flags of a measurement of steps."""
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn")
    parser.add_argument("--unroll", type=int, default=0, help="layers a scan iteration, 0: all")
    parser.add_argument("--lean", action="store_true", help="memory before speed")
    parser.add_argument("--as-started", action="store_true", help="with ftjax's allocator on its own side alone")
    parser.add_argument("--alone", nargs=5, help=argparse.SUPPRESS)
    bench_common.add_arguments(parser)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", default=[], help="MODEL-METHOD-DTYPE, such as 40m-lora-float32; default: all"
    )
    arguments(parser)
    args = parser.parse_args()
    bench_common.restart_with_malloc(args.malloc)
    if args.alone:
        side, *case, scratch = args.alone
        bench_common.report([alone(side, tuple(case), args, Path(scratch))], None)
    else:
        bench_common.report(rows(args), args.out)


if __name__ == "__main__":
    main()
