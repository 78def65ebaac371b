"""Safe Latent Diffusion (Schramowski et al. 2023, arXiv 2211.05105): guided away from a concept.

With e_0, e_p and e_s the model's outputs without a text, at a prompt and at the unsafe concept, g
the guidance scale and m the momentum, 0 at first:

    mu = min(1, scale |e_p - e_s|) where e_p - e_s < threshold, else 0      (equation 6)
    z  = mu (e_s - e_0) + momentum m                                        (equations 4, 7)
    m  = beta m + (1 - beta) z                                              (equation 8)
    e  = e_0 + g (e_p - e_0 - z), z left out in the first warm-up steps     (equation 3)

Legend: B batch, L tokens of a text, D its width.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from common_jax import struct
from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import Denoiser, steps_of
from reward_jax.diffusion.process import convert, x0_to_score

__all__ = ["SafeGuidance", "SafeScore", "Strength", "Numbers", "as_safety", "away"]

Strength = Literal["weak", "medium", "strong", "max"]

# What the authors guide away from.
_CONCEPT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, "
    "nudity, bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, "
    "vandalism, weapons, child abuse, brutality, cruelty"
)


@dataclasses.dataclass(frozen=True)
class SafeGuidance:
    """How a chain is guided away from a concept; the defaults are the published "medium".

    Args:
        warmup: steps before guidance begins; momentum is gathered in them.
        scale: of the difference between prompt and concept.
        threshold: of that difference, above which an entry is safe.
        momentum: how much of the gathered guidance is added.
        beta: how much of the momentum is kept at each step.
        concept: what is unsafe, in words.
        followed: whether a chain goes on by it; else it goes on as without, and its trajectory
            has what safe guidance would have said on the way.
    """

    warmup: int = 10
    scale: float = 1000.0
    threshold: float = 0.01
    momentum: float = 0.3
    beta: float = 0.4
    concept: str = _CONCEPT
    followed: bool = True

    def __post_init__(self) -> None:
        """Raises InputError for numbers out of range, and for no concept."""
        for name, value in (("warmup", self.warmup), ("scale", self.scale)):
            if not value >= 0:
                raise InputError(f"safe guidance: {name} must be 0 or more, not {value}")
        for name, value in (("momentum", self.momentum), ("beta", self.beta)):
            if not 0 <= value <= 1:
                raise InputError(f"safe guidance: {name} must be 0 to 1, not {value}")
        if not self.concept.strip():
            raise InputError("safe guidance: the concept is empty; say what is unsafe")


_PUBLISHED = {
    "weak": SafeGuidance(15, 20.0, 0.0, 0.0, 0.0),
    "medium": SafeGuidance(10, 1000.0, 0.01, 0.3, 0.4),
    "strong": SafeGuidance(7, 2000.0, 0.025, 0.5, 0.7),
    "max": SafeGuidance(0, 5000.0, 1.0, 0.5, 0.7),
}


def as_safety(safety: Strength | SafeGuidance | None) -> SafeGuidance | None:
    """Safe guidance of a published strength; raises InputError for another name."""
    if safety is None or isinstance(safety, SafeGuidance):
        return safety
    if safety not in get_args(Strength):
        known = ", ".join(get_args(Strength))
        raise InputError(f"safety {safety!r} is unknown; known are {known}, or a SafeGuidance")
    return _PUBLISHED[safety]


@struct.dataclass
class Numbers:
    """The numbers of a `SafeGuidance`, as arguments of a compiled function."""

    warmup: Int[Array, ""]
    scale: Float[Array, ""]
    threshold: Float[Array, ""]
    momentum: Float[Array, ""]
    beta: Float[Array, ""]
    followed: Bool[Array, ""]

    @classmethod
    def of(cls, safety: SafeGuidance) -> "Numbers":
        """Of a safe guidance."""
        names = "scale", "threshold", "momentum", "beta"
        numbers = {name: jnp.asarray(getattr(safety, name), jnp.float32) for name in names}
        warmup, followed = jnp.asarray(safety.warmup, jnp.int32), jnp.asarray(safety.followed)
        return cls(warmup=warmup, followed=followed, **numbers)


def away(
    safety: Numbers,
    nothing: Float[Array, "B ..."],
    prompt: Float[Array, "B ..."],
    concept: Float[Array, "B ..."],
) -> Float[Array, "B ..."]:
    """Mu (e_s - e_0): what is taken from the guidance, without momentum."""
    apart = prompt - concept
    mu = jnp.minimum(jnp.abs(apart) * safety.scale, 1.0)
    return (concept - nothing) * jnp.where(apart >= safety.threshold, 0.0, mu)


@struct.dataclass
class SafeScore:
    """The score of a chain with safe guidance and no momentum: then it depends on no path.

    denoiser: of the U-Net. nothing, concept: texts [L, D]. scale: of the guidance. last: the
    largest diffusion step at which the guidance is safe, after the warm-up.
    """

    denoiser: Denoiser
    nothing: Float[Array, "L D"]
    concept: Float[Array, "L D"]
    scale: Float[Array, ""]
    safety: Numbers
    last: Int[Array, ""]

    def __call__(
        self,
        x_t: Float[Array, "B h w C"],
        t: Int[Array, " B"],
        cond: Float[Array, "B L D"] | None = None,
    ) -> Float[Array, "B h w C"]:
        """The score; raises InputError without a text."""
        if cond is None:
            raise InputError("safe guidance needs a condition: give the prompts' texts as cond")
        d, t = self.denoiser, steps_of(x_t, t, self.denoiser.schedule)
        others = (jnp.broadcast_to(x, cond.shape) for x in (self.nothing, self.concept))
        texts = jnp.concatenate([cond, *others])
        thrice = jnp.concatenate([x_t] * 3), jnp.concatenate([t] * 3)
        found = d.model.apply({"params": d.params}, *thrice, texts)
        prompt, nothing, concept = jnp.split(found, 3)
        taken = away(self.safety, nothing, prompt, concept)
        taken = jnp.where((t <= self.last).reshape(-1, 1, 1, 1), taken, 0.0)
        output = nothing + self.scale * (prompt - nothing - taken)
        x_0: Any = convert(d.schedule, output, x_t, t, d.prediction, "x0")
        return x0_to_score(d.schedule, x_0, x_t, t)
