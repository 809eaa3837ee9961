"""Damage a run, what it reads and what it wrote at random, kill it at random moments, and fill its disk.

    python scripts/damage.py --count 300 --kills 200 --disks 40 --seed 7

Of each damage the outcome is one of: `same` (the numbers are those of the whole run), `told` (an older checkpoint, or
rows that were computed again, and a line says so), `refused` (an FtjaxError), and the two that are faults: `SILENT`
(other numbers, and no word of it) and `TRACEBACK`.

A kill is one or two signals to a process that prepares rows, trains, evaluates, generates, exports, or does something
else with a run. No process may hang or print a traceback, and the same command must then end in the bytes of an
undisturbed run. The verbs are killed in turn, and each in all of its parts, which lie between two lines of its log: at
a share of the processor time that the undisturbed command spends there, or at the next line. So a slow machine kills
in the same stages as a fast one.

A full disk is one in memory, which has room for what a command finds and for some of the files that it writes. The
command must end with an error that says so and, once there is room, in the bytes of an undisturbed run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

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
PAGE = 4096  # bytes


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
    said.write_bytes(b"")
    if child := os.fork():
        return child
    os.setsid()
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # a line counts when it is printed, see `Part`
    from ftjax import cli

    sys.argv, code = ["ftjax", *arguments], 99
    try:
        code = cli.main()
    except KeyboardInterrupt:  # before the command listens to signals
        code = 128 + signal.SIGINT
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Part(NamedTuple):
    """A part of a command, between two lines of its log.

    Attributes:
        after: Number of lines before it.
        before: Number of lines at its end; the last part has no end.
        seconds: Processor time that the undisturbed command spends in it.
    """

    after: int
    before: float
    seconds: float


def ended(child: int, seconds: float, look=lambda spent: False) -> int | None:
    """The exit code of a child, negative for a signal.

    Args:
        child: Number of the process.
        seconds: How long it is waited for.
        look: Called every few milliseconds with the processor time that the child has spent; true ends the waiting.

    Returns:
        None if the child still runs.
    """
    until = time.monotonic() + seconds
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        ticks = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]
        if look(sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")) or time.monotonic() > until:
            return None
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1])


def lines_of(said: Path) -> int:
    """Number of lines of a log, without those that say how long something has taken so far."""
    return sum(line.endswith(b"\n") and b" so far" not in line for line in said.read_bytes().splitlines(keepends=True))


def parts_of(command: list[str], said: Path) -> list[Part]:
    """Run a command undisturbed, and measure its parts."""
    marks = [(0, 0.0)]  # lines of the log, and the processor time at which there are so many

    def look(spent: float) -> bool:
        nonlocal last
        last, lines = spent, lines_of(said)
        if lines > marks[-1][0]:
            marks.append((lines, spent))
        return False

    last, code = 0.0, ended(start(command, said), 10 * HANG, look)
    if code:
        raise AssertionError(f"{command}: exit code {code}: {said.read_text()[-3000:]}")
    marks.append((math.inf, last))
    return [Part(a, b, max(y - x, 0.01)) for (a, x), (b, y) in itertools.pairwise(marks)]


def within(part: Part, share: float, said: Path):
    """For `ended`: whether a command is so far in a part, or past it."""
    begun: list[float] = []

    def look(spent: float) -> bool:
        lines = lines_of(said)
        if lines >= part.after and not begun:
            begun.append(spent)
        return lines >= part.before or bool(begun) and spent - begun[0] >= share * part.seconds

    return look


def timeless(value):
    """Plain data without what a clock or the name of a folder says."""
    if isinstance(value, dict):
        return {key: timeless(x) for key, x in value.items() if not any(word in key for word in ("second", "path"))}
    return [timeless(x) for x in value] if isinstance(value, list) else value


def written(folder: Path) -> dict:
    """What the commands wrote into a folder, without clocks."""
    names = ("run/adapter/*.safetensors", "run/samples.jsonl", "out/**/*.safetensors", "out/**/*.json*")
    found = {}
    for path in sorted(p for name in names for p in folder.glob(name) if p.is_file()):
        content = path.read_bytes()
        content = timeless(json.loads(content)) if path.suffix == ".json" else content
        found[str(path.relative_to(folder))] = content
    if (metrics := folder / "run/metrics.jsonl").is_file():
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        # A run that is stopped also logs the step that it ended at.
        rows = [row for row in rows if row["step"] % EVERY == 0]
        found["metrics"] = [[row.get(key) for key in ("step", "loss", "grad_norm", "lr", "val_loss")] for row in rows]
    return found


def commands(folder: Path) -> dict[str, list[str]]:
    """{verb: its command}: train (with its preparation, scores before and after, and an export), and what others do
    with the run. Each reads what those before it wrote."""
    fields = FIELDS | {"evaluate.compare": True, "log.compilation_cache": True, "export.formats": ("adapter",)}
    flat = fuzz.RUN | fields | {"run_dir": str(folder / "run"), "data.cache": str(folder / "cache")}
    (folder / "out").mkdir(parents=True)
    text = f"from ftjax import config\n\n\ndef get_config():\n    return config.from_dict({flat!r})\n"
    (folder / "config.py").write_text(text)
    run, out, config = str(folder / "run"), folder / "out", ["--config", str(folder / "config.py")]
    base = fuzz.assets.resolve("builtin:stories260K")
    return {
        "train": ["train", *config],
        "evaluate": ["evaluate", "--model", run, "--out", str(out / "scores.json")],
        "generate": ["generate", "--model", run, "--prompt", "A dog", "--out", str(out / "answers.jsonl")],
        "export": ["export", "--run", run, "--out", str(out / "merged"), "--format", "merged"],
        "inspect": ["data", "inspect", *config, "--out", str(out / "report")],
        "check": ["check", run],
        "upcycle": ["upcycle", str(base), "--experts", "2", "--out", str(out / "experts")],
    }


DEADLY = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WAYS = [(one,) for one in DEADLY] + [(one, two) for one in DEADLY[1:] for two in DEADLY]  # to kill, one or two signals


class Undisturbed(NamedTuple):
    """What commands do when nothing disturbs them.

    Attributes:
        folder: What they read and write.
        said: The log of the last one.
        todo: {verb: its command}.
        begun: Holds a copy of the folder as each verb finds it.
        parts: The parts of each.
        right: What lies in the folder after each, see `written`.
        sizes: Bytes on a disk of each file that a verb writes, in the order in which they are ended.
    """

    folder: Path
    said: Path
    todo: dict[str, list[str]]
    begun: Path
    parts: dict[str, list[Part]]
    right: dict[str, dict]
    sizes: dict[str, list[int]]


def undisturbed(work: Path) -> Undisturbed:
    """Run all commands in a new folder."""
    import grain  # noqa: F401  what the commands import, so that a fork begins at once
    import matplotlib.backends.backend_agg  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import transformers  # noqa: F401

    import ftjax.training.loop  # noqa: F401
    from ftjax import cli  # noqa: F401

    os.environ |= {"XDG_CACHE_HOME": f"{work}/xdg", "FTJAX_MALLOC": "0"}
    folder = work / "folder"
    found = Undisturbed(folder, work / "said", commands(folder), work / "begun", {}, {}, {})
    for verb, command in found.todo.items():
        shutil.copytree(folder, found.begun / verb)
        before = {path: path.stat().st_mtime_ns for path in files_in(folder)}
        found.parts[verb] = parts_of(command, found.said)
        found.right[verb] = written(folder)
        new = [path for path in files_in(folder) if path.stat().st_mtime_ns != before.get(path)]
        found.sizes[verb] = [on_disk(path) for path in sorted(new, key=lambda path: path.stat().st_mtime_ns)]
    return found


def files_in(folder: Path) -> list[Path]:
    """All files in a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def on_disk(path: Path) -> int:
    """Bytes that a file takes on a disk in memory: whole pages."""
    return -(-path.stat().st_size // PAGE) * PAGE


def gone_on(verb: str, whole: Undisturbed, say, what: str) -> str:
    """Run a disturbed command again: `same` if the folder then is as if nothing had happened."""
    fair = fine(verb, whole)
    if (code := ended(start(whole.todo[verb], whole.said), 10 * HANG)) not in fair:
        raise AssertionError(f"{whole.todo[verb]}: exit code {code}: {whole.said.read_text()[-3000:]}")
    theirs, right = written(whole.folder), whole.right[verb]
    other = [name for name in theirs | right if theirs.get(name) != right.get(name)]
    if other:
        say(f"{verb}, {what}: other than the undisturbed run: {', '.join(other)}")
    return "SILENT" if other else "same"


def fine(verb: str, whole: Undisturbed) -> set[int]:
    """Exit codes of a command that goes on: 2 if all was written before, in a folder that must be new."""
    return {0, 2} if written(whole.folder) == whole.right[verb] else {0}


def killed(count: int, seed: int, whole: Undisturbed, say=print) -> Counter:
    """How often each outcome came of so many kills."""
    found, rng = Counter(), random.Random(f"kills {seed}")
    folder, said, todo = whole.folder, whole.said, whole.todo
    parts = {verb: [*each] for verb, each in whole.parts.items()}
    for each in parts.values():
        rng.shuffle(each)

    def kill(verb: str, part: Part, share: float, signals: tuple) -> bool:
        """Start the command and kill it at a share of a part. Returns whether it still ran then."""
        fair = fine(verb, whole)
        child = start(todo[verb], said)
        code = ended(child, 10 * HANG, within(part, share, said))
        early = code is None
        if early:
            found[f"in-{verb}"] += 1
            fair |= {*(-n for n in signals), *(128 + n for n in signals)}
            for number in signals:
                os.killpg(child, number)
                code = ended(child, HANG if number == signals[-1] else rng.uniform(0, 1))
                if code is not None:
                    break
        if code is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        text = said.read_text(errors="replace")
        came = "HANG" if code is None else "killed" if code else "finished"
        if "Traceback" in text or code is not None and code not in fair:
            came = "TRACEBACK"
        found[came] += 1
        if came in ("HANG", "TRACEBACK"):
            say(f"{verb}, {part}, {share:.2f}, {signals}: exit code {code}: {text[-3000:]}")
        return early

    for i in range(count):
        verb, turn = list(todo)[i % len(todo)], i // len(todo)
        part, share = parts[verb][turn % len(parts[verb])], rng.random()
        for _ in range(5):
            shutil.rmtree(folder)
            shutil.copytree(whole.begun / verb, folder)
            if kill(verb, part, share, WAYS[i % len(WAYS)]):
                break
            share /= 2  # it was faster than when it was measured, when it compiled
        if rng.random() < 0.3:  # and what goes on after it
            kill(verb, rng.choice(parts[verb]), rng.random(), rng.choice(WAYS))
        found[gone_on(verb, whole, say, f"kill {i} in {part}")] += 1
    return found


# ----------------------------------------------------------------------------------------------------- the full disks


@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    """Put a disk of so many bytes at a folder; yields a function that gives it room. Needs the rights of root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def filled(count: int, seed: int, whole: Undisturbed, say=print) -> Counter:
    """How often each outcome came of so many full disks: one command each, which has room for some of its files."""
    found, rng = Counter(), random.Random(f"disks {seed}")
    shutil.rmtree(whole.folder)
    whole.folder.mkdir()
    writers = [verb for verb, sizes in whole.sizes.items() if sizes]
    for i in range(count):
        verb = writers[i % len(writers)]
        sizes, begun = whole.sizes[verb], whole.begun / verb
        last = rng.randrange(len(sizes))  # the file that has half of its room
        room = sum(sizes[:last]) + sizes[last] // 2 // PAGE * PAGE
        with small_disk(whole.folder, sum(map(on_disk, files_in(begun))) + room) as more:
            shutil.copytree(begun, whole.folder, dirs_exist_ok=True)
            code = ended(start(whole.todo[verb], whole.said), 10 * HANG)
            text = whole.said.read_text(errors="replace")
            told = "No space left" in text or "the disk has room for" in text
            came = "finished" if code == 0 else "HANG" if code is None else "full" if told else "UNNAMED"
            came = "TRACEBACK" if "Traceback" in text else came
            found[came] += 1
            if came not in ("finished", "full"):
                say(f"{i} {verb}, room for {last} of {len(sizes)} files: exit code {code}: {text[-3000:]}")
            more()
            found[gone_on(verb, whole, say, f"disk {i}")] += 1
    return found


def main(argv=None) -> int:
    """Exit status 1 where a damage, a kill or a full disk ended in other numbers or in another error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="of damages")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--disks", type=int, default=0, help="of disks that become full; needs the rights of root")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    found = Counter()
    if args.kills or args.disks:  # before this process uses a device
        with tempfile.TemporaryDirectory() as work:
            whole = undisturbed(Path(work))
            found += killed(args.kills, args.seed, whole) + filled(args.disks, args.seed, whole)
    found += several(args.count, args.seed) if args.count else Counter()
    print(", ".join(f"{name} {n}" for name, n in sorted(found.items())))
    return int(any(found[name] for name in ("SILENT", "TRACEBACK", "HANG", "UNNAMED")))


if __name__ == "__main__":
    sys.exit(main())
