"""The one way to run a study: refused before anything is written, in parts, and once."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from common_jax import distributed
from common_jax.cli.options import MeshOptions
from common_jax.errors import InputError, Taken
from reward_jax.studies.base import Part, Study
from tests.processes import LIMIT


@dataclasses.dataclass
class Config:
    out: pathlib.Path
    size: int = 2
    names: tuple[str, ...] = ("a", "b")
    workers: int = 1
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


def study(done: list[str]) -> Study[Config]:
    def check(config: Config) -> None:
        if config.size < 1:
            raise InputError("size must be 1 or more")

    def parts(config: Config):
        for name in config.names:
            yield Part(name, lambda name=name: done.append(name))

    return Study(Config, check, parts, lambda config: {"made": done}, free=("out", "names"))


def test_parts_are_done_in_order_and_settings_kept(tmp_path):
    done: list[str] = []
    one, out = study(done), tmp_path / "out"
    assert one.run(Config(out)) == {"made": ["a", "b"]}
    assert one.run(Config(out, names=("b",)))["made"] == ["a", "b", "b"]
    with pytest.raises(InputError, match="the run there has size 2, not 3; give the same"):
        one.run(Config(out, size=3))
    assert done == ["a", "b", "b"]


def test_what_is_refused_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="size must be 1 or more"):
        study([]).run(Config(tmp_path / "out", size=0))
    assert not list(tmp_path.iterdir())


def test_a_mesh_that_cannot_be_is_refused_too(tmp_path):
    with pytest.raises(InputError, match="mesh 3000 x 1 x 1 .* wants 3000 devices"):
        study([]).run(Config(tmp_path / "out", mesh=MeshOptions(data=3000)))
    assert not list(tmp_path.iterdir())


def test_data_that_settings_only_name_are_kept_too(tmp_path):
    data, out = {}, tmp_path / "out"
    one = dataclasses.replace(study([]), check=lambda config: data)
    one.run(Config(out))  # as before data had a checksum
    data["rows (checksum of data)"] = "0a"
    one.run(Config(out))
    data["rows (checksum of data)"] = "0b"
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=r"has rows .checksum of data. '0a', not '0b'; give the"):
        one.run(Config(out))
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


@contextlib.contextmanager
def held(folder: pathlib.Path):
    """A process that holds a folder; it is killed at the end, or before."""
    code = "import sys, time; from common_jax import distributed, resume\n"
    code += "with resume.alone(sys.argv[1]): print(flush=True); time.sleep(600)"
    argv = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        yield other
        other.kill()


def until(found) -> None:
    end = time.monotonic() + LIMIT
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_part_that_another_process_is_at_is_waited_for(tmp_path, capfd):
    """The other is killed: its part is free, and done here, after all else."""
    done: list[str] = []
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").touch()
    with concurrent.futures.ThreadPoolExecutor() as pool, held(out / "b") as other:
        found = pool.submit(study(done).run, Config(out, names=("a", "b", "c")))
        until(lambda: "waiting for b, which another process is at" in capfd.readouterr().out)
        assert done == ["a", "c"] and not found.done()
        other.kill()
        assert found.result(LIMIT) == {"made": ["a", "c", "b"]}
    assert "waiting" not in capfd.readouterr().out


def test_a_part_that_needs_what_another_process_makes_is_tried_again(tmp_path, capsys):
    asked = []

    def needs() -> None:
        asked.append(None)
        if len(asked) < 3:
            raise Taken("the base is another's")

    def parts(config: Config):
        yield Part("a", needs)

    one = Study(Config, lambda config: None, parts, lambda config: {})
    one.run(Config(tmp_path / "out"))
    assert len(asked) == 3
    assert capsys.readouterr().out.count("waiting for a, which another process is at") == 1


# A study of a module, as workers want it: the first process is at `a` until a worker is at `b`,
# and notes who did a part.


def _do(config: Config, name: str) -> None:
    path = config.out / name / "who"
    if path.exists():
        return
    (config.out / name / "begun").touch()
    if name == "a":
        until((config.out / "b" / "begun").exists)
    elif is_worker():
        AT_B[config.size]()
    path.write_text(str(os.getpid()))


def is_worker() -> bool:
    return "serve()" in sys.orig_argv[-1]


def no_more() -> None:
    raise InputError("no worker can do this")


AT_B = {2: lambda: None, 3: lambda: os.kill(os.getpid(), signal.SIGKILL), 4: no_more}


def _check(config: Config) -> None:
    pass


def _parts(config: Config):
    for name in config.names[::-1] if is_worker() else config.names:
        yield Part(name, functools.partial(_do, config, name))


def _who(config: Config) -> dict[str, int]:
    found = {name: int((config.out / name / "who").read_text()) for name in config.names}
    (config.out / "who.json").write_text(json.dumps(found))
    return found


SHARED = Study(Config, _check, _parts, _who)


def test_a_worker_takes_parts(tmp_path):
    out = tmp_path / "out"
    who = SHARED.run(Config(out, workers=2))
    assert who["a"] == os.getpid() != who["b"]
    assert SHARED.run(Config(out, workers=1)) == who  # their number may change
    assert not list(out.rglob(".lock"))


def test_on_an_accelerator_there_is_one_worker(tmp_path, monkeypatch, capsys):
    """A second would find no memory, or no device."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    alone = dataclasses.replace(SHARED, parts=lambda config: [Part("b", lambda: None)])
    found = dataclasses.replace(alone, summarise=lambda config: {"workers": config.workers})
    assert found.run(Config(tmp_path / "out", workers=2)) == {"workers": 1}
    assert capsys.readouterr().out == "workers: 1, not 2: a gpu is for one process\n"
    found.run(Config(tmp_path / "out", workers=1))
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("size", "how"), [(3, "was killed by signal 9"), (4, "ended with exit")])
def test_what_a_worker_leaves_undone_is_done_without_it(tmp_path, size, how):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=f"worker 2 {how}"):
        SHARED.run(Config(out, size=size, workers=2))
    assert json.loads((out / "who.json").read_text()) == {"a": os.getpid(), "b": os.getpid()}


def test_workers_of_one_of_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(InputError, match="workers is 2, but this process is one of several"):
        SHARED.run(Config(tmp_path / "out", workers=2))
    assert not list(tmp_path.iterdir())
