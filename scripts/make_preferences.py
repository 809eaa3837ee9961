"""Make pairs for configs/dpo_commongen.py: a person's sentence, and the one that a model writes for the same words.

    ftjax train --config configs/quickstart.py
    python scripts/make_preferences.py
    ftjax train --config configs/dpo_commongen.py

The files reward_*.jsonl, for configs/reward_commongen.py, have a second pair for each row: the person's sentence, and a
person's sentence for other words.
A row is left out if the model writes nothing, or the person's sentence. The number of rows is printed.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import ftjax
from ftjax import assets

ROWS = {"train": 3000, "validation": 300, "test": 300}  # most rows of each part


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart/merged")
    parser.add_argument("--out", type=Path, default=Path("pairs"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lm = ftjax.load(args.model)
    for part, most in ROWS.items():
        first = {}  # words -> the first sentence of a person
        for line in Path(assets.resolve(f"builtin:commongen/{part}.jsonl")).read_text().splitlines():
            row = json.loads(line)
            first.setdefault(row["src"], row["tgt"].strip())
        words = np.random.default_rng(0).permutation(list(first))[:most].tolist()
        prompts = [f"Words: {src}\nSentence:" for src in words]
        answers = [text.strip() for text in lm.generate(prompts, max_new_tokens=48, batch_size=64)]
        rows = [
            {"src": src, "prompt": prompt, "chosen": f" {first[src]}", "rejected": f" {answer}"}
            for src, prompt, answer in zip(words, prompts, answers, strict=True)
            if answer not in ("", first[src])
        ]
        (args.out / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        others = [row | {"rejected": before["chosen"]} for before, row in zip([rows[-1], *rows], rows)]
        both = rows + [row for row in others if row["rejected"] != row["chosen"]]
        (args.out / f"reward_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
        print(f"{args.out / part}.jsonl: {len(rows):,} of {len(words):,} rows")


if __name__ == "__main__":
    main()
