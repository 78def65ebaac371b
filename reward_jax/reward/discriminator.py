"""The baseline: tell the expert's noised trajectories from the base's, and climb that.

The logit of the best discriminator at x_t is log p_expert,t(x_t) - log p_base,t(x_t) (plus a
constant for unequal amounts of data): the relative reward itself, learned from data in place of
scores.
The authors' guide differentiates its sigmoid, which is flat where the discriminator is sure; the
logit's gradient is not.
"""

import functools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from reward_jax.diffusion.loop import OnStep, begin, run_loop
from reward_jax.diffusion.process import draw_noise, q_sample
from reward_jax.diffusion.schedule import Schedule
from reward_jax.diffusion.sources import Source
from reward_jax.reward.gradients import gradient_of

__all__ = ["DiscriminatorGuide", "train_discriminator"]


@struct.dataclass
class DiscriminatorGuide:
    """A trained discriminator as a guide of `guided_sample`: (x_t, t) -> [B].

    output: "logit", or "sigmoid" as the authors had it.
    """

    params: Any
    model: Any = struct.field(pytree_node=False)
    output: Literal["logit", "sigmoid"] = struct.field(pytree_node=False, default="logit")

    def __call__(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """What is climbed."""
        logit = self.model.apply({"params": self.params}, x_t, t)
        return logit if self.output == "logit" else jax.nn.sigmoid(logit)

    def gradient(self, x_t: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        """grad_x of what is climbed, [B, ...] (see `Guide`); a condition is ignored."""
        return gradient_of(self, x_t, t)


def train_discriminator(
    model: Any,
    params: Any,
    base: Source,
    expert: Source,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    key: jax.Array,
    batch_size: int = 128,
    pin: Any = None,
    steps_per_call: int = 50,
    on_step: OnStep | None = None,
    checkpoints: str | pathlib.Path | None = None,
    save_every: int | None = None,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Binary cross-entropy on x_t of both data sets, half a batch of each; (params, metrics).

    model: apply({"params": params}, x_t, t) -> logits [B], any reward network. Other arguments as
    of `extract_reward`.
    """
    state = (jax.tree.map(jnp.array, params), begin(params, optimizer=optimizer, seeds=False))
    run = functools.partial(_run, model=model, optimizer=optimizer, batch=batch_size, pin=pin)

    def call(state: Any, first: int, count: int) -> Any:
        return run(state, base, expert, schedule, key, jnp.arange(first, first + count))

    (params, _), metrics = run_loop(
        call,
        state,
        steps=steps,
        per_call=steps_per_call,
        on_step=on_step,
        directory=checkpoints,
        save_every=save_every,
        settings={
            "batch_size": batch_size,
            "key": np.asarray(jax.random.key_data(key)).tolist(),
        },
    )
    return params, metrics


@functools.partial(
    jax.jit, static_argnames=("model", "optimizer", "batch", "pin"), donate_argnums=0
)
def _run(state, base, expert, schedule, key, steps, *, model, optimizer, batch: int, pin):
    half = batch // 2
    labels = jnp.arange(2 * half) >= half

    def loss_of(params: Any, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, x_t, t)
        loss = optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))
        return jnp.mean(loss), jnp.mean((logits > 0) == labels)

    def one(state: Any, step: jax.Array):
        params, moments = state
        keys = jax.random.split(jax.random.fold_in(key, step), 4)
        x_0 = jnp.concatenate([base.sample(keys[0], half), expert.sample(keys[1], half)])
        t = jax.random.randint(keys[2], (2 * half,), 0, schedule.steps)
        x_t = q_sample(schedule, x_0, t, draw_noise(keys[3], x_0.shape))
        x_t = pin(x_0)(x_t) if pin else x_t
        (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(params, x_t, t)
        updates, moments = optimizer.update(grads, moments, params)
        state = optax.apply_updates(params, updates), moments
        return state, {"loss": loss, "accuracy": right}

    return jax.lax.scan(one, state, steps)
