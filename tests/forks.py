"""A process that has imported what ftjax needs, and forks one for each command: tests of many commands pay for the
imports once."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


class Child:
    """A process that Forks started. `pid` may be sent signals."""

    def __init__(self, forks: Forks, pid: int):
        self.forks, self.pid, self.status = forks, pid, None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._ask(os.WNOHANG)

    def wait(self) -> int:
        """Wait for its end. Returns the exit status."""
        return self._ask(0)

    def _ask(self, how: int) -> int | None:
        if self.status is None:
            self.status = self.forks.ask(wait=self.pid, how=how)
        return self.status


class Forks:
    """Runs commands of ftjax and pieces of Python, each in a new process of the same environment."""

    def __init__(self, env: dict[str, str]):
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **asked) -> int | None:
        """Send a line to the process; returns its answer."""
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, folder: Path, said: str | Path, arguments: list[str] | None = None, program="", env=None) -> Child:
        """Start `ftjax ARGUMENTS`, or else a program.

        Args:
            folder: Where it runs.
            said: A file that gets what it prints behind what it holds.
            arguments: Of the command line.
            program: Python; `sys.argv` is then as `arguments` say.
            env: Variables of its environment beside those of the process. JAX has read its own before the fork, but
                for XLA_FLAGS.
        """
        Path(said).touch()
        asked = {"folder": str(folder), "said": str(said), "arguments": arguments or [], "program": program}
        return Child(self, self.ask(**asked, env=env or {}))

    def run(self, folder: Path, arguments: list[str] | None = None, program: str = "", env=None) -> tuple[int, str]:
        """Start it and wait for its end. Returns the exit status and what it printed."""
        with tempfile.NamedTemporaryFile("r") as said:
            status = self.start(folder, said.name, arguments, program, env).wait()
            return status, said.read()

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve() -> None:
    """Import everything that a command may, then fork for each line of standard input."""
    import datasets  # noqa: F401
    import grain  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import transformers

    import ftjax.cli
    import ftjax.plan.worker
    import ftjax.stages
    import ftjax.verdict.run  # noqa: F401
    from ftjax.training import report

    report._tensorboard()
    transformers.AutoTokenizer.from_pretrained  # noqa: B018  # its module is imported when it is looked up
    gc.set_threshold(ftjax.cli.COLLECTED)  # as the command line does
    gc.freeze()  # what is not looked through by a fork is not copied for it
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            child, status = os.waitpid(asked["wait"], asked["how"])
            print(json.dumps(os.waitstatus_to_exitcode(status) if child else None), flush=True)
            continue
        child = os.fork()
        if not child:
            for stream in (1, 2):
                os.dup2(os.open(asked["said"], os.O_WRONLY | os.O_APPEND), stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(asked["folder"])
            os.environ |= asked["env"]
            sys.argv = ["ftjax", *asked["arguments"]]
            if asked["program"]:
                exec(compile(asked["program"], "program", "exec"), {"__name__": "__main__"})
                sys.exit()
            sys.exit(ftjax.cli.main())
        print(child, flush=True)


if __name__ == "__main__":
    serve()
