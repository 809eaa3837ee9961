"""Renew constraints.txt: the exact version of every package that the test environment installs.

    pip install uv && python scripts/update_lock.py

uv resolves `.[test]` for all supported Pythons at once; where versions differ, a line carries the Python that it is
for. Every package moves to the newest version that the ranges in pyproject.toml allow. Run the whole suite with the
new file before it is committed.
"""

from __future__ import annotations

import argparse
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"
HEADER = """\
# Exact versions that the tests run with: pip install -e ".[test]" -c constraints.txt
# Written by scripts/update_lock.py.
"""


def resolved(lowest: bool = False) -> str:
    """The pinned requirements of `.[test]`, one a line.

    Args:
        lowest: pin every package that pyproject.toml names to the lower bound of its range, for Python 3.11. uv ends
            with an error where the bounds contradict one another.
    """
    command = ["uv", "pip", "compile", "pyproject.toml", "--extra", "test", "--python-version", "3.11"]
    command += ["--no-annotate", "--no-header", "--quiet"]
    command += ["--constraints", "-"] if lowest else ["--universal"]
    bounds = lower_bounds() if lowest else None
    return subprocess.run(command, cwd=ROOT, check=True, input=bounds, stdout=subprocess.PIPE, text=True).stdout


def lower_bounds() -> str:
    """Requirements of pyproject.toml, the extra `test` among them, each as NAME==LOWER BOUND, one a line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = project["dependencies"] + project["optional-dependencies"]["test"]
    return "".join(f"{text.split(',')[0].replace('>=', '==')}\n" for text in ranges)


def pins(text: str) -> dict[str, list[str]]:
    """package -> its pins, "1.2" or "1.2 ; python_full_version < '3.12'"."""
    found = {}
    for line in text.splitlines():
        name, equals, pin = line.partition("==")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(pin)
    return found


def changes(old: str, new: str) -> list[str]:
    """One line for each package whose pins differ between two locks."""
    before, after = pins(old), pins(new)
    return [
        f"{name}: {', '.join(before.get(name, ['(absent)']))} -> {', '.join(after.get(name, ['(absent)']))}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowest", action="store_true", help="print the lowest allowed versions, and write nothing")
    if parser.parse_args().lowest:
        print(resolved(lowest=True), end="")
        return
    new = HEADER + resolved()
    changed = changes(LOCK.read_text() if LOCK.exists() else "", new)
    LOCK.write_text(new)
    print("\n".join(changed) or f"{LOCK.name} is up to date")


if __name__ == "__main__":
    main()
