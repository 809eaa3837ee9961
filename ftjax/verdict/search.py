"""The points of a sweep: every point of a grid, or points drawn from lists and ranges.

A point is a tuple of texts `key=value`, in the order of the axes.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftjax import config as configs
from ftjax.errors import FtjaxError

THIRD = 3  # one point in three goes to the next rung, with three times the budget
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})(:log)?")
Point = tuple[str, ...]


class Range(NamedTuple):
    """Numbers from low to high.

    Attributes:
        low: The lowest number.
        high: The highest number.
        log: Whether the logarithm is uniform, instead of the number.
        whole: Whether numbers are rounded to whole ones.
    """

    low: float
    high: float
    log: bool
    whole: bool

    def at(self, share: float) -> str:
        """The quantile `share` of the range, as text."""
        low, high = (math.log(x) if self.log else x for x in self[:2])
        x = low + share * (high - low)
        x = math.exp(x) if self.log else x
        return f"{round(x)}" if self.whole else f"{x:.4g}"


class Axis(NamedTuple):
    """A field of the config, with the values of a grid or the range to draw from."""

    key: str
    values: tuple | Range


def axes(grid: Sequence[str], drawn: bool = False) -> list[Axis]:
    """Parse the axes of a grid.

    Args:
        grid: Texts such as `tuning.rank=4,8,16`.
        drawn: Whether points are drawn; a text may then be a range, such as `optim.lr=1e-5..1e-3:log`.

    Raises:
        FtjaxError: If a text is anything else, if a key occurs twice, or if it is `seed` or `run_dir`.
    """
    found = []
    for text in grid:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise FtjaxError(f"--grid {text!r}: expected key=value,value,... such as tuning.rank=4,8,16")
        if key in ("seed", "run_dir"):
            raise FtjaxError(
                f"--grid {text!r}: {key} cannot be an axis; --seeds sets the number of seeds, --config.seed the first "
                "one"
            )
        if key in (axis.key for axis in found):
            raise FtjaxError(f"--grid {text!r}: the key {key} occurs twice; write all its values in one --grid")
        found.append(Axis(key, _range(text, values, drawn) or _list(key, values)))
    return found


def _list(key: str, values: str) -> tuple:
    """The texts of a list, one for each value of the field: 1e-3 and 0.001 are one point, not two runs of it."""
    # A comma within brackets or quotes is part of a value.
    parts = re.findall(r"""(?:[^,("'\[]|\([^)]*\)|\[[^\]]*\]|"[^"]*"|'[^']*')+""", values)
    read = configs.FIELDS[key].read if key in configs.FIELDS else lambda part, _: part
    found: dict[str, str] = {}
    for part in parts:
        found.setdefault(repr(read(part, f"--config.{key}")), part)
    return tuple(found.values())


def _range(text: str, values: str, drawn: bool) -> Range | None:
    match = RANGE.fullmatch(values)
    if not match:
        return None
    if not drawn:
        raise FtjaxError(
            f"--grid {text!r}: a grid needs a list of values, and a range has infinitely many; add --random N to draw "
            "from it"
        )
    low, high, log = float(match[1]), float(match[2]), bool(match[3])
    if low >= high or log and low <= 0:
        raise FtjaxError(f"--grid {text!r}: expected low..high with low below high, and both above 0 for :log")
    return Range(low, high, log, whole=all(re.fullmatch(r"[+-]?\d+", match[i]) for i in (1, 2)))


def every(found: list[Axis]) -> list[Point]:
    """All points of the grid."""
    return [_point(found, values) for values in itertools.product(*(axis.values for axis in found))]


def drawn(found: list[Axis], n: int, seed: int) -> list[Point]:
    """Draw n different points; fewer if there are not so many. The points of a smaller n are the first of them."""
    points, rng = {}, np.random.default_rng(seed)
    for _ in range(100 * n):
        shares = rng.random(len(found))
        values = [
            axis.values.at(share)
            if isinstance(axis.values, Range)
            else axis.values[min(int(share * len(axis.values)), len(axis.values) - 1)]
            for axis, share in zip(found, shares, strict=True)
        ]
        points[_point(found, values)] = None
        if len(points) == n:
            break
    return list(points)


def _point(found: list[Axis], values) -> Point:
    return tuple(f"{axis.key}={value}" for axis, value in zip(found, values, strict=True))


def rungs(points: int) -> list[int]:
    """Number of points on each rung of successive halving (Jamieson & Talwalkar 2016): all, a third, ..., one."""
    found = [points]
    while found[-1] > 1:
        found.append(math.ceil(found[-1] / THIRD))
    return found
