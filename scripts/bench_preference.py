"""What a step of DPO costs beside its parts, and what a rollout costs beside `ftjax generate`:

    python scripts/bench_preference.py --out preference.json

dpo: a step of DPO with LoRA, beside a supervised step on the same tokens and the forward pass of the reference. The
step may cost at most 1.15 of the two. rollout: the answers of a GRPO step with their rewards, beside `generate` for as
many tokens; it may cost at most 1.3 of it. The sides run in turn in one process. Processor time of all cores is
measured, which other programs on the machine disturb less than the time of a clock, and the least of all turns counts.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from pathlib import Path

import bench_common
import bench_torch
import jax
import jax.numpy as jnp
import numpy as np

import ftjax
from ftjax import config as configs
from ftjax.data.prepare import prepare
from ftjax.hub import families, weights
from ftjax.lm import continue_tokens
from ftjax.objectives import preference
from ftjax.tasks import policy
from ftjax.training import program as programs
from ftjax.training import sharding
from ftjax.tuning import METHODS, Spec

ROWS, ANSWER, PROMPT = 8, 64, 64  # pairs, and tokens of each text


def least(sides: dict, turns: int) -> dict[str, float]:
    """The least processor seconds of each side, after one turn that compiles."""
    spent: dict[str, list] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in sides.items():
            start = time.process_time()
            jax.block_until_ready(side())
            if turn:
                spent[name].append(time.process_time() - start)
    return {name: round(min(values), 4) for name, values in spent.items()}


def batch_of(vocab: int) -> dict:
    """Rows of two texts each, of which the answers are trained; the same for both tasks."""
    T = PROMPT + ANSWER
    tokens = np.random.default_rng(0).integers(3, vocab, (ROWS, 2 * T)).astype(np.int32)
    places = np.concatenate([np.arange(PROMPT - 1, T - 1), T + np.arange(PROMPT - 1, T - 1)])
    index = np.tile(places.astype(np.int32), (ROWS, 1))
    return {
        "tokens": tokens, "positions": np.tile(np.arange(T, dtype=np.int32), (ROWS, 2)),
        "segment_ids": np.tile(np.repeat(np.array([1, 2], np.int32), T), (ROWS, 1)), "loss_index": index,
        "labels": np.take_along_axis(tokens, index + 1, 1), "weights": np.ones(index.shape, np.float32),
    }  # fmt: skip


def dpo(folder: Path, turns: int) -> dict:
    """Seconds of a step of each task, and of the forward pass of the reference."""
    family, shape = families.read_config(folder)
    mesh, sides = sharding.make_mesh({"data": 1}, jax.devices()[:1]), {}
    with jax.set_mesh(mesh):
        batch = sharding.place_batch(batch_of(shape.vocab_size), mesh, ROWS, slice(0, ROWS))
        for kind in ("causal", "preference"):
            config = configs.default()
            config.task.kind, config.train.batch_size, config.optim.lr = kind, ROWS, 1e-4
            spec = Spec(shape, families.linear_names(family, shape), config.tuning, family)
            program = programs.build(config, spec, mesh, jnp.dtype("float32"), 10_000)
            read = functools.partial(weights.read_params, folder, family, shape, program.base_places)
            trained, frozen = program.begin(jax.random.key(0), read(lambda path: jnp.float32, given_away=True))
            held = [program.init_state(trained)]

            def step(program=program, frozen=frozen, held=held):
                held[0], report = program.step(held[0], frozen, batch)
                return report["loss"]

            sides[kind] = step
        base = {"params": METHODS["lora"].variables(held[0].trained, frozen, spec)["params"]}
        forward = jax.jit(functools.partial(preference.log_probs, program.model, loss="sigmoid"))
        sides["reference"] = lambda: forward(base, batch)
        spent = least(sides, turns)
    parts = spent["causal"] + spent["reference"]
    return spent | {"ratio": round(spent["preference"] / parts, 3), "must": 1.15}


def rollout(turns: int, top_k: int, top_p: float) -> dict:
    """Seconds of drawing the answers to 16 prompts with their rewards, and of generating as many."""
    config = configs.default()
    config.data.update(train="builtin:commongen/train.jsonl", prompt="Words: {src}\nSentence:", completion=" {tgt}")
    config.task.update(kind="policy", rewards=("length",), beta=0.0)
    config.generate.update(max_new_tokens=48, batch_size=64)
    config.rollout.update(top_k=top_k, top_p=top_p)
    config.train.batch_size = 16 * config.rollout.group
    lm = ftjax.load("builtin:stories260K")
    data, examples = prepare(config, lm.tokenizer, lm.max_tokens), np.arange(16)
    prompts = [data.train.examples[int(i)].ids.tolist() for i in np.repeat(examples, config.rollout.group)]
    how = {"temperature": 1.0, "top_k": top_k, "top_p": top_p, "max_new_tokens": 48, "batch_size": 64}
    sides = {
        "generate": lambda: continue_tokens(lm, lm.variables, prompts, **how) and None,
        "rollout": lambda: policy.collect(lm, lm.variables, data, config, 0, examples) and None,
    }
    spent = least(sides, turns)
    return spent | {"ratio": round(spent["rollout"] / spent["generate"], 3), "must": 1.3}


def rows(turns: int):
    """A row of figures for each case."""
    with tempfile.TemporaryDirectory() as scratch:
        yield {"case": "dpo, 40m"} | dpo(bench_torch.folder_of("40m", Path(scratch)), turns)
    yield {"case": "dpo, starter"} | dpo(bench_torch.folder_of("starter", Path()), turns)
    yield {"case": "rollout"} | rollout(turns, 0, 1.0)
    yield {"case": "rollout, top_k=20, top_p=0.9"} | rollout(turns, 20, 0.9)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_common.add_arguments(parser)
    parser.add_argument("--turns", type=int, default=8)
    given = parser.parse_args()
    bench_common.restart_with_malloc(given.malloc)
    bench_common.report(rows(given.turns), given.out)


if __name__ == "__main__":
    main()
