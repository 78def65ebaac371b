"""A training run's directory: its settings, its environment and its metrics.

run/
  config.yaml         settings, ready to be given to the command again
  settings.json       those that must be the same when it is resumed (`common_jax.resume`)
  environment.json    of each start: revision, versions, devices, precision, time and command
  metrics.jsonl       one object a logged step
  tensorboard/        the same numbers
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import yaml

from common_jax import resume as resuming
from common_jax.distributed import beat, by_first, is_first, there
from common_jax.errors import InputError
from common_jax.io.files import cannot_write, make_folder, parse_json, write_text, writing
from common_jax.machine import processor
from common_jax.precision import stated

__all__ = [
    "Run",
    "check_directory",
    "check_run",
    "environment",
    "held_run",
    "made_by",
    "note_run",
    "read_metrics",
]

_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def check_directory(directory: str | pathlib.Path, *, resume: bool = False) -> None:
    """Raise InputError, naming the directory, where a run cannot be written; writes nothing.

    A run that is already there needs `resume`. A directory that holds something else, or that
    another run is writing to, is refused. Of several processes, process 0 looks for all.
    """
    by_first(lambda: _check_directory(directory, resume))


def _check_directory(directory: str | pathlib.Path, resume: bool) -> None:
    path = pathlib.Path(directory).absolute()
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{directory}: {existing} is a file; name a directory for the run")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{directory}: {existing} cannot be written to; name another directory")
    resuming.check_alone(directory)
    if path.is_dir() and any(path.iterdir()):
        if not any((path / name).is_file() for name in ("config.yaml", "settings.json")):
            raise InputError(f"{directory}: is not empty and holds no run; name a new directory")
        if not resume:
            raise InputError(
                f"{directory}: holds a run already; go on with it by --resume, or name a new "
                "directory"
            )


@contextlib.contextmanager
def held_run(
    directory: str | pathlib.Path, command: str, config: Mapping[str, Any]
) -> Iterator[None]:
    """`note_run` of a command's results, in a directory that it holds alone.

    Raises InputError where another process holds it, and where it holds results of another command
    or of other settings (`out` and `mesh` aside). Settings of a start that left no result go.
    """
    path = pathlib.Path(directory)
    _check_no_training(path)
    settings = {"command": command, **config}
    with resuming.hold(path, settings, free=("out", "mesh")):
        try:
            note_run(path, config)
            yield
        finally:
            noted = {resuming.SETTINGS, resuming.LOCK, "config.yaml", "environment.json"}
            if is_first() and {p.name for p in path.iterdir()} <= noted:
                (path / resuming.SETTINGS).unlink()


def check_run(directory: str | pathlib.Path, command: str, config: Mapping[str, Any]) -> None:
    """Raise InputError as `held_run`, before any of the command's work; writes nothing."""
    _check_no_training(directory)
    resuming.check_alone(directory)
    resuming.check(directory, {"command": command, **config}, free=("out", "mesh"))


def _check_no_training(directory: str | pathlib.Path) -> None:
    if there(pathlib.Path(directory) / "metrics.jsonl"):
        raise InputError(f"{directory}: holds a training run; name another directory")


def note_run(directory: str | pathlib.Path, config: Mapping[str, Any]) -> None:
    """Make the directory, and write a command's config.yaml and environment.json there.

    Paths among the settings become text. Raises InputError where it cannot be written, and for
    the directory of a training run, whose own settings would be lost.
    """
    _check_no_training(directory)
    _note(directory, config)


def _note(directory: str | pathlib.Path, config: Mapping[str, Any]) -> None:
    path = make_folder(directory)
    plain = {k: str(v) if isinstance(v, pathlib.PurePath) else v for k, v in config.items()}
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    write_text(path / "config.yaml", text)
    _note_environment(path / "environment.json")


