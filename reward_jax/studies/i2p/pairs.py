"""Chains of a prompt with and without safe guidance, and what both ways say at each step.

Safe guidance with momentum depends on the path: eps_safe is no function of (x_t, t). So both
models are asked where a chain comes by. For each prompt and noise there are two chains from that
noise: the base's follows the guided epsilon, the safe one the safe epsilon. At each x_t of either,
both epsilons are kept, the momentum gathered along that chain. One program draws both.

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
from common_jax.precision import jit
from reward_jax import sharding
from reward_jax.models.stable_diffusion.pipeline import StableDiffusion
from reward_jax.models.stable_diffusion.safety import SafeGuidance
from reward_jax.models.stable_diffusion.schedulers import SchedulerName

__all__ = ["CHAINS", "ChainOptions", "Pairs", "compare_ways", "draw_pairs", "exact"]

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

    No image is decoded. Raises InputError as `StableDiffusion.sample`. What is not finite is
    returned as it is.
    """
    given: Any = dataclasses.asdict(how) | {"latents": noise, "key": key, "trajectory": True}
    found = []
    for followed in (False, True):
        guided = dataclasses.replace(safety, followed=followed)
        latents, seen = sd.chain(prompts, safety=guided, **given)
        assert seen is not None
        found.append(fetch((seen.x_t, seen.base, seen.safe, latents, seen.t)))
    x_t, base, safe, last, t = (np.stack(both) for both in zip(*found, strict=True))
    x_t, base, safe = (np.moveaxis(x, 1, 2) for x in (x_t, base, safe))
    return Pairs(x_t, base, safe, last, t[0])


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


@jit
def _epsilons(score: Any, schedule: Any, x_t: Array, t: Array, text: Array) -> Array:
    score = sharding.in_use(score)

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
    key: Key[Array, ""],
) -> dict[str, float]:
    """The two ways, along chains without momentum, and on the safe chains of some pairs.

    Returns `rounding`, the largest difference of the two where there is no momentum, over the
    exact one's root mean square, and `path`, by how much of its own size the guidance that was
    drawn depends on the path: |eps_safe - exact| / |exact - eps_base|, root mean squares.
    """
    x_t, base, drawn = (np.moveaxis(x[1], 0, 1) for x in (pairs.x_t, pairs.base, pairs.safe))
    still = dataclasses.replace(safety, momentum=0.0)
    given: Any = dataclasses.asdict(how) | {"latents": jnp.asarray(x_t[0]), "key": key}
    _, seen = sd.chain(prompts, safety=still, trajectory=True, **given)
    assert seen is not None
    along, there, function = fetch(
        (
            seen.safe,
            exact(sd, seen.x_t, seen.t, prompts, safety, how),
            exact(sd, jnp.asarray(x_t), jnp.asarray(pairs.t), prompts, safety, how),
        )
    )
    guidance = _size(function - base)
    return {
        "rounding": float(np.abs(along - there).max() / _size(there)),
        "path": float(_size(drawn - function) / max(guidance, 1e-12)),
    }


def _size(x: Float[np.ndarray, "..."]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
