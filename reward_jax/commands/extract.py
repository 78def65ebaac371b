"""`reward-jax extract`: the reward of an expert relative to its base.

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

from common_jax.cli.options import RunOptions
from common_jax.cli.ranges import HalfAtMost, PositiveInt, check_ranges
from common_jax.errors import InputError
from common_jax.io.files import read_json, write_json
from common_jax.mesh import mesh_for
from common_jax.run import check_directory
from reward_jax.data.trajectory.checkpoint import load_model, save_guide
from reward_jax.data.trajectory.convert import expert_in_base_coordinates
from reward_jax.data.trajectory.windows import CutOptions
from reward_jax.diffusion.sources import Mixed
from reward_jax.planning.extract import Matching, RewardOptions, diagnose, fit_reward, hold_out
from reward_jax.planning.fit import open_run, window_source
from reward_jax.tasks.find import read

__all__ = ["Config", "read_diagnostics", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Extract a relative reward from two diffusion models.

    Args:
        base: the base's denoiser, a file or a run of `reward-jax train`.
        expert: the expert's, likewise.
        data: the base's episodes, for matching.x_t mixed or base: x_t is noised data.
        expert_data: the expert's episodes, for matching.x_t mixed or expert.
        cut: how the file is divided into episodes, and episodes into windows.
        held_out: share of the episodes that the diagnostics are measured on, and nothing else.
        reward: the network.
        matching: how it is trained.
    """

    base: str
    expert: str
    data: str | None = None
    expert_data: str | None = None
    cut: CutOptions = dataclasses.field(default_factory=CutOptions)
    held_out: HalfAtMost = 0.05
    reward: RewardOptions = dataclasses.field(default_factory=RewardOptions)
    matching: Matching = dataclasses.field(default_factory=Matching)
    save_every: PositiveInt = 500


def run(config: Config) -> pathlib.Path:
    """Extract and write; returns the path of the reward.

    Raises InputError, before anything is written, where base and expert do not fit each other.
    """
    check_ranges(config)
    _check_data(config)
    check_directory(config.out, resume=config.resume)
    mesh = mesh_for(dataclasses.asdict(config.mesh))
    base, expert = load_model(config.base), load_model(config.expert)
    expert_score, notes = expert_in_base_coordinates(base, expert, pin=config.matching.pin)
    for note in notes:
        print(f"note: {note}")
    space = dataclasses.replace(base.space, about=expert.space.about)
    config.reward.make(space)  # before anything is written
    names = [name for name in (config.data, config.expert_data) if name]
    episodes = [read(name, ends=config.cut.ends) for name in names]
    parts = [hold_out(one, config.held_out, space, config.cut.padding) for one in episodes]
    source, apart = (
        Mixed(tuple(window_source(p[i], space, config.cut.padding) for p in parts)) for i in (0, 1)
    )
    if config.held_out and any(p[0] is p[1] for p in parts):
        notes.append("too few episodes to hold some out: diagnostics are of those trained on")
        print(f"note: {notes[-1]}")
    out = pathlib.Path(config.out)
    written = dataclasses.asdict(config) | {"resume": False}
    steps = config.matching.steps
    with open_run(
        out, written, "matching gradients", steps, save_every=config.save_every, mesh=mesh
    ) as context:
        guide = fit_reward(
            base,
            expert_score,
            source,
            space,
            config.reward,
            config.matching,
            seed=config.seed,
            context=context,
        )
    rows = apart.sample(jax.random.key(config.seed + 2), 256)
    found = diagnose(
        guide, base.denoiser, expert_score, rows, matching=config.matching, seed=config.seed
    )
    path = out / "reward.safetensors"
    save_guide(path, guide)
    write_json(out / "diagnostics.json", found | {"notes": notes})
    middle = np.median(found["explained"])
    print(f"reward: {path}\nexplained fraction of the target, median over t: {middle:.2f}")
    return path


def _check_data(config: Config) -> None:
    """InputError for data that are wanted and not given, or given and not read."""
    noised = config.matching.x_t
    for name, given, other in (
        ("data", config.data, "expert"),
        ("expert_data", config.expert_data, "base"),
    ):
        if noised != other and not given:
            raise InputError(f"matching.x_t {noised} needs {name}; give it, or x_t {other}")
        if noised == other and given:
            raise InputError(
                f"{name} is not read with matching.x_t {other}: leave it out, or set mixed"
            )


def read_diagnostics(run: str | pathlib.Path) -> dict[str, Any]:
    """What a run kept of its diagnostics; {} if nothing. InputError for a damaged file."""
    path = pathlib.Path(run) / "diagnostics.json"
    if not path.is_file():
        return {}
    wanted = {"explained": [None], "antisymmetric": [None]}
    mend = "delete it, and it is made again by `reward-jax extract --resume`"
    return read_json(path, wanted, mend)
