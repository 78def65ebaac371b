"""`reward-jax extract`: the reward of an expert relative to its base.

run/
  config.yaml, environment.json, metrics.jsonl, tensorboard/     (`common_jax/run.py`)
  checkpoints/         whole training states
  reward.safetensors   the network, its parameters for each seed, its unit
  diagnostics.json     explained fraction, antisymmetric part, agreement of seeds; for each t
"""

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common_jax.cli.options import MeshOptions, check_seed
from common_jax.errors import InputError
from common_jax.io.files import write_json
from common_jax.mesh import mesh_for
from common_jax.run import Run, check_directory
from reward_jax.commands.kept import read_kept
from reward_jax.commands.progress import check_resumed, reporter
from reward_jax.commands.train import optimiser, window_source
from reward_jax.data.files import read_episodes
from reward_jax.data.hdf5 import EpisodeEnds
from reward_jax.data.trajectory.checkpoint import (
    Space,
    TrajectoryGuide,
    expert_in_base_terms,
    load_model,
    save_guide,
)
from reward_jax.data.trajectory.windows import Episodes
from reward_jax.diffusion.denoiser import Score
from reward_jax.diffusion.loop import OnStep, steps_done
from reward_jax.diffusion.schedule import Schedule
from reward_jax.diffusion.sources import Mixed, Source
from reward_jax.models.reward_nets import HalfUnet, WindowMLP
from reward_jax.models.temporal.layers import Activation
from reward_jax.reward.diagnostics import antisymmetric_part, explained_fraction, seed_agreement
from reward_jax.reward.extract import RelativeReward, extract_reward, init_params
from reward_jax.reward.targets import GradientAt, Target, draw_targets

__all__ = [
    "ExtractConfig",
    "Matching",
    "RewardOptions",
    "check",
    "diagnose",
    "fit_reward",
    "run_extract",
]


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """The reward network.

    Args:
        kind: window (a network over windows of the trajectory) or half_unet.
        window: time steps of a window, a divisor of the horizon; 0 for the whole trajectory.
        widths: hidden layers of a window's network.
        act: activation. The gradient is what is trained: kinked ones fail (the authors' have
            leaky_relu).
        cut: windows of neighbouring steps, or strided as the authors cut them.
        reduce: over windows.
        dim: half_unet: unit of the channels, and width of the time embedding.
        multipliers: half_unet: channels of each level, in units of dim.
        groups: half_unet: of the group norms; 0 for none (the authors').
        use_bias: half_unet: of the convolutions; the authors' have none.
        head: window: linear, or activated: one more activation and scale (the authors').
    """

    kind: Literal["window", "half_unet"] = "window"
    window: int = 0
    widths: tuple[int, ...] = (64, 64)
    act: Activation = "silu"
    cut: Literal["contiguous", "strided"] = "contiguous"
    reduce: Literal["sum", "mean"] = "sum"
    dim: int = 4
    multipliers: tuple[int, ...] = (16, 16, 32, 32)
    groups: int = 8
    use_bias: bool = True
    head: Literal["linear", "activated"] = "linear"

    def make(self, space: Space) -> Any:
        """The module."""
        if min(*self.widths, *self.multipliers, 1) < 1 or self.window < 0:
            raise InputError(
                "reward.widths and reward.multipliers must be 1 or more, reward.window 0 or more"
            )
        if self.kind == "half_unet":
            channels = [self.dim * m for m in self.multipliers]
            groups = self.groups or 1  # the last blocks have half and a quarter of the channels
            whole = channels and groups > 0 and not any(c % groups for c in channels)
            if not whole or channels[-1] % (4 * groups) or self.dim % 4:
                raise InputError(
                    "reward.dim must be a multiple of 4, reward.groups 0 or more, and dim times "
                    f"reward.multipliers multiples of {groups}, the last of {4 * groups}; not "
                    f"{channels}"
                )
            return HalfUnet(
                self.dim,
                tuple(self.multipliers),
                act=self.act,
                groups=self.groups or None,
                use_bias=self.use_bias,
            )
        window = self.window or space.horizon
        if space.horizon % window:
            raise InputError(
                f"reward.window {window} does not divide the horizon {space.horizon}: choose one "
                "that does, or 0 for the whole trajectory"
            )
        return WindowMLP(
            window,
            tuple(self.widths),
            act=self.act,
            cut=self.cut,
            reduce=self.reduce,
            head=self.head,
        )


