"""A profile of some steps: an XProf trace in the run folder, and a summary of where the time of these steps went.

What a device executed is read from the trace. What each operation is, is read from the text of the compiled program,
because a trace has only the names of its instructions.
"""

from __future__ import annotations

import collections
import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from ftjax.errors import FtjaxError
from ftjax.files import replace_json, replace_text
from ftjax.training import hlo

FOLDER, JSON, TABLE = "profile", "profile.json", "profile.txt"  # in the run folder

WINDOW = "ftjax.profile"  # the annotation that spans all traced steps, to the end of the last one's work
LONGEST = 12  # number of longest operations that are listed

# Kind of operation -> what it is called in the table. What overlaps with a collective is not waited for: a collective
# counts for the time in which nothing else runs.
KINDS = {
    "matmul": "matrix products",
    "elementwise": "elementwise and reductions",
    "copy": "copies, transposes, slices",
    "collective": "collectives",
    "other": "other",
    "idle": "idle, or the host's",
}
MOVES = {"parameter", "constant", "bitcast", "copy", "copy-start", "copy-done", "transpose", "reshape", "slice"}
MOVES |= {"dynamic-slice", "dynamic-update-slice", "concatenate", "broadcast", "pad", "reverse", "gather", "iota"}
MOVES |= {"tuple", "get-tuple-element", "slice-start", "slice-done"}
PRODUCTS = {"dot", "convolution", "ragged-dot", "scaled-dot"}
OTHERS = {"custom-call", "sort", "topk", "rng", "rng-bit-generator", "fft", "infeed", "outfeed"}
CONTAINERS = {"while", "conditional", "call"}  # their bodies' operations are in the trace too
COLLECTIVES = (*hlo.SENT, "ragged-all-to-all", "collective-broadcast")

# Part of the model -> regular expression of the names of JAX's scopes that an instruction keeps; the first match wins.
SCOPES = {
    "attention": r"/(attn|global)(_read)?/(?!\w*(proj|c_attn|norm)\b)",
    "attention's projections": r"/(attn|global)(_read)?/",
    "feed-forward": r"/(mlp|wide|inputs)/",
    "head": r"\.logits\)|/lm_head/|/head/|embed\.attend",
    "embeddings": r"/embed/|/pos_embed/|/type_embed/|/inputs_embed/|/inputs_proj/",
}
REST = "norms, loss, optimizer, the rest"
# XLA gathers a GPU's kernels in CUDA graphs, and the trace then names a graph instead of the operation of a kernel.
GRAPH, GRAPHS = "command_buffer", "kernels of CUDA graphs"
NO_GRAPHS = "XLA_FLAGS=--xla_gpu_enable_command_buffer="

# Names of what has no instruction of the step's program: a GPU's kernels, the categories of a TPU's, operations of
# other programs.
NAMED = (
    (r"(?i)nccl|rccl|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective.?permute", "collective"),
    (r"(?i)gemm|nvjet|cutlass|cublas|xmma|matmul|fmha|flash|convolution|(^|_)dot|output fusion", "matmul"),
    (r"(?i)memcpy|memset|copy|transpose|slice|data formatting|concatenate|bitcast", "copy"),
    (r"(?i)fusion|reduce|wrapped|elementwise|add|multiply|broadcast", "elementwise"),
)


class Line(NamedTuple):
    """The place in a trace where a kind of device has its operations."""

    plane: str  # how the plane's name begins
    line: str  # how the name of a line on it begins
    stat: bool  # whether an operation has the stat `hlo_op`: on a CPU all threads' other doings lie on the same lines


# https://openxla.org/xprof/trace_viewer; tsl/profiler/utils/xplane_schema.cc of XLA. A TPU has its asynchronous copies
# on a line of their own: waiting for them is an operation of this one.
DEVICES = (Line("/device:TPU:", "XLA Ops", False), Line("/device:GPU:", "Stream #", False), Line("/host:CPU", "", True))


class Operation(NamedTuple):
    """One execution of one operation, in nanoseconds."""

    name: str
    program: str
    start: float
    end: float
    hint: str  # what else the trace says of it


