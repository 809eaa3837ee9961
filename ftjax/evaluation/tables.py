"""Tables for the terminal, as text."""

from __future__ import annotations


def grid(head: list[tuple[str, int]], lines: list[list[str]]) -> str:
    """A table of texts. head: (title, whether to the right) of each column."""
    from rich.table import Table
    from rich.text import Text

    out = Table()
    for title, right in head:
        out.add_column(title, justify="right" if right else "left")
    for line in lines:
        out.add_row(*map(Text, line))  # Text: brackets in names are no markup
    return rendered(out)


def rendered(table) -> str:
    """A rich table as wide as the terminal, up to 160 characters; it ends with a line end."""
    import io
    import shutil

    from rich.console import Console

    console = Console(file=io.StringIO(), width=min(shutil.get_terminal_size((120, 24)).columns, 160))
    console.print(table)
    return console.file.getvalue()
