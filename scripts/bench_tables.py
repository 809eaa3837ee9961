"""The tables of a page from what benchmarks wrote: `python scripts/bench_tables.py runs/bench docs/performance.md`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, NAME a row of TABLES; it is made of the files NAME.json and
those that it names beside, with the commands, the machine and the versions above. One without its file stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

BESIDE = {"generate": ("generate_rounded", "generate_bfloat16"), "steps": ("steps_malloc", "steps_as_started")}
STEP = {"model": "model", "method": "method", "dtype": "dtype", "ftjax_tokens_s": "ftjax, tokens/s"}
STEP |= {"torch_tokens_s": "torch, tokens/s", "ratio": "ratio"}
MEMORY = {"ftjax_above_gb": "ftjax, GB", "torch_above_gb": "torch, GB", "above_ratio": "ratio of memory"}
# name -> key of a row: head of its column
TABLES = {
    "steps": STEP | {"malloc": "with ftjax's allocator"},
    "lean": STEP | MEMORY,
    "devices": {"model": "model", "method": "method", "dtype": "dtype", "devices_n": "devices", "one": "one device, ms"}
    | {"devices": "so many, ms", "gain": "gain", "takes": "a run takes"},
    "share": {"case": "case", "ftjax_tokens_s": "tokens/s", "tflops": "TFLOP/s", "product_tflops": "of the product"}
    | {"share": "share"},
    "generate": {"model": "model", "dtype": "dtype", "weights": "weights", "ftjax_tokens_s": "ftjax, tokens/s"}
    | {"torch_tokens_s": "transformers, tokens/s", "ratio": "ratio", "milliseconds_a_token": "ms a token"}
    | {"bandwidth_gb_s": "machine reads, GB/s", "bandwidth_share": "share of that", "must": "must", "goal": "goal"},
    "load": {"dtype": "dtype", "gigabytes": "GB", "ftjax_seconds": "ftjax, s", "torch_seconds": "torch, s"}
    | {"speed": "ratio", "must_speed": "must", "goal_speed": "goal", "ftjax_memory": "ftjax, memory"}
    | {"torch_memory": "torch, memory"},
    "start": {"what": "what", "seconds": "seconds", "must": "must", "goal": "goal"},
    "lengths": {"length": "tokens of a row", "ftjax_tokens_s": "ftjax, tokens/s", "torch_tokens_s": "torch, tokens/s"}
    | {"ratio": "ratio", "ftjax_above_gb": "ftjax, GB", "torch_above_gb": "torch, GB"},
}


def table(files: list[dict], columns: dict[str, str]) -> str:
    """Markdown of what benchmarks wrote: commands, machine and versions, then their rows; columns: key -> head."""
    machine = {f"{f['machine']['cores']} cores of {f['machine']['cpu']}" for f in files}
    versions = {", ".join(f"{name} {v}" for name, v in f["versions"].items()) for f in files}
    lines = [f"{'; '.join(sorted(machine))}. {'; '.join(sorted(versions))}.", "", "```text"]
    lines += [re.sub(r" --out \S+", "", f["command"]) for f in files]
    kept = {key: head for key, head in columns.items() if any(key in row for f in files for row in f["rows"])}
    lines += ["```", "", f"| {' | '.join(kept.values())} |", "|---" * len(kept) + "|"]
    for row in (row for f in files for row in f["rows"]):
        lines.append(f"| {' | '.join(shown(row.get(key)) for key in kept)} |")
    return "\n".join(lines)


def shown(value) -> str:
    """A cell: numbers with their thousands apart, yes or nothing for a flag."""
    if isinstance(value, bool) or value is None:
        return "yes" if value else ""
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def rewritten(page: str, folder: Path) -> str:
    """The page with each table that `folder` has a file of."""
    for name, columns in TABLES.items():
        files = [folder / f"{part}.json" for part in (name, *BESIDE.get(name, ()))]
        found = [json.loads(file.read_text()) for file in files if file.is_file()]
        block = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if found and block.search(page):
            text = table(found, columns)
            page = block.sub(lambda m, text=text: m[1] + text + m[2], page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the JSON files")
    parser.add_argument("page", type=Path, help="Markdown file that is rewritten")
    args = parser.parse_args()
    args.page.write_text(rewritten(args.page.read_text(), args.folder))


if __name__ == "__main__":
    main()
