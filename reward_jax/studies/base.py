"""What a study of diffusion models is, and the one way to run one.

A study trains many models, for hours: it is cut into parts, each with a folder of its own, and
one that was stopped goes on where it stood. Its module holds `Config`, the options, and `STUDY`:

    check(config)           InputError for what cannot be studied; writes nothing; returns
                            checksums, by name, of data that the settings only name, if there are
                            any: later starts must be of the same
    parts(config)           its parts, in order; each makes what its folder lacks
    summarise(config)       results.json and the report, from what the parts left

`Study.run` does what all of them share: the folder, its settings, and who works where.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import jax

from common_jax import distributed, resume
from common_jax.cli.options import MeshOptions
from common_jax.cli.ranges import PositiveInt
from common_jax.errors import InputError, Taken
from common_jax.mesh import mesh_for, part_cpu
from common_jax.run import check_directory, note_run
from reward_jax.studies.workers import beside, ended

__all__ = ["AmountOption", "Part", "Study", "WorkersOption"]

_PACE = 1.0  # seconds between looks at what another process holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class AmountOption:
    """How much data a study records.

    Args:
        base_episodes: of a base's data.
        expert_episodes: of an expert's.
    """

    base_episodes: PositiveInt = 2000
    expert_episodes: PositiveInt = 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkersOption:
    """How many processes share the parts of a study.

    Args:
        workers: processes that take its parts, side by side on the cores of a CPU; on a GPU or a
            TPU, which one process has for itself, there is one.
    """

    workers: PositiveInt = 1


class _Options(Protocol):
    @property
    def out(self) -> pathlib.Path: ...
    @property
    def mesh(self) -> MeshOptions: ...
    @property
    def workers(self) -> int: ...


Config = TypeVar("Config", bound=_Options)


@dataclasses.dataclass(frozen=True)
class Part:
    """Work in `out/NAME`, held alone: several processes may take a part each.

    run: does what is not done yet; `Taken` where it waits for what another process is at.
    """

    name: str
    run: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Study(Generic[Config]):
    """One experiment.

    config: class of its options, a dataclass with the folder `out`, a `mesh` and `workers`. check,
    parts, summarise: see the module; check sees a folder that is empty or of the same settings.
    free: settings that may change from start to start, beside the number of workers.
    """

    config: type[Config]
    check: Callable[[Config], Mapping[str, str] | None]
    parts: Callable[[Config], Iterable[Part]]
    summarise: Callable[[Config], dict[str, Any]]
    free: Collection[str] = ("out", "mesh")

    def run(self, config: Config) -> dict[str, Any]:
        """Do what is not done yet; writes and returns the summary.

        Other processes in the same folder, `workers` of this one or started apart, take parts as
        this one does, and what they are at is waited for; a part whose process dies is free again.
        Raises InputError before anything is written, for what `check` refuses and where the folder
        holds something else, or the study of other settings or data; and once all is done, where
        a worker has failed.
        """
        part_cpu(config.workers)
        settings, free = _plain(config), {*self.free, "workers"}
        check_directory(config.out, resume=True)
        resume.check(config.out, settings, free=free)
        data = self.check(config) or {}
        resume.check(config.out, data)
        mesh_for(dataclasses.asdict(config.mesh))
        if config.workers > 1 and distributed.count() > 1:
            raise InputError(
                f"workers is {config.workers}, but this process is one of several (--processes), "
                "which do all together: give one of the two"
            )
        config = _alone_on_accelerator(config)
        note_run(config.out, settings)
        resume.settle(config.out, settings | {**data}, free=free)
        with beside(config.workers - 1, functools.partial(self.work, config)) as workers:
            self.work(config)
            found: list[dict[str, Any]] = []
            _each([Part("report", lambda: found.append(self.summarise(config)))], config.out)
            ended(workers)
        return found[0]

    def work(self, config: Config) -> None:
        """Do all parts, but for those that other processes do; returns when all are done."""
        part_cpu(config.workers)
        _each(self.parts(config), config.out)


def _alone_on_accelerator(config: Config) -> Config:
    """One worker where the first would keep the device, or most of its memory, from others."""
    backend = jax.default_backend()
    if config.workers == 1 or backend == "cpu":
        return config
    print(f"workers: 1, not {config.workers}: a {backend} is for one process", flush=True)
    return dataclasses.replace(config, workers=1)  # pyright: ignore[reportArgumentType]


def _each(parts: Iterable[Part], out: pathlib.Path) -> None:
    """Run the parts in order, those that another process is at when that is done with them."""
    left, waited = list(parts), ""
    while left:
        later = []
        for part in left:
            try:
                with resume.alone(out / part.name):
                    part.run()
            except Taken:
                later.append(part)
        if len(later) == len(left):
            if waited != later[0].name:
                waited = later[0].name
                print(f"waiting for {waited}, which another process is at", flush=True)
            time.sleep(_PACE)
        left = later


def _plain(config: Any) -> dict[str, Any]:
    """Settings as a YAML file holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
