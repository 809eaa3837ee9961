"""List the error messages of ftjax that no test reads, and write docs/errors.md, the list of all.

    python scripts/messages.py [--write]

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
HEAD = """# Error messages

Look up a message by a few of its words. `{name}` stands for a value: a file, a row, a key, what was found.
Beside a message that names an option is the page that says most about it; `ftjax config KEY` explains any option.
A command that ends with one of these messages has the exit code 2.
This page is written by `python scripts/messages.py --write`.
"""


def texts(node: ast.AST, named: bool = False) -> str:
    """The fixed parts of the texts in an expression, with GAP between them, or if `named` a value's name in braces."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else GAP
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(part, named) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        name = re.search(r"\w+$", ast.unparse(node.value))
        return GAP if not named else f"{{{name[0]}}}" if name else "{…}"
    return GAP.join(texts(part, named) for part in ast.iter_child_nodes(node))


def messages(folder: Path, named: bool = False) -> list[tuple[str, int, str]]:
    """(file, line, message as `texts` gives it) of each FtjaxError that is made in a folder, also by check_known."""
    found = []
    for file in sorted(file for file in folder.rglob("*.py") if file.name != "errors.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called in ERRORS and node.args:
                text = texts(node.args[0], named)
            elif called == "check_known":
                text = texts(node.args[2], named) + (" {name}{…}; expected one of {…}" if named else GAP)
                text += texts(node.args[3], named) if named and len(node.args) > 3 else ""
            else:
                continue
            found.append((str(file.relative_to(ROOT)), node.lineno, text))
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


def page() -> str:
    """The content of docs/errors.md."""
    from ftjax.config import FIELDS

    pages = {file.name: file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))}
    del pages["errors.md"]
    out, modules = [HEAD], {}
    for file, _, text in messages(ROOT / "ftjax", named=True):
        if windows(text):
            modules.setdefault(file, {})[" ".join(text.replace(GAP, " ").split())] = None
    for file, found in modules.items():
        out.append(f"\n## {file}\n\n| message | see |\n|---|---|\n")
        for text in found:
            key = next((key for key in re.findall(r"[a-z]+(?:\.\w+)+", text) if key in FIELDS), "")
            said = {name: len(re.findall(rf"{re.escape(key)}\b", content)) for name, content in pages.items()}
            best = max(said, key=said.__getitem__)
            see = f"[{best.removesuffix('.md')}]({best})" if key and said[best] else ""
            out.append(f"| ``{text.replace('|', chr(92) + '|')}`` | {see} |\n")
    return "".join(out)


def main() -> int:
    """Print each message that no test reads."""
    if "--write" in sys.argv:
        (ROOT / "docs/errors.md").write_text(page(), encoding="utf-8")
    found, every = unread()
    for file, line, text in found:
        print(f"{file}:{line}: {' '.join(text.replace(GAP, '...').split())[:120]}")
    print(f"{len(found)} of {every} messages are read by no test")
    return 0


if __name__ == "__main__":
    sys.exit(main())
