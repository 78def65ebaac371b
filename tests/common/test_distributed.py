"""Real processes: what they agree on, and how the others end when one is lost."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax._src.distributed import global_state  # the store has no public name

from common_jax import distributed
from common_jax.distributed import by_first, count, is_first, joined, meet
from common_jax.errors import InputError
from common_jax.watch import FAREWELL, PACE, Watch
from tests.processes import ROOT, Ended, collect, free_port, start

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


def test_all_meet_once_a_program_is_compiled_and_before_it_runs(monkeypatch):
    happened = []

    class Store:
        def wait_at_barrier(self, key: str, timeout_in_ms: int) -> None:
            happened.append("all met")

    def program(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: happened.append("ran"))
        return x + 1

    jax.devices()  # begun without the others
    monkeypatch.setattr(global_state, "client", Store())
    monkeypatch.setattr(Watch, "start", lambda *_: None)
    world, jitted = distributed._World("program", 0, 2, 0), jax.jit(program)
    with world.watched():
        for _ in range(2):
            jax.block_until_ready(jitted(np.zeros(3, np.float32)))
            jax.effects_barrier()
        assert happened == ["all met", "ran", "ran"]
        world.alone = True  # in what process 0 does for all, the others compile nothing
        jax.block_until_ready(jax.jit(lambda x: x + 2)(np.zeros(3, np.float32)))
    assert happened == ["all met", "ran", "ran"]


class Harm(NamedTuple):
    """What ends a group of processes; what those that are left say, and their exit code.

    act: of their own. sent: a signal, to process `whom`, which is not among those that are left.
    """

    said: str
    code: int = 1
    act: str = ""
    sent: signal.Signals | None = None
    whom: int | None = 1
    patience: int = 0
    processes: int = 2


LOST = "was lost: not a sign of life for 30 s (killed, or stopped); start all processes again"
OTHERS = "process 1 was started with norm 2, process 0 with norm 1: give all the same options"
ENDED = "process 0, which the others meet at, was lost (the lines above are JAX's own)"
STUCK = "process 1 made no step for 30 s (--patience), and the others wait; start all"
HARMS = {
    "killed": Harm(f"process 1 {LOST}", sent=signal.SIGKILL, processes=3),
    "stopped": Harm(f"process 1 {LOST}", sent=signal.SIGSTOP),
    "first killed": Harm(ENDED, sent=signal.SIGKILL, whom=0),
    "first stopped": Harm(f"process 0 {LOST}", sent=signal.SIGSTOP, whom=0),
    "stuck": Harm(STUCK, act="stick", patience=30),
    "refuse alone": Harm("process 1 ended (InputError: no such", code=2, act="refuse alone"),
    "refuse": Harm("no such file", code=2, act="refuse", whom=None),
    "disagree": Harm(OTHERS, code=2, act="disagree", whom=None, processes=3),
    "terminate": Harm("", code=143, act="terminate", whom=None),
}


@pytest.fixture(scope="module")
def left() -> dict[str, list[Ended]]:
    """Those that are left of each group. They run side by side: most of the time is waiting."""
    with contextlib.ExitStack() as stack:
        groups = {"end": stack.enter_context(start(MEMBER, ["--act", "end"], 2))}
        for name, harm in HARMS.items():
            argv = ["--act", harm.act, "--patience", harm.patience]
            groups[name] = stack.enter_context(start(MEMBER, argv, harm.processes))
        found = {}
        for name, group in groups.items():
            for one in group:
                one.wait_for("ready")
            found[name] = group
            if name in HARMS:
                harm = HARMS[name]
                found[name] = [one for i, one in enumerate(group) if i != harm.whom]
                if harm.whom is not None and harm.sent:
                    group[harm.whom].process.send_signal(harm.sent)
        return {name: collect(group) for name, group in found.items()}


@pytest.mark.parametrize("name", HARMS)
def test_others_end_and_say_why(left, name):
    """Within a minute of the last step of all, as their own looks at one another count it."""
    harm = HARMS[name]
    for one in left[name]:
        said = re.findall(r"^member: (?!process \d of \d: process 0 writes).*", one.err, re.M)
        assert len(said) == bool(harm.said), one
        assert harm.said in "".join(said) and one.code == harm.code, one
        looks = [int(n) for n in re.findall(r"^looks since its last step: (\d+)$", one.err, re.M)]
        assert len(looks) == (name != "first killed")  # which JAX ends, at once
        assert all(n * PACE + FAREWELL < 60 for n in looks), one


def test_what_is_printed_is_process_0_s(left):
    assert [(one.code, one.out) for one in left["end"]] == [(0, "done\n"), (0, "")]