class Run:
    """An open run directory. Use as a context: leaving it closes the files.

    Of several processes, process 0 writes them.
    """

    def __init__(
        self, directory: str | pathlib.Path, config: Mapping[str, Any], *, start: int = 0
    ) -> None:
        """Open or make the directory.

        start: the step from which the run is resumed, 0 for a new one. Later lines of the log, of
        steps after the last checkpoint, are removed: those steps are run, and logged, again.
        """
        self.directory, self.start = pathlib.Path(directory), start
        self._metrics: Any = None
        self._board: Any = None
        from common_jax.io.board import Board  # not above: commands that draw none start sooner

        path, board = self.directory / "metrics.jsonl", self.directory / "tensorboard"
        _note(directory, config)
        by_first(lambda: self._keep_until(start))
        if not is_first():
            return
        with writing(path):
            self._metrics = path.open("a", encoding="utf-8")
        with writing(board):
            self._board = Board(board, start)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for path, close in (("metrics.jsonl", self._metrics), ("tensorboard", self._board)):
            try:
                if close is not None:
                    close.close()
            except OSError as error:  # a full disk, once more
                if kind is None:
                    raise cannot_write(self.directory / path, error) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics of `step`, at once: a kill loses none that were logged.

        Raises InputError where they cannot be written, as on a full disk.
        """
        beat()
        if self._metrics is None or self._board is None:
            return
        with writing(self.directory / "metrics.jsonl"):
            line = json.dumps({"step": step, **metrics}, ensure_ascii=False)
            self._metrics.write(line + "\n")
            self._metrics.flush()
        with writing(self.directory / "tensorboard"):
            self._board.log(step, metrics)

    def _keep_until(self, step: int) -> None:
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return
        lines = [line for line, row in _lines(path) if row["step"] <= step] if step else []
        write_text(path, "".join(lines))


def read_metrics(directory: str | pathlib.Path) -> list[dict[str, float]]:
    """A run's metrics, each with its "step"; [] if none. Raises InputError for a damaged line."""
    path = pathlib.Path(directory) / "metrics.jsonl"
    return [row for _, row in _lines(path)] if path.is_file() else []


def _lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, float]]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):  # a kill in the middle of a write
            continue
        try:
            row = parse_json(line)
            int(row["step"])
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            what = f"{path}:{number}: not a line of metrics; remove it to go on"
            raise InputError(what) from error
        yield line, row


def environment() -> dict[str, Any]:
    """Time, command, git revision, devices, precision of products, and versions; plain JSON."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "revision": _revision(),
        "devices": [str(d.device_kind) for d in jax.devices()],
        "processor": processor(),
        "matmul_precision": stated(),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
    }


def made_by(directory: str | pathlib.Path, *packages: str) -> dict[str, str]:
    """What made a run's results, in all of its starts, as facts of a report.

    packages: those whose versions are told beside JAX's, as they are now.
    """
    starts = _starts(pathlib.Path(directory) / "environment.json") or [environment()]

    def all_of(name: str) -> str:
        said = (one.get(name) for one in starts)
        flat = (x for one in said for x in (one if isinstance(one, list) else [one]))
        return ", ".join(dict.fromkeys("not noted" if x is None else str(x) for x in flat))

    return {
        "device": all_of("devices"),
        "processor": all_of("processor"),
        "precision of products": all_of("matmul_precision"),
        "revision": all_of("revision"),
        "versions": ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", *packages)),
    }


def _note_environment(path: pathlib.Path) -> None:
    write_text(path, json.dumps([*_starts(path), environment()], indent=1) + "\n")


def _starts(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        starts = parse_json(path.read_bytes()) if path.exists() else []
    except ValueError:  # cut short by a kill: its lines are lost, the run is not
        starts = []
    return [x for x in starts if isinstance(x, dict)] if isinstance(starts, list) else []


def _revision() -> str | None:
    """The revision of the code that runs, "+" when files were changed; None outside git."""
    here = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(here), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
