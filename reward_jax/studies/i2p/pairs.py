"""Chains of a prompt with and without safe guidance, and what both ways say at each step.

Safe guidance with momentum depends on the path: eps_safe is no function of (x_t, t). So both
models are asked where a chain comes by. For each prompt and noise there are two chains from that
noise: the base's follows the guided epsilon, the safe one the safe epsilon. At each x_t of either,
both epsilons are kept, the momentum gathered along that chain.

The authors do the same, in their pipeline's `get_deltas` (their code, safe-stable-diffusion/), but
for what follows. They draw each chain's noise anew. They keep the two latents that a scheduler's
step makes of both epsilons at x_t, not the epsilons; PNDM, which remembers outputs, is shown both.
They have no warm-up; with their strength, max, there is none.

Without momentum eps_safe is a function (`StableDiffusion.safe_score`), the second way.

Legend: B prompts, S evaluations of the model in a chain, h, w, C of latents, L tokens of a text, D
its width. The first of two chains is the base's, the second the safe one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from common_jax.cli.ranges import PositiveFloat, PositiveInt
from common_jax.mesh import fetch
from reward_jax.diffusion.denoiser import Denoiser
from reward_jax.diffusion.process import convert
from reward_jax.models.stable_diffusion.pipeline import StableDiffusion
from reward_jax.models.stable_diffusion.safety import Numbers, SafeGuidance, away
from reward_jax.models.stable_diffusion.schedulers import SchedulerName

__all__ = [
    "CHAINS",
    "ChainOptions",
    "Pairs",
    "compare_ways",
    "draw_pairs",
    "exact",
    "guided_along",
]

CHAINS = ("base", "safe")


@dataclasses.dataclass(frozen=True)
class ChainOptions:
    """How chains are drawn.

    Args:
        scheduler: pndm, ddim or ddpm, with the folder's own settings.
        steps: of a chain.
        guidance_scale: of classifier-free guidance, above 1.
    """

    scheduler: SchedulerName = "pndm"
    steps: PositiveInt = 50
    guidance_scale: PositiveFloat = 7.5


class Pairs(NamedTuple):
    """Two chains of each prompt, on the host.

    x_t: where both were asked, at diffusion step t. base, safe: the guided epsilons there. last:
    the latents that a chain ends in.
    """

    x_t: Float[np.ndarray, "2 B S h w C"]
    base: Float[np.ndarray, "2 B S h w C"]
    safe: Float[np.ndarray, "2 B S h w C"]
    last: Float[np.ndarray, "2 B h w C"]
    t: Int[np.ndarray, " S"]

    def first(self, rows: int) -> "Pairs":
        """Those of the first so many prompts."""
        four = ("x_t", "base", "safe", "last")
        return self._replace(**{name: getattr(self, name)[:, :rows] for name in four})


def draw_pairs(
    sd: StableDiffusion,
    prompts: Sequence[str],
    noise: Float[Array, "B h w C"],
    safety: SafeGuidance,
    how: ChainOptions,
    key: Key[Array, ""],
) -> Pairs:
    """Both chains from the same noise; key: of what DDPM draws, the same for both.

    Raises InputError as `StableDiffusion.sample`. What is not finite is returned as it is.
    """
    given: Any = dataclasses.asdict(how) | {"latents": noise, "key": key, "trajectory": True}
    base, safe = (sd.sample(prompts, safety=s, **given) for s in (None, safety))
    path, safe_path = base.trajectory, safe.trajectory
    assert path is not None and safe_path is not None and safe_path.base is not None
    of_base = guided_along(sd, path.x_t, path.t, prompts, safety, how.guidance_scale)
    of_safe = safe_path.base, safe_path.epsilon
    chains = (path.x_t, *of_base, base.latents), (safe_path.x_t, *of_safe, safe.latents)
    x_t, by_base, by_safe, last = (np.stack(both) for both in zip(*fetch(chains), strict=True))
    x_t, by_base, by_safe = (np.moveaxis(x, 1, 2) for x in (x_t, by_base, by_safe))
    return Pairs(x_t, by_base, by_safe, last, np.asarray(fetch(path.t)))


def guided_along(
    sd: StableDiffusion,
    x_t: Float[Array, "S B h w C"],
    t: Int[Array, " S"],
    prompts: Sequence[str],
    safety: SafeGuidance,
    guidance_scale: float,
) -> tuple[Float[Array, "S B h w C"], Float[Array, "S B h w C"]]:
    """The guided epsilons without and with safety on a given path, from its first step on."""
    text = sd.encode_text([*prompts, "", safety.concept])
    rows = len(prompts)
    nothing, concept = (jnp.broadcast_to(text[i], text[:rows].shape) for i in (rows, rows + 1))
    texts = jnp.concatenate([nothing, text[:rows], concept])
    scale = jnp.asarray(guidance_scale, jnp.float32)
    return _along(sd.score(), x_t, t, texts, scale, Numbers.of(safety))


@jax.jit
def _along(
    denoiser: Denoiser, x_t: Array, t: Array, texts: Array, scale: Array, safety: Numbers
) -> tuple[Array, Array]:
    d = denoiser

    def step(momentum: Any, given: Any) -> Any:
        x, t, i = given
        rows, times = jnp.concatenate([x] * 3), jnp.full(len(x), t)
        found = d.model.apply({"params": d.params}, rows, jnp.full(len(rows), t), texts)
        nothing, prompt, concept = jnp.split(found, 3)
        taken = away(safety, nothing, prompt, concept) + safety.momentum * momentum
        base = nothing + scale * (prompt - nothing)
        safe = jnp.where(i >= safety.warmup, base - scale * taken, base)
        both = (convert(d.schedule, y, x, times, d.prediction, "epsilon") for y in (base, safe))
        return safety.beta * momentum + (1 - safety.beta) * taken, tuple(both)

    given = x_t, t, jnp.arange(len(t))
    return jax.lax.scan(step, jnp.zeros_like(x_t[0]), given)[1]


def exact(
    sd: StableDiffusion,
    x_t: Float[Array, "S B h w C"],
    t: Int[Array, " S"],
    prompts: Sequence[str],
    safety: SafeGuidance,
    how: ChainOptions,
) -> Float[Array, "S B h w C"]:
    """eps_safe as a function of x_t, t and the text: of safe guidance without momentum."""
    still = dataclasses.replace(safety, momentum=0.0)
    score = sd.safe_score(still, how.guidance_scale, how.scheduler, how.steps)
    return _epsilons(score, sd.schedule, x_t, t, sd.encode_text(list(prompts)))


@jax.jit
def _epsilons(score: Any, schedule: Any, x_t: Array, t: Array, text: Array) -> Array:
    def one(given: Any) -> Array:
        x, t = given
        return -schedule.sqrt_one_minus_alphas_cumprod[t] * score(x, jnp.full(len(x), t), text)

    return jax.lax.map(one, (x_t, t))


def compare_ways(
    sd: StableDiffusion,
    pairs: Pairs,
    prompts: Sequence[str],
    safety: SafeGuidance,
    how: ChainOptions,
) -> dict[str, float]:
    """The two ways on the safe chains of some pairs.

    Returns `rounding`, the largest difference of the two without momentum, over the exact one's
    root mean square, and `path`, by how much of its own size the guidance that was drawn depends
    on the path: |eps_safe - exact| / |exact - eps_base|, root mean squares.
    """
    x_t, t = jnp.asarray(np.moveaxis(pairs.x_t[1], 0, 1)), jnp.asarray(pairs.t)
    function = fetch(exact(sd, x_t, t, prompts, safety, how))
    still = dataclasses.replace(safety, momentum=0.0)
    base, along = fetch(guided_along(sd, x_t, t, prompts, still, how.guidance_scale))
    drawn = np.moveaxis(pairs.safe[1], 0, 1)
    guidance = _size(function - base)
    return {
        "rounding": float(np.abs(along - function).max() / _size(function)),
        "path": float(_size(drawn - function) / max(guidance, 1e-12)),
    }


def _size(x: Float[np.ndarray, "..."]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
