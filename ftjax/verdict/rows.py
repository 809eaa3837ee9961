"""The same rows for all seeds: parts that each seed would split off train otherwise, split once, into files."""

from __future__ import annotations

from pathlib import Path

from ftjax import config as configs
from ftjax.data.prepare import PARTS, rows
from ftjax.errors import FtjaxError
from ftjax.files import write_jsonl


def fix_rows(config, folder: Path, say) -> None:
    """Where parts are split off train by the seed, split them by the config's, into files of `folder`, which the config
    then names. Raises FtjaxError for a mixture, whose sources have no files of their own for that."""
    data = config.data
    open_parts = [part for part, share in zip(PARTS, data.split) if part != "train" and share and not data[part]]
    if not open_parts:
        return
    if data.mixture:
        raise FtjaxError(
            "data.mixture: every seed would split it otherwise; name files for the parts of its entries, or set "
            "data.split=(1.0, 0.0, 0.0)"
        )
    whole = configs.copy(config)
    whole.data.update(limit=0, shots=0)
    (source,), _ = rows(whole, augmented=False)
    folder.mkdir(parents=True, exist_ok=True)
    named = {}
    for part in PARTS:
        table = source.tables.get(part)
        if table is not None and len(table):
            named[part] = str(folder / f"{part}.jsonl")
            write_jsonl(Path(named[part]), (row for _, chunk in table.chunks() for row in chunk))
    data.update(**named, columns=(), split=(1.0, 0.0, 0.0))
    say(f"{folder}: rows of {', '.join(named)}, for all seeds the same")
