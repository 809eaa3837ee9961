"""Make ftjax/assets/commongen from CommonGen (github.com/INK-USC/CommonGen, MIT), the same bytes every time.

    python scripts/make_commongen_part.py FOLDER_WITH_commongen.{train,dev}.{src_alpha,tgt}.txt

Training: one sentence for each of 12,000 concept sets, chosen by seed. Validation and test: the concept sets of the
dev files with all their sentences, next to one another. No two parts share a concept set.
"""

import json
import random
import shutil
import sys
from pathlib import Path

TRAIN_SETS, VALIDATION_SETS, SEED = 12_000, 300, 0
OUT = Path(__file__).resolve().parents[1] / "ftjax" / "assets" / "commongen"


def concept_sets(folder: Path, part: str) -> list[tuple[str, list[str]]]:
    """(given words, their sentences), one a set of words, in the order of the files; repeated sentences once."""
    words, sentences = (
        (folder / f"commongen.{part}.{column}.txt").read_text("utf-8").rstrip("\n").split("\n")
        for column in ("src_alpha", "tgt")
    )
    sets: dict[frozenset, tuple[str, list[str]]] = {}
    for src, tgt in zip(words, sentences, strict=True):
        targets = sets.setdefault(frozenset(src.split()), (src, []))[1]
        if tgt.strip() and tgt.strip() not in targets:
            targets.append(tgt.strip())
    return [(src, targets) for src, targets in sets.values() if targets]


def write(name: str, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"src": src, "tgt": tgt}, ensure_ascii=False) + "\n" for src, tgt in rows]
    (OUT / name).write_text("".join(lines), "utf-8", newline="\n")


def main(folder: Path) -> None:
    rng = random.Random(SEED)
    train = rng.sample(concept_sets(folder, "train"), TRAIN_SETS)
    held_out = concept_sets(folder, "dev")
    seen = {frozenset(src.split()) for src, _ in train}
    held_out = [(src, tgts) for src, tgts in held_out if frozenset(src.split()) not in seen]
    rng.shuffle(held_out)
    OUT.mkdir(parents=True, exist_ok=True)
    write("train.jsonl", [(src, rng.choice(tgts)) for src, tgts in train])
    write("validation.jsonl", [(src, tgt) for src, tgts in held_out[:VALIDATION_SETS] for tgt in tgts])
    write("test.jsonl", [(src, tgt) for src, tgts in held_out[VALIDATION_SETS:] for tgt in tgts])
    shutil.copyfile(folder / "LICENSE", OUT / "LICENSE")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
