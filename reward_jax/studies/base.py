"""What a study of diffusion models is, and the one way to run one.

A study trains many models, for hours: it is cut into parts, each with a folder of its own, and
one that was stopped goes on where it stood. Its module holds `Config`, the options, and `STUDY`:

    check(config)           InputError for what cannot be studied; writes nothing
    parts(config)           its parts, in order; each makes what its folder lacks
    summarise(config)       results.json and the report, from what the parts left

`Study.run` does what all of them share: the folder, its settings, and who works where.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, Protocol, TypeVar

from common_jax import resume
from common_jax.cli.options import MeshOptions
from common_jax.cli.ranges import PositiveInt
from common_jax.errors import InputError, Taken
from common_jax.mesh import mesh_for
from common_jax.run import check_directory, note_run

__all__ = ["AmountOption", "Part", "Study"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AmountOption:
    """How much data a study records.

    Args:
        base_episodes: of a base's data.
        expert_episodes: of an expert's.
    """

    base_episodes: PositiveInt = 2000
    expert_episodes: PositiveInt = 600


class _Options(Protocol):
    @property
    def out(self) -> pathlib.Path: ...
    @property
    def mesh(self) -> MeshOptions: ...


Config = TypeVar("Config", bound=_Options)


@dataclasses.dataclass(frozen=True)
class Part:
    """Work in `out/NAME`, held alone: several processes may take a part each."""

    name: str
    run: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Study(Generic[Config]):
    """One experiment.

    config: class of its options, a dataclass with the folder `out` and a `mesh`. check, parts,
    summarise: see the module; check sees a folder that is empty or of the same settings. free:
    settings that may change from start to start.
    """

    config: type[Config]
    check: Callable[[Config], None]
    parts: Callable[[Config], Iterable[Part]]
    summarise: Callable[[Config], dict[str, Any]]
    free: Collection[str] = ("out", "mesh")

    def run(self, config: Config) -> dict[str, Any]:
        """Do what is not done yet; writes and returns the summary.

        Parts that another process is at are left to it; where it is not done when all others are,
        InputError says so, for there is no summary yet. Raises InputError before anything is
        written, for what `check` refuses and where the folder holds something else, or the study
        of other settings.
        """
        settings = _plain(config)
        check_directory(config.out, resume=True)
        resume.check(config.out, settings, free=self.free)
        self.check(config)
        mesh_for(dataclasses.asdict(config.mesh))
        note_run(config.out, settings)
        resume.settle(config.out, settings, free=self.free)
        held = []
        for part in self.parts(config):
            try:
                with resume.alone(config.out / part.name):
                    part.run()
            except Taken:
                held.append(part.name)
                print(f"{part.name}: another process is at it", flush=True)
        if held:
            raise InputError(
                f"{config.out}: another process is at {', '.join(held)}, all else is done; the "
                "same command, when that is done, too, writes the summary"
            )
        return self.summarise(config)


def _plain(config: Any) -> dict[str, Any]:
    """Settings as a YAML file holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
