"""One of several real processes: what it feeds its devices from some step on, and a sum over all of them.

Run by test_hosts.py: host.py PROCESS PROCESSES PORT SETTINGS.json OUT.npz
"""

import json
import sys
from pathlib import Path

import jax

process, processes, port, settings, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
jax.distributed.initialize(f"localhost:{port}", processes, process)

import numpy as np  # noqa: E402

from ftjax import config  # noqa: E402
from ftjax.assets import resolve  # noqa: E402
from ftjax.data.batches import Batches, loader  # noqa: E402
from ftjax.data.prepare import prepare  # noqa: E402
from ftjax.hub.tokenizer import load_tokenizer  # noqa: E402
from ftjax.training import sharding  # noqa: E402

asked = json.loads(Path(settings).read_text())
c = config.from_dict(asked["config"])
data = prepare(c, load_tokenizer(resolve("builtin:stories260K")), 512)
batches = Batches(
    data.train.examples, 8, data.max_length, packing=c.data.packing, seed=c.seed, source=data.train.source,
    shares=data.shares,
)  # fmt: skip
mesh = sharding.make_mesh(c.mesh)
local = sharding.local_rows(mesh, 8)
found = {"start": local.start, "stop": local.stop}
total = jax.jit(lambda batch: (batch["tokens"] * batch["segment_ids"]).sum())
with jax.set_mesh(mesh):
    for step, batch in enumerate(loader(batches, asked["start"], asked["steps"], 2, local), asked["start"]):
        found |= {f"{step}/{name}": array for name, array in batch.items()}
        placed = sharding.place_batch(batch, mesh, 8, local)
        assert placed["tokens"].shape[0] == 8
        for shard in placed["tokens"].addressable_shards:
            rows = slice(*shard.index[0].indices(8)[:2])
            assert (np.asarray(shard.data) == batch["tokens"][rows.start - local.start : rows.stop - local.start]).all()
        found[f"{step}/total"] = np.asarray(total(placed))
np.savez(out, **found)
