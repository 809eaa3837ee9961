"""Energy that the processors of this machine take, by Intel's and AMD's counters (RAPL), where Linux lets us read them.

It is that of all processes on the machine, of its processors and not of its memory, discs or accelerators.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/class/powercap")
EVERY = 60.0  # seconds between readings: a counter begins anew after some minutes under load


class Meter:
    """joules: taken since it began, up to the last reading; None where nothing can be read."""

    def __init__(self, root: Path = ROOT):
        # A package's own counter, `intel-rapl:0`; those of its parts, `intel-rapl:0:1`, count what it counts too.
        folders = [folder for folder in sorted(root.glob("*rapl:*")) if folder.name.count(":") == 1]
        self.counters = [
            (f / "energy_uj", int((f / "max_energy_range_uj").read_text())) for f in folders if _readable(f)
        ]
        self.joules = 0.0 if self.counters else None
        self.last = self._read()

    def read(self) -> None:
        """Add what was taken since the last reading."""
        now = self._read()
        for (_, most), before, after in zip(self.counters, self.last, now, strict=True):
            self.joules += ((after - before) % (most + 1)) / 1e6
        self.last = now

    def _read(self) -> list[int]:
        return [int(file.read_text()) for file, _ in self.counters]


def _readable(folder: Path) -> bool:
    try:
        (folder / "energy_uj").read_text()
    except OSError:  # since 2020 for root alone, as the counters betray what is computed
        return False
    return True


@contextlib.contextmanager
def metered(root: Path = ROOT) -> Iterator[Meter]:
    """A meter of what the block takes, whole once the block has ended."""
    meter, ended = Meter(root), threading.Event()

    def watch():
        while not ended.wait(EVERY):
            meter.read()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield meter
    finally:
        ended.set()
        watcher.join()
        meter.read()
