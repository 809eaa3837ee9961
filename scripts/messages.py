"""List the error messages of ftjax that no test reads.

    python scripts/messages.py

A message counts as read if a text in tests/ shares three words in a row with it. It is a sign of what to test, and no
proof: the words may stand in a test for another reason.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ERRORS = ("FtjaxError", "NotFinite")
GAP = "\x00"  # in place of a value


def texts(node: ast.AST) -> str:
    """The fixed parts of the texts in an expression, with GAP between them."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    return GAP.join(texts(part) for part in ast.iter_child_nodes(node)) if not isinstance(node, ast.Constant) else (
        node.value if isinstance(node.value, str) else GAP
    )  # fmt: skip


def messages(folder: Path) -> list[tuple[str, int, str]]:
    """(file, line, fixed parts) of each FtjaxError that is made in a folder."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS
            if named and node.args:
                found.append((str(file.relative_to(ROOT)), node.lineno, texts(node.args[0])))
    return found


def windows(text: str) -> set[tuple[str, ...]]:
    """Every three words in a row of each fixed part."""
    parts = [re.findall(r"[\w']+", part) for part in text.split(GAP)]
    return {tuple(words[i : i + 3]) for words in parts for i in range(len(words) - 2)}


def unread() -> tuple[list[tuple[str, int, str]], int]:
    """The messages that no test reads, and the number of all."""
    known = set()
    for file in (ROOT / "tests").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        said = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        known |= {window for text in said for window in windows(re.sub(r"\\(.)|\.\*", r"\1" + GAP, text))}
        known |= {window for text in said for window in windows(text.replace("\\", ""))}
    known |= {w for line in (ROOT / "tests/scripts/hostile.jsonl").read_text().splitlines() for w in windows(line)}
    every = messages(ROOT / "ftjax")
    return [message for message in every if windows(message[2]) and not windows(message[2]) & known], len(every)


def main() -> int:
    """Print each message that no test reads."""
    found, every = unread()
    for file, line, text in found:
        print(f"{file}:{line}: {' '.join(text.replace(GAP, '...').split())[:120]}")
    print(f"{len(found)} of {every} messages are read by no test")
    return 0


if __name__ == "__main__":
    sys.exit(main())