@dataclasses.dataclass(frozen=True)
class Matching:
    """How gradients are matched.

    Args:
        steps: optimiser steps.
        batch: noised trajectories of a step.
        learning_rate: of Adam; decays to 2% along a cosine, where decay is set.
        decay: see learning_rate.
        target: epsilon, score or posterior_mean (the authors').
        weighting: "" for none, or standardise: one over the target's mean square at each t.
        gradient_at: x_t, or posterior_mean (the authors').
        x_t: whose data is noised: mixed, base or expert. The expert's alone (the authors') leaves
            out where the two models differ.
        pin: impose the first state on x_t (the authors do not).
        draws: noised trajectories for which the teachers are asked, once; 0: anew at every step.
        seeds: rewards trained at once.
        steps_per_call: steps of one compiled call.
    """

    steps: int = 1500
    batch: int = 128
    learning_rate: float = 1e-3
    decay: bool = True
    target: Target = "epsilon"
    weighting: Literal["", "standardise"] = ""
    gradient_at: GradientAt = "x_t"
    x_t: Literal["mixed", "base", "expert"] = "mixed"
    pin: bool = True
    draws: int = 20000
    seeds: int = 3
    steps_per_call: int = 100


@dataclasses.dataclass
class ExtractConfig:
    """Extract a relative reward from two diffusion models.

    Args:
        base: the base's denoiser, a file or a run of `reward-jax train`.
        expert: the expert's, likewise.
        out: the run's directory; it must not exist yet, unless resume is given.
        data: the base's episodes, for matching.x_t mixed or base: x_t is noised data.
        expert_data: the expert's episodes, for matching.x_t mixed or expert.
        ends: where episodes of an HDF5 file end: at its marks, where the goal changes, nowhere
            (none: D4RL's Maze2D is one stream), or auto.
        held_out: share of the episodes that the diagnostics are measured on, and nothing else.
        reward: the network.
        matching: how it is trained.
        seed: of initial parameters and of all that is drawn.
        save_every: steps between checkpoints.
        resume: go on with the run in out, if there is one.
        mesh: devices; batches are cut over data and fsdp.
    """

    base: str
    expert: str
    out: str
    data: str | None = None
    expert_data: str | None = None
    ends: EpisodeEnds = "auto"
    held_out: float = 0.05
    reward: RewardOptions = dataclasses.field(default_factory=RewardOptions)
    matching: Matching = dataclasses.field(default_factory=Matching)
    seed: int = 0
    save_every: int = 500
    resume: bool = False
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


def fit_reward(
    base: Score,
    expert: Score,
    source: Source,
    space: Space,
    schedule: Schedule,
    options: RewardOptions,
    matching: Matching,
    *,
    seed: int,
    on_step: OnStep | None = None,
    checkpoints: pathlib.Path | None = None,
    save_every: int | None = None,
    mesh: Mesh | None = None,
) -> TrajectoryGuide:
    """Extract the reward of two scores over one space."""
    key = jax.random.key(seed)
    reward = options.make(space)
    pin = space.pin if matching.pin else None
    shared: dict[str, Any] = dict(
        target=matching.target,
        gradient_at=matching.gradient_at,
        pin=pin,
        batch_size=matching.batch,
    )
    batches: Any = source
    if matching.draws:
        batches = draw_targets(
            base, expert, source, schedule, count=matching.draws, key=key, mesh=mesh, **shared
        )
    params = init_params(reward, key, jnp.zeros((1, *space.shape)), matching.seeds)
    params, _ = extract_reward(
        base,
        expert,
        reward,
        params,
        batches,
        schedule,
        optimiser(matching.learning_rate, matching.steps, decay=matching.decay, clip=0.0),
        steps=matching.steps,
        key=jax.random.fold_in(key, 1),
        weighting=matching.weighting or None,
        seeds=matching.seeds,
        steps_per_call=matching.steps_per_call,
        on_step=on_step,
        checkpoints=checkpoints,
        save_every=save_every,
        mesh=mesh,
        **shared,
    )
    params = jax.tree.map(np.asarray, params)
    found = RelativeReward(params, schedule, reward, matching.target, matching.seeds)
    return TrajectoryGuide(found, space, schedule)


