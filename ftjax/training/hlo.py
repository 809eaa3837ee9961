"""What a compiled program does, read from its text: bytes through memory and over links, loops counted as they run.

XLA's own `cost_analysis` counts the body of a loop once; here every instruction counts as often as it is executed.
"""

from __future__ import annotations

import collections
import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}  # else the digits of the name: f32, s8, u4, f8e4m3fn

# Collective -> bytes that one of n devices sends for a result of so many bytes, in a ring.
SENT = {
    "all-gather": lambda size, n: size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}

# Instructions that move nothing, or whose inner computation is counted in their place.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"while", "conditional", "call", "iota", "opt-barrier", "optimization-barrier"}


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # of the result, such as `f32[8,16]{1,0}` or a tuple of them
    op: str
    operands: tuple[str, ...]
    rest: str  # attributes behind the operands
    root: bool
    inside: str  # what stands between the parentheses: operands, or a constant's value


class Collective(NamedTuple):
    """All collectives of one kind in a step, of one device."""

    kind: str
    count: int  # executions
    bytes: float  # that the device sends in a step


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """(computations by name, each its instructions by name and in order; the entry's name)."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?\{\s*$", line)
        if head and not line.startswith((" ", "HloModule")):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _instruction(line)):
            current[found.name] = found
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT\s+)?%?([\w.\-]+)\s*=\s*", line)
    if not head:
        return None
    shape, end = _balanced(line, head.end()) if line[head.end()] == "(" else (None, None)
    if shape is None:
        end = line.index(" ", head.end())
        shape = line[head.end() : end]
    op = re.match(r"\s*([\w\-]+)", line[end:])
    inside, close = _balanced(line, end + op.end())
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(head[2], shape, op[1], operands, line[close:], bool(head[1]), inside)


def _balanced(line: str, start: int) -> tuple[str, int]:
    """The text in the parentheses that open at `start`, and where they are closed."""
    depth = 0
    for at in range(start, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if depth == 0:
            return line[start : at + 1], at + 1
    raise ValueError(f"parentheses that never close: {line[:200]}")


def sizes(shape: str) -> list[tuple[float, bool]]:
    """Of each array in `f32[8,16]{1,0}` or a tuple: its bytes, and whether it lies in the device's main memory."""
    out = []
    for kind, sides, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?", shape):
        bits = BITS[kind] if kind in BITS else int(re.match(r"[a-z]+(\d+)", kind)[1])
        count = math.prod(int(n.removeprefix("<=")) for n in sides.split(",") if n)
        out.append((count * bits / 8, "S(" not in layout))  # S(1): a TPU's vector memory, on the chip itself
    return out


def size(shape: str) -> float:
    """Bytes of an array, or of all arrays of a tuple."""
    return sum(n for n, _ in sizes(shape))


def outside(shape: str) -> float:
    """Bytes of those that lie in main memory."""
    return sum(n for n, main in sizes(shape) if main)


def executions(computations: dict, entry: str) -> dict[str, int]:
    """Computation -> how often a run executes it, of those that hold instructions of their own (no fusions)."""
    times = collections.Counter()

    def visit(name, n):
        times[name] += n
        for instruction in computations[name].values():
            if instruction.op == "while":
                trips = trip_count(instruction, computations)
                for part in ("condition", "body"):
                    visit(_called(instruction, part), n * trips)
            elif instruction.op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
                names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest)
                visit(max(names, key=lambda b: len(computations[b])), n)  # one is taken: the longest, to be safe
            elif instruction.op in ("call", "async-start") and (name := _called(instruction, "to_apply|calls")):
                visit(name, n)

    visit(entry, 1)
    return times


def _called(instruction: Instruction, attribute: str) -> str | None:
    found = re.search(rf"(?:{attribute})=%?([\w.\-]+)", instruction.rest)
    return found[1] if found else None


