"""Damage a run, what it reads and what it wrote at random, and kill it at random moments.

    python scripts/damage.py --count 300 --kills 200 --seed 7

Of each damage the outcome is one of: `same` (the numbers are those of the whole run), `told` (an older checkpoint, or
rows that were computed again, and a line says so), `refused` (an FtjaxError), and the two that are faults: `SILENT`
(other numbers, and no word of it) and `TRACEBACK`.

A kill is one or two signals to a process that prepares rows, trains, evaluates, generates or exports. No process may
hang or print a traceback, and the same command must then end in the bytes of an undisturbed run. Its moment lies
between two lines of the undisturbed command's log, each pair equally likely, by the processor time that was spent
there, so that a loaded machine kills in the same stages as a quiet one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
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
FIELDS |= {"evaluate.compare": False, "export.formats": ("adapter", "merged")}
# What a number of a JSON file becomes, besides one that is a little larger.
ODD = (None, True, -1, 0, 10**30, 1e300, float("nan"), "", "x", "../x", "/etc/passwd", [], {}, [[]], {"a": {}})
HANG = 120  # seconds


def settings(folder: Path):
    """The config of the run in a folder."""
    return fuzz.settings(folder, **FIELDS | {"model.path": str(folder / "base")})


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
    read = ocp.PyTreeCheckpointHandler(use_ocdbt=False).restore
    with warnings.catch_warnings():  # of Orbax, that it is not told how arrays are sharded
        warnings.filterwarnings("ignore", "Sharding info not provided")
        tree = {name: read(at / name) for name in ("trained", "optimizer")}
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


def of_stages(folder: Path, say) -> str:
    """What two stages give: the scores of each model, and the last one's numbers. Stages that are whole are kept."""
    results = ftjax.train(fuzz.staged(folder), say=say).results
    return seals.digest(results["scores"], results["forgotten"], of_model(folder / "run/two/merged"))


def make(folder: Path) -> dict:
    """Run it; returns the numbers of the whole one: of its model, its adapter, its rows, each of its states, and of two
    stages."""
    fuzz.make_model(folder / "base")
    ftjax.train(settings(folder), say=fuzz.quiet)
    whole = {"model": of_model(folder / "run"), "rows": of_rows(folder)}
    whole |= {name: of_model(folder / "run" / name) for name in ("adapter", "merged")}
    (folder / "staged").mkdir()
    whole["stages"] = of_stages(folder / "staged", fuzz.quiet)
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
    ways = ("flip", "zeros", "cut", "empty", "gone", "longer", "folder", "link", "loop")
    data, way = bytearray(file.read_bytes()), rng.choice(ways + ("value",) * 6 * (file.suffix == ".json"))
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
    elif way == "value":
        content = json.loads(data)
        *path, last = rng.choice(fuzz.paths(content) or [["x"]])
        node = content
        for key in path:
            node = node[key]
        old = node[last] if path or last in content else None
        near = [old * 1.25, old + 1] if isinstance(old, int | float) else []
        node[last] = rng.choice([*ODD, *near * 5])
        way, data = f"{'.'.join(map(str, [*path, last]))} = {node[last]}", json.dumps(content).encode()
    file.unlink()
    if way in ("link", "loop"):
        file.symlink_to(file.with_name("nowhere") if way == "link" else file)
    elif way == "folder":
        file.mkdir()
    elif way != "gone":
        file.write_bytes(data)
    return way


def misplaced(rng: random.Random, staged: Path, other: Path) -> str:
    """Put the folders of two stages, or what is in them, into a wrong place; returns how."""
    stage, part = staged / rng.choice(("one", "two")), rng.choice(("", "merged", "adapter", "checkpoints"))
    way, at = rng.choice(("gone", "swapped", "of another run", "empty", "earlier version")), stage / part
    if way == "swapped":
        with_, aside = staged / ({"one": "two", "two": "one"}[stage.name]) / part, staged.with_name("aside")
        at.rename(aside), with_.rename(at), aside.rename(with_)
    elif way == "earlier version":
        record = json.loads((stage / "run.json").read_text())
        rng.choice((lambda: record.pop("base"), lambda: record.pop("rows"), lambda: record["config"].pop("task")))()
        (stage / "run.json").write_text(json.dumps(record))
    else:
        shutil.rmtree(at)
        if way == "empty":
            at.mkdir()
        elif way == "of another run":
            shutil.copytree(other / part, at)
    return f"{way}: {at.relative_to(staged)}"