def diagnose(
    guide: TrajectoryGuide,
    base: Score,
    expert: Score,
    held_out: jax.Array,
    *,
    matching: Matching,
    seed: int = 0,
) -> dict[str, list[float]]:
    """The diagnostics at each t, for trajectories [B, H, D], best of episodes held out.

    matching: how the reward was trained: its pin and gradient_at are kept to.
    """
    reward, schedule = guide.guide, guide.schedule
    assert isinstance(reward, RelativeReward)
    key, pinned = jax.random.key(seed), guide.space.pin if matching.pin else None
    found = {
        "explained": explained_fraction(
            reward,
            base,
            expert,
            held_out,
            schedule,
            key=key,
            pin=pinned,
            gradient_at=matching.gradient_at,
        ),
        "antisymmetric": antisymmetric_part(
            base, expert, held_out[:64], schedule, key=key, probes=2, pin=pinned
        ),
    }
    if reward.seeds and reward.seeds > 1:
        at = base if matching.gradient_at == "posterior_mean" else None
        found["seed_agreement"] = seed_agreement(
            reward, held_out, key=key, pin=pinned, base_score=at
        )
    return {name: np.asarray(value, np.float64).tolist() for name, value in found.items()}


def run_extract(config: ExtractConfig) -> pathlib.Path:
    """Extract and write; returns the path of the reward.

    Raises InputError, before anything is written, where base and expert do not fit each other.
    """
    check(config)
    check_directory(config.out, resume=config.resume)
    mesh = mesh_for(dataclasses.asdict(config.mesh))
    base, expert = load_model(config.base), load_model(config.expert)
    expert_score, notes = expert_in_base_terms(base, expert, pin=config.matching.pin)
    for note in notes:
        print(f"note: {note}")
    space = dataclasses.replace(base.space, about=expert.space.about)
    config.reward.make(space)  # before anything is written
    names = [name for name in (config.data, config.expert_data) if name]  # see `check`
    episodes = [read_episodes(name, ends=config.ends) for name in names]
    parts = [hold_out(one, config.held_out, space) for one in episodes]
    source, apart = (Mixed(tuple(window_source(p[i], space) for p in parts)) for i in (0, 1))
    if config.held_out and any(p[0] is p[1] for p in parts):
        notes.append("too few episodes to hold some out: diagnostics are of those trained on")
        print(f"note: {notes[-1]}")
    out = pathlib.Path(config.out)
    written = dataclasses.asdict(config) | {"resume": False}
    done = steps_done(out / "checkpoints")
    check_resumed(out, written)
    with (
        Run(out, written, start=done) as run,
        reporter("matching gradients", config.matching.steps, run, done) as on_step,
    ):
        guide = fit_reward(
            base.denoiser,
            expert_score,
            source,
            space,
            base.denoiser.schedule,
            config.reward,
            config.matching,
            seed=config.seed,
            on_step=on_step,
            checkpoints=out / "checkpoints",
            save_every=config.save_every,
            mesh=mesh,
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


def hold_out(episodes: Episodes, share: float, space: Space) -> tuple[Episodes, Episodes]:
    """Episodes to train on, and every so-manieth of those that hold a window: all, if too few."""
    long = np.flatnonzero(episodes.lengths > (space.horizon - 1) * space.stride)
    every = round(1 / share) if share else len(long) + 1
    apart = np.zeros(len(episodes.lengths), bool)
    apart[long[every - 1 :: every]] = True
    if not apart.any():
        return episodes, episodes
    return episodes.choose(~apart), episodes.choose(apart)


def check(config: ExtractConfig) -> None:
    """InputError for settings that cannot be matched with."""
    check_seed(config.seed)
    m = config.matching
    if not 0 <= config.held_out <= 0.5:
        raise InputError(f"held_out must be 0 to .5, not {config.held_out}")
    for name, value in (
        ("matching.steps", m.steps),
        ("matching.batch", m.batch),
        ("matching.seeds", m.seeds),
        ("matching.steps_per_call", m.steps_per_call),
        ("save_every", config.save_every),
    ):
        if value < 1:
            raise InputError(f"{name} must be 1 or more, not {value}")
    if m.draws < 0:
        raise InputError(f"matching.draws must be 0 or more, not {m.draws}")
    if not m.learning_rate > 0:
        raise InputError(f"matching.learning_rate must be above 0, not {m.learning_rate}")
    for name, given, other in (
        ("data", config.data, "expert"),
        ("expert_data", config.expert_data, "base"),
    ):
        if m.x_t != other and not given:
            raise InputError(f"matching.x_t {m.x_t} needs {name}; give it, or x_t {other}")
        if m.x_t == other and given:
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
    return read_kept(path, wanted, mend)
