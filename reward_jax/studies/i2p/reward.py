"""The reward of safe guidance: a half U-Net on latents, matched to stored pairs at every step.

    grad_y r(y, t) = d / (size of d at t),    y = (x_t - its mean at t) / (its deviation at t)

with d = eps_base - eps_safe, which is sqrt(1 - abar_t) times the difference of scores. Sizes are
one number a step (`timestep`), so that r is the relative reward times a number at each t; or one a
step and entry of the latents (`pixel`), a weighting of entries, under which r orders latents but
is no multiple of it; or 1 (`none`): epsilon space. Where d is nothing, as in a warm-up, so is its
target. The authors standardise by pixel: the latents and, by the latents' own deviation, the
difference of the next ones.

Legend: S evaluations of the model in a chain, h, w, C of latents, B batch.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common_jax import struct
from common_jax.cli.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from common_jax.io.files import read_arrays
from common_jax.precision import jit
from reward_jax.diffusion.schedule import Schedule
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.planning.fit import AdamOptions, RunContext, optimizer
from reward_jax.reward.extract import extract_reward, init_params
from reward_jax.reward.relative import RelativeReward
from reward_jax.reward.targets import ExtractionOptions, Targets
from reward_jax.studies.i2p.store import PairStore

__all__ = [
    "LatentNetwork",
    "PairMatching",
    "Scaling",
    "fit_reward",
    "measure",
    "read_scaling",
    "score_rows",
]

Standardise = Literal["timestep", "pixel", "none"]


@dataclasses.dataclass(frozen=True)
class LatentNetwork:
    """The half U-Net with a linear head; defaults are the authors' widths.

    Args:
        dim: channels of the first level.
        multipliers: channels of each level, in units of dim.
        blocks: residual blocks of a level.
        groups: of the group norms.
    """

    dim: PositiveInt = 32
    multipliers: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    blocks: PositiveInt = 1
    groups: PositiveInt = 8

    def make(self, channels: int) -> HalfUNet2D:
        """The module, of latents of so many channels."""
        return HalfUNet2D(channels, patch=1, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class PairMatching(ExtractionOptions, AdamOptions):
    """How the reward is matched to pairs.

    Args:
        standardise: by step (timestep), by step and entry (pixel, as the authors do), or none.
        seeds: rewards trained at once, whose mean is the reward.
        clip: largest norm of a gradient; 0 for none.
    """

    steps: PositiveInt = 50_000
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-4
    steps_per_call: PositiveInt = 20
    standardise: Standardise = "timestep"
    seeds: PositiveInt = 1
    clip: NonNegativeFloat = 1.0


@struct.dataclass
class Scaling:
    """Mean and deviation of x_t, and size of the difference, at each step of a chain.

    Leaves are [S, h, w, C], or [S, 1, 1, 1]; t [S].
    """

    mean: Float[np.ndarray, "S ..."]
    deviation: Float[np.ndarray, "S ..."]
    size: Float[np.ndarray, "S ..."]
    t: Int[np.ndarray, " S"]

    def inputs(
        self, x_t: Float[np.ndarray, "B h w C"], step: Int[np.ndarray, " B"]
    ) -> Float[np.ndarray, "B h w C"]:
        """What the reward sees of latents at those steps of a chain."""
        return (x_t - self.mean[step]) / self.deviation[step]


def read_scaling(path: pathlib.Path) -> Scaling:
    """The scaling that a study has written; raises InputError for a file that is damaged."""
    names = [field.name for field in dataclasses.fields(Scaling)]
    stored = read_arrays(path, names)
    return Scaling(**{name: stored[name] for name in names})


def measure(store: PairStore, rows: Int[np.ndarray, " R"], by: Standardise) -> Scaling:
    """The scaling of both chains of some rows, a chain in memory at a time."""
    t = store.steps()
    if by == "none":
        one = np.ones((len(t), 1, 1, 1), np.float32)
        return Scaling(0 * one, one, one, t)
    sums = np.zeros(())
    for row in rows:
        for chain in range(2):
            x, base, safe = (store.read(n, chain, row) for n in ("x_t", "base", "safe"))
            sums = sums + np.stack([x, x**2, (safe - base) ** 2]).astype(np.float64)
    means = sums / (2 * len(rows))
    # PNDM walks one step twice: the reward is of t, and so is its scaling.
    means = np.stack([means[:, t == one].mean(1) for one in t], 1)
    if by == "timestep":
        means = means.mean((2, 3, 4), keepdims=True)
    mean, square, size = means
    # A difference of nothing, or one so small at an entry that its rounding would be the target,
    # counts as a thousandth of the chain's mean.
    least = 1e-6 * size.mean()
    deviation = np.sqrt(np.maximum(square - mean**2, 1e-6))
    sizes = np.sqrt(np.maximum(size, max(least, 1e-20)))
    mean, deviation, sizes = (x.astype(np.float32) for x in (mean, deviation, sizes))
    return Scaling(mean, deviation, sizes, t)


class _Batches:
    """Targets of each step of the training, drawn from the store by the step's own numbers."""

    def __init__(
        self, store: PairStore, rows: Int[np.ndarray, " R"], scaling: Scaling, how: tuple[int, int]
    ) -> None:
        self._store, self._rows, self._scaling = store, rows, scaling
        self._batch, self._seed = how

    def __call__(self, number: int) -> Targets:
        rng = np.random.default_rng((self._seed, number))
        rows = rng.choice(self._rows, self._batch)
        chains = rng.integers(2, size=self._batch)
        step = rng.integers(len(self._scaling.t), size=self._batch)
        x, base, safe = (
            np.stack(
                [self._store.read(n, *map(int, at)) for at in zip(chains, rows, step, strict=True)]
            )
            for n in ("x_t", "base", "safe")
        )
        s = self._scaling
        value = (base - safe) / s.size[step]
        x, t = jnp.asarray(s.inputs(x, step)), jnp.asarray(s.t[step])
        return Targets(x, t, jnp.asarray(value), "epsilon")


