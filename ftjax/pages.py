"""Reports as HTML, Markdown and text, from the Jinja templates in FOLDER. A page of HTML needs no other file."""

from __future__ import annotations

import functools
from pathlib import Path

from ftjax import assets

FOLDER = Path(assets.__file__).parent / "pages"


@functools.cache
def _templates():
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=lambda name: not name.endswith((".md", ".jinja")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"grouped": "{:,.0f}".format, "md": escape_markdown, "num": format}
    return found


def page(name: str, **values) -> str:
    """Render a template with the given values. In HTML every value is escaped."""
    return _templates().get_template(name).render(values) + "\n"


def macros(name: str, **values):
    """The macros of a template as functions that return text, with the given values as names that they may use."""
    return _templates().get_template(name).make_module(values)


def escape_markdown(text: str) -> str:
    """The text in one line, escaped so that Markdown shows it as it is."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())
