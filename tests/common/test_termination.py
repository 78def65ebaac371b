"""SIGTERM: noted where a training looks for it, and what it always was everywhere else."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from common_jax.termination import Terminated, noticed
from tests.processes import ROOT


def tell() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def default():
    """The signal ends this process."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_signal_is_noted(default):
    said = r"told to end \(SIGTERM\): step 3 is saved"
    with pytest.raises(Terminated, match=said) as raised, noticed() as ending:
        assert not ending()
        tell()
        assert ending() and ending()
        raise Terminated("step 3 is saved")
    assert raised.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_error_goes_before_the_signal(default):
    """What is wrong is said; the process ends by that."""
    with pytest.raises(ValueError, match="wrong"), noticed():
        tell()
        raise ValueError("wrong")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


LATE = """
import os, signal
from common_jax.termination import noticed
with noticed() as ending:
    assert not ending()
    os.kill(os.getpid(), signal.SIGTERM)
    print("saved", flush=True)
print("not here")
"""


def test_a_signal_after_the_last_question_ends_the_process_after_the_block():
    done = subprocess.run([sys.executable, "-c", LATE], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "saved\n"), done.stderr


def test_a_handler_of_a_program_s_own_stays(default):
    came = []
    signal.signal(signal.SIGTERM, lambda *_: came.append(None))
    with noticed() as ending:
        tell()
        assert came and not ending()


def test_in_a_thread_nothing_is_noted(default):
    found = []

    def look() -> None:
        with noticed() as ending:
            found.append((ending(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(False, signal.SIG_DFL)]
