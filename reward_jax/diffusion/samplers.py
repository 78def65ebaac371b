"""Samplers: at which diffusion steps the model is evaluated, and the move between two of them.

`Ancestral` draws from q(x_{t-1} | x_t, x_0) at every step of the schedule (Ho et al. 2020). `DDIM`
(Song et al. 2021, arXiv 2010.02502, equation 12) takes any number of steps, t to s < t:

    x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma^2) epsilon + sigma noise
    sigma = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)

with epsilon that of x_t and x_0: no noise with eta 0, and with eta 1 and all T steps the ancestral
noise. To add a sampler, derive from `Sampler`: timesteps and a move.

Legend: B batch, T diffusion steps of the schedule, S of the sampler.
"""

from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common_jax import struct
from common_jax.errors import InputError
from reward_jax.diffusion.process import posterior_mean
from reward_jax.diffusion.schedule import Schedule

__all__ = ["DDIM", "Ancestral", "Jump", "Sampler", "SamplerName", "make_sampler"]

SamplerName = Literal["ancestral", "ddim"]


class Jump(NamedTuple):
    """A move from diffusion step t to step `to`, which is -1 where it leads to x_0."""

    t: Int[Array, ""]
    to: Int[Array, ""]

    def coefficients(self, schedule: Schedule) -> tuple[Float[Array, ""], ...]:
        """sqrt(abar) and sqrt(1 - abar) at t, then both at `to` (1 and 0 at x_0)."""
        a, s = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        there = jnp.maximum(self.to, 0)
        return (
            a[self.t],
            s[self.t],
            jnp.where(self.to < 0, 1.0, a[there]),
            jnp.where(self.to < 0, 0.0, s[there]),
        )


class Sampler:
    """The base of samplers, which are frozen pytrees (`common_jax.struct.dataclass`).

    guides_first: guidance moves x_t before the model is evaluated, as in Diffuser. Else it is
    added to the score that the move is made with (Dhariwal and Nichol 2021, algorithm 2).
    """

    guides_first: ClassVar[bool] = False

    @property
    def draws_noise(self) -> bool:
        """Whether moves draw noise; where none do, a temperature changes nothing."""
        return True

    def timesteps(self, schedule: Schedule) -> Int[Array, " S"]:
        """The diffusion steps at which the model is evaluated, falling; S is static."""
        raise NotImplementedError

    def begin(self, x: Float[Array, "B ..."]) -> Any:
        """The memory before the first move; None for a sampler that uses no earlier steps."""
        return None

    def move(
        self,
        schedule: Schedule,
        jump: Jump,
        x_t: Float[Array, "B ..."],
        x_0: Float[Array, "B ..."],
        noise: Float[Array, "B ..."],
        temperature: Float[Array, ""],
        memory: Any,
    ) -> tuple[Float[Array, "B ..."], Any]:
        """The sample at jump.to, and the memory for the next move.

        x_0: the (guided) model's estimate at x_t. noise: standard normal. temperature: factor of
        the noise's standard deviation.
        """
        raise NotImplementedError


@struct.dataclass
class Ancestral(Sampler):
    """Ancestral sampling (Ho et al. 2020): every step of the schedule, the posterior's noise."""

    guides_first: ClassVar[bool] = True

    def timesteps(self, schedule: Schedule) -> Int[Array, " S"]:
        """All steps, T - 1 .. 0."""
        return jnp.arange(schedule.steps - 1, -1, -1)

    def move(
        self,
        schedule: Schedule,
        jump: Jump,
        x_t: Float[Array, "B ..."],
        x_0: Float[Array, "B ..."],
        noise: Float[Array, "B ..."],
        temperature: Float[Array, ""],
        memory: Any,
    ) -> tuple[Float[Array, "B ..."], Any]:
        """A draw of q(x_{t-1} | x_t, x_0); the temperature scales its standard deviation."""
        t = jnp.full(x_t.shape[:1], jump.t)
        mean = posterior_mean(schedule, x_0, x_t, t)
        spread = temperature * jnp.sqrt(schedule.posterior_variance[jump.t])  # 0 at t = 0
        return mean + spread * noise, memory


@struct.dataclass
class DDIM(Sampler):
    """Denoising diffusion implicit models: S steps, and eta times the ancestral noise.

    steps: S, at most T; None for T. They are evenly spaced, the first at t = T - 1 ("trailing":
    Lin et al. 2024, arXiv 2305.08891, table 2).
    """

    steps: int | None = struct.field(pytree_node=False, default=None)
    eta: float | Float[Array, ""] | Float[np.ndarray, ""] = 0.0

    @property
    def draws_noise(self) -> bool:
        """False where eta is the number 0; an array's value is not looked at."""
        return not isinstance(self.eta, int | float) or self.eta != 0

    def timesteps(self, schedule: Schedule) -> Int[Array, " S"]:
        """round(T (S - i) / S) - 1 for i = 0 .. S - 1."""
        total = schedule.steps
        steps = total if self.steps is None else self.steps
        if not 1 <= steps <= total:
            raise InputError(
                f"sampling steps must be 1 to {total}, the schedule's diffusion steps, not {steps}"
            )
        return jnp.asarray(np.round(total * np.arange(steps, 0, -1) / steps).astype(int) - 1)

    def move(
        self,
        schedule: Schedule,
        jump: Jump,
        x_t: Float[Array, "B ..."],
        x_0: Float[Array, "B ..."],
        noise: Float[Array, "B ..."],
        temperature: Float[Array, ""],
        memory: Any,
    ) -> tuple[Float[Array, "B ..."], Any]:
        """Equation 12; the temperature scales sigma's noise, so that it does nothing at eta 0."""
        a, s, a_to, s_to = jump.coefficients(schedule)
        epsilon = (x_t - a * x_0) / s
        # 1 - abar_t / abar_to, from a difference whose parts are not both near 1.
        lost = jnp.where(a < 0.7, (a_to - a) * (a_to + a), (s - s_to) * (s + s_to)) / a_to**2
        sigma = self.eta * s_to / s * jnp.sqrt(jnp.maximum(lost, 0))
        keep = jnp.sqrt(jnp.maximum(s_to**2 - sigma**2, 0))
        return a_to * x_0 + keep * epsilon + sigma * temperature * noise, memory


def make_sampler(
    name: SamplerName,
    steps: int | None = None,
    eta: float | Float[Array, ""] | Float[np.ndarray, ""] = 0.0,
) -> Sampler:
    """The sampler of that name.

    steps: S, None for all of the schedule's. eta: of DDIM, 0 to 1. Raises InputError for an
    unknown name, an eta out of range, and steps for the ancestral sampler.
    """
    if name not in get_args(SamplerName):
        raise InputError(
            f"sampler {name!r} is unknown; known are {', '.join(get_args(SamplerName))}"
        )
    if isinstance(eta, int | float) and not 0 <= eta <= 1:
        raise InputError(f"eta must be 0 to 1, not {eta}")
    if name == "ddim":
        return DDIM(steps, eta)
    if steps is not None:
        raise InputError(
            "the ancestral sampler takes every diffusion step: leave the sampling steps out, or "
            "choose ddim (with eta 1 its noise is the ancestral one)"
        )
    return Ancestral()
