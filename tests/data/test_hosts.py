"""The order of batches does not depend on how many hosts read them, nor on where a run begins."""

import json
import socket
from pathlib import Path

import haste
import numpy as np
import pytest
from transformers import AutoTokenizer

from ftjax import config
from ftjax.assets import resolve
from ftjax.data.batches import Batches, loader
from ftjax.data.prepare import prepare

STEPS = 40
SETTINGS = {
    "plain": {},
    "packed": {"packing": True},
    "mixture": {"mixture": True},
    "packed mixture, streamed": {"mixture": True, "packing": True, "streaming": True},
    "streamed": {"streaming": True},
}


def settings(tmp_path, mixture=False, **data):
    c = config.default()
    sources = {}
    for name, n in (("a", 90), ("b", 30)):
        rows = [{"prompt": f"{name} {i}:", "completion": " word" * (i % 9 + 1)} for i in range(n)]
        sources[name] = tmp_path / f"{name}.jsonl"
        sources[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    c.data.update(train=str(sources["a"]), cache="", max_length=64, **data)
    if mixture:
        c.data.mixture = tuple({"train": str(path), "weight": w} for path, w in zip(sources.values(), (0.4, 0.6)))
    return c


def read(c):
    data = prepare(c, AutoTokenizer.from_pretrained(resolve("builtin:stories260K")), 512)
    return Batches(
        data.train.examples, 8, data.max_length, packing=c.data.packing, seed=c.seed, source=data.train.source,
        shares=data.shares,
    )  # fmt: skip


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_same_batches_after_a_resume_on_any_number_of_hosts(name, hosts, tmp_path):
    c = settings(tmp_path, **SETTINGS[name])
    whole = list(loader(read(c), 0, STEPS))
    assert len({batch["tokens"].tobytes() for batch in whole}) > STEPS // 2
    start = 17  # within an epoch, and not the first
    share = 8 // hosts
    feeds = [loader(read(c), start, STEPS - start, row_slice=slice(h * share, (h + 1) * share)) for h in range(hosts)]
    for expected, *parts in zip(whole[start:], *feeds, strict=True):
        assert_same({k: np.concatenate([p[k] for p in parts]) for k in expected}, expected)


def test_two_real_processes_feed_the_batches_of_one(tmp_path, forks):
    c = settings(tmp_path, **SETTINGS["packed mixture, streamed"])
    start, steps = 5, 6
    (tmp_path / "settings.json").write_text(json.dumps({"config": c.to_dict(), "start": start, "steps": steps}))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {haste.FLAGS}"}
    program, said = Path(__file__).with_name("host.py").read_text(), [tmp_path / f"said.{i}" for i in range(2)]
    asked = [[str(i), "2", str(port), str(tmp_path / "settings.json"), str(tmp_path / f"{i}.npz")] for i in range(2)]
    started = [forks.start(tmp_path, text, one, program, env) for text, one in zip(said, asked, strict=True)]
    assert not any([process.wait() for process in started]), "".join(text.read_text() for text in said)
    one, two = (dict(np.load(tmp_path / f"{i}.npz")) for i in range(2))
    assert [(int(f["start"]), int(f["stop"])) for f in (one, two)] == [(0, 4), (4, 8)]
    batches = read(c)
    for step in range(start, start + steps):
        batch = batches[step]
        assert_same({k: np.concatenate([one[f"{step}/{k}"], two[f"{step}/{k}"]]) for k in batch}, batch)
        total = (batch["tokens"] * batch["segment_ids"]).sum()
        assert one[f"{step}/total"] == two[f"{step}/total"] == total
