"""What Ctrl-C does at each moment of a program: one line, exit code 130, and nothing else.

While modules are loaded it ends the process at once: nothing is written yet, and an import that is
broken off inside a library raises anything. While a command runs (`interruptible`) it raises
KeyboardInterrupt, as everywhere, but where the command itself loads modules (`loading`). Once that
has ended, when only threads are waited for, it ends the process without a word.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["guard", "interruptible", "loading"]

_guards: list["_Leave"] = []  # that of this process, if it is a program's own


def guard(program: str) -> None:
    """Take over SIGINT in a process of the program's own, unless it is ignored or taken."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _guards[:] = [_Leave(f"{program}: interrupted\n")]
        signal.signal(signal.SIGINT, _guards[0])


@contextmanager
def interruptible() -> Iterator[None]:
    """In the block, SIGINT raises KeyboardInterrupt; after it the process ends without a word."""
    if not isinstance(signal.getsignal(signal.SIGINT), _Leave):
        yield
        return
    hook = sys.unraisablehook
    sys.unraisablehook = lambda found: _unheard(found) or hook(found)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _Leave(""))  # the hook stays: others may stand on it


@contextmanager
def loading() -> Iterator[None]:
    """In the block, where a command imports what takes time, SIGINT ends the process at once."""
    if not _guards:
        yield
        return
    before = signal.signal(signal.SIGINT, _guards[0])
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _unheard(found: Any) -> bool:
    """Whether it is an interrupt that was raised where nobody hears it; it is then raised again.

    As in a callback of the garbage collector: jax has one, which runs often.
    """
    if found.exc_type is not KeyboardInterrupt:
        return False
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.01, signal.pthread_kill, [main, signal.SIGINT]).start()
    return True


class _Leave:
    """A handler that ends the process at once, as one that was interrupted."""

    def __init__(self, line: str) -> None:
        self._line = line

    def __call__(self, *_: object) -> None:
        os.write(2, self._line.encode())
        os._exit(130)