class Known(NamedTuple):
    """What an operation is."""

    kind: str
    part: str
    scope: str  # JAX's name of it, such as `jit(train_step)/.../attn/q_proj/dot_general`


class Profiler:
    """A step that traces itself. It is called instead of the step that it wraps.

    Args:
        step: The compiled step.
        asked: `FIRST:LAST` as in log.profile, both ends included.
        run_dir: The run folder.
        done: Number of steps that were taken before this start.
        steps: Steps of the whole run.
        say: Called with lines for a person.
    """

    def __init__(self, step: Callable, asked: str, run_dir: Path, done: int, steps: int, say: Callable):
        self.step, self.run_dir, self.done, self.say = step, run_dir, done, say
        self.first, self.last = map(int, asked.split(":")) if asked else (0, -1)
        self.open = contextlib.ExitStack()
        self.shapes, self.traced, self.compiled = {}, [], []
        if asked and self.first <= done:
            say(f"log.profile: the run goes on after step {done:,}, so that no step before is in the profile")
        elif asked and self.last > steps:
            say(f"log.profile: step {self.last:,} lies beyond the run's end; it has {steps:,} steps")
        self.first = max(self.first, done + 1)

    def __call__(self, state, frozen, batch):
        """Run the step and return its result."""
        self.done += 1
        if not self.first <= self.done <= self.last:
            self._remember(batch)
            return self.step(state, frozen, batch)
        if self.done == self.first:
            jax.block_until_ready(state)  # what earlier steps left to do is not of these
            self._start()
        if self._remember(batch):
            self.compiled.append(self.done)
        self.traced.append(self.done)
        self.shapes[_key(batch)] = jax.tree.map(_shape, (state, frozen, batch))
        with jax.profiler.StepTraceAnnotation("train", step_num=self.done):
            out = self.step(state, frozen, batch)
        if self.done == self.last:
            jax.block_until_ready(out)
            self.open.close()
        return out

    def _remember(self, batch) -> bool:
        """Whether a batch is the first one of its shapes, for which the step is compiled."""
        new = _key(batch) not in self.shapes
        self.shapes.setdefault(_key(batch), None)
        return new

    def _start(self) -> None:
        folder = self.run_dir / FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of a Python function would take longer than the steps
        jax.profiler.start_trace(folder, profiler_options=options)
        self.open.callback(jax.profiler.stop_trace)
        self.open.enter_context(jax.profiler.TraceAnnotation(WINDOW))

    def close(self) -> None:
        """End a trace that is running. Calling it twice is harmless."""
        self.open.close()

    def finish(self, state) -> dict[str, str]:
        """Write the summary of the trace and report it. Returns {name: path} of the written files, empty without a
        trace.

        state: the last state, for which a run that ended within the traced steps waits.
        """
        if not self.traced:
            return {}
        jax.block_until_ready(state)
        self.close()
        files = sorted((self.run_dir / FOLDER).rglob("*.xplane.pb"))
        texts = [self.step.lower(*s).compile().as_text() for s in self.shapes.values() if s]
        found = summary(files[-1], texts, self.traced, jax.default_backend()) | {"compiled_in": self.compiled}
        if self.last > self.done:
            found["missing"] = f"steps {self.done + 1} to {self.last}: the run ended before"
        replace_json(self.run_dir / JSON, found)
        replace_text(self.run_dir / TABLE, table(found) + "\n")
        self.say(table(found))
        names = {"trace": FOLDER, "profile": TABLE}
        return {name: str(self.run_dir / file) for name, file in names.items()}


def _key(batch) -> tuple:
    return tuple((name, x.shape) for name, x in batch.items())


def _shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=getattr(x, "weak_type", False))


