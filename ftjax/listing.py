"""What there is to choose from, as text for a terminal: `ftjax config`, `methods`, `tasks`, `models` and `metrics`.

Every description is read from the table or the comment that the rest of the project uses; none is written here.
"""

from __future__ import annotations

import functools
import inspect
import io
import re
import sys
import textwrap
import tokenize

from ftjax import config, progress
from ftjax.errors import FtjaxError, nearest

INDENT = " " * 4
WIDEST = 100  # characters; longer lines are hard to read, however wide a terminal is


@functools.cache
def explained() -> dict[str, tuple[str, str]]:
    """{key of the config: (heading of its section, what the field means)}, from the comments of ftjax/config.py.

    A comment behind an entry of FIELDS, with the lines below it up to the next entry or an empty comment, belongs to
    that entry. `# ---- text` starts a section.
    """
    source = inspect.getsource(config)
    table = source[source.index("\nFIELDS") : source.index("\n}\n", source.index("\nFIELDS")) + 3]
    found, key, heading = {}, None, "the run"
    for token in tokenize.generate_tokens(io.StringIO(table).readline):
        if token.type == tokenize.STRING and token.start[1] == 4:
            key = token.string.strip("\"'")
            found[key] = (heading, "")
        elif token.type == tokenize.COMMENT:
            text = token.string.removeprefix("#").strip()
            if text.startswith("----"):
                key, heading = None, text.strip("- ")
            elif not text:
                key = None
            elif key:
                found[key] = (heading, f"{found[key][1]} {text}".strip())
    return found


def fields(name: str = "", search: str = "") -> str:
    """The fields of the config.

    Args:
        name: A group (`optim`, `data.clean`) or a key (`optim.lr`); empty: all fields.
        search: Words that a field's key, meaning or name in other projects must contain; empty: no search.

    Returns:
        One line for each field where nothing is named or searched, and else all that is known of each.

    Raises:
        FtjaxError: For an unknown name and for a search that finds nothing; it suggests the nearest ones.
    """
    means = explained()
    keys = [key for key in means if not name or key == name or key.startswith(f"{name}.")]
    if not keys:
        groups = dict.fromkeys(key.rpartition(".")[0] for key in means if "." in key)
        suggestions = (nearest(name, groups), *(f' (did you mean "{key}"?)' for key in config.similar(name)))
        near = next(filter(None, suggestions[1:] if "." in name else suggestions), "")
        raise FtjaxError(f"config {name}: no such group or field{near}; the groups are {', '.join(groups)}")
    if not name and not search:
        return _overview(means)
    known = {key: _searched(key, means[key][1]) for key in keys}
    words = search.lower().split()
    keys = [key for key in keys if all(word in known[key] for word in words)]
    if not keys:
        names = {word for key in means for word in re.split("[._ ]", f"{key} {config.FIELDS[key].also}")}
        meant = [nearest(word, names).partition('"')[2].partition('"')[0] or word for word in words]
        near = f' (did you mean "{" ".join(meant)}"?)' if meant != words else ""
        where = f"in the group {name}" if name else "of the config"
        raise FtjaxError(f"config --search {search!r}: no field {where} has these words in its description{near}")
    return "\n\n".join(_in_full(key, means[key][1]) for key in keys)


def methods() -> str:
    """The tuning methods, for `tuning.method`."""
    from ftjax.verdict.decision import TUNING

    return _table(TUNING)


def tasks() -> str:
    """The tasks, for `task.kind`."""
    meaning = dict(part.split(": ", 1) for part in explained()["task.kind"][1].split("; "))
    return _table({kind: meaning[kind] for kind in config.FIELDS["task.kind"].choices})


def models() -> str:
    """The model families by the `model_type` of their config.json, and the tasks that each can be trained for."""
    from ftjax import tasks
    from ftjax.hub.family_table import FAMILIES

    able = {
        name: [kind for kind, task in tasks.every().items() if task.head in f.forms] for name, f in FAMILIES.items()
    }
    return _table({name: ", ".join(kinds) for name, kinds in able.items()})


def metrics() -> str:
    """The metrics of generated answers, for `evaluate.metrics`."""
    from ftjax.evaluation.metrics import METRICS

    return _table({name: metric.described for name, metric in METRICS.items()})


def _width() -> int:
    return min(progress.columns(sys.stdout), WIDEST)


def _table(rows: dict[str, str]) -> str:
    """Two columns; a description that is too long for its line goes on below itself."""
    left = max(map(len, rows)) + 2
    return "\n".join(
        textwrap.fill(text, _width(), initial_indent=name.ljust(left), subsequent_indent=" " * left)
        for name, text in rows.items()
    )


def _overview(means: dict[str, tuple[str, str]]) -> str:
    lines, last = [], None
    for key, (heading, text) in means.items():
        if heading != last:
            lines += ["", heading]
        line = f"  {key.ljust(29)} {text}"
        lines.append(line if len(line) <= _width() else line[: _width() - 4].rpartition(" ")[0] + " ...")
        last = heading
    lines += ["", "`ftjax config GROUP` or `ftjax config KEY` says more, --search finds words."]
    return "\n".join(lines).strip()


def _in_full(key: str, text: str) -> str:
    field = config.FIELDS[key]
    none = " or None" if field.default is None else ""
    parts = [text, f"Expected: {field.expected}{none}."]
    if field.also:
        parts.append(f"In other projects: {', '.join(field.also.split())}.")
    first = textwrap.fill(f"{key} = {field.default!r}", _width(), subsequent_indent=INDENT)
    below = textwrap.TextWrapper(_width(), initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False)
    return "\n".join([first, *map(below.fill, parts)])


def _searched(key: str, text: str) -> str:
    """All that a search may find a field by, in lower case, also with `_` and `.` as blanks."""
    names = f"{key} {config.FIELDS[key].also}"
    return f"{names} {re.sub('[_.]', ' ', names)} {text}".lower()
