"""Training steps as a share of the machine's own matrix product: `python scripts/bench_share.py`.

Random weights of a known shape, every token trained, arithmetic by formula (causal, nothing twice) over the best
product of two square matrices that the process reaches in the same dtype. Without --only: the model of
scripts/bench_torch.py on a CPU, Llama 3.1 8B and a Llama of 1B on an accelerator. `--packed`: the same rows as several
documents each. `--torch`: the same shapes by transformers and peft with SDPA, in a process of its own, with gradient
checkpointing where it does not fit without. Prints tokens a second, the share, the most memory in use, and what is
asked of an H200.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import bench_common
import bench_torch
import numpy as np

LLAMA = Path(__file__).resolve().parents[1] / "configs" / "llama-3.1-8b"
ONE_B = {  # of Llama 3.2
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
DOCUMENTS = 8  # of a packed row
SQUARES = {"cpu": (1024, 2048, 4096)}  # sizes of products
LARGE_SQUARES = (4096, 8192, 16384)  # on accelerators


class Case(NamedTuple):
    """A row of CASES. changed: of LLAMA's config.json, None: the model of bench_torch; settings: of the run; must and
    goal: of the share, on an H200."""

    changed: dict | None
    rows: int
    length: int
    settings: dict
    must: float | None = None
    goal: float | None = None


FULL = {"tuning.method": "full", "model.trained_dtype": "bfloat16"}
CASES = {
    "40m-lora-float32": Case(None, 4, 512, {"model.dtype": "float32"}),
    "40m-full-float32": Case(None, 4, 512, {"model.dtype": "float32", "tuning.method": "full"}),
    "40m-lora-bfloat16": Case(None, 4, 512, {"model.dtype": "bfloat16"}),
    "8b-lora": Case({}, 2, 4096, {"model.dtype": "bfloat16"}, 0.50, 0.65),
    "1b-full": Case(ONE_B, 4, 4096, {"model.dtype": "bfloat16"} | FULL, 0.45, 0.60),
    "8b-full": Case({}, 2, 4096, {"model.dtype": "bfloat16"} | FULL, 0.50, 0.65),
}


def folder_of(case: Case, scratch: Path) -> Path:
    """A directory with the model's config.json."""
    if case.changed is None:
        return bench_torch.folder_of("40m", scratch)
    shape = json.loads((LLAMA / "config.json").read_text()) | case.changed
    (scratch / "config.json").write_text(json.dumps(shape))
    return scratch


def ids_of(folder: Path, case: Case) -> np.ndarray:
    """Tokens (rows, length)."""
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(3, vocab, (case.rows, case.length)).astype(np.int32)


def ours(folder: Path, case: Case, packed: bool, seconds: float, changed: Sequence[str] = ()) -> dict:
    """What a step of the run that `ftjax train` would choose reaches on the devices here. changed: NAME=VALUE."""
    import jax
    import jax.numpy as jnp

    from ftjax import config as configs
    from ftjax.hub import families
    from ftjax.lm import compute_dtype
    from ftjax.training import auto_mesh, program, sharding
    from ftjax.training.compiling import trim_after_compiling
    from ftjax.training.flops import flops_per_token
    from ftjax.tree import flatten, map_paths
    from ftjax.tuning import Spec

    trim_after_compiling()
    config = configs.default()
    settings = {"tuning.rank": 16, "tuning.alpha": 32.0, "train.batch_size": case.rows} | case.settings
    configs.override(config, [*(f"{name}={value}" for name, value in settings.items()), *changed])
    config.data.packing = packed
    program.fill_defaults(config)
    family, shape = families.read_config(folder)
    spec = Spec(shape, families.linear_names(family, shape), config.tuning, family)
    dtype, here, T = compute_dtype(config.model.dtype), auto_mesh.here(), case.length
    auto_mesh.settle(config, spec, here, T, dtype)
    mesh = sharding.make_mesh(config.mesh)
    program.check_rows(config, mesh, shape)
    auto_mesh.settle_unroll(config, mesh.devices.flat[0])
    auto_mesh.settle_remat(config, spec, here, mesh.shape, T, dtype)
    attention = program.check_attention(config, spec, mesh, dtype, [T])
    with jax.set_mesh(mesh):
        run = program.build(config, spec, mesh, dtype, 10_000)
        places = flatten(run.base_places)

        def draw(path, x):
            """A parameter at random, layer by layer: the memory of its bits is not to be the most that is in use."""
            one = lambda key, shape: 0.02 * jax.random.normal(key, shape, run.read_dtype)  # noqa: E731

            def make(key):
                if path.endswith("/scale"):
                    return jnp.ones(x.shape, run.read_dtype)
                if x.ndim < 3:
                    return one(key, x.shape)
                return jax.lax.map(lambda key: one(key, x.shape[1:]), jax.random.split(key, x.shape[0]))

            return jax.jit(make, out_shardings=places[path])(jax.random.key(zlib.crc32(path.encode())))

        trained, frozen = run.begin(jax.random.key(0), map_paths(draw, run.base))
        state = run.init_state(trained)
        del trained
        batch = bench_torch.batch_of(ids_of(folder, case), DOCUMENTS if packed else 1)
        batch = sharding.place_batch(batch, mesh, case.rows, slice(0, case.rows))

        late = []

        def step() -> int:
            nonlocal state
            state, report = run.step(state, frozen, batch)
            late.append(report["loss"])
            assert np.isfinite(float(late.pop(0) if len(late) > 1 else 0))  # read a step late, as a run reads it
            return case.rows * T

        step()
        rate = bench_common.in_turn({"ftjax": step}, 2, seconds)["ftjax"]
    flops = flops_per_token(shape, run.base, run.trained, run.frozen, T)
    found = {"tokens_s": rate, "tflops": rate * flops / 1e12, "remat": config.model.remat, "attention": attention}
    stats = jax.local_devices()[0].memory_stats() or {}
    found["gb"] = stats.get("peak_bytes_in_use", bench_common.memory()["peak"]) / 1e9
    return found | {"product_tflops": mesh.size * product(dtype, seconds) / 1e12}


