"""The run that extracts a reward, from files of models and data to a file of the reward.

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
from reward_jax.data.model import Space, SpaceGuide, SpaceModel
from reward_jax.diffusion.denoiser import Score
from reward_jax.diffusion.sources import Mixed
from reward_jax.planning.extract import diagnose, fit_reward
from reward_jax.planning.fit import open_run
from reward_jax.planning.kinds import Kind, check_own, kind_of_model
from reward_jax.planning.options import AnyRewardNetOption, CutOption, PairOption
from reward_jax.reward.relative import RelativeReward

__all__ = [
    "Extracted",
    "Extraction",
    "RewardRunOptions",
    "load_extraction",
    "read_diagnostics",
    "run_extraction",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRunOptions(RunOptions, AnyRewardNetOption, CutOption, PairOption):
    """Extract a relative reward from two diffusion models.

    Args:
        init: a reward to begin with, a file or a run: its network, target and seeds are taken
            over, and matching.path_draws are on its own paths.
        data: the base's data, for matching.x_t mixed or base: x_t is noised data. Images are read
            as the model's were: of its size, and without the classes that were left out.
        expert_data: the expert's data, likewise, for matching.x_t mixed or expert.
        held_out: share of the data that the diagnostics are measured on, and nothing else.
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
    """Two models that fit each other, and the samples that their scores are compared at.

    expert_score: in the base's coordinates. space: the base's, with the expert's `about`. network:
    options of the reward's. source: of samples to train on. held_out: of those for diagnostics.
    begin: a reward to begin with. notes: what a user should know.
    """

    base: SpaceModel[Any]
    expert_score: Score
    space: Space
    network: Any
    source: Mixed
    held_out: Mixed
    begin: RelativeReward | None
    mesh: Mesh | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Extracted:
    """A reward, the file that it is in, and its diagnostics at each diffusion step."""

    path: pathlib.Path
    guide: SpaceGuide[Any]
    diagnostics: dict[str, list[float]]

    def __str__(self) -> str:
        middle = np.median(self.diagnostics["explained"])
        return (
            f"reward: {self.path}\nexplained fraction of the target, median over t: {middle:.2f}"
        )


def load_extraction(options: RewardRunOptions) -> Extraction:
    """Read models and data; writes nothing.

    Raises InputError where base and expert do not fit each other, or the run cannot be written.
    """
    check_ranges(options)
    options.check_data()
    check_directory(options.out, resume=options.resume)
    mesh = mesh_for(dataclasses.asdict(options.mesh))
    kind = kind_of_model(options.base)
    check_own(kind, f"{options.base} is", options)
    base, expert = (load_model(p, kind.space, mesh) for p in (options.base, options.expert))
    options.matching.check(base.denoiser.schedule.steps)
    expert_score, notes = kind.expert_score(base, expert, pin=options.matching.pin)
    space = dataclasses.replace(base.space, about=expert.space.about)
    network = kind.reward(options)
    begin = _begin(options, kind, base, network, mesh) if options.init else None
    kind.check_reward(network, space)
    given = ((options.data, base), (options.expert_data, expert))
    samples = [kind.read(path, model.space, options) for path, model in given if path]
    parts = [one.hold_out(options.held_out, space) for one in samples]
    source, held_out = (Mixed(tuple(p[i].source(space) for p in parts)) for i in (0, 1))
    if options.held_out and any(p[0] is p[1] for p in parts):
        notes.append(f"too few {kind.parts} to hold some out: diagnostics are of those trained on")
    return Extraction(
        base, expert_score, space, network, source, held_out, begin, mesh, tuple(notes)
    )


def _begin(
    options: RewardRunOptions,
    kind: Kind[Any],
    base: SpaceModel[Any],
    network: Any,
    mesh: Mesh | None,
) -> RelativeReward:
    """The reward to begin with; InputError for one that does not steer this base."""
    guide = load_guide(options.init or "", kind.space, mesh)
    if not isinstance(guide.guide, RelativeReward):
        raise InputError(f"{options.init}: holds a discriminator; a reward is wanted (init)")
    kind.check_steers("base and the reward to begin with", base, guide)
    if network != type(network)():
        raise InputError(
            "the network is that of the reward to begin with (init): leave "
            f"{kind.reward_option} out"
        )
    return guide.guide


def run_extraction(extraction: Extraction, options: RewardRunOptions) -> Extracted:
    """Train, diagnose and write, in the directory `options.out`, where a run goes on.

    options: those that the extraction was loaded with; its paths and its network are noted, and
    not read again.
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
            e.network,
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