def damage(rng: random.Random, folder: Path) -> tuple[str, str]:
    """Damage something in a folder; returns the kind, and what was done."""
    kind = rng.choice(("checkpoint", "checkpoint", "folders", "cache", "adapter", "run", "base", "merged", "stages"))
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
    if kind == "stages" and rng.random() < 0.6:
        return kind, misplaced(rng, folder / "staged/run", folder / "run")
    files = {
        "stages": [p for p in (folder / "staged/run").rglob("*") if p.is_file()],
        "checkpoint": [p for p in rng.choice(saved).rglob("*") if p.is_file()],
        "cache": [p for p in (folder / "cache").rglob("*") if p.is_file()],
        "adapter": [p for p in (folder / "run/adapter").rglob("*") if p.is_file()],
        "merged": [p for p in (folder / "run/merged").rglob("*") if p.is_file()],
        "base": [p for p in (folder / "base").rglob("*") if p.is_file()],
        "run": [folder / "run" / name for name in ("run.json", "metrics.jsonl")],
    }[kind]
    file = rng.choice(sorted(files))
    if kind == "merged" and rng.random() < 0.2:  # a part of another export
        shutil.copyfile(
            folder / "base" / (name := rng.choice(("model.safetensors", "config.json"))), file.with_name(name)
        )
        return kind, f"of the base: {name}"
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
            if kind == "stages":
                lines = []
                found = of_stages(folder / "staged", lines.append)
                said += [line for line in lines if "damaged" in line or "warning" in line]
                return judge(found, whole["stages"])
            if kind in ("adapter", "merged"):
                return judge(of_model(folder / "run" / kind), whole[kind])
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
        folder, right = Path(work) / "folder", Path(work) / "right"
        folder.mkdir()
        whole = make(folder)
        shutil.copytree(folder, right)
        for i in range(count):
            shutil.rmtree(folder)
            shutil.copytree(right, folder)
            kind, what = damage(random.Random(f"{seed} {i}"), folder)
            came = outcome(kind, whole, folder)
            found[came.split(":")[0].split()[0]] += 1
            if came.startswith(("SILENT", "TRACEBACK")):
                say(f"{i} {kind}, {what}: {came}")
    return found


# --------------------------------------------------------------------------------------------------------- the kills


def start(arguments: list[str], said: Path) -> int:
    """Start the command line in a fork, which need not import anything; returns its number. said: what it prints."""
    if child := os.fork():
        return child
    os.setsid()
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from ftjax import cli

    sys.argv, code = ["ftjax", *arguments], 99
    try:
        code = cli.main()
    except KeyboardInterrupt:  # before the command listens to signals
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, seconds: float, spent: float = math.inf, at_lines=None) -> int | None:
    """The exit code of a child, negative for a signal; None if it still runs after some seconds, or has spent so much
    processor time. at_lines: called with the seconds of processor time that it has spent, each time it is looked at."""
    until = time.monotonic() + seconds
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        ticks = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]
        so_far = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        if at_lines:
            at_lines(so_far)
        if time.monotonic() > until or so_far > spent:
            return None
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1])


def written(folder: Path) -> dict:
    """What the commands wrote into a folder, without clocks."""
    names = [*(folder / "run/adapter").rglob("*"), *(folder / "out").rglob("*"), folder / "run/samples.jsonl"]
    names += [folder / "out.jsonl"]
    found = {str(p.relative_to(folder)): p.read_bytes() for p in names if p.suffix in (".safetensors", ".jsonl")}
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    # A run that is stopped also logs the step that it ended at.
    told = [row for row in rows if row["step"] % EVERY == 0]
    found["metrics"] = [[row.get(key) for key in ("step", "loss", "grad_norm", "lr", "val_loss")] for row in told]
    scores = json.loads((folder / "scores.json").read_text())
    return found | {"scores": {key: x for key, x in scores.items() if "second" not in key and "path" not in key}}


