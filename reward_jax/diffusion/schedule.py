"""Noise schedules: how much of x_0 is left in x_t.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t = 0 .. T - 1; abar is `alphas_cumprod`. Tables are
computed in float64 and cast once. Legend: T diffusion steps.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common_jax import struct
from common_jax.errors import InputError

__all__ = [
    "Schedule",
    "check_same_schedule",
    "check_schedule",
    "cosine_schedule",
    "from_betas",
    "linear_schedule",
    "make_schedule",
]


@struct.dataclass
class Schedule:
    """Tables of a variance-preserving schedule, float32.

    posterior_x0 and posterior_xt are the coefficients of x_0 and x_t in the mean of
    q(x_{t-1} | x_t, x_0), posterior_variance its variance (0 at t = 0), mean_per_score by how much
    that mean moves for each unit of score: beta_t / sqrt(alpha_t).
    """

    betas: Float[Array, " T"]
    alphas_cumprod: Float[Array, " T"]
    sqrt_alphas_cumprod: Float[Array, " T"]
    sqrt_one_minus_alphas_cumprod: Float[Array, " T"]
    posterior_x0: Float[Array, " T"]
    posterior_xt: Float[Array, " T"]
    posterior_variance: Float[Array, " T"]
    mean_per_score: Float[Array, " T"]
    name: str = struct.field(pytree_node=False, default="betas")

    @property
    def steps(self) -> int:
        """T."""
        return self.betas.shape[0]

    def at(
        self, table: Float[Array, " T"], t: Int[Array, " B"], like: Float[Array, "B ..."]
    ) -> Float[Array, "B ..."]:
        """`table` at t, with as many axes as `like`, to be multiplied with it."""
        return jnp.reshape(jnp.asarray(table)[t], t.shape + (1,) * (like.ndim - t.ndim))


def from_betas(betas: Float[np.ndarray, " T"], name: str = "betas") -> Schedule:
    """A schedule from its betas; raises InputError for one that is not above 0 and below 1."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not betas.size or not ((betas > 0) & (betas < 1)).all():
        raise InputError("betas of a schedule are a list of numbers above 0 and below 1")
    alphas = 1 - betas
    bar = np.cumprod(alphas)
    before = np.concatenate([[1.0], bar[:-1]])
    tables = {
        "betas": betas,
        "alphas_cumprod": bar,
        "sqrt_alphas_cumprod": np.sqrt(bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar),
        "posterior_x0": betas * np.sqrt(before) / (1 - bar),
        "posterior_xt": (1 - before) * np.sqrt(alphas) / (1 - bar),
        "posterior_variance": betas * (1 - before) / (1 - bar),
        "mean_per_score": betas / np.sqrt(alphas),
    }
    return Schedule(**{k: jnp.asarray(v, jnp.float32) for k, v in tables.items()}, name=name)


def cosine_schedule(steps: int, offset: float = 0.008, most: float = 0.999) -> Schedule:
    """Cosine: abar ~ cos((t / T + offset) / (1 + offset) * pi / 2) ** 2 (Nichol, Dhariwal 2021).

    most: the largest beta; without it the last one would be 1.
    """
    _check(steps)
    grid = np.arange(steps + 1, dtype=np.float64) / steps
    bar = np.cos((grid + offset) / (1 + offset) * np.pi / 2) ** 2
    return from_betas(np.clip(1 - bar[1:] / bar[:-1], 1e-12, most), "cosine")


def linear_schedule(steps: int, first: float | None = None, last: float | None = None) -> Schedule:
    """Betas from first to last (Ho et al. 2020: 1e-4 to .02 at 1000 steps, scaled to T)."""
    _check(steps)
    scale = 1000 / steps
    first = scale * 1e-4 if first is None else first
    last = min(scale * 0.02, 0.999) if last is None else last
    return from_betas(np.linspace(first, last, steps), "linear")


def make_schedule(name: str, steps: int) -> Schedule:
    """The schedule called "cosine" or "linear"; raises InputError for another name."""
    makers = {"cosine": cosine_schedule, "linear": linear_schedule}
    if name not in makers:
        raise InputError(f"schedule {name!r} is unknown; known are {', '.join(makers)}")
    return makers[name](steps)


def check_schedule(schedule: Any) -> None:
    """Raise InputError for what is no schedule, such as a number of steps."""
    if not isinstance(schedule, Schedule):
        raise InputError(
            f"schedule is a {type(schedule).__name__}: give one, such as cosine_schedule(20)"
        )


def _check(steps: int) -> None:
    if steps < 1:
        raise InputError(f"a schedule needs 1 diffusion step or more, not {steps}")


def check_same_schedule(what: str, a: Schedule, b: Schedule) -> None:
    """Raise InputError where two schedules differ in steps, or in abar by more than 1e-5."""
    if a.steps != b.steps:
        raise InputError(
            f"{what} differ in diffusion steps: {a.steps} and {b.steps}; train both alike"
        )
    gap = float(jnp.abs(a.alphas_cumprod - b.alphas_cumprod).max())
    if gap > 1e-5:
        raise InputError(
            f"{what} differ in schedule: {a.name} and {b.name} (abar by up to {gap:.3f}); train "
            "both alike"
        )
