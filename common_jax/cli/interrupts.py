"""What Ctrl-C does at each moment of a program: one line, exit code 130, and nothing else.

While modules are loaded it ends the process at once: nothing is written yet, and an import that is
broken off inside a library raises anything. While a command runs (`interruptible`) it raises
KeyboardInterrupt, as everywhere. Once that has ended, when only threads are waited for, it ends
the process without a word.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["guard", "interruptible"]


def guard(program: str) -> None:
    """Take over SIGINT in a process of the program's own, unless it is ignored or taken."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _Leave(f"{program}: interrupted\n"))


@contextmanager
def interruptible() -> Iterator[None]:
    """In the block, SIGINT raises KeyboardInterrupt; after it the process ends without a word."""
    if not isinstance(signal.getsignal(signal.SIGINT), _Leave):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _Leave(""))


class _Leave:
    """A handler that ends the process at once, as one that was interrupted."""

    def __init__(self, line: str) -> None:
        self._line = line

    def __call__(self, *_: object) -> None:
        os.write(2, self._line.encode())
        os._exit(130)
