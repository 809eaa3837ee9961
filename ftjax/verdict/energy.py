"""Energy of this machine's processors, by Intel's and AMD's counters (RAPL), if Linux permits reading them.

It is the energy of all processes on the machine. Memory, disks and accelerators are not included.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/class/powercap")
EVERY = 60.0  # seconds between readings: a counter wraps around after some minutes under load


class Meter:
    """A meter of energy. `joules` is the energy from its start to the last reading; None if no counter can be read."""

    def __init__(self, root: Path = ROOT):
        self.counters = []  # (file, its highest value)
        for folder in sorted(root.glob("*rapl:*")):
            # The counter of a package, `intel-rapl:0`, includes those of its parts, such as `intel-rapl:0:1`.
            if folder.name.count(":") == 1:
                with contextlib.suppress(OSError):  # since 2020 only root may read them: they reveal what is computed
                    (folder / "energy_uj").read_text()
                    self.counters.append((folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())))
        self.joules = 0.0 if self.counters else None
        self.last = self._read()

    def read(self) -> None:
        """Add the energy since the last reading."""
        now = self._read()
        for (_, most), before, after in zip(self.counters, self.last, now, strict=True):
            self.joules += ((after - before) % (most + 1)) / 1e6
        self.last = now

    def _read(self) -> list[int]:
        return [int(file.read_text()) for file, _ in self.counters]


@contextlib.contextmanager
def metered(root: Path = ROOT) -> Iterator[Meter]:
    """Measure the energy of the block. The meter is complete after the block."""
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