def commands(folder: Path) -> list[list[str]]:
    """Train (with its preparation, scores before and after, and an export), evaluate, generate and export."""
    fields = FIELDS | {"evaluate.compare": True, "log.compilation_cache": True, "export.formats": ("adapter",)}
    flat = fuzz.RUN | fields | {"run_dir": str(folder / "run"), "data.cache": str(folder / "cache")}
    folder.mkdir()
    text = f"from ftjax import config\n\n\ndef get_config():\n    return config.from_dict({flat!r})\n"
    (folder / "config.py").write_text(text)
    run = str(folder / "run")
    return [
        ["train", "--config", str(folder / "config.py")],
        ["evaluate", "--model", run, "--out", str(folder / "scores.json")],
        ["generate", "--model", run, "--prompt", "A dog", "--max-new-tokens", "8", "--out", str(folder / "out.jsonl")],
        ["export", "--run", run, "--out", str(folder / "out"), "--format", "merged"],
    ]


def killed(count: int, seed: int, say=print) -> Counter:
    """How often each outcome came of so many kills."""
    import grain  # noqa: F401  what the commands import, so that a fork begins at once
    import matplotlib.backends.backend_agg  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import transformers  # noqa: F401

    import ftjax.training.loop  # noqa: F401
    from ftjax import cli  # noqa: F401

    found, rng = Counter(), random.Random(f"kills {seed}")
    with tempfile.TemporaryDirectory() as work:
        os.environ |= {"XDG_CACHE_HOME": f"{work}/xdg", "FTJAX_MALLOC": "0"}
        said, moments, names = Path(work) / "said", {}, iter(range(count + 2))

        def finish(todo: list[list[str]]) -> None:
            for command in todo:
                marks = [0.0, 0.0]  # processor time at each line of the log, and at the end

                def note(so_far, marks=marks):
                    marks[-1] = so_far
                    if said.exists() and said.read_bytes().count(b"\n") > len(marks) - 2:
                        marks.append(so_far)

                said.unlink(missing_ok=True)
                code = ended(start(command, said), 10 * HANG, at_lines=note)
                moments.setdefault(command[0], marks)
                if code:
                    raise AssertionError(f"{command}: exit code {code}: {said.read_text()[-3000:]}")

        def compare(folder: Path) -> None:
            theirs = written(folder)
            other = [name for name in right if theirs.get(name) != right[name]]
            found["SILENT" if other else "same"] += 1
            if other:
                say(f"{folder.name}: other than the undisturbed run: {', '.join(other)}")

        for _ in range(2):  # the first one compiles
            folder = Path(work) / str(next(names))
            moments.clear()
            finish(commands(folder))
        right, todo, told, left = written(folder), [], 0, 0
        for i in range(count):
            if not left and todo:
                finish([todo.pop(0)])
                if not todo:
                    compare(folder)
            if not todo:
                todo = commands(folder := Path(work) / str(next(names)))
            left = left or rng.randint(1, 3)  # kills of this command in this folder
            left -= 1
            verb, marks = todo[0][0], moments[todo[0][0]]
            part = rng.randrange(len(marks) - 1)
            until = rng.uniform(*marks[part : part + 2])
            signals = [
                rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)) for _ in range(rng.choice((1, 1, 2)))
            ]
            child = start(todo[0], said)
            code = ended(child, 10 * HANG, until)
            found[f"in-{verb}"] += code is None
            for number in signals if code is None else ():
                os.killpg(child, number)
                code = ended(child, HANG if number == signals[-1] else rng.uniform(0, 1))
                if code is not None:
                    break
            text = said.read_text(errors="replace")
            if code is None:
                found["HANG"] += 1
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
            elif "Traceback" in text or code not in {0, *(-n for n in signals), *(128 + n for n in signals)}:
                found["TRACEBACK"] += 1
            else:
                found["finished" if code == 0 else "killed"] += 1
            if code is None or found["TRACEBACK"] > told:
                told = found["TRACEBACK"]
                say(f"kill {i}: {verb} after {until:.2f} s, {signals}: exit code {code}: {text[-3000:]}")
            if code == 0:
                left = 0
                todo.pop(0)
                if not todo:
                    compare(folder)
        if todo:
            finish(todo)
            compare(folder)
    return found


def main(argv=None) -> int:
    """Exit status 1 where a damage or a kill ended in other numbers or in another error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="of damages")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    found = killed(args.kills, args.seed) if args.kills else Counter()  # before this process uses a device
    found += several(args.count, args.seed) if args.count else Counter()
    print(", ".join(f"{name} {n}" for name, n in sorted(found.items())))
    return int(any(found[name] for name in ("SILENT", "TRACEBACK", "HANG")))


if __name__ == "__main__":
    sys.exit(main())
