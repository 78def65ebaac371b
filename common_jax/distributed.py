"""Several processes that run one command as one program, over `jax.distributed`.

Every process runs the same host program, step for step: reads the same inputs, makes the same
batches, calls the same compiled programs over one mesh of all devices, of which each fills the
shards of its own devices alone. Process 0 writes: what changes files goes through `by_first`,
before which all meet, so that all see the same files at the same point of the program. Files lie
where all processes see them. With one process nothing here does anything.

JAX tells neither who was lost nor, in time, that someone was: a process that is stopped goes on
being waited for. So each watches the others (`common_jax/watch.py`).

Before the first run of a compiled program all meet: collectives over gloo (CPUs) fail where one
process arrives 30 s after another, which compiling alone may take (jax issue 40831).
"""

import atexit
import concurrent.futures
import contextlib
import ctypes
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from common_jax.errors import InputError, Taken
from common_jax.watch import AGAIN, PACE, SILENCE, Watch

__all__ = [
    "TERMINATED",
    "anywhere",
    "beat",
    "by_first",
    "count",
    "heard",
    "is_first",
    "joined",
    "meet",
    "there",
]

TERMINATED = 128 + signal.SIGTERM  # exit code of processes that end together, as they were told

_MEETING = 300.0  # seconds in which all processes begin
_MOST = 1 << 16  # processes; JAX's service makes room for as many as are said to come
_ADDRESS = re.compile(r"(?:[\w.-]{1,255}|\[[0-9a-fA-F:.]{2,45}\]):(\d{1,5})", re.ASCII)
_FOREVER = 7 * 24 * 3600 * 1000  # ms: who waits is ended by the watch, not by a limit of time
_COMPILED = "/jax/core/compile/backend_compile_duration"

_world: "_World | None" = None


def count() -> int:
    """How many processes run this program."""
    return _world.count if _world else 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return _world is None or _world.index == 0


def beat() -> None:
    """Note a step of the work, for the watch of steps."""
    if _world:
        _world.beats += 1


def meet() -> None:
    """Wait for all processes; they call it at the same point of the program."""
    if _world and not _world.alone:
        _world.meet()


def by_first(act: Callable[[], Any]) -> Any:
    """What `act` returns in process 0, where alone it is called, once all are here.

    The value is what JSON holds. Its InputError (or `Taken`) is raised in every process. All call
    it at the same point of the program; within `act`, process 0 is alone.
    """
    return _world.by_first(act) if _world and not _world.alone else act()


def there(path: pathlib.Path) -> bool:
    """Whether a file is there, in the eyes of process 0: all take the same way from here."""
    return by_first(path.exists)


def heard(what: str | None) -> list[tuple[int, str]]:
    """What processes say, by their number, of those that say anything; the same for all.

    All call it at the same point of the program.
    """
    if _world and not _world.alone:
        return _world.heard(what)
    return [] if what is None else [(0, what)]


def anywhere(so: bool) -> bool:
    """Whether it is so in any process; all ask at the same point of the program."""
    return bool(heard("so" if so else None))


@contextlib.contextmanager
def joined(
    program: str,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    patience: float = 0,
    alone: bool = False,
) -> Iterator[bool]:
    """Run the block as one of several processes; yields whether this one has anything to do.

    The three say where process 0 is, HOST:PORT, how many there are and which this is; without
    them Slurm, a TPU pod or mpirun does, or there is one process. patience: seconds without a step
    after which a process counts as stuck, 0 for no end. alone: the command is for one process:
    process 0 runs it without the others.

    Raises InputError for options of which some are missing. Ends the process, exit code 1, where
    another is lost.
    """
    given = coordinator, processes, process
    if any(x is not None for x in given):
        if coordinator is None or processes is None or process is None:
            raise InputError(
                "--coordinator, --processes and --process go together: give all three"
            )
        if process >= processes:
            raise InputError(
                f"--process {process} of --processes {processes}: they count from 0 to "
                f"{processes - 1}"
            )
        if processes > _MOST:
            raise InputError(f"--processes {processes}: there may be {_MOST} of them at most")
        address = _ADDRESS.fullmatch(coordinator)
        if not address or not 0 < int(address[1]) < 1 << 16:
            raise InputError(
                f"--coordinator {coordinator!r:.99}: give HOST:PORT, of process 0, such as "
                "localhost:9876"
            )
    elif (found := _launched(os.environ)) is not None:
        processes, process = found
    if processes in (None, 1):
        yield True
        return
    if alone:
        if process:
            print(f"{program}: process 0 runs this command alone", file=sys.stderr)
        elif "TPU_WORKER_HOSTNAMES" in os.environ:  # its chips wait for those of the others
            import jax

            jax.config.update("jax_platforms", "cpu")  # a variable is read when jax is imported
        yield not process
        return
    with _initialized(program, coordinator, processes, process, patience):
        yield True