def fit_reward(
    store: PairStore,
    rows: Int[np.ndarray, " R"],
    scaling: Scaling,
    schedule: Schedule,
    network: LatentNetwork,
    matching: PairMatching,
    *,
    seed: NonNegativeInt,
    context: RunContext,
) -> RelativeReward:
    """The reward, of scaled latents; batches are read from the store as they are needed.

    Eight parameters: data, what is fitted, how, and where it is kept.
    """
    m, key = matching, jax.random.key(seed)
    height, width, channels = store.read("last", 0, 0).shape
    module = network.make(channels)
    start = init_params(module, key, jnp.zeros((1, height, width, channels)), m.seeds)
    params, _ = extract_reward(
        _stored,
        _stored,
        module,
        start,
        _Batches(store, rows, scaling, (m.batch_size, seed)),
        schedule,
        optimizer(m, clip=m.clip),
        steps=m.steps,
        key=key,
        seeds=m.seeds,
        on_step=context.on_step,
        options=m,
        checkpoints=context.checkpoints,
        save_every=context.save_every,
        mesh=context.mesh,
    )
    return RelativeReward(params, schedule, module, "epsilon", m.seeds)


def _stored(
    x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Any = None, /
) -> Float[Array, "B ..."]:
    """A score that is never asked: its answers are in the store."""
    raise AssertionError("targets are stored")


def score_rows(
    reward: RelativeReward, scaling: Scaling, store: PairStore, rows: Int[np.ndarray, " R"]
) -> Float[np.ndarray, "2 R S"]:
    """The reward along both chains of some rows, in the network's own unit."""

    def scores() -> Iterator[Any]:
        steps, t = np.arange(len(scaling.t)), jnp.asarray(scaling.t)
        for chain in range(2):
            for row in rows:
                x = scaling.inputs(store.read("x_t", chain, row), steps)
                yield np.asarray(_scores(reward, jnp.asarray(x), t))

    return np.stack(list(scores())).reshape(2, len(rows), -1)


@jit
def _scores(reward: RelativeReward, x: Array, t: Array) -> Array:
    return reward.learned(x, t)
