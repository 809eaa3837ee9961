"""Damage a run, its cache and its adapter at random, and see that each damage is repaired or refused by name.

    python scripts/damage.py --count 300 --seed 7

Of each damage the outcome is one of: `same` (the numbers are those of the whole run), `told` (an older checkpoint, or
rows that were computed again, and a line says so), `refused` (an FtjaxError), and the two that are faults: `SILENT`
(other numbers, and no word of it) and `TRACEBACK`. Exit status 1 where there is a fault.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import fuzz
import jax
import numpy as np

import ftjax
from ftjax import seals
from ftjax.errors import FtjaxError

STEPS, EVERY = 6, 2
FIELDS = {"train.steps": STEPS, "train.save_every": EVERY, "train.eval_every": EVERY, "train.keep": 3}
FIELDS |= {"evaluate.compare": False}


def settings(folder: Path):
    """The config of the run in a folder."""
    return fuzz.settings(folder, **FIELDS)


def numbers(tree) -> str:
    """Digest of the arrays of a tree."""
    leaves = [(jax.tree_util.keystr(path), np.asarray(x)) for path, x in jax.tree.leaves_with_path(tree)]
    return seals.digest(*(part for name, x in leaves for part in (name, x.tobytes())))


def of_model(path: Path) -> str:
    """What a model computes with, as a run or an adapter gives it."""
    return numbers(ftjax.load(path).variables)


def of_state(folder: Path, say) -> tuple[int, str]:
    """Step and numbers of the state that the run in a folder would go on from, opened as the run opens it."""
    import orbax.checkpoint as ocp
    from etils import epath

    from ftjax.training.checkpoint import FOLDER, Checkpoints
    from ftjax.training.report import Metrics, read_metrics

    saved = Checkpoints(folder / "run", 3, say=say)
    step = saved.latest()
    record = saved.record(step)
    at = epath.Path(folder / "run" / FOLDER / str(step))
    tree = {name: ocp.PyTreeCheckpointHandler(use_ocdbt=False).restore(at / name) for name in ("trained", "optimizer")}
    saved.close()
    Metrics(folder / "run", settings(folder), step, record.get("metrics", ""), say).close()
    rows = [row for row in read_metrics(folder / "run") if row["step"] <= step]
    kept = {key: record[key] for key in ("step", "best", "best_loss", "stale")}
    return step, seals.digest(numbers(tree), kept, rows)


def of_rows(folder: Path) -> str:
    """The tokens of a run's rows."""
    from ftjax.training.job import prepared

    data = prepared(settings(folder), fuzz.quiet).data
    examples = [part.examples for part in (data.train, data.validation)]
    return numbers(
        {str(i): {"ids": np.array(e.ids[:]), "trained": np.array(e.trained[:])} for i, e in enumerate(examples)}
    )


def make(folder: Path) -> dict:
    """Run it; returns the numbers of the whole one: of its model, its adapter, its rows and each of its states."""
    ftjax.train(settings(folder), say=fuzz.quiet)
    whole = {"model": of_model(folder / "run"), "adapter": of_model(folder / "run/adapter"), "rows": of_rows(folder)}
    states, copy = {}, folder.parent / "states"
    shutil.copytree(folder, copy)
    for _ in range(3):
        step, state = of_state(copy, fuzz.quiet)
        states[step] = state
        shutil.rmtree(copy / "run/checkpoints" / str(step))
    shutil.rmtree(copy)
    return whole | {"states": states}


def hurt(rng: random.Random, file: Path) -> str:
    """Damage a file; returns how."""
    data, way = bytearray(file.read_bytes()), rng.choice(("flip", "zeros", "cut", "empty", "gone", "longer"))
    at = rng.randrange(len(data)) if data else 0
    if way == "flip" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif way == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif way == "cut":
        del data[at:]
    elif way == "empty":
        data = bytearray()
    elif way == "longer":
        data += rng.randbytes(16)
    file.unlink()
    if way != "gone":
        file.write_bytes(data)
    return way


def damage(rng: random.Random, folder: Path) -> tuple[str, str]:
    """Damage something in a folder; returns the kind, and what was done."""
    kind = rng.choice(("checkpoint", "checkpoint", "folders", "cache", "adapter", "run"))
    saved = sorted((folder / "run/checkpoints").iterdir(), key=lambda path: int(path.name))
    if kind == "folders":
        one, other = rng.sample(saved, 2)
        way = rng.choice(("item gone", "item of another", "record of another", "swapped", "renamed", "empty folder"))
        item = rng.choice(("trained", "optimizer"))
        if way == "item gone":
            shutil.rmtree(one / item)
        elif way == "item of another":
            shutil.rmtree(one / item)
            shutil.copytree(other / item, one / item)
        elif way == "record of another":
            shutil.copyfile(other / "run/metadata", one / "run/metadata")
        elif way == "swapped":
            one.rename(folder / "aside")
            other.rename(one)
            (folder / "aside").rename(other)
        elif way == "renamed":
            one.rename(one.with_name("99"))
        else:
            one.with_name("98").mkdir()
        return "checkpoint", f"{way}: {one.name}, {other.name}, {item}"
    files = {
        "checkpoint": [p for p in rng.choice(saved).rglob("*") if p.is_file()],
        "cache": [p for p in (folder / "cache").rglob("*") if p.is_file()],
        "adapter": [folder / "run/adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")],
        "run": [folder / "run" / name for name in ("run.json", "metrics.jsonl")],
    }[kind]
    file = rng.choice(sorted(files))
    return kind, f"{hurt(rng, file)}: {file.relative_to(folder)}"


def outcome(kind: str, whole: dict, folder: Path) -> str:
    """What a damage of a kind came to, see the module's docstring."""
    said = []

    def judge(found, right) -> str:
        return "same" if found == right else "told" if said else "SILENT"

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if kind == "cache":
                return judge(of_rows(folder), whole["rows"])
            if kind == "adapter":
                return judge(of_model(folder / "run/adapter"), whole["adapter"])
            first = judge(of_model(folder / "run"), whole["model"])
            del said[:]
            step, state = of_state(folder, said.append)
            if step != STEPS and not said:
                return "SILENT"
            second = judge(state, whole["states"].get(step))
            return max(first, second, key=("same", "told", "SILENT").index)
    except FtjaxError as error:
        return f"refused: {error}"
    except Exception:
        return f"TRACEBACK {traceback.format_exc()}"


def several(count: int, seed: int, say=print) -> Counter:
    """How often each outcome came of so many damages."""
    found = Counter()
    with tempfile.TemporaryDirectory() as work:
        right, copy = Path(work) / "whole", Path(work) / "copy"
        right.mkdir()
        whole = make(right)
        for i in range(count):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(right, copy)
            kind, what = damage(random.Random(f"{seed} {i}"), copy)
            came = outcome(kind, whole, copy)
            found[came.split(":")[0].split()[0]] += 1
            if came.startswith(("SILENT", "TRACEBACK")):
                say(f"{i} {kind}, {what}: {came}")
    return found


def main(argv=None) -> int:
    """Exit status 1 where a damage ended in other numbers or in another error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    found = several(args.count, args.seed)
    print(", ".join(f"{name} {n}" for name, n in sorted(found.items())))
    return int(bool(found["SILENT"] or found["TRACEBACK"]))


if __name__ == "__main__":
    sys.exit(main())
