"""Ctrl-C at each moment of a program: one line, code 130, nothing else."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]

PROGRAM = """
import sys, pathlib
sys.path.insert(0, {folder!r})
from common_jax.cli.commands import Group, of_module
from common_jax.cli.program import start
commands = {{"work": of_module("works", "slow_command"), "more": Group("more", lambda: {{}})}}
sys.exit(start("artist", "Makes pictures.", commands))
"""

COMMAND = """
import dataclasses, os, pathlib, sys, threading, time

folder = pathlib.Path({folder!r})

def wait(moment):
    if {moment!r} == moment:
        (folder / "now").touch()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            time.sleep(0.01)

try:
    wait("import")
except BaseException as error:  # as a library's extension may
    raise ImportError("initialization failed") from error

@dataclasses.dataclass
class Config:
    '''Work.'''

def run(config):
    wait("command")
    if {moment!r} == "loading":  # what a module's own import makes of it
        try:
            wait("loading")
        except BaseException as error:
            raise ImportError("initialization failed") from error
    if {moment!r} == "threads":  # they lose what they work on
        import logging
        broken = threading.Event()
        def work():
            broken.wait()
            logging.getLogger("absl").error("operation failed")
            raise RuntimeError("cannot schedule new futures")
        thread = threading.Thread(target=work)
        thread.start()
        try:
            wait("threads")
        finally:
            broken.set()
            thread.join()
    if {moment!r} == "compiling":  # XLA's threads go on with it
        import jax
        def long(x):
            for _ in range(3000):
                x = jax.numpy.sin(x) @ x
            return x
        jax.jit(long).lower(jax.numpy.ones((8, 8))).compile()
        time.sleep(20)
    if {moment!r} == "callback":  # what is raised there is lost
        import gc
        def once(*_):
            gc.callbacks.clear()
            wait("callback")
        gc.callbacks.append(once)
        gc.collect()
        time.sleep(20)
    print("done")
    if {moment!r} == "end":
        def last():
            time.sleep(0.5)  # the command has ended
            wait("end")

        threading.Thread(target=last).start()
"""


@pytest.mark.parametrize(
    ("moment", "out", "err"),
    [
        ("import", "", "artist: interrupted\n"),
        ("command", "", "artist: interrupted\n"),
        ("loading", "", "artist: interrupted\n"),
        ("threads", "", "artist: interrupted\n"),
        ("compiling", "", "artist: interrupted\n"),
        ("callback", "", "artist: interrupted\n"),
        ("end", "done\n", ""),
    ],
)
def test_an_interrupt_is_one_line_at_every_moment(tmp_path, moment, out, err):
    folder = str(tmp_path)
    (tmp_path / "slow_command.py").write_text(COMMAND.format(folder=folder, moment=moment))
    (tmp_path / "artist.py").write_text(PROGRAM.format(folder=folder))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "artist.py"), "work"],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": f"--xla_dump_to={tmp_path}"}
        | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # XLA writes down what it compiles when it begins to.
    begun = "*jit_long*before_optimizations*" if moment == "compiling" else "now"
    while not any(tmp_path.glob(begun)):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)
    assert (process.returncode, *said) == (130, out, err)


def test_a_program_that_ignores_interrupts_still_does(tmp_path):
    """As one that a shell began in the background: its handler is left as it is."""
    code = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from common_jax.cli.program import start
assert start("artist", "", {}, ["--version"]) == 0
import sys; sys.argv = ["artist", "--version"]
assert start("artist", "", {}) == 0
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