def _launched(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """How many processes a launcher started, and which this is; None where none did.

    JAX finds the rest out by itself, where the names are there that it looks for: a script that
    Slurm runs without srun, say, is one process, though Slurm counts the tasks that it may start.
    """
    slurm = (
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_JOB_ID",
        "SLURM_STEP_NODELIST",
    )
    mpi = (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_MCA_orte_hnp_uri",
    )
    for size, rank, *others in (slurm, mpi):
        if all(name in environment for name in (size, rank, *others)):
            return _number(environment, size), _number(environment, rank)
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts:
        own = _number(environment, "TPU_WORKER_ID", "0")
        slices = _number(environment, "MEGASCALE_NUM_SLICES", "1")
        each = hosts.count(",") + 1
        return slices * each, _number(environment, "MEGASCALE_SLICE_ID", "0") * each + own
    return None


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    value = environment.get(name, default)
    if not re.fullmatch(r"\d{1,9}", value, re.ASCII):
        raise InputError(f"{name}={value!r:.99}, which a launcher sets, is no number")
    return int(value)


@contextlib.contextmanager
def _initialized(
    program: str,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    patience: float,
) -> Iterator[None]:
    global _world
    import jax

    # SIGTERM, with which Slurm and Kubernetes announce an end, ends the process as ever.
    jax.config.update("jax_enable_preemption_service", False)
    by_hand: Any = {} if coordinator is None else {"cluster_detection_method": "deactivate"}
    if coordinator is None:
        processes = process = None  # JAX's own count holds
    if coordinator is not None and process == 0:
        _check_port(coordinator)
    elif coordinator is not None:
        _check_alone(coordinator, process)
    where = f" at {coordinator}" if coordinator else ""
    mend = f"start all of them within {_MEETING:g} s, at a host and a port that process 0 has free"

    def give_up() -> None:  # JAX would abort, with its stack
        os.write(2, f"{program}: error: the processes did not meet{where}: {mend}\n".encode())
        os._exit(2)

    timer = threading.Timer(_MEETING, give_up)
    timer.daemon = True
    timer.start()
    # Our watch is the first to speak: JAX's heartbeats would end the process without a name.
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=round(2 * _MEETING),
            heartbeat_timeout_seconds=100,
            **by_hand,
        )
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(f"the processes could not meet{where} ({why}): {mend}") from error
    finally:
        timer.cancel()
    world = _World(program, jax.process_index(), jax.process_count(), patience)
    with world.watched():
        _world = world
        try:
            with _printing(world):
                yield
                world.meet()  # no one leaves while another works
        finally:
            _world = None
    jax.distributed.shutdown()


def _check_port(coordinator: str) -> None:
    """InputError where the port is not free here: JAX's service would crash."""
    port = int(coordinator.rpartition(":")[2])
    try:
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("", port))
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--coordinator {coordinator}: process 0 cannot meet others at port {port} ({error}); "
            "give one that is free on its host"
        ) from error


_held: list[socket.socket] = []  # until this process ends


def _check_alone(coordinator: str, process: int | None) -> None:
    """InputError where this process runs on this host already: its double would end the run."""
    if sys.platform != "linux":  # whose names of sockets go with their process
        return
    one = socket.socket(socket.AF_UNIX)
    try:
        one.bind(f"\0tuco-reward {coordinator[:64]} {process}")
    except OSError as error:
        one.close()
        raise InputError(
            f"--process {process}: a process {process} of {coordinator} runs on this host "
            "already; each has a number of its own, and each run a port"
        ) from error
    _held.append(one)


@contextlib.contextmanager
def _printing(world: "_World") -> Iterator[None]:
    """What a command prints, process 0 does; others say once where it goes.

    What gloo prints goes to stderr: it would stand among the command's own lines.
    """
    sys.stdout.flush()
    if world.index:
        print(f"{world}: process 0 writes and prints the results", file=sys.stderr, flush=True)
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(os.devnull if world.index else os.dup(own), "w") as out:
            with contextlib.redirect_stdout(out):
                yield
    finally:
        os.dup2(own, 1)
        os.close(own)


