"""Errors of the tokenizers library, which is written in Rust, as errors of ours."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from common_jax.errors import InputError

__all__ = ["rust_errors"]


@contextlib.contextmanager
def rust_errors(what: str) -> Iterator[None]:
    """Make an InputError, "what: why" in one line, of whatever the library raises inside.

    That is bare Exceptions, and panics, which are no Exceptions at all; of a panic Rust also
    prints a report to the terminal, which is kept off it.
    """
    try:
        with _held_back_stderr():
            yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what}: {reason}") from None


@contextlib.contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Hold back what is written to the terminal's error stream; drop it if a panic follows."""
    sys.stderr.flush()
    try:
        terminal = os.dup(2)
    except OSError:  # closed
        yield
        return
    panicked = False
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException as error:
            panicked = type(error).__name__ == "PanicException"
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            if not panicked:
                held.seek(0)
                os.write(2, held.read())
