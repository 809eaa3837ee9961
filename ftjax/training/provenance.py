"""The environment of a run: `starts` in run.json has an entry for each time that the command was started."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from ftjax.files import replace_json

PACKAGES = (
    "ftjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "tokenizers", "datasets",
)  # fmt: skip
SECRET = re.compile(r"(?i)token|secret|password|passwd|api_?key|credential")
KEYS = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)[\w-]{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")


def without_secrets(text: str) -> str:
    """The text with `***` in place of secrets: keys of known services, passwords in addresses, and the values of
    environment variables whose names look like those of secrets."""
    values = {v for name, v in os.environ.items() if SECRET.search(name) and len(v) >= 8}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return KEYS.sub("***", text)


def git_state(folder: str | Path = ".") -> dict | None:
    """{"commit", "changed"} of the git checkout that contains a folder; None if there is none."""

    def git(*arguments: str):
        command = ["git", "-c", "core.fsmonitor=false", *arguments]  # this setting could name a program to run
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)

    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        commit = git("rev-parse", "HEAD")
        if commit.returncode == 0:
            return {"commit": commit.stdout.strip(), "changed": git("diff-index", "--quiet", "HEAD").returncode != 0}
    return None


def start() -> dict:
    """The entry of `starts` for this process. "ended" is None until it ends."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    kinds = [device.device_kind for device in jax.devices()]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": without_secrets(shlex.join(sys.argv)),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": versions,
        "devices": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "processes": jax.process_count(),
        "git": git_state(),
        "ended": None,  # stays None if the process is killed
    }


@contextlib.contextmanager
def recorded(file: Path) -> Iterator[None]:
    """Write how this process ended into the last entry of `starts` in run.json: "finished", "stopped", or its error."""
    ended = "finished"
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        ended = "stopped" if stopped else without_secrets(f"{type(error).__name__}: {error}")
        raise
    finally:
        with contextlib.suppress(OSError):  # a full disk; the error itself is what the user must see
            *before, this = json.loads(file.read_text(encoding="utf-8"))["starts"]
            note(file, starts=[*before, this | {"ended": ended}])


def note(file: Path, **entries) -> None:
    """Set entries of run.json."""
    replace_json(file, json.loads(file.read_text(encoding="utf-8")) | entries)
