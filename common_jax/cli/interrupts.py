"""What Ctrl-C does at each moment of a program: one line, exit code 130, and nothing else.

Before a command runs it ends the process at once: nothing is written yet. While one runs
(`interruptible`) it raises KeyboardInterrupt, as everywhere, so that what is half written is taken
away; whatever comes out of the command then is the interrupt (`came`), as libraries make other
errors of one that breaks off an import. Once the command has ended, when only threads are waited
for, it ends the process without a word.

What was broken off has threads that go on: XLA's compile, orbax's write. They say nothing any
more, and the process ends by `leave`, without Python's finalization, which takes away what they
stand on: they would die of signal 11, or of errors that each prints.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

__all__ = ["came", "guard", "interruptible", "leave"]


def guard(program: str) -> bool:
    """Take over SIGINT in a process of the program's own, unless it is ignored or taken.

    Returns whether it did.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, _Leave(f"{program}: interrupted\n"))
    return True


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """In the block, SIGINT raises KeyboardInterrupt; after it the process ends without a word."""
    if not isinstance(signal.getsignal(signal.SIGINT), _Leave):
        yield
        return
    raising = _Raising(sys.unraisablehook)
    sys.unraisablehook = raising.unraisable  # it stays: others may stand on it
    signal.signal(signal.SIGINT, raising.interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _Leave(""))


def came() -> bool:
    """Whether the command that ran was interrupted, whatever became of it."""
    return bool(_came)


def leave(code: int) -> NoReturn:
    """End the process with what was printed, and without waiting for any thread."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or interrupted while it was written to
            stream.flush()
    os._exit(code)


_came: list[None] = []  # one for each that was raised


class _Raising:
    """A handler that raises KeyboardInterrupt, and the hook for errors that cannot be caught.

    In a callback of the garbage collector, of which jax has one that runs often, an interrupt is
    lost: it is raised again. Other errors, after one, are of what it broke off: nobody hears of
    them.
    """

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self._hook, self._busy = hook, False

    def interrupt(self, *_: object) -> None:
        if self._busy:  # it would be lost; it comes again
            return
        _came.append(None)
        logging.disable()  # threads lose what they work on
        threading.excepthook = lambda _: None
        raise KeyboardInterrupt

    def unraisable(self, found: Any) -> None:
        if found.exc_type is KeyboardInterrupt:
            self._busy = True
            threading.Thread(target=self._again, args=(len(_came),), daemon=True).start()
            self._busy = False
        elif not came():
            self._hook(found)

    @staticmethod
    def _again(count: int) -> None:
        """Send SIGINT until it is raised: Python overlooks one just before a call that waits."""
        main = threading.main_thread().ident
        while main is not None and len(_came) == count:
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.1)


class _Leave:
    """A handler that ends the process at once, as one that was interrupted."""

    def __init__(self, line: str) -> None:
        self._line = line

    def __call__(self, *_: object) -> None:
        os.write(2, self._line.encode())
        leave(130)
