"""Several real processes of one command, joined over `jax.distributed`, one CPU device each."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

__all__ = [
    "LIMIT",
    "ROOT",
    "Ended",
    "Group",
    "Running",
    "collect",
    "free_port",
    "in_one_start",
    "start",
    "together",
]

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 900.0  # seconds: no test waits longer, however busy the machine is


class Ended(NamedTuple):
    """What a process left."""

    code: int
    out: str
    err: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Several processes that have ended.

    out: the folder of what they wrote. alone: of what one process makes of the same commands.
    """

    count: int
    ended: list[Ended]
    out: pathlib.Path
    alone: pathlib.Path


class Running(NamedTuple):
    """A process, and the folder with what it prints."""

    process: subprocess.Popen
    folder: pathlib.Path

    def said(self, name: str) -> str:
        """What it has printed so far on "out" or "err"."""
        return (self.folder / name).read_text("utf-8")

    def wait_for(self, line: str) -> None:
        """Wait until it has printed a text on stderr."""
        until = time.monotonic() + LIMIT
        while line not in self.said("err"):
            assert self.process.poll() is None and time.monotonic() < until, self.said("err")
            time.sleep(0.05)


def free_port() -> int:
    """A port that nobody has at this moment."""
    with contextlib.closing(socket.socket()) as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def start(
    module: str, argv: Sequence[Any], count: int, each: Sequence[Sequence[Any]] = ()
) -> Iterator[list[Running]]:
    """`python -m MODULE ARGV...` as `count` processes; those still there at the end are killed.

    each: what stands behind ARGV in one after another of them.
    """
    flags = re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])
    port, begun = free_port(), []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for i in range(count):
                own = pathlib.Path(folder) / str(i)
                own.mkdir()
                where = ["--coordinator", f"localhost:{port}", "--processes", count, "--process"]
                with (own / "out").open("wb") as out, (own / "err").open("wb") as err:
                    given = [*argv, *(each[i] if i < len(each) else ()), *where, i]
                    process = subprocess.Popen(
                        [sys.executable, "-m", module, *map(str, given)],
                        cwd=ROOT,
                        env=os.environ | {"XLA_FLAGS": flags},
                        stdout=out,
                        stderr=err,
                    )
                begun.append(Running(process, own))
            yield begun
        finally:
            for one in begun:
                one.process.kill()
                one.process.wait()


def collect(begun: Sequence[Running]) -> list[Ended]:
    """Wait for all of them."""
    return [Ended(one.process.wait(LIMIT), one.said("out"), one.said("err")) for one in begun]


def together(module: str, argv: Sequence[Any], count: int = 2) -> list[Ended]:
    """What the processes left; AssertionError with what they said where one failed."""
    with start(module, argv, count) as begun:
        found = collect(begun)
    assert not any(one.code for one in found), "\n".join(
        f"{o.code}: {o.err[-3000:]}" for o in found
    )
    return found


def in_one_start(
    program: str, runs: Sequence[Sequence[Any]], folder: pathlib.Path, count: int
) -> list[Ended]:
    """`together`, of commands one after another (`tests/several.py`); folder: for their list."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs, default=str), "utf-8")
    return together("tests.several", [program, file], count)
