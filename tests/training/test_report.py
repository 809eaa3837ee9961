"""What a run shows: one line that fits the terminal, a line a logged step in a file, and the truth after Ctrl-C."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from ftjax import progress
from ftjax.training import report
from ftjax.training.loop import saved_so_far
from ftjax.training.report import Progress

TRAINED = {"loss": 1.23456, "lr": 1e-4, "grad_norm": 0.5}


def terminal(columns: int):
    """(stream, read): a terminal so wide, and what was written to it."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    stream, found = os.fdopen(theirs, "w"), []

    def read() -> str:
        stream.flush()
        os.set_blocking(ours, False)
        try:
            while chunk := os.read(ours, 1 << 16):
                found.append(chunk.decode())
        except OSError:
            pass
        stream.close()
        os.close(ours)
        return "".join(found)

    return stream, read


def shown(text: str, columns: int) -> list[str]:
    """The lines that a terminal of so many columns holds after this text; longer ones wrap."""
    lines = [""]
    for piece in re.split(r"(\r\x1b\[K|\r\n|\n)", text):
        if piece == "\r\x1b[K":
            lines[-1] = ""
        elif piece in ("\n", "\r\n"):
            lines.append("")
        else:
            whole = lines.pop() + piece
            lines += [whole[i : i + columns] for i in range(0, max(len(whole), 1), columns)]
    return [line for line in lines if line]


def fed(stream, tokens=100) -> Progress:
    p = Progress(20_000, 0, 1e6, 1e12, stream)
    p.count(tokens)
    p.begin -= 40  # seconds ago
    for _ in range(10):
        p.count(tokens)
    return p


@pytest.mark.parametrize("columns, there", [(120, ("tokens/s", "lr", "grad")), (80, ("mcc", "left")), (40, ("loss",))])
def test_a_terminal_shows_one_line_that_fits_it(columns, there):
    stream, read = terminal(columns)
    p = fed(stream)
    for step in (9, 10, 11):
        p.show(step, TRAINED)
    p.show(11, {"val_loss": 2.5, "val_mcc": None})
    p.show(12, TRAINED)
    p.end()
    kept, last = shown(read(), columns)
    assert kept.startswith("step    11/20000") and last.startswith("step    12/20000  loss 1.2346")
    assert all(word in last for word in there) and len(last) < columns
    assert columns < 80 or "val 2.5000  mcc undefined" in kept


def test_a_file_gets_a_line_for_every_logged_step():
    stream = io.StringIO()
    p = fed(stream)
    p.show(10, TRAINED)
    p.show(11, {"val_loss": 2.5})
    p.show(20, TRAINED)
    p.end()
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("step    10/20000  loss 1.2346  lr 1.00e-04  grad 0.50") and first.endswith("left")
    assert second.startswith("step    11/20000  val 2.5000")
    assert third.startswith("step    20/20000  loss 1.2346  lr")  # the loss of step 11 is not shown as that of step 20


def test_the_speed_is_that_of_training_without_validation(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    p = Progress(5, 0, 1.0, None, io.StringIO())
    p.count(10)
    for _ in range(2):
        now[0] += 1
        p.count(10)
    with p.aside("validating"):
        now[0] += 6
    assert p.rates(3) == {
        "tokens_per_second": 10.0,
        "seconds_left": 8.0,
    }  # 20 tokens in 2 s; 8 s for 2 steps, so 2 more


def test_long_work_gives_a_sign_of_life(monkeypatch):
    monkeypatch.setattr(progress, "SOON", 0.01)
    monkeypatch.setattr(progress, "LATER", 0.01)
    stream = io.StringIO()
    with progress.doing("compiling", stream), progress.doing("a part of it", stream):
        time.sleep(0.2)
    assert stream.getvalue().startswith("compiling: 0:00 so far\ncompiling: 0:00 so far\n")
    assert "part" not in stream.getvalue() and threading.active_count() < 50
    short = io.StringIO()
    monkeypatch.setattr(progress, "SOON", 60)
    with progress.doing("brief", short):
        pass
    assert short.getvalue() == ""


def test_what_is_said_after_ctrl_c_is_what_lies_on_disk(tmp_path):
    assert "nothing was written" in saved_so_far()
    assert "no checkpoint yet, and the same command starts at step 0" in saved_so_far(tmp_path, 40)
    for name in ("8", "20", "24.orbax-checkpoint-tmp-1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert "the last checkpoint is that of step 20 of 40" in saved_so_far(tmp_path, 40)
    assert "all 20 steps are trained and saved" in saved_so_far(tmp_path, 20)


LOST = """
import gc, sys, time
from ftjax import stops
listening = stops.listening()
listening.__enter__()
def callback(phase, info):
    if phase == "start" and not sent:
        sent.append(1)
        raise KeyboardInterrupt
sent = []
gc.callbacks.append(callback)
try:
    gc.collect()
    time.sleep(30)
except KeyboardInterrupt:
    print("heard")
"""


SLOW = """
import threading, time
class Slow(threading.Timer):
    slow = True
    def start(self):
        super().start()
        if Slow.slow:
            Slow.slow = False
            time.sleep(0.3)
threading.Timer = Slow
"""


@pytest.mark.parametrize("machine", ["", SLOW])  # a slow one is still in the callback when the signal comes again
def test_a_ctrl_c_that_python_loses_in_a_callback_is_heard(machine):
    done = subprocess.run(
        [sys.executable, "-c", machine + LOST],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert (done.stdout, done.stderr) == ("heard\n", "")


def test_torch_is_not_imported_where_it_happens_to_be_installed(tmp_path):
    """TensorBoard's events are written by a library that imports torch wherever it finds it."""
    program = f"""
import pathlib, sys
from ftjax import config
from ftjax.training import loop, report
sink = report.Metrics(pathlib.Path({str(tmp_path)!r}), config.default(), 0)
sink.write(1, {{"loss": 0.5}})
sink.close()
assert "torch" not in sys.modules, "torch"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
