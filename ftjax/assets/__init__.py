"""Files that come with ftjax: the starter model and a part of its data with a free licence (licences are beside the
files), chat templates, and the pages of reports."""

from __future__ import annotations

from pathlib import Path

from ftjax.errors import FtjaxError

PREFIX = "builtin:"


def resolve(path: str) -> str:
    """`builtin:name` -> the path of that file or folder in the installed package; any other path as it is.

    Raises FtjaxError for a `builtin:` name that ftjax does not carry.
    """
    if not str(path).startswith(PREFIX):
        return str(path)
    root = Path(__file__).parent
    target = (root / str(path).removeprefix(PREFIX)).resolve()
    if not target.is_relative_to(root) or not target.exists():
        names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in (".jsonl", ".txt", ".json"))
        names = [n for n in names if not n.startswith("stories260K/")] + ["stories260K"]
        raise FtjaxError(f"{path}: ftjax carries no such file. It carries: {', '.join(PREFIX + n for n in names)}")
    return str(target)
