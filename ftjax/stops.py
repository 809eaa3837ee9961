"""What happens when a process receives Ctrl-C (SIGINT), or SIGTERM, which clusters and `kill` send.

The first signal raises KeyboardInterrupt. Within `held` it is only recorded: a training run then finishes its step,
saves and stops by itself. The second signal ends the process at once, as a kill does. The first one does so too if
Python cannot handle it within GRACE seconds, for instance during a long compilation, when there is nothing to save.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

GRACE = 5.0  # seconds
ONE = 0.5  # seconds within which signals count as one: `timeout` and shells send theirs to a process and to its group

heard: list[int] = []  # the signals that this process received
_held = False
_obeyed = threading.Event()  # set when Python has handled the first signal
_at_exit: list[Callable] = []
_sent_again = 0  # number of signals that `_send_again` sent, which do not count as new ones


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Handle signals in the block as the module describes.

    Only in the main thread, and only signals whose usual handler is installed: a background job, for instance, ignores
    Ctrl-C.
    """
    global _sent_again
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    mine = [n for n, handler in usual.items() if signal.getsignal(n) is handler]
    if threading.current_thread() is not threading.main_thread() or not mine or os.name != "posix":
        yield
        return
    heard.clear()
    _obeyed.clear()
    _sent_again = 0
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    wakeup, report = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False), sys.unraisablehook
    for number in mine:
        signal.signal(number, _hear)
    sys.unraisablehook = functools.partial(_hook, thread=threading.get_ident(), report=report)
    threading.Thread(target=_watch, args=(receiver, mine), daemon=True).start()
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number in mine:
            signal.signal(number, usual[number])
        signal.set_wakeup_fd(wakeup)
        sender.close()  # which ends the thread


@contextlib.contextmanager
def held(on: bool = True) -> Iterator[None]:
    """Only record the first signal in the block. The caller checks `heard` and stops at the next good moment.

    on: False within a held block, for a part of it that may be interrupted at any moment.
    """
    global _held
    before, _held = _held, on
    if on and not before:
        heard.clear()
    try:
        yield
    finally:
        _held = before


def at_exit(f: Callable, *args) -> None:
    """As atexit.register, for a function that `leave` must also call."""
    atexit.register(f, *args)
    _at_exit.append(functools.partial(f, *args))


def leave(code: int) -> None:
    """End a process that was stopped. Python's normal exit destroys objects that other threads may still use, such as
    one that compiles, and then dies of SIGSEGV."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the process is already ending
    for f in _at_exit:
        f()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _hear(number, frame) -> None:
    heard.append(number)
    _obeyed.set()
    if _held:
        return
    while frame and frame.f_code is not _hook.__code__:
        frame = frame.f_back
    if not frame:
        raise KeyboardInterrupt
    _send_again(number, threading.get_ident())  # within _hook Python loses it too, and calls nothing


def _hook(lost, thread: int, report) -> None:
    """Raise a lost KeyboardInterrupt again. If one is raised in a callback, such as JAX's in each garbage collection,
    Python only reports it there, and the program continues."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        _send_again(heard[0] if heard else signal.SIGINT, thread)
    else:
        report(lost)


def _send_again(number: int, thread: int) -> None:
    """Send a signal to a thread once the callback has ended in which it was lost."""
    global _sent_again
    _sent_again += 1
    threading.Timer(0.05, signal.pthread_kill, (thread, number)).start()


def _watch(receiver: socket.socket, mine: list[int]) -> None:
    """End the process if its main thread cannot, or need not, handle a signal. `receiver` receives the number of each
    signal."""
    global _sent_again
    first, deadline = None, None  # first: (number, time) of the first signal; deadline: when it must be handled
    while True:
        receiver.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
        try:
            number = receiver.recv(1)
        except TimeoutError:
            if not _obeyed.is_set() and not _held:
                _end(first[0], "ended without waiting for what it was doing")
            deadline = None
            continue
        if not number:
            receiver.close()
            return
        if number[0] not in mine:
            continue
        if _sent_again:
            _sent_again -= 1
        elif first is None:
            first = number[0], time.monotonic()
            deadline = first[1] + GRACE
        elif time.monotonic() - first[1] > ONE:
            _end(number[0], "ended at once")


def _end(number: int, how: str) -> None:
    os.write(2, f"\nftjax: {how}; whole checkpoints stay as they are\n".encode())
    os._exit(128 + number)


def _forget() -> None:
    """In a forked process: restore the usual handlers. Otherwise its parent would take the signals of the fork for its
    own."""
    if signal.getsignal(signal.SIGINT) is _hear or signal.getsignal(signal.SIGTERM) is _hear:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.unraisablehook = sys.__unraisablehook__


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
