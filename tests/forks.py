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


class Forks:
    """Runs commands of ftjax and pieces of Python, each in a new process of the same environment."""

    def __init__(self, env: dict[str, str]):
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, folder: Path, arguments: list[str] | None = None, program: str = "") -> tuple[int, str]:
        """Run `ftjax ARGUMENTS`, or else a program, in a folder. Returns the exit status and what it printed."""
        with tempfile.NamedTemporaryFile("r") as said:
            asked = {"folder": str(folder), "said": said.name, "arguments": arguments, "program": program}
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            return status, said.read()

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve() -> None:
    """Import everything that a command may, then fork for each line of standard input."""
    import datasets  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import transformers

    import ftjax.cli
    import ftjax.stages
    import ftjax.verdict.run  # noqa: F401
    from ftjax.training import report

    report._tensorboard()
    transformers.AutoTokenizer.from_pretrained  # noqa: B018  # its module is imported when it is looked up
    gc.freeze()  # what is not looked through by a fork is not copied for it
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            for stream in (1, 2):
                os.dup2(os.open(asked["said"], os.O_WRONLY | os.O_APPEND), stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(asked["folder"])
            if asked["program"]:
                exec(compile(asked["program"], "program", "exec"), {"__name__": "__main__"})
                sys.exit()
            sys.argv = ["ftjax", *asked["arguments"]]
            sys.exit(ftjax.cli.main())
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
