"""Training a diffusion model: several steps a compiled call, averaged weights, exact resume.

Legend: B batch, S seeds or experts trained at once, T diffusion steps.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from common_jax.mesh import constrain
from reward_jax.diffusion.loop import OnStep, begin, run_loop
from reward_jax.diffusion.process import Prediction, draw_noise, prediction_loss, q_sample
from reward_jax.diffusion.schedule import Schedule
from reward_jax.diffusion.sources import Source

__all__ = ["EMA", "TrainState", "start", "train_denoiser"]


class EMA(NamedTuple):
    """Average of the parameters: every `every` steps, after `begin` steps of plain copies.

    The defaults are the authors' .995 every 10 steps, but sooner than their 2000 steps.
    """

    decay: float = 0.995
    every: int = 10
    begin: int = 500


class TrainState(NamedTuple):
    """params, their average and the optimiser's state; leaves are [S, ...] with seeds."""

    params: Any
    average: Any
    optimizer: Any


def start(
    model: Any,
    optimizer: optax.GradientTransformation,
    x: jax.Array,
    key: jax.Array,
    *,
    seeds: int | None = None,
    params: Any = None,
) -> TrainState:
    """The state before the first step, for inputs like x [B, ...]; params: to begin with."""
    if params is None:
        t = jnp.zeros(x.shape[0], jnp.int32)

        def init(key: jax.Array) -> Any:
            return model.init(key, x, t)["params"]

        many = jax.vmap(init)
        params = jax.jit(init if seeds is None else many)(
            key if seeds is None else jax.random.split(key, seeds)
        )
    params = jax.tree.map(jnp.array, params)
    moments = begin(params, optimizer=optimizer, seeds=seeds is not None)
    return TrainState(params, jax.tree.map(jnp.copy, params), moments)


class _Setting(NamedTuple):
    """What the compiled step depends on besides arrays."""

    model: Any
    optimizer: optax.GradientTransformation
    prediction: Prediction
    batch: int
    ema: EMA
    pin: Any
    seeds: int | None
    per_expert: bool
    mesh: Mesh | None


def train_denoiser(
    model: Any,
    state: TrainState,
    source: Source,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    key: jax.Array,
    prediction: Prediction = "v",
    batch_size: int = 64,
    weights: Any = 1.0,
    ema: EMA | None = None,
    pin: Any = None,
    seeds: int | None = None,
    per_expert: bool = False,
    steps_per_call: int = 50,
    on_step: OnStep | None = None,
    checkpoints: str | pathlib.Path | None = None,
    save_every: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Train a model to denoise; returns the state and the metrics (loss [steps] or [steps, S]).

    Args:
        model: apply({"params": params}, x_t, t) -> [B, ...].
        state: from `start`.
        source: of x_0 (`data/sources.py`).
        schedule: noise levels; t is drawn uniformly.
        optimizer: an optax optimiser.
        steps: in all; a run that goes on from a checkpoint does what is left.
        key: of all that is drawn; step i draws from fold_in(key, i).
        prediction: what the model's output means. The score of an x_0 prediction is mostly
            error at low t; v is good at every t.
        batch_size: B.
        weights: of the squared error, broadcastable to x (`action_weights`).
        ema: how parameters are averaged; by default `EMA()`.
        pin: x_0 -> what of it is given (`FirstState`): clean in the input, no part of the loss.
        seeds: S, to train as many at once; each draws batches of its own.
        per_expert: with seeds: the source's leaves have a leading axis [S], a data set for each.
        steps_per_call: steps of one compiled call.
        on_step: called with (steps done, metrics) after each compiled call.
        checkpoints: folder of an exact resume.
        save_every: steps between checkpoints; by default there is one at the end.
        mesh: batches are cut over its data and fsdp axes.
    """
    ema = ema or EMA()
    setting = _Setting(model, optimizer, prediction, batch_size, ema, pin, seeds, per_expert, mesh)
    run = functools.partial(_run, setting=setting)

    def call(state: Any, first: int, count: int) -> Any:
        span = jnp.arange(first, first + count)
        return run(state, source, schedule, jnp.asarray(weights, jnp.float32), key, span)

    return run_loop(
        call,
        state,
        steps=steps,
        per_call=steps_per_call,
        on_step=on_step,
        directory=checkpoints,
        save_every=save_every,
        settings={
            "prediction": prediction,
            "batch_size": batch_size,
            "ema": list(ema),
            "key": np.asarray(jax.random.key_data(key)).tolist(),
        },
    )


@functools.partial(jax.jit, static_argnames="setting", donate_argnums=0)
def _run(state: TrainState, source, schedule, weights, key, steps, *, setting: _Setting):
    def loss_of(params: Any, x_0: jax.Array, key: jax.Array) -> jax.Array:
        for_t, for_noise = jax.random.split(key)
        x_0 = constrain(x_0, setting.mesh)
        t = jax.random.randint(for_t, x_0.shape[:1], 0, schedule.steps)
        noise = draw_noise(for_noise, x_0.shape, x_0.dtype)
        pinned = setting.pin(x_0) if setting.pin else None
        x_t = q_sample(schedule, x_0, t, noise)
        x_t = pinned(x_t) if pinned else x_t
        output = setting.model.apply({"params": params}, x_t, t)
        loss = prediction_loss(
            schedule,
            output,
            x_0,
            t,
            noise,
            prediction=setting.prediction,
            weights=weights,
            pinned=pinned,
        )
        return jnp.mean(loss)

    def update(state: TrainState, source: Source, key: jax.Array, step: jax.Array):
        draw, rest = jax.random.split(jax.random.fold_in(key, step))
        x_0 = source.sample(draw, setting.batch)
        loss, grads = jax.value_and_grad(loss_of)(state.params, x_0, rest)
        updates, moments = setting.optimizer.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        ema = setting.ema
        # Counted as the authors count: the step that begins is number `step`, from 0.
        kept = jnp.where(step < ema.begin, 0.0, ema.decay)
        kept = jnp.where(step % ema.every == 0, kept, 1.0)
        average = jax.tree.map(lambda a, p: kept * a + (1 - kept) * p, state.average, params)
        return TrainState(params, average, moments), {"loss": loss}

    def one(state: TrainState, step: jax.Array):
        if setting.seeds is None:
            return update(state, source, key, step)
        keys = jax.random.split(key, setting.seeds)
        axes = (0, 0 if setting.per_expert else None, 0, None)
        return jax.vmap(update, in_axes=axes)(state, source, keys, step)

    return jax.lax.scan(one, state, steps)
