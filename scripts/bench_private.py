"""Time and memory of a private step beside a plain one, for an encoder of MiniLM's shape with random weights, LoRA of
rank 8 and a head:

    python scripts/bench_private.py

Both compute the gradient of the same rows. `full` rows have no padding; the lengths of `mixed` rows are those of short
texts, of which a plain batch has one bucket and a private batch all. The two take turns, and the least processor time
counts. Memory is what XLA reserves for the compiled program beside its inputs. `group` is the number of examples whose
gradients are held at once; `flops` are those that XLA counts for a batch without padding.
"""

from __future__ import annotations

import argparse
import functools
import time

import jax
import numpy as np

from ftjax import config as configs
from ftjax.data.batches import Batches, Poisson
from ftjax.data.tokenise import Example
from ftjax.hub import families, weights
from ftjax.models.transformer import Transformer
from ftjax.objectives import classify
from ftjax.training import privacy, step
from ftjax.tuning import METHODS, Spec

BERT = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip


def examples(lengths) -> list[Example]:
    rng = np.random.default_rng(0)
    return [Example(rng.integers(5, 9999, n), np.arange(n) == 0, np.int32([i % 2])) for i, n in enumerate(lengths)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()

    import json
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(BERT))
        family, shape = families.read_config(Path(folder))
        shape = families.with_head(family, shape, "sequence", 2, Path(folder), "mean")
    c = configs.default()
    c.tuning.update(method="lora", rank=8)
    spec = Spec(shape, families.linear_names(family, shape), c.tuning, family)
    rng, method, model = np.random.default_rng(0), METHODS["lora"], Transformer(shape)
    base = jax.tree.map(lambda x: 0.03 * rng.normal(size=x.shape).astype(x.dtype), weights.param_shapes(shape))
    trained, frozen = method.init(jax.random.key(0), base, spec)
    sums, variables = functools.partial(classify.one_class, model), functools.partial(method.variables, spec=spec)

    N = args.rows
    lengths = np.clip(np.random.default_rng(1).lognormal(2.4, 0.65, 8 * N).astype(int), 4, 64)
    sampled = np.random.default_rng(2).permutation(lengths)[:N]
    sampled[:1] = 64
    cases = {"full": np.full(N, 64), "mixed": sampled}
    for name, own in cases.items():
        poisson = Poisson(examples(own), N, 64, steps=1, multiple=8)
        poisson.rate = 1.0  # all examples
        poisson.slots = poisson.batch_size = N
        # What plain batches of the same lengths take on average: one batch of each bucket, weighed by its rows.
        plain = Batches(examples(own if name == "full" else lengths), N, 64, buckets=4, seed=0)
        fed = [(plain[i], 1 / len(plain)) for i in range(len(plain))]
        runs = {"plain": (step.gradients, fed)}
        for group in args.groups:
            size = 4 * sum(x.size for x in jax.tree.leaves(trained))
            how = functools.partial(privacy.gradients, clip=1.0, noise=0.5, expected=N, at_once=group * size)
            runs[f"private, group {group}"] = (how, [(poisson[0], 1.0)])
        times: dict[str, list] = {name: [] for name in runs}
        compiled = {}
        for what, (gradients, batches) in runs.items():
            f = jax.jit(lambda t, z, b, k, g=gradients: g(sums, variables, t, z, b, k, 1))
            programs = [f.lower(trained, frozen, batch, jax.random.key(0)).compile() for batch, _ in batches]
            compiled[what] = programs
        for _ in range(args.turns):
            for what, (_, batches) in runs.items():
                total = 0.0
                for program, (batch, share) in zip(compiled[what], batches, strict=True):
                    began = time.process_time()
                    jax.block_until_ready(program(trained, frozen, batch, jax.random.key(0)))
                    total += share * (time.process_time() - began)
                times[what].append(total)
        for what, programs in compiled.items():
            memory = max(p.memory_analysis().temp_size_in_bytes for p in programs) / 2**20
            flops = max(p.cost_analysis().get("flops", 0) for p in programs) / 1e9
            least, first = min(times[what]), min(times["plain"])
            print(
                f"{name:<6} {what:<18} {least:7.2f} s, {least / first:5.2f} times plain; {memory:7.1f} MiB; "
                f"{flops:7.1f} GFLOP counted", flush=True
            )  # fmt: skip


if __name__ == "__main__":
    main()
