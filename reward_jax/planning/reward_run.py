"""The run that extracts a reward, from files of models and episodes to a file of the reward.

    options = RewardRunOptions(base="runs/base", expert="runs/expert", out="runs/reward", ...)
    found = run_extraction(load_extraction(options), options)

run/
  config.yaml, environment.json, metrics.jsonl, tensorboard/     (`common_jax/run.py`)
  checkpoints/         whole training states
  reward.safetensors   the network, its parameters for each seed, its unit
  diagnostics.json     explained fraction, antisymmetric part, agreement of seeds; for each t
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from common_jax.checksum import checksum
from common_jax.cli.options import RunOptions
from common_jax.cli.ranges import HalfAtMost, PositiveInt, check_ranges
from common_jax.errors import InputError
from common_jax.io.files import read_json, write_json
from common_jax.mesh import mesh_for
from common_jax.run import check_directory
from reward_jax.data.checkpoint import load_guide, load_model, save_guide
from reward_jax.data.trajectory.convert import expert_in_base_coordinates
from reward_jax.data.trajectory.space import (
    TrajectoryGuide,
    TrajectoryModel,
    TrajectorySpace,
    check_steers,
)
from reward_jax.diffusion.denoiser import Score
from reward_jax.diffusion.sources import Mixed
from reward_jax.planning.extract import RewardOptions, diagnose, fit_reward, hold_out
from reward_jax.planning.fit import open_run, window_source
from reward_jax.planning.options import CutOption, PairOption, RewardNetOption
from reward_jax.reward.relative import RelativeReward
from reward_jax.tasks.find import read

__all__ = [
    "Extracted",
    "Extraction",
    "RewardRunOptions",
    "load_extraction",
    "read_diagnostics",
    "run_extraction",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRunOptions(RunOptions, RewardNetOption, CutOption, PairOption):
    """Extract a relative reward from two diffusion models.

    Args:
        init: a reward to begin with, a file or a run: its network, target and seeds are taken
            over, and matching.path_draws are on its own paths.
        data: the base's episodes, for matching.x_t mixed or base: x_t is noised data.
        expert_data: the expert's episodes, for matching.x_t mixed or expert.
        held_out: share of the episodes that the diagnostics are measured on, and nothing else.
    """

    init: str | None = None
    data: str | None = None
    expert_data: str | None = None
    held_out: HalfAtMost = 0.05
    save_every: PositiveInt = 500

    def check_data(self) -> None:
        """Raise InputError for data that are wanted and not given, or given and not read."""
        noised = self.matching.x_t
        for name, given, other in (
            ("data", self.data, "expert"),
            ("expert_data", self.expert_data, "base"),
        ):
            if noised != other and not given:
                raise InputError(f"matching.x_t {noised} needs {name}; give it, or x_t {other}")
            if noised == other and given:
                raise InputError(
                    f"{name} is not read with matching.x_t {other}: leave it out, or set mixed"
                )


@dataclasses.dataclass(frozen=True, eq=False)
class Extraction:
    """Two models that fit each other, and the windows that their scores are compared at.

    expert_score: in the base's coordinates. space: the base's, with the expert's `about`. source:
    of windows to train on. held_out: of those for diagnostics. begin: a reward to begin with.
    notes: what a user should know.
    """

    base: TrajectoryModel
    expert_score: Score
    space: TrajectorySpace
    source: Mixed
    held_out: Mixed
    begin: RelativeReward | None
    mesh: Mesh | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Extracted:
    """A reward, the file that it is in, and its diagnostics at each diffusion step."""

    path: pathlib.Path
    guide: TrajectoryGuide
    diagnostics: dict[str, list[float]]

    def __str__(self) -> str:
        middle = np.median(self.diagnostics["explained"])
        return (
            f"reward: {self.path}\nexplained fraction of the target, median over t: {middle:.2f}"
        )


def load_extraction(options: RewardRunOptions) -> Extraction:
    """Read models and episodes; writes nothing.

    Raises InputError where base and expert do not fit each other, or the run cannot be written.
    """
    check_ranges(options)
    options.check_data()
    check_directory(options.out, resume=options.resume)
    mesh = mesh_for(dataclasses.asdict(options.mesh))
    both = options.base, options.expert
    base, expert = (load_model(path, TrajectorySpace, mesh) for path in both)
    options.matching.check(base.denoiser.schedule.steps)
    expert_score, notes = expert_in_base_coordinates(base, expert, pin=options.matching.pin)
    space = dataclasses.replace(base.space, about=expert.space.about)
    begin = _begin(options, base, mesh) if options.init else None
    if options.reward.kind != "energy":
        options.reward.make(space)
    padding = options.cut.padding
    names = [name for name in (options.data, options.expert_data) if name]
    episodes = [read(name, ends=options.cut.ends, env=options.env) for name in names]
    parts = [hold_out(one, options.held_out, space, padding) for one in episodes]
    source, held_out = (
        Mixed(tuple(window_source(p[i], space, padding) for p in parts)) for i in (0, 1)
    )
    if options.held_out and any(p[0] is p[1] for p in parts):
        notes.append("too few episodes to hold some out: diagnostics are of those trained on")
    return Extraction(base, expert_score, space, source, held_out, begin, mesh, tuple(notes))


def _begin(options: RewardRunOptions, base: TrajectoryModel, mesh: Mesh | None) -> RelativeReward:
    """The reward to begin with; InputError for one that does not steer this base."""
    guide = load_guide(options.init or "", TrajectorySpace, mesh)
    if not isinstance(guide.guide, RelativeReward):
        raise InputError(f"{options.init}: holds a discriminator; a reward is wanted (init)")
    check_steers("base and the reward to begin with", base, guide)
    if options.reward != RewardOptions():
        raise InputError(
            "the network is that of the reward to begin with (init): leave reward out"
        )
    return guide.guide


def run_extraction(extraction: Extraction, options: RewardRunOptions) -> Extracted:
    """Train, diagnose and write, in the directory `options.out`, where a run goes on.

    options: those that the extraction was loaded with; its paths are noted, and not read again.
    Raises InputError when the loss is no longer finite, naming the step.
    """
    e, out = extraction, pathlib.Path(options.out)
    with open_run(
        out,
        dataclasses.asdict(options) | {"resume": False},
        "matching gradients",
        options.matching.steps,
        save_every=options.save_every,
        mesh=e.mesh,
        inputs={"init": checksum(e.begin)} if e.begin else None,
    ) as context:
        guide = fit_reward(
            e.base,
            e.expert_score,
            e.source,
            e.space,
            options.reward,
            options.matching,
            seed=options.seed,
            begin=e.begin,
            context=context,
        )
    rows = e.held_out.sample(jax.random.key(options.seed + 2), 256)
    found = diagnose(
        guide,
        e.base.denoiser,
        e.expert_score,
        rows,
        matching=options.matching,
        seed=options.seed,
    )
    path = out / "reward.safetensors"
    save_guide(path, guide)
    write_json(out / "diagnostics.json", found | {"notes": list(e.notes)})
    return Extracted(path, guide, found)


def read_diagnostics(run: str | pathlib.Path) -> dict[str, Any]:
    """What a run kept of its diagnostics; {} if nothing. InputError for a damaged file."""
    path = pathlib.Path(run) / "diagnostics.json"
    if not path.is_file():
        return {}
    wanted = {"explained": [None], "antisymmetric": [None]}
    mend = "delete it, and it is made again by `reward-jax extract --resume`"
    return read_json(path, wanted, mend)