def summary(trace: Path, texts: list[str], steps: list[int], backend: str) -> dict:
    """Where the time of traced steps went, in milliseconds per step of one device (the mean over devices).

    `kinds` adds up to `step_ms`, and `parts` to the time in it that was not idle.

    Args:
        trace: An .xplane.pb file.
        texts: Texts of the compiled programs that the steps ran.
        steps: Number of traced steps.
        backend: cpu, gpu or tpu.
    """
    planes, window = operations(jax.profiler.ProfileData.from_file(str(trace)))
    programs = [describe(text) for text in texts]
    spent, times, ops = collections.Counter(), collections.Counter(), {}
    for plane in planes:
        by_program = collections.defaultdict(set)
        for operation in plane:
            by_program[operation.program].add(operation.name)
        # Programs of one name differ by the shapes of their batches: the text is the one that knows the most names.
        best = {p: max(programs, key=lambda k: len(names & k.keys())) for p, names in by_program.items()}
        known = [(o, best[o.program].get(o.name) or by_name(o)) for o in plane]
        known = [(o, k) for o, k in known if k.kind != "container"]
        ops |= {o.name: k for o, k in known}
        times.update(o.name for o, _ in known)
        spent.update(shares([(o.start, o.end, o.name) for o, _ in known], window, ops))
    each = len(planes) * len(steps) * 1e6  # nanoseconds of all planes and steps -> milliseconds of one
    kinds, parts = dict.fromkeys(KINDS, 0.0), dict.fromkeys((*SCOPES, REST, GRAPHS), 0.0)
    for name, nanoseconds in spent.items():
        kind = ops[name].kind if name else "idle"
        kinds[kind] += nanoseconds / each
        if name:
            parts[ops[name].part] += nanoseconds / each
    total = (window[1] - window[0]) / len(steps) / 1e6
    longest = [name for name, _ in spent.most_common(LONGEST + 1) if name][:LONGEST]
    return {
        "steps": steps,
        "backend": backend,
        "devices": len(planes),
        "step_ms": total,
        "matmul_share": kinds["matmul"] / total,
        "attention_share": parts["attention"] / total,
        "idle_share": kinds["idle"] / total,
        "kinds": kinds,
        "parts": parts,
        "longest": [
            {"name": name, "ms": spent[name] / each, "times": times[name] / len(planes) / len(steps)}
            | ops[name]._asdict()
            for name in longest
        ],
    }


def operations(data) -> tuple[list[list[Operation]], tuple[float, float]]:
    """(operations of each device, (start, end) of the traced steps in nanoseconds) of a jax.profiler.ProfileData."""
    planes = {plane.name: plane for plane in data.planes}
    host = [event for line in planes["/host:CPU"].lines for event in line.events if event.name == WINDOW]
    window = host[0].start_ns, host[0].start_ns + host[0].duration_ns
    for kind in DEVICES:
        found = [_of_plane(plane, kind) for name, plane in planes.items() if name.startswith(kind.plane)]
        if found := [plane for plane in found if plane]:
            return found, window
    raise FtjaxError(f"the trace holds no operation of a device; its planes are {', '.join(planes)}")


def _of_plane(plane, kind: Line) -> list[Operation]:
    found, ends = [], {}
    for line in plane.lines:
        if not line.name.startswith(kind.line):
            continue
        for event in line.events:
            ended = event.name.startswith("end: ")
            if event.duration_ns <= 0 and not ended:
                continue
            stats = dict(event.stats)
            if ended:  # what a CPU's operation left to other threads ends when this says so
                ends[event.name[5:], stats.get("_c")] = event.start_ns
            elif "hlo_op" in stats or not kind.stat:
                op = str(stats.get("hlo_op") or event.name)
                hint = f"{stats.get('hlo_category', '')} {event.name}"
                if op.startswith(GRAPH):
                    op, hint = event.name.removeprefix("void "), f"{hint} {GRAPH}"
                name = re.match(r"%?([\w.\-:]*)", op.split("/")[-1])[1]
                flow = stats.get("_p")
                program = f"{stats.get('hlo_module', '')}:{stats.get('program_id', '')}"
                found.append((Operation(name, program, event.start_ns, event.start_ns + event.duration_ns, hint), flow))
    return [o._replace(end=max(o.end, ends.get((o.name, flow), 0))) for o, flow in found]


