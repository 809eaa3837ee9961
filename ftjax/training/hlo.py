"""What a compiled program does, read from its text: bytes through memory and over links, every loop counted as often as
it runs.

XLA's own `cost_analysis` counts the body of a loop once.
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
FREE |= {"while", "conditional", "call", "async-start", "async-update", "iota", "opt-barrier", "optimization-barrier"}


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
    """All collectives of one kind in a step, on one device."""

    kind: str
    count: int  # executions
    bytes: float  # that the device sends in a step


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({name of a computation: its instructions by name, in order}, name of the entry)."""
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
    """The text in the parentheses that open at `start`, and the position where they close."""
    depth = 0
    for at in range(start, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if depth == 0:
            return line[start : at + 1], at + 1
    raise ValueError(f"parentheses that never close: {line[:200]}")


class Array(NamedTuple):
    """One array of a shape."""

    count: int  # elements
    bytes: float
    main: bool  # whether it lies in the device's main memory


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape such as `f32[8,16]{1,0}`, or of a tuple of shapes."""
    out = []
    for kind, sides, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?", shape):
        bits = BITS[kind] if kind in BITS else int(re.match(r"[a-z]+(\d+)", kind)[1])
        count = math.prod(int(n.removeprefix("<=")) for n in sides.split(",") if n)
        main = "S(" not in layout  # S(1) is a TPU's vector memory, on the chip itself
        out.append(Array(count, count * bits / 8, main))
    return out


def elements(shape: str) -> int:
    """Elements of an array, or of all arrays of a tuple."""
    return sum(array.count for array in arrays(shape))


def size(shape: str) -> float:
    """Bytes of an array, or of all arrays of a tuple."""
    return sum(array.bytes for array in arrays(shape))


def outside(shape: str) -> float:
    """Bytes of the arrays that are in main memory."""
    return sum(array.bytes for array in arrays(shape) if array.main)


def executions(computations: dict, entry: str, fusions: bool = False) -> dict[str, int]:
    """{computation: how often a run executes it}. fusions: count the computations inside fusions too."""
    times = collections.Counter()

    def visit(name, n):
        times[name] += n
        for instruction in computations[name].values():
            if instruction.op == "while":
                trips = trip_count(instruction, computations)
                for part in ("condition", "body"):
                    visit(called(instruction, part), n * trips)
            elif instruction.op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
                names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest)
                visit(max(names, key=lambda b: len(computations[b])), n)  # one is taken: the longest, to be safe
            elif instruction.op in ("call", "async-start") or (fusions and instruction.op == "fusion"):
                visit(called(instruction, "to_apply|calls"), n)

    visit(entry, 1)
    return times


def called(instruction: Instruction, attribute: str) -> str | None:
    """The computation that an instruction names in an attribute, or in one of several: a regular expression."""
    found = re.search(rf"(?:{attribute})=%?([\w.\-]+)", instruction.rest)
    return found[1] if found else None


def trip_count(loop: Instruction, computations: dict) -> int:
    """Number of iterations of a `while`: as XLA states it, else the constant that its condition compares with."""
    if known := re.search(r'known_trip_count"?:\s*\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    name = called(loop, "condition")
    found, todo = [], [name]
    while todo:
        for instruction in computations.get(todo.pop(), {}).values():
            if instruction.op == "constant" and re.fullmatch(r"\(\d+\)", instruction.inside):
                found.append(int(instruction.inside[1:-1]))
            elif inner := called(instruction, "calls"):
                todo.append(inner)
    if not found:
        raise ValueError(f"the trip count of {loop.name} cannot be read from its condition {name}")
    return max(found)


def collectives(text: str) -> list[Collective]:
    """Collectives of a step by kind, those inside fusions and loops included."""
    computations, entry = parse(text)
    counts, sent = collections.Counter(), collections.Counter()
    # TPU programs put collectives into fusions, so that they run beside arithmetic.
    for name, n in executions(computations, entry, fusions=True).items():
        for instruction in computations[name].values():
            kind = instruction.op.removesuffix("-start")
            if kind in SENT and not instruction.op.endswith("-done"):
                counts[kind] += n
                sent[kind] += n * SENT[kind](_result(instruction), group_size(instruction))
    return [Collective(kind, counts[kind], sent[kind]) for kind in SENT if counts[kind]]


def _result(instruction: Instruction) -> float:
    """Bytes of a collective's result. An instruction that starts one also returns its operands, and maybe a context."""
    if not instruction.op.endswith("-start") or not instruction.shape.startswith("("):
        return size(instruction.shape)
    parts = [array.bytes for array in arrays(instruction.shape)]
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
    """Bytes that a step reads from and writes to the device's main memory.

    The operands and results of every instruction outside fusions are counted, and a fusion counts as one instruction.
    Of an operand only the needed part counts, such as one layer's slice of a stack; of an update in place, the part
    that changes.
    """
    computations, entry = parse(text)
    total = 0.0
    for name, n in executions(computations, entry).items():
        body = computations[name]
        for instruction in body.values():
            if instruction.op not in FREE and not instruction.op.endswith("-done"):
                total += n * _traffic(instruction, body, computations)
    return total


def _traffic(instruction: Instruction, body: dict, computations: dict) -> float:
    """Bytes of main memory that one execution of an instruction of `body` reads and writes."""
    if instruction.op.endswith("slice-start"):  # ((operands), result, ...): as much of the operand as the result has
        operands, end = _balanced(instruction.shape, 1)
        moved = arrays(instruction.shape[end:])[0]
        return moved.bytes * (arrays(operands)[0].main + moved.main)
    if instruction.op.endswith("-start"):  # sources and results are both parts of the shape
        return outside(instruction.shape)
    if re.search(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"', instruction.rest):
        return 0.0
    graph = {name: body[name]._replace(op="parameter", operands=()) for name in instruction.operands}
    root = _inline(instruction, computations, graph)
    needed, total = collections.Counter(), 0.0  # needed: name -> share of its elements, summed over its users
    outputs, results = [root], [outside(instruction.shape)]
    if graph[root].op == "tuple":
        outputs, results = graph[root].operands, [array.bytes * array.main for array in arrays(instruction.shape)]
    for output, result in zip(outputs, results, strict=True):
        updates = _updates_in_place(output, graph)
        for update in updates:
            needed.update(update.operands[1:])
        if not updates:
            needed[output] += 1
        changed = sum(_part(graph[update.operands[1]], update) for update in updates) if updates else 1
        total += min(1, changed) * result
    for name in reversed(graph):  # users come before what they use
        node, share = graph[name], min(1, needed[name])
        if node.op == "parameter":
            total += share * outside(node.shape)
        elif share:
            for place, operand in enumerate(node.operands):
                needed[operand] += _needed(node, place, graph[operand], share)
    return total


def _inline(instruction: Instruction, computations: dict, graph: dict) -> str:
    """Add an instruction to `graph`, which holds its operands, and return the name of its result there.

    A fusion is replaced by the instructions inside it, at any depth.
    """
    if instruction.op != "fusion":
        graph[instruction.name] = instruction
        return instruction.name
    names, root = {}, ""
    for inner in computations[called(instruction, "calls")].values():
        operands = tuple(names[operand] for operand in inner.operands)
        if inner.op == "parameter":
            name = instruction.operands[int(inner.inside[1:-1])]
        elif inner.op == "get-tuple-element" and graph[operands[0]].op == "tuple":
            name = graph[operands[0]].operands[int(re.search(r"index=(\d+)", inner.rest)[1])]
        else:
            inner_name = f"{instruction.name}/{inner.name}"
            name = _inline(inner._replace(name=inner_name, operands=operands), computations, graph)
        names[inner.name] = name
        root = name if inner.root else root
    return root


def _updates_in_place(output: str, graph: dict) -> list[Instruction]:
    """The dynamic-update-slices through which an output is an operand with some parts changed; none for any other
    output."""
    node, updates = graph[output], []
    while node.op in ("bitcast", "convert", "copy", "dynamic-update-slice"):
        updates += [node] if node.op == "dynamic-update-slice" else []
        node = graph[node.operands[0]]
    same = node.op == "parameter" and size(node.shape) == size(graph[output].shape)
    return updates if same else []


def _needed(node: Instruction, place: int, operand: Instruction, share: float) -> float:
    """Share of an operand's elements that is read for this share of the elements of `node`."""
    if node.op in ("dynamic-slice", "slice", "gather") and place == 0:
        return share * _part(node, operand)
    elementwise = elements(node.shape) == elements(operand.shape) and node.op not in ("dot", "convolution", "sort")
    return share if elementwise else 1.0


def _part(small: Instruction, large: Instruction) -> float:
    """Ratio of the numbers of elements of two arrays, at most 1."""
    return min(1.0, elements(small.shape) / max(1, elements(large.shape)))
