#!/usr/bin/env python3
"""Write questions with one or two sums in GSM8K's form, for configs/grpo_calculator.py: a question, a solution with
`<<12+30=42>>`, and the final number after `####`. The same seed gives the same rows; no question is in two files, but
those of train.jsonl are also in drafts.jsonl, with hasty solutions: most of those with two sums end after the first."""

import argparse
import json
from pathlib import Path

import numpy as np

SIZES = {"train": 3000, "validation": 200, "test": 400}
HASTY = 0.6  # share of the solutions with two sums that end after the first in drafts.jsonl
NAMES, THINGS = ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna"), ("apples", "balls", "toys", "cakes", "books", "eggs")
MORE = (("gets", "+"), ("finds", "+"), ("loses", "-"), ("eats", "-"))


def row(rng: np.random.Generator) -> dict:
    """A question with its solution."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    value = int(rng.integers(10, 100))
    asked, solved = f"{name} has {value} {things}.", ""
    for _ in range(rng.integers(1, 3)):
        verb, sign = MORE[rng.integers(len(MORE))]
        other = int(rng.integers(2, 50 if sign == "+" else max(3, value)))
        result = value + other if sign == "+" else value - other
        asked += f" {name} {verb} {other}."
        solved += f"<<{value}{sign}{other}={result}>>\n"
        value = result
    return {"question": f"{asked} How many?", "answer": f"{solved}#### {value}"}


def draft(made: dict, hasty: bool) -> dict:
    """The row, with a solution that ends after its first sum if it is hasty."""
    first = made["answer"].split("\n")[0]
    value = first.removesuffix(">>").partition("=")[2]
    return made | {"answer": f"{first}\n#### {value}"} if hasty else made


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("sums"), help="the folder of the files")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, seen = np.random.default_rng(given.seed), set()
    given.out.mkdir(parents=True, exist_ok=True)
    for part, size in SIZES.items():
        rows = []
        while len(rows) < size:
            made = row(rng)
            if made["question"] not in seen:
                seen.add(made["question"])
                rows.append(made)
        files = {part: rows}
        if part == "train":
            chances = np.random.default_rng((given.seed, 1)).random(size)
            files["drafts"] = [draft(r, chance < HASTY) for r, chance in zip(rows, chances, strict=True)]
        for name, found in files.items():
            (given.out / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
            print(f"{given.out / name}.jsonl: {len(found):,} rows, such as {found[0]}")


if __name__ == "__main__":
    main()