def shares(operations: list[tuple[float, float, str]], window: tuple[float, float], known: dict) -> dict[str, float]:
    """{name: time within the window}. The times add up to the window.

    A moment is divided equally among all operations that run in it. Collectives get time only if nothing else runs, and
    the name "" gets the time in which nothing runs.

    Args:
        operations: (start, end, name) of each.
        window: (start, end).
        known: {name: Known}.
    """
    start, end = window
    edges = []
    for a, b, name in operations:
        if (a := max(a, start)) < (b := min(b, end)):
            edges += [(a, 1, name), (b, -1, name)]
    edges.sort()
    spent, active, now = collections.Counter({"": 0.0}), collections.Counter(), start
    for at, change, name in [*edges, (end, 0, "")]:
        if at > now:
            running = {n: c for n, c in active.items() if known[n].kind != "collective"} or dict(active) or {"": 1}
            for n, c in running.items():
                spent[n] += (at - now) * c / sum(running.values())
            now = at
        active[name] += change
        if not active[name]:
            del active[name]
    return spent


def describe(text: str) -> dict[str, Known]:
    """{name: Known} of all instructions in a compiled program's text."""
    computations, _ = hlo.parse(text)
    return {
        name: Known(_kind(instruction, computations), *_where(instruction, computations))
        for body in computations.values()
        for name, instruction in body.items()
    }


def _inner(instruction, computations) -> list:
    """The instructions that a fusion, or an instruction that starts another, computes; for others the instruction
    itself."""
    name = hlo.called(instruction, "calls")
    return list(computations[name].values()) if name else [instruction]


def _kind(instruction, computations) -> str:
    if instruction.op in CONTAINERS:
        return "container"
    inner = _inner(instruction, computations)
    # Scalars are places that slices are taken at, no work.
    ops = {i.op for i in inner if i.root or not re.match(r"\w+\[\]", i.shape)}
    if {op.removesuffix("-start").removesuffix("-done") for op in ops} & set(COLLECTIVES):
        return "collective"
    targets = " ".join(re.findall(r'custom_call_target="([^"]*)"', " ".join(i.rest for i in inner)))
    if ops & PRODUCTS or re.search(NAMED[1][0], targets):
        return "matmul"
    if ops <= MOVES:
        return "copy"
    return "other" if ops & OTHERS else "elementwise"


def _where(instruction, computations) -> tuple[str, str]:
    """(part of the model, JAX's scope)."""
    inner = [i for i in _inner(instruction, computations) if i.root]
    for source in (instruction, *inner):
        if named := re.search(r'op_name="([^"]*)"', source.rest):
            return next((part for part, scope in SCOPES.items() if re.search(scope, named[1])), REST), named[1]
    return REST, ""


def by_name(operation: Operation) -> Known:
    """What an operation may be if the step's program does not have its name."""
    if re.match(r"(while|conditional|call)\b", operation.name):
        return Known("container", REST, "")
    kind = next((kind for pattern, kind in NAMED if re.search(pattern, f"{operation.name} {operation.hint}")), "other")
    return Known(kind, GRAPHS if GRAPH in operation.hint else REST, operation.program)


def table(found: dict) -> str:
    """A summary as text for a person."""
    steps, total = found["steps"], found["step_ms"]
    of = f"{found['devices']} devices, their mean" if found["devices"] > 1 else f"one {found['backend']} device"
    which = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    lines = [f"profile of {which}, {of}: {total:.2f} ms a step"]
    row = lambda name, ms: f"  {name:<34}{ms:>10.2f} ms{ms / total:>8.1%}"  # noqa: E731
    lines += [row(KINDS[kind], ms) for kind, ms in found["kinds"].items() if ms or kind == "idle"]
    lines += ["of it"] + [row(part, ms) for part, ms in found["parts"].items() if ms]
    lines += ["longest operations"]
    for op in found["longest"]:
        scope = re.sub(r"^.*?(layers/|Transformer\.)", "", op["scope"])
        lines.append(f"{row(op['name'][:34], op['ms'])}  {op['times']:>6.0f} times  {op['kind']:<12} {scope[-48:]}")
    if found["compiled_in"]:
        some = ", ".join(map(str, found["compiled_in"]))
        lines.append(f"compiled within the profile, for batches of new shapes: step {some}; later steps tell more")
    if found["parts"][GRAPHS]:
        lines.append(f"the trace does not tell the parts of the model in CUDA graphs; with {NO_GRAPHS} it does")
    if "missing" in found:
        lines.append(found["missing"])
    return "\n".join(lines)
