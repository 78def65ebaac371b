"""Processes beside this one that do the same work; who takes what, they settle by locks.

Each is told by its standard input what to call, and ends with that pipe: with the process that
began it, whatever ends that. Ctrl-C does not reach them: it ends the first, and so all.
"""

import contextlib
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax

from common_jax.cli.command_line import one_line
from common_jax.errors import InputError

__all__ = ["beside", "ended", "serve", "with_devices"]

_SERVE = "from reward_jax.studies.workers import serve; serve()"


def with_devices(count: int) -> None:
    """So many devices of this process's CPU, one for each process that shares the work.

    While others wait for what one of them makes, that one can make it on all of the devices. To be
    called before devices are used; where they are, or were counted by the user, they stay so.
    """
    if "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if count > 1 and jax.config.jax_num_cpu_devices < count:
        with contextlib.suppress(RuntimeError):  # devices are in use
            jax.config.update("jax_num_cpu_devices", count)


@contextlib.contextmanager
def beside(count: int, work: Callable[[], Any]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that call `work`, of some module; those there at the end are ended."""
    task, begun = pickle.dumps(work) if count else b"", []
    try:
        for _ in range(count):
            one = subprocess.Popen(
                [sys.executable, "-c", _SERVE],
                stdin=subprocess.PIPE,
                process_group=0,  # Ctrl-C is this process's
            )
            begun.append(one)
            assert one.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: `ended` says so
                one.stdin.write(task)
                one.stdin.flush()
        yield begun
    finally:
        for one in begun:
            one.terminate()
            with contextlib.suppress(BrokenPipeError):
                one.communicate()


def ended(workers: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Wait for them; InputError where one was killed, or failed: others did its share."""
    for number, code in enumerate([one.wait() for one in workers], 2):
        if code:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise InputError(f"worker {number} {how}; the others did its share, and all is done")


def serve() -> NoReturn:
    """What such a process does."""
    from common_jax.io import compile_cache

    sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)
    work = pickle.load(sys.stdin.buffer)  # noqa: S301 (of the process that began this one)
    threading.Thread(target=_end_with_first, daemon=True).start()
    compile_cache.enable()
    code = 0
    try:
        work()
    except InputError as error:
        print(f"worker: error: {one_line(str(error))}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    os._exit(code)


class _NoTerminal(io.TextIOWrapper):
    """What draws no bars: they are the first process's."""

    def isatty(self) -> bool:
        return False


def _end_with_first() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
