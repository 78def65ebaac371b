"""A chain of latents, one scan over a scheduler's plan: guidance, safety, trajectory.

Legend: B batch, S evaluations of the model, h and w height and width of latents, C their channels,
L tokens of a text, D its width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from common_jax import struct
from common_jax.precision import jit
from reward_jax import sharding
from reward_jax.diffusion.process import convert, draw_noise
from reward_jax.diffusion.schedule import Schedule
from reward_jax.models.stable_diffusion.safety import Numbers, away
from reward_jax.models.stable_diffusion.schedulers import Plan, Row, move, remember
from reward_jax.models.stable_diffusion.unet import UNet

__all__ = ["Guided", "Trajectory", "chain"]


class Trajectory(NamedTuple):
    """Where the model was evaluated, in order, and what it gave.

    epsilon: guided, as the chain went on by. base, safe: guided without and with safety at the
    same x_t, the momentum gathered along this chain; None where there is no safety.
    """

    x_t: Float[Array, "S B h w C"]
    t: Int[Array, " S"]
    epsilon: Float[Array, "S B h w C"]
    base: Float[Array, "S B h w C"] | None
    safe: Float[Array, "S B h w C"] | None


@struct.dataclass
class Guided:
    """Texts, and how a chain is guided by them.

    nothing: the text without a prompt, or the negative prompts; None: no guidance, the prompt
    alone. concept: what is unsafe; None: no safety.
    """

    prompt: Float[Array, "B L D"]
    nothing: Float[Array, "B L D"] | None
    concept: Float[Array, "B L D"] | None
    scale: Float[Array, ""]
    safety: Numbers | None


@functools.partial(jit, static_argnames=("model", "trajectory"))
def chain(
    params: PyTree[Float[Array, "..."]],
    schedule: Schedule,
    plan: Plan,
    latents: Float[Array, "B h w C"],
    guided: Guided,
    key: Key[Array, ""] | None,
    *,
    model: UNet,
    trajectory: bool,
) -> tuple[Float[Array, "B h w C"], Trajectory | None]:
    """The chain's last latents, and its trajectory if asked for.

    key: of a plan with noise, of which row i draws `draw_noise(fold_in(key, i), latents.shape)`.
    """
    params = sharding.in_use(params)
    texts = [x for x in (guided.nothing, guided.prompt, guided.concept) if x is not None]
    text = jnp.concatenate(texts)

    def outputs(x_t: Float[Array, "B h w C"], t: Int[Array, ""]) -> list[Array]:
        rows = jnp.concatenate([x_t] * len(texts))
        found = model.apply({"params": params}, rows, jnp.full(len(rows), t), text)
        assert isinstance(found, jax.Array)
        return jnp.split(found, len(texts))

    def epsilon(output: Array, x_t: Array, t: Int[Array, ""]) -> Array:
        if plan.prediction == "epsilon":
            return output
        return convert(schedule, output, x_t, jnp.full(len(x_t), t), "v", "epsilon")

    def step(carry: Any, given: tuple[Row, Int[Array, ""]]) -> tuple[Any, Trajectory | None]:
        x_t, memory, momentum = carry
        row, i = given
        found = outputs(x_t, row.t)
        output = found[0] if guided.nothing is None else guide(*found[:2])
        base = safe = None
        if guided.concept is not None and guided.safety is not None:
            safety, base = guided.safety, output
            taken = away(safety, *found) + safety.momentum * momentum
            momentum = safety.beta * momentum + (1 - safety.beta) * taken
            safe = jnp.where(i >= safety.warmup, guide(found[0], found[1] - taken), base)
            output = jnp.where(safety.followed, safe, base)
        noise = None
        if plan.noisy:
            assert key is not None
            noise = draw_noise(jax.random.fold_in(key, i), x_t.shape, x_t.dtype)
        seen = None
        if trajectory:
            others = (y if y is None else epsilon(y, x_t, row.t) for y in (base, safe))
            seen = Trajectory(x_t, row.t, epsilon(output, x_t, row.t), *others)
        x, memory = move(plan, row, x_t, output, noise, memory)
        return (x, memory, momentum), seen

    def guide(nothing: Array, prompt: Array) -> Array:
        return nothing + guided.scale * (prompt - nothing)

    carry = latents, remember(latents, plan), jnp.zeros_like(latents)
    rows = plan.rows, jnp.arange(len(plan.rows.t))
    (latents, _, _), found = jax.lax.scan(step, carry, rows)
    return latents, found
