"""Real processes: what they agree on, and how the others end when one is lost."""

import contextlib
import re
import signal
import socket
import subprocess
import sys

import pytest

from common_jax.distributed import by_first, count, is_first, joined, meet
from common_jax.errors import InputError
from tests.processes import ROOT, collect, free_port, start, together

MEMBER = "tests.common.member"


def test_one_process_needs_none_of_it(monkeypatch):
    for name in ("SLURM_LOCALID", "TPU_WORKER_HOSTNAMES", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined("program") as takes_part:
        assert takes_part and count() == 1 and is_first() and by_first(lambda: 3) == 3
        meet()


@pytest.mark.parametrize(
    "given, message",
    [
        (("host:1", 2, None), "go together: give all three"),
        ((None, None, 0), "go together: give all three"),
        (("host:1", 2, 2), "--process 2 of --processes 2: they count from 0 to 1"),
        (("host:1", 3, 5), "--process 5 of --processes 3: they count from 0 to 2"),
        (("host:1", 10**9, 0), "--processes 1000000000: there may be 65536 of them at most"),
    ],
)
def test_options_that_say_too_little_or_too_much(given, message):
    with pytest.raises(InputError, match=message), joined("program", *given):
        pass


@pytest.mark.parametrize(
    "given",
    [
        *("host", "", ":", ":1", "host:", "host:x", "host:-1", "host:0", "host:70000", "host:1:2"),
        *("host:1 ", "ho st:1", "host:1\n", "http://host:1", "unix:/tmp/x:1", "host:\u00b2"),
        *("\x1b[2J:1", "$(id):1", "[::g]:1", 300 * "h" + ":1", "host:" + 5000 * "1"),
    ],
    ids=range(21),
)
@pytest.mark.parametrize("process", [0, 1])
def test_a_coordinator_that_is_no_address(given, process):
    """At once and in one line; JAX would look for some of them for five minutes."""
    said = r"--coordinator .{0,99}: give HOST:PORT, of process 0, such as localhost:9876"
    with pytest.raises(InputError) as raised, joined("program", given, 2, process):
        pass
    assert re.fullmatch(said, str(raised.value)) and "\x1b" not in str(raised.value)


NOBODY_COMES = """
import sys
from common_jax import distributed
distributed._MEETING = 2
with distributed.joined("program", sys.argv[1], 2, int(sys.argv[2])):
    pass
"""


@pytest.mark.parametrize("process", [0, 1])
def test_others_that_never_come(process):
    """One that nobody comes to, and one at whose address nobody listens; JAX would abort."""
    where = f"localhost:{free_port()}"
    argv = [sys.executable, "-c", NOBODY_COMES, where, str(process)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"program: error: the processes did not meet at {where}: start all of them within 2 s, at "
        "a host and a port that process 0 has free\n"
    )


def test_a_port_that_process_0_cannot_have():
    """JAX's service died of signal 11."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        said = f"--coordinator localhost:{port}: process 0 cannot meet others at port {port} "
        with pytest.raises(InputError, match=said), joined("p", f"localhost:{port}", 2, 0):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such names")
def test_a_process_that_runs_already():
    """The one that came second would end them all."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("\0tuco-reward localhost:45 1")
        said = "--process 1: a process 1 of localhost:45 runs on this host already; each has a"
        with pytest.raises(InputError, match=said), joined("p", "localhost:45", 2, 1):
            pass


SLURM = {"SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_JOB_ID": "7"}


def test_a_script_that_slurm_runs_without_srun_is_one_process(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    with joined("program", alone=True) as takes_part:
        assert takes_part and count() == 1


def test_a_launcher_s_variable_that_is_no_number(monkeypatch):
    for name, value in (SLURM | {"SLURM_STEP_NODELIST": "n", "SLURM_NTASKS": "4(x2)"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"SLURM_NTASKS='4\(x2\)', which a launcher sets, is no"):
        with joined("program"):
            pass


@pytest.mark.parametrize(
    "environment",
    [
        SLURM | {"SLURM_STEP_NODELIST": "node[1-4]"},
        {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"},
        {
            "TPU_WORKER_HOSTNAMES": "a,b",
            "TPU_WORKER_ID": "0",
            "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_SLICE_ID": "1",
        },
    ],
)
def test_a_command_for_one_process_is_process_0_s(environment, monkeypatch, capsys):
    """A launcher's environment says which process this is."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with joined("program", alone=True) as takes_part:
        assert not takes_part
    assert capsys.readouterr().err == "program: process 0 runs this command alone\n"


def test_what_is_printed_is_process_0_s():
    found = together(MEMBER, ["--act", "end"])
    assert [one.out for one in found] == ["done\n", ""]


def test_others_end_and_say_why():
    """Each case is a group of two; they run side by side, for most of the time is waiting."""
    cases = {
        "killed": (["--act", ""], "process 1 was lost: not a sign of life for 30 s", 1),
        "stopped": (["--act", ""], "process 1 was lost: not a sign of life for 30 s", 1),
        "first killed": (["--act", ""], "process 0, which the others meet at, was lost", 1),
        "stuck": (
            ["--act", "stick", "--patience", 30],
            "process 1 made no step for 30 s (--patience), and the others wait",
            1,
        ),
        "refuse alone": (["--act", "refuse alone"], "process 1 ended (InputError: no such", 2),
        "refuse": (["--act", "refuse"], "member: error: no such file", 2),
    }
    with contextlib.ExitStack() as stack:
        groups = {k: stack.enter_context(start(MEMBER, v[0], 2)) for k, v in cases.items()}
        for name, group in groups.items():
            for one in group:
                one.wait_for("ready")
            if name == "killed":
                group[1].process.kill()
            if name == "stopped":
                group[1].process.send_signal(signal.SIGSTOP)
            if name == "first killed":
                group[0].process.kill()
        for name, (_, message, code) in cases.items():
            survivor = groups[name][1 if name == "first killed" else 0]
            (left,) = collect([survivor])
            assert message in left.err and left.code == code, f"{name}: {left}"
