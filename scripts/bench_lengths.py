"""Speed and memory of a step against the length of its rows, beside torch: `python scripts/bench_lengths.py`.

The model of 40 million parameters of scripts/bench_torch.py, as many rows as make 2,048 tokens a step; each side in
a process of its own, by turns. Memory: the most above what the process held with its libraries imported. `--picture`
draws both.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import bench_common
import bench_torch

TOKENS = 2048  # of a step


def rows(args):
    """A row for each method and length."""
    with tempfile.TemporaryDirectory() as scratch:
        bench_torch.folder_of("40m", Path(scratch))
        for method in args.methods:
            for length in args.lengths:
                row = {"method": method, "dtype": args.dtype, "length": length}
                row |= bench_torch.beside([method, args.dtype, str(length), scratch], args)
                yield row


def draw(table: list[dict], path: Path) -> None:
    """Tokens a second, and gigabytes, against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = zip(figure.subplots(1, 2), ("{}_tokens_s", "{}_above_gb"), ("tokens a second", "GB"), strict=True)
    for axes, what, label in panels:
        for method, colour in zip(sorted({row["method"] for row in table}), ("C0", "C1"), strict=False):
            line = [row for row in table if row["method"] == method]
            for side, style in (("ftjax", "-"), ("torch", "--")):
                values = [row[what.format(side)] for row in line]
                axes.plot(
                    [row["length"] for row in line], values, style, color=colour, marker=".", label=f"{side}, {method}"
                )
        axes.set(xscale="log", xlabel="tokens of a row", ylabel=label, ylim=0)
        lengths = sorted({row["length"] for row in table})
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024], help="at most 1,024")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    bench_torch.arguments(parser)
    args = parser.parse_args()
    bench_common.restart_with_malloc(args.malloc)
    if args.alone:
        side, method, dtype, length, scratch = args.alone
        case, shape = ("40m", method, dtype), (TOKENS // int(length), int(length))
        bench_common.report([bench_torch.alone(side, case, args, Path(scratch), shape)], None)
        return
    table = []
    bench_common.report((table.append(row) or row for row in rows(args)), args.out)
    if args.picture:
        draw(table, args.picture)


if __name__ == "__main__":
    main()
