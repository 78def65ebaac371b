"""What orbax says of its errors, beside raising them: in a log, from threads, and late."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without orbax's words on its errors in the block, which raise one of their own."""
    if not isinstance(sys.unraisablehook, _WithoutLateCallbacks):  # for good: they are late
        sys.unraisablehook = _WithoutLateCallbacks(sys.unraisablehook)
    logging.getLogger("asyncio").addFilter(_is_of_others)
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except BaseException:
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise
    finally:
        logger.setLevel(level)


def _is_of_others(record: logging.LogRecord) -> bool:
    """Whether it is of no task of orbax, which leaves those beside the first that failed."""
    return "orbax" not in record.getMessage()


class _WithoutLateCallbacks:
    """A hook for errors that nobody can catch, which says nothing of orbax's late callbacks.

    Reads and writes that end after it has given up on the others call back into an event loop
    that is closed by then; each would print a traceback.
    """

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self._before = before

    def __call__(self, what: Any) -> None:
        late = isinstance(what.exc_value, RuntimeError) and "loop is closed" in str(what.exc_value)
        if not late:
            self._before(what)