class _World:
    """This process among the others. alone: in what `by_first` calls."""

    def __init__(self, program: str, index: int, count: int, patience: float) -> None:
        from jax._src.distributed import global_state  # the store has no public name

        self._program, self.index, self.count = program, index, count
        self._store: Any = global_state.client
        self.beats, self.alone = 0, False
        self._meetings, self._said = itertools.count(), itertools.count()
        self._asked = itertools.count()
        self._waiting = concurrent.futures.ThreadPoolExecutor(1)
        self._watch = Watch(self._store, index, count, patience, self._end)
        self._leaving, self._code = False, 1
        self._aborting = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)

    def __str__(self) -> str:
        return f"{self._program}: process {self.index} of {self.count}"

    def meet(self) -> None:
        self.beats += 1
        self._wait(self._store.wait_at_barrier, f"tuco_reward/meet/{next(self._meetings)}")

    def _wait(self, call: Callable[[str, int], Any], key: str) -> Any:
        """A call that waits for others, in a thread, so that this one answers to Ctrl-C."""
        return self._waiting.submit(call, key, _FOREVER).result()

    def by_first(self, act: Callable[[], Any]) -> Any:
        self.meet()
        number = next(self._said)
        key = f"tuco_reward/said/{number}"
        if self.index:
            said = json.loads(self._wait(self._store.blocking_key_value_get, key))
            if "error" in said:
                raise (Taken if said["taken"] else InputError)(said["error"])
            return said["value"]
        if number:
            self._store.key_value_delete(f"tuco_reward/said/{number - 1}")  # all have read it
        self.alone = True
        said = None
        try:
            said = {"value": act()}
            return said["value"]
        except InputError as error:
            said = {"error": str(error), "taken": isinstance(error, Taken)}
            raise
        finally:
            self.alone = False
            if said is not None:
                self._store.key_value_set(key, json.dumps(said))

    def heard(self, what: str | None) -> list[tuple[int, str]]:
        place = f"tuco_reward/heard/{next(self._asked)}/"
        if what is not None:
            self._store.key_value_set(f"{place}{self.index}", what)

        def all_of_them() -> list[tuple[int, str]]:
            found = self._store.key_value_dir_get(place)
            return sorted((int(key.rpartition("/")[2]), text) for key, text in found)

        return [(process, text) for process, text in self.by_first(all_of_them)]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look after the others, and let them know how this one ends."""
        import jax.monitoring

        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        signal_of = ctypes.CDLL(None).signal
        signal_of.restype, signal_of.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
        before = signal_of(signal.SIGABRT, ctypes.cast(self._aborting, ctypes.c_void_p))
        self._watch.start(lambda: self.beats)
        try:
            yield
        except BaseException as error:
            if _of_another(error):
                time.sleep(SILENCE + 5 * PACE)  # the watch says who it was
            agreed = isinstance(error, SystemExit) and error.code == TERMINATED
            self._leaving = True
            self._code = TERMINATED if agreed else 2 if _told(error) else 1
            atexit.unregister(jax.distributed.shutdown)  # it would wait for those that are left
            what = None if agreed else f"{type(error).__name__}: {error}"  # all know the former
            self._watch.tell(what, self._code)
            raise
        else:
            signal_of(signal.SIGABRT, before)
        finally:
            self._leaving = True
            self._watch.stop()
            jax.monitoring.unregister_event_duration_listener(self._compiled)

    def _compiled(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Once a program is compiled, and before it runs, wait for who still compiles it."""
        mine = threading.current_thread() is threading.main_thread()
        if event == _COMPILED and mine and not self.alone and not self._leaving:
            self.meet()

    def _aborted(self, _: int) -> None:
        """JAX's client aborts where the service is gone: its line, with a name."""
        if not self._leaving:  # for a reason that has been told
            lost = (
                "aborted" if self.index == 0 else "process 0, which the others meet at, was lost"
            )
            self._print(f"{lost} (the lines above are JAX's own); {AGAIN}")
        os._exit(self._code)

    def _end(self, what: str, code: int) -> None:
        """End this process, because of another; process 0 once the others know why."""
        if self._leaving:  # it ends by itself
            return
        self._print(what)
        self._watch.tell(None, code)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)

    def _print(self, what: str) -> None:
        os.write(2, f"{self}: {what}\n".encode())


def _told(error: BaseException) -> bool:
    return isinstance(error, InputError)


def _of_another(error: BaseException) -> bool:
    """Whether an error may be what the loss of another process looks like here."""
    signs = ("Gloo", "gloo", "coordination", "Connection closed", "NCCL", "barrier")
    return (
        isinstance(error, Exception) and not _told(error) and any(w in str(error) for w in signs)
    )