def trip_count(loop: Instruction, computations: dict) -> int:
    """How often a `while` runs: what XLA says, else the constant that its condition compares with."""
    if known := re.search(r'known_trip_count"?:\s*\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    name = _called(loop, "condition")
    found, todo = [], [name]
    while todo:
        for instruction in computations.get(todo.pop(), {}).values():
            if instruction.op == "constant" and re.fullmatch(r"\(\d+\)", instruction.inside):
                found.append(int(instruction.inside[1:-1]))
            elif called := _called(instruction, "calls"):
                todo.append(called)
    if not found:
        raise ValueError(f"the trip count of {loop.name} cannot be read from its condition {name}")
    return max(found)


def collectives(text: str) -> list[Collective]:
    """Collectives of a step by kind, those inside fusions and loops included."""
    computations, entry = parse(text)
    times = collections.Counter(executions(computations, entry))
    # TPU programs put collectives into fusions, so that they run beside arithmetic.
    for name, n in list(times.items()):
        for instruction in computations[name].values():
            if instruction.op == "fusion" and (inner := _called(instruction, "calls")):
                times[inner] += n
    counts, sent = collections.Counter(), collections.Counter()
    for name, n in times.items():
        for instruction in computations[name].values():
            kind = instruction.op.removesuffix("-start")
            if kind in SENT and not instruction.op.endswith("-done"):
                counts[kind] += n
                sent[kind] += n * SENT[kind](_result(instruction), group_size(instruction))
    return [Collective(kind, counts[kind], sent[kind]) for kind in SENT if counts[kind]]


def _result(instruction: Instruction) -> float:
    """Bytes of a collective's result; what starts one has its operands beside its results, and maybe a context."""
    if not instruction.op.endswith("-start") or not instruction.shape.startswith("("):
        return size(instruction.shape)
    parts = [n for n, _ in sizes(instruction.shape)]
    return sum(parts) if instruction.op == "all-reduce-start" else max(parts)


def group_size(instruction: Instruction) -> int:
    """Devices that take part in one collective together."""
    named = re.search(r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?\s*\{([^}]*)\}", instruction.rest)
    if named:
        axes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
        # `'a':(2)4`: a part of the axis, 4 devices of it
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or axes[axis]) for axis, part in parts)
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=", instruction.rest):
        return int(iota[1].split(",")[-1])
    if "source_target_pairs" in instruction.rest:
        return 2
    raise ValueError(f"the devices that take part in {instruction.name} cannot be read: {instruction.rest[:200]}")


def memory_bytes(text: str) -> float:
    """Bytes that a step reads from and writes to device memory: operands and results of every instruction that stands
    by itself; of a slice what it takes, of an update in place what it changes."""
    computations, entry = parse(text)
    total = 0.0
    for name, n in executions(computations, entry).items():
        body = computations[name]
        for instruction in body.values():
            if instruction.op not in FREE and not instruction.op.endswith("-done"):
                total += n * _traffic(instruction, body, computations)
    return total


def _traffic(instruction: Instruction, body: dict, computations: dict) -> float:
    result = outside(instruction.shape)
    if instruction.op.endswith("slice-start"):  # result and source, of which it takes as much
        moved = sizes(instruction.shape)[1][0]
        return moved * sum(main for _, main in sizes(instruction.shape)[:2])
    if instruction.op.endswith("-start"):  # sources and results are both parts of the shape
        return result
    if instruction.op in ("dynamic-slice", "slice", "gather"):
        return 2 * result
    operands = [outside(body[o].shape) if o in body else 0.0 for o in instruction.operands]
    if instruction.op == "dynamic-update-slice":
        return 2 * operands[1]
    if re.search(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"', instruction.rest):
        return 0.0
    inner = computations.get(_called(instruction, "calls")) if instruction.op == "fusion" else None
    if inner is None:
        return result + sum(operands)
    return _written(inner, result) + _read(inner, operands)


def _written(inner: dict, result: float) -> float:
    """What a fusion writes: an update in place writes its part alone."""
    root = next(i for i in inner.values() if i.root)
    outputs = [inner[o] for o in root.operands] if root.op == "tuple" else [root]
    for output in outputs:
        while output.op in ("bitcast", "convert", "copy") and output.operands[0] in inner:
            output = inner[output.operands[0]]
        if output.op == "dynamic-update-slice":
            result -= size(output.shape) - size(inner[output.operands[1]].shape)
    return max(result, 0.0)


def _read(inner: dict, operands: list[float]) -> float:
    """What a fusion reads of its operands: slices of those that it only slices, nothing of what it updates in place."""
    uses = collections.defaultdict(list)
    for instruction in inner.values():
        for place, operand in enumerate(instruction.operands):
            uses[operand].append((instruction, place))
    total = 0.0
    for instruction in inner.values():
        if instruction.op != "parameter":
            continue
        whole = operands[int(instruction.inside[1:-1])]
        total += min(whole, sum(_used(user, place, whole, uses) for user, place in uses[instruction.name]))
    return total


def _used(user: Instruction, place: int, whole: float, uses: dict) -> float:
    if user.op in ("dynamic-slice", "gather", "slice") and place == 0:
        return size(user.shape)
    if user.op == "dynamic-update-slice" and place == 0:
        return 0.0
    if user.op == "bitcast":
        return sum(_used(next_user, next_place, whole, uses) for next_user, next_place in uses[user.name])
    return whole
