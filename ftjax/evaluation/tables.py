"""Tables for the terminal, as text."""

from __future__ import annotations


def grid(head: list[tuple[str, int]], lines: list[list[str]], parted: bool = False) -> str:
    """A table of texts, as wide as the terminal but at most 160 characters. It ends with a newline.

    Args:
        head: (title, whether it is aligned to the right) of each column.
        lines: The cells of each row.
        parted: Whether a line separates rows.
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
        out.add_row(*map(Text, line))  # Text, so that brackets in names are not read as markup
    console = Console(file=io.StringIO(), width=min(shutil.get_terminal_size((120, 24)).columns, 160))
    console.print(out)
    return console.file.getvalue()