def product(dtype, seconds: float) -> float:
    """FLOP/s of the best product of two square matrices on one device, among a few sizes."""
    import jax
    import jax.numpy as jnp

    best = 0.0
    sizes = SQUARES.get(jax.default_backend(), LARGE_SQUARES)
    for n in sizes:
        x = jax.random.normal(jax.random.key(0), (n, n), dtype)
        y = (jax.random.normal(jax.random.key(1), (n, n)) / np.sqrt(n)).astype(dtype)
        times = (max(sizes) // n) ** 3  # a call takes as long for each, so that starting one costs nothing

        @jax.jit
        def chain(x, y, times=times):
            one = lambda _, x: jnp.dot(x, y, preferred_element_type=jnp.float32).astype(x.dtype)  # noqa: E731
            return jax.lax.fori_loop(0, times, one, x)

        jax.block_until_ready(chain(x, y))
        begin, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - begin < seconds / 3:
            start = time.perf_counter()
            jax.block_until_ready(chain(x, y))
            best, done = max(best, times * 2 * n**3 / (time.perf_counter() - start)), done + 1
    return best


def theirs(folder: Path, case: Case, seconds: float) -> dict:
    """The same shapes by transformers and peft with SDPA."""
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"
    for checkpointing in (False, True):
        try:
            return torch_steps(folder, case, seconds, place, checkpointing)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    raise SystemExit(f"{case}: does not fit with torch")


def torch_steps(folder: Path, case: Case, seconds: float, place: str, checkpointing: bool) -> dict:
    """Tokens a second and memory of steps on one device."""
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, case.settings["model.dtype"])
    torch.manual_seed(0)
    with torch.device(place):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation="sdpa"
        )
    if case.settings.get("tuning.method") != "full":
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=place == "cuda" or None)
    ids = torch.tensor(ids_of(folder, case), device=place).long()

    def step() -> int:
        loss = model(ids, labels=ids).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        assert np.isfinite(loss.item())
        return ids.numel()

    step()
    rate = bench_common.in_turn({"torch": step}, 2, seconds)["torch"]
    peak = torch.cuda.max_memory_allocated() if place == "cuda" else bench_common.memory()["peak"]
    return {"tokens_s": rate, "gb": peak / 1e9, "checkpointing": checkpointing}


def rows(args):
    """A row for each case."""
    # Not asked of JAX in this process, which would take most of a GPU's memory for itself.
    backend = "" if args.only else bench_common.in_a_process(["--alone", "backend", next(iter(CASES))])
    known = [name for name, case in CASES.items() if (case.changed is None) == (backend == "cpu")]
    for name in args.only or known:
        case, asked = CASES[name], ["--seconds", str(args.seconds), "--set", *args.set]
        found = bench_common.in_a_process(["--alone", "ftjax", name, *asked])
        row = {"case": name, "rows": case.rows, "length": case.length, "remat": found["remat"]}
        row |= {"attention": found["attention"], "ftjax_tokens_s": round(found["tokens_s"])}
        row |= {what: round(found[what], 2) for what in ("tflops", "product_tflops")}
        row |= {"share": round(found["tflops"] / found["product_tflops"], 3), "ftjax_gb": round(found["gb"], 2)}
        if case.must:
            row |= {"must": case.must, "goal": case.goal}
        if args.packed:
            packed = bench_common.in_a_process(["--alone", "packed", name, *asked])
            row |= {"packed_tokens_s": round(packed["tokens_s"]), "packed_attention": packed["attention"]}
            row["packed_ratio"] = round(packed["tokens_s"] / found["tokens_s"], 3)
        if args.torch:
            torch = bench_common.in_a_process(["--alone", "torch", name, *asked])
            row |= {"torch_tokens_s": round(torch["tokens_s"]), "torch_gb": round(torch["gb"], 2)}
            row |= {"torch_checkpointing": torch["checkpointing"]}
            row |= {"ratio": round(found["tokens_s"] / torch["tokens_s"], 2)}
            row["memory_ratio"] = round(found["gb"] / torch["gb"], 3)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=[])
    parser.add_argument("--packed", action="store_true", help=f"also rows of {DOCUMENTS} documents")
    parser.add_argument("--torch", action="store_true", help="also transformers and peft")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of ftjax's runs")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn, at least")
    parser.add_argument("--alone", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    bench_common.add_arguments(parser)
    args = parser.parse_args()
    bench_common.restart_with_malloc(args.malloc)
    if not args.alone:
        bench_common.report(rows(args), args.out)
        return
    # Weights, gradients and moments of 8B in full take 96 GB; of a GPU's memory JAX takes three quarters otherwise.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    side, case = args.alone[0], CASES[args.alone[1]]
    if side == "backend":
        import jax

        print(json.dumps(jax.default_backend()))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder_of(case, Path(scratch))
        if side == "torch":
            print(json.dumps(theirs(folder, case, args.seconds)))
        else:
            print(json.dumps(ours(folder, case, side == "packed", args.seconds, args.set)))


if __name__ == "__main__":
    main()
