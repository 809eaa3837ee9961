"""What `ftjax data VERB` does: run the preparation of a run's rows up to some step, and print or write the result."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ftjax import tasks
from ftjax.data import chat_templates, domain, preview
from ftjax.data.batches import Batches
from ftjax.data.clean import records
from ftjax.data.prepare import PARTS, prepare, read_and_clean, rows
from ftjax.errors import FtjaxError
from ftjax.files import drafted, replace_json, replace_text, write_jsonl

UNBOUNDED = 1 << 30  # number of positions if the folder holds a tokenizer and no model


def inspect(config, out: str | None = None, say: Callable = print) -> None:
    """Run every check on the rows of a config and print the findings.

    Args:
        config: The whole config.
        out: Folder for inspect.html, inspect.json and, with data.domain_report, domain.json; None: they are not
            written.
        say: Prints a text.

    Raises:
        FtjaxError: If rows cannot be read at all. A problem of single rows is a finding.
    """
    from ftjax.data import inspect as inspecting
    from ftjax.data import inspect_report

    tokenizer, _ = _tokenizer(config)
    with _new(out) if out else contextlib.nullcontext() as folder:
        found = inspecting.inspect(config, tokenizer)
        say(inspect_report.table(found))
        if config.data.domain_report:
            of_domain = domain.report(config, tokenizer)
            say(f"\ncompared with {config.data.domain_report}\n{domain.shown(of_domain)}")
            if folder:
                replace_json(folder / "domain.json", of_domain)
        if folder:
            replace_json(folder / "inspect.json", inspect_report.to_json(found))
            replace_text(folder / "inspect.html", inspect_report.html(found))
    if out:
        page, numbers = (Path(out) / name for name in ("inspect.html", "inspect.json"))
        say(f"{page}: the same findings with plots; {numbers}: with all row numbers")


# Verb -> the function that makes the rows which it writes: those of every named part, cleaned; those of train,
# validation and test, split and decontaminated as in a run; and these with synthetic rows of train, marked in a column.
WRITTEN = {"clean": read_and_clean, "split": functools.partial(rows, augmented=False), "augment": rows}


def show(config, count: int = 3, ids: bool = False, html: str | None = None, say: Callable = print) -> None:
    """Print statistics, and the first rows of the first training batches as the model sees them.

    Args:
        config: The whole config.
        count: Number of rows.
        ids: Whether the ids of tokens are printed.
        html: File for a page with every token and its id; None: it is not written.
        say: Prints a text.
    """
    tokenizer, positions = _tokenizer(config)
    data = prepare(config, tokenizer, positions, **_head(config))
    settings = config.data
    batches = Batches(
        data.train.examples, config.train.batch_size or 1, data.max_length, packing=settings.packing,
        buckets=settings.buckets, seed=config.seed, source=data.train.source, shares=data.shares,
        **tasks.find(config.task.kind).layout(config, tokenizer),
    )  # fmt: skip
    say(preview.show(data, tokenizer, packing=settings.packing))
    say(preview.rows(data, batches, tokenizer, count, ids=ids))
    if html:
        replace_text(Path(html), preview.html(data, batches, tokenizer, count))
        say(f"{html}: every token of these rows with its id")


def _tokenizer(config):
    """(the tokenizer of `model.path`, number of positions of its model)."""
    from ftjax.hub import families, resolve
    from ftjax.hub import tokenizer as tokenizers

    folder = resolve.resolve_model(config.model.path, config.model.revision)
    tokenizer = chat_templates.dated(tokenizers.of_run(config, folder)[0], config.data.date)
    model = (Path(folder) / "config.json").is_file()
    return tokenizer, families.read_config(folder)[1].max_positions if model else UNBOUNDED


def _head(config) -> dict:
    """Arguments of `prepare`: where the head over labels of `model.path` reads a text, and the names of its labels."""
    from ftjax.hub import families, resolve

    folder = resolve.resolve_model(config.model.path, config.model.revision)
    if tasks.find(config.task.kind).head == "causal" or not (Path(folder) / "config.json").is_file():
        return {}
    family, shape = families.read_config(folder)
    head = families.with_head(family, shape, tasks.find(config.task.kind).head, 1, folder, config.task.pool).head
    return {"pool": head.pool, "known": families.label_names(folder) if shape.head.task == head.task else ()}


@contextlib.contextmanager
def _new(out: str) -> Iterator[Path]:
    """Yield a draft, which becomes the new folder `out` when the block ends. A kill or an error leaves no part of it,
    which would look whole, and which the same command would refuse."""
    folder = Path(os.path.realpath(out))
    with drafted(folder) as draft:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise FtjaxError(
                f"--out: {out} already exists and is not empty; name a new folder, because nothing is overwritten"
            )
        yield draft
        draft.rename(folder)


def write(verb: str, config, out: str, say: Callable = print) -> None:
    """Write `[SOURCE/]PART.jsonl` for every part that has rows, and removed.jsonl if any row was left out.

    Args:
        verb: A key of WRITTEN.
        config: The whole config.
        out: Folder to write to, which must be new or empty.
        say: Prints a text.
    """
    lines = []
    with _new(out) as draft:
        sources, gone = WRITTEN[verb](config)
        for source in sources:
            (draft / source.name).mkdir(exist_ok=True)
            for part in PARTS:
                table = source.tables.get(part)
                if table is not None and len(table):
                    name = Path(source.name) / f"{part}.jsonl"
                    write_jsonl(draft / name, table)
                    lines.append(f"{Path(out) / name}: {len(table):,} rows")
            lines += [f"{source.name}: {note}".removeprefix(": ") for note in source.notes]
        if gone:
            path = draft / "removed.jsonl"
            write_jsonl(path, (record for table, removed in gone for record in records(table, removed)))
            lines.append(f"{Path(out) / path.name}: {preview.left_out(gone)}")
    for line in lines:
        say(line)
