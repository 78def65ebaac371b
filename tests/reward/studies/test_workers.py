"""Processes that share work: they end with the first, and what became of each is told."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import pytest

from common_jax.errors import InputError
from reward_jax.studies.workers import beside, ended, with_devices
from tests.processes import LIMIT, ROOT


def note(folder: pathlib.Path) -> None:
    (folder / str(os.getpid())).touch()


def wait(folder: pathlib.Path) -> None:
    note(folder)
    time.sleep(600)


def fail(folder: pathlib.Path) -> None:
    raise InputError("no\nroom")


def die(folder: pathlib.Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


def names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_each_does_the_work(tmp_path):
    with beside(2, functools.partial(note, tmp_path)) as workers:
        ended(workers)
    assert names(tmp_path) == {str(one.pid) for one in workers}


def test_where_there_are_none_the_work_may_be_anything():
    with beside(0, lambda: None) as workers:
        ended(workers)
    assert workers == []


@pytest.mark.parametrize(
    ("work", "said"),
    [(fail, "ended with exit code 2"), (die, "was killed by signal 9")],
)
def test_one_that_fails_is_told(tmp_path, capfd, work, said):
    with beside(1, functools.partial(work, tmp_path)) as workers:
        with pytest.raises(InputError, match=f"worker 2 {said}; the others did its share"):
            ended(workers)
    wanted = "worker: error: no room\n" if work is fail else ""
    assert capfd.readouterr() == ("", wanted)


def test_those_that_are_left_are_ended(tmp_path):
    with beside(1, functools.partial(wait, tmp_path)) as workers:
        until(lambda: bool(names(tmp_path)))
    assert workers[0].poll() == -signal.SIGTERM


FIRST = """
import functools, pathlib, sys
from reward_jax.studies.workers import beside, ended, with_devices
from tests.reward.studies.test_workers import wait
with beside(1, functools.partial(wait, pathlib.Path(sys.argv[1]))) as workers:
    ended(workers)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_they_end_with_the_first(tmp_path, how):
    argv = [sys.executable, "-c", FIRST, str(tmp_path)]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as first:
        until(lambda: bool(names(tmp_path)))
        (worker,) = names(tmp_path)
        first.send_signal(how)
        assert first.wait(LIMIT) == -how
        until(lambda: not is_there(int(worker)))
        said = first.stderr.read() if first.stderr else ""
    # Ctrl-C: one word, of the first.
    assert said.count("KeyboardInterrupt") == (how == signal.SIGINT)


def is_there(process: int) -> bool:
    """Whether it runs; one that ended and is asked for by nobody is a zombie."""
    try:
        state = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _count(folder: pathlib.Path, wanted: int) -> None:
    with_devices(wanted)
    (folder / f"{wanted}-{jax.device_count()}").touch()
    with_devices(wanted + 1)  # in use by now
    assert jax.device_count() == wanted


@pytest.mark.parametrize("wanted", [1, 3])
def test_devices_of_a_cpu(tmp_path, monkeypatch, wanted):
    monkeypatch.delenv("XLA_FLAGS")
    with beside(1, functools.partial(_count, tmp_path, wanted)) as workers:
        ended(workers)
    assert names(tmp_path) == {f"{wanted}-{wanted}"}


def test_devices_that_the_user_counted_stay():
    before = jax.config.jax_num_cpu_devices
    with_devices(jax.device_count() + 1)  # eight, by XLA_FLAGS
    assert jax.config.jax_num_cpu_devices == before
