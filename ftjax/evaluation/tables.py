"""Tables for the terminal, as text."""

from __future__ import annotations


def grid(head: list[tuple[str, int]], lines: list[list[str]], parted: bool = False) -> str:
    """A table of texts, as wide as the terminal, up to 160 characters; it ends with a line end.

    head: (title, whether to the right) of each column; parted: a line stands between rows.
    """
    import io
    import shutil

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table(show_lines=parted)
    for title, right in head:
        out.add_column(title, justify="right" if right else "left")
    for line in lines:
        out.add_row(*map(Text, line))  # Text: brackets in names are no markup
    console = Console(file=io.StringIO(), width=min(shutil.get_terminal_size((120, 24)).columns, 160))
    console.print(out)
    return console.file.getvalue()
