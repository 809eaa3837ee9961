"""Make ftjax/assets/commongen from CommonGen (github.com/INK-USC/CommonGen, MIT), the same bytes every time.

    python scripts/make_commongen_part.py FOLDER_WITH_commongen.{train,dev}.{src_alpha,tgt}.txt

Sets of three words, as four fifths of its training sets are: their sentences suit a model of 260,000 parameters.
Training: every sentence that makes a row of at most 60 of the starter model's tokens. Validation and test: the sets of
the dev files with all their sentences, next to one another. No two parts share a set of words.
"""

import json
import random
import shutil
import sys
from pathlib import Path

WORDS, TOKENS, VALIDATION_SETS, SEED = 3, 60, 150, 0
ASSETS = Path(__file__).resolve().parents[1] / "ftjax" / "assets"
OUT = ASSETS / "commongen"


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
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ASSETS / "stories260K" / "tokenizer.json"))

    def fits(src: str, tgt: str) -> bool:
        return len(tokenizer.encode(f"Words: {src}\nSentence: {tgt}").ids) < TOKENS

    rng = random.Random(SEED)
    held_out = [(src, tgts) for src, tgts in concept_sets(folder, "dev") if len(src.split()) == WORDS]
    seen = {frozenset(src.split()) for src, _ in held_out}
    sets = [(src, tgts) for src, tgts in concept_sets(folder, "train") if len(src.split()) == WORDS]
    train = [(src, tgt) for src, tgts in sets if frozenset(src.split()) not in seen for tgt in tgts if fits(src, tgt)]
    rng.shuffle(train)
    rng.shuffle(held_out)
    OUT.mkdir(parents=True, exist_ok=True)
    write("train.jsonl", train)
    write("validation.jsonl", [(src, tgt) for src, tgts in held_out[:VALIDATION_SETS] for tgt in tgts])
    write("test.jsonl", [(src, tgt) for src, tgts in held_out[VALIDATION_SETS:] for tgt in tgts])
    shutil.copyfile(folder / "LICENSE", OUT / "LICENSE")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
