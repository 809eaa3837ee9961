#!/usr/bin/env python3
"""Weak scaling on paper: what each device sends a step, from 8 to 256 devices, read from compiled programs.

    python scripts/plan_scaling.py --out docs

Every device keeps its rows, whatever their number. Programs are compiled by the TPU compiler (extra `plan-tpu`), for
slices of v6e. Writes scaling.json and scaling.png to --out and prints the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ftjax import config as configs
from ftjax.plan.devices import DEVICES
from ftjax.plan.run import plan

# devices -> the slice that has so many
SLICES = {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CHIP = DEVICES["v6e"]
METHODS = {"LoRA": {}, "full": {"tuning.method": "full", "model.trained_dtype": "bfloat16"}}
# name -> mesh of n devices, 8 of them a host
MESHES = {
    "fsdp over all": lambda n: {"mesh.data": 1, "mesh.fsdp": n},
    "fsdp within a host, data between": lambda n: {"mesh.data": n // 8, "mesh.fsdp": 8},
}
SHORT = {"all-gather": "gather", "reduce-scatter": "scatter", "all-reduce": "reduce", "all-to-all": "exchange"}


def measure(model: str, method: str, mesh: str, n: int, rows: int, length: int) -> dict:
    """Bytes that one device sends a step by kind of collective, and seconds at the chip's stated speeds."""
    config = configs.default()
    overrides = METHODS[method] | MESHES[mesh](n) | {"model.path": model, "model.remat": "full"}
    overrides |= {"train.batch_size": rows * n, "train.steps": 1, "data.max_length": length}
    configs.override(config, [f"{key}={value}" for key, value in overrides.items()])
    found = plan(config, f"v6e:{SLICES[n]}", choices=False)["asked"]
    sent = {c["kind"]: c["bytes"] for c in found["collectives"]}
    links, compute = sum(sent.values()) / CHIP.link, found["flops"] / n / CHIP.flops
    return {
        "method": method, "mesh": mesh, "devices": n, "rows": rows, "length": length, "sent": sent,
        "links": links, "compute": compute, "tokens_where_equal": rows * length * links / compute,
        "compile_seconds": found["compile_seconds"],
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Markdown: a line a program."""
    kinds = [kind for kind in SHORT if any(row["sent"].get(kind) for row in rows)]
    names = ["", "devices", *(f"{SHORT[kind]} GB" for kind in kinds), "links ms", "arithmetic ms", "equal at tokens"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [f"{row['method']}, {row['mesh']}", str(row["devices"])]
        cells += [f"{row['sent'].get(kind, 0) / 1e9:.2f}" for kind in kinds]
        cells += [f"{1e3 * row['links']:.0f}", f"{1e3 * row['compute']:.0f}", f"{row['tokens_where_equal']:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Tokens a device at which links take as long as arithmetic, against the number of devices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for method, style in zip(METHODS, ("-", "--"), strict=True):
        for mesh, colour in zip(MESHES, ("C0", "C1"), strict=True):
            line = [row for row in rows if (row["method"], row["mesh"]) == (method, mesh)]
            axes.plot(
                [row["devices"] for row in line], [row["tokens_where_equal"] for row in line], style, color=colour,
                marker=".", label=f"{method}, {mesh}",
            )  # fmt: skip
    axes.set(xscale="log", xlabel="devices", ylabel="tokens a device where links\ntake as long as arithmetic", ylim=0)
    axes.set_xticks(list(SLICES), [str(n) for n in SLICES], minor=False)
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="configs/llama-3.1-8b", help="a directory with config.json")
    parser.add_argument("--devices", type=int, nargs="+", default=list(SLICES), choices=list(SLICES))
    parser.add_argument("--rows", type=int, default=1, help="of a device")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    rows = []
    for method in METHODS:
        for mesh in MESHES:
            for n in args.devices:
                if rows and MESHES[mesh](n) in (MESHES[row["mesh"]](n) for row in rows if row["method"] == method):
                    continue  # one host: the same mesh by another name
                rows.append(measure(args.model, method, mesh, n, args.rows, args.length))
                print(f"{method}, {mesh}, {n}: {rows[-1]['compile_seconds']:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    (args.out / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, args.out / "scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
