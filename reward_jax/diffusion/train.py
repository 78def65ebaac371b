"""Training a diffusion model: several steps a compiled call, averaged weights, exact resume.

Legend: B batch, N rows, S seeds or experts trained at once, T diffusion steps.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from common_jax.checksum import checksum
from common_jax.cli.ranges import BelowOne, NonNegativeInt, PositiveInt, check_ranges
from common_jax.errors import InputError
from common_jax.mesh import constrain
from common_jax.precision import jit
from reward_jax import sharding
from reward_jax.diffusion.denoiser import Condition, null_like
from reward_jax.diffusion.loop import (
    LoopOptions,
    OnStep,
    begin,
    check_applies,
    check_key,
    check_pin,
    check_run,
    check_seeds,
    model_checksum,
    pin_checksum,
    run_loop,
    update_checksum,
)
from reward_jax.diffusion.process import Prediction, draw_noise, prediction_loss, q_sample
from reward_jax.diffusion.scan import scan
from reward_jax.diffusion.schedule import Schedule
from reward_jax.diffusion.sources import (
    Source,
    as_source,
    example,
    source_checksum,
    split_batch,
)

__all__ = [
    "EMA",
    "TrainState",
    "TrainingOptions",
    "init_state",
    "steps_of",
    "train_denoiser",
]


@dataclasses.dataclass(frozen=True)
class EMA:
    """Exponential moving average of the parameters; the authors begin it after 2,000 steps.

    Args:
        decay: weight of the old average in an update.
        every: steps between updates.
        begin: steps before, in which the average is a copy of the parameters.
    """

    decay: BelowOne = 0.995
    every: PositiveInt = 10
    begin: NonNegativeInt = 500


@dataclasses.dataclass(frozen=True)
class TrainingOptions(LoopOptions):
    """How a denoiser is trained.

    Args:
        prediction: what the network's output means: v, x0 or epsilon. The score of an x_0
            prediction is mostly error at low t; v is good at every t.
        ema: how parameters are averaged.
    """

    batch_size: PositiveInt = 64
    prediction: Prediction = "v"
    ema: EMA = EMA()


class TrainState(NamedTuple):
    """Parameters, their average and the optimizer's state; leaves are [S, ...] with seeds."""

    params: PyTree[Float[Array, "..."]]
    average: PyTree[Float[Array, "..."]]
    optimizer: PyTree[Shaped[Array, "..."]]


def init_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    x: Any,
    key: Key[Array, ""],
    *,
    seeds: int | None = None,
    params: PyTree[Float[Array, "..."]] | None = None,
) -> TrainState:
    """The state before the first step.

    x: an example of the input, [B, ...], or (x, condition); its values are not used. seeds: S, to
    train as many at once. params: to begin with, in place of random ones.
    """
    if params is None:
        x, cond = split_batch(x)
        check_key(key)
        keys = key if seeds is None else jax.random.split(key, seeds)
        params = _init(model, keys, x, cond, many=seeds is not None)
    params = jax.tree.map(jnp.array, params)
    moments = begin(params, optimizer=optimizer, seeds=seeds is not None)
    return TrainState(params, jax.tree.map(jnp.copy, params), moments)


@functools.partial(jit, static_argnames=("model", "many"))
def _init(model: Any, keys: Key[Array, "..."], x: Any, cond: Any, *, many: bool) -> Any:
    t = jnp.zeros(x.shape[0], jnp.int32)

    def init(key: Key[Array, ""]) -> Any:
        return model.init(key, x, t, *_conditions(cond))["params"]

    return (jax.vmap(init) if many else init)(keys)


def _own(options: TrainingOptions) -> TrainingOptions:
    """These alone: what a subclass has besides, such as a number of steps, compiles nothing."""
    fields = dataclasses.fields(TrainingOptions)
    return TrainingOptions(**{field.name: getattr(options, field.name) for field in fields})


class _Static(NamedTuple):
    """What the compiled step depends on besides arrays."""

    model: Any
    update: optax.TransformUpdateFn
    options: TrainingOptions
    drop_condition: float
    pin: Any
    seeds: int | None
    per_expert: bool
    mesh: Mesh | None


def steps_of(
    model: Any,
    optimizer: optax.GradientTransformation,
    options: TrainingOptions,
    *,
    pin: Any = None,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, "steps ..."]]]]:
    """The program of `train_denoiser`, for who compiles it without running it.

    It takes (state, source, schedule, weights of the error, null, key, numbers of its steps).
    """
    static = _Static(model, optimizer.update, _own(options), 0.0, pin, None, False, mesh)
    return functools.partial(_run, static=static)


def train_denoiser(
    model: Any,
    state: TrainState,
    batches: Any,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    key: Key[Array, ""],
    options: TrainingOptions | None = None,
    weights: float | Float[Array, "..."] | Float[np.ndarray, "..."] = 1.0,
    drop_condition: float = 0.0,
    null: PyTree[Shaped[Array, "..."]] | None = None,
    pin: Any = None,
    seeds: int | None = None,
    per_expert: bool = False,
    on_step: OnStep | None = None,
    checkpoints: str | pathlib.Path | None = None,
    save_every: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, Float[np.ndarray, "steps ..."]]]:
    """Train a model to denoise; returns the state and the metrics: loss, [steps] or [steps, S].

    Args:
        model: apply({"params": params}, x_t, t[, cond]) -> [B, ...].
        state: from `init_state`.
        batches: an array x_0 [N, ...] to draw from, (x_0, cond) with cond a tree of [N, ...], or a
            source of either (`diffusion/sources.py`).
        schedule: noise levels; t is drawn uniformly.
        optimizer: an optax optimizer.
        steps: in all; a resumed run does those that are left.
        key: of all random numbers; step i draws from fold_in(key, i).
        options: by default `TrainingOptions()`.
        weights: of the squared error, broadcastable to x (`action_weights`).
        drop_condition: share of rows whose condition is replaced by `null`, for classifier-free
            guidance.
        null: the condition that a dropped one becomes, a tree like cond, its arrays [...] or
            [B, ...].
        pin: x_0 -> `Pinned`, such as `FirstState`: entries that are clean in the input and no
            part of the loss.
        seeds: S, to train as many at once; each draws batches of its own.
        per_expert: with seeds: leaves of batches have a leading axis [S], a data set for each.
        on_step: called with (steps done, metrics) after each compiled call.
        checkpoints: folder of checkpoints, from which a run resumes exactly; InputError where it
            is of another model, data, optimizer or option.
        save_every: steps between checkpoints; by default there is one at the end.
        mesh: batches are sharded over its data and fsdp axes, parameters over fsdp and tensor
            (`reward_jax/sharding.py`).

    Raises InputError for options that do not fit, for data that are no floating numbers, for a
    model whose output has not the shape of its input, and when the loss is no longer finite,
    naming the step. More than eight parameters, since arrays, functions and folders are not
    options.
    """
    o = TrainingOptions() if options is None else options
    check_ranges(o)
    if not 0 <= drop_condition <= 1:
        raise InputError(f"drop_condition must be 0 to 1, not {drop_condition}")
    if drop_condition and null is None:
        raise InputError("drop_condition needs null, the condition that a dropped one becomes")
    check_run(model, schedule, optimizer, steps, key, pin)
    if not isinstance(state, TrainState):
        raise InputError(f"state is a {type(state).__name__}: give one of init_state")
    check_seeds(state.params, seeds)
    if per_expert and seeds is None:
        raise InputError("per_expert needs seeds: as many as there are data sets")
    made = jax.eval_shape(
        functools.partial(begin, optimizer=optimizer, seeds=seeds is not None), state.params
    )
    if jax.tree.structure(made) != jax.tree.structure(state.optimizer):
        raise InputError("state was made with another optimizer: give init_state this one")
    static = _Static(
        model, optimizer.update, _own(o), drop_condition, pin, seeds, per_expert, mesh
    )
    run = functools.partial(_run, static=static)
    source, weights = as_source(batches), jnp.asarray(weights, jnp.float32)
    _check_fit(model, state, source, pin, seeds=seeds, per_expert=per_expert)
    given = state
    state = sharding.place(jax.tree.map(jnp.array, state), mesh)  # a copy: it is donated

    def call(state: Any, first: int, count: int) -> Any:
        span = jnp.arange(first, first + count)
        return run(state, source, schedule, weights, null, key, span)

    def settings() -> dict[str, Any]:
        many, one = seeds is not None, source
        if per_expert:
            one = jax.tree.map(lambda x: x[0], source)
        x_0, cond = split_batch(example(one))
        rows = x_0, jnp.zeros(2, jnp.int32), *_conditions(cond)

        def apply(params: Any, *rows: Any) -> Any:
            return model.apply({"params": params}, *rows)

        return {
            "prediction": o.prediction,
            "batch_size": o.batch_size,
            "ema": list(dataclasses.astuple(o.ema)),
            "drop_condition": drop_condition,
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "seeds": seeds,
            "params": checksum(given.params),
            "model": model_checksum(apply, given.params, *rows, seeds=many),
            "pin": pin_checksum(pin, x_0),
            "data": source_checksum(source, o.batch_size, many=per_expert),
            "schedule": checksum(schedule),
            "optimizer": update_checksum(optimizer, given.params, given.optimizer, seeds=many),
            "other": checksum((weights, null, per_expert)),
        }

    return run_loop(
        call,
        state,
        steps=steps,
        per_call=o.steps_per_call,
        on_step=on_step,
        directory=checkpoints,
        save_every=save_every,
        settings=settings,
    )


def _check_fit(
    model: Any, state: TrainState, source: Any, pin: Any, *, seeds: int | None, per_expert: bool
) -> None:
    """Raise InputError where model, parameters, data and pin do not fit one another."""
    params = state.params
    if per_expert:
        sizes = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(source)}
        if sizes != {seeds}:
            raise InputError(
                f"per_expert with seeds={seeds}, but the batches' leading axes are "
                f"{sorted(sizes)}: give a data set for each"
            )
        source = jax.tree.map(lambda x: x[0], source)
    if seeds is not None:
        params = jax.tree.map(lambda x: x[0], params)
    x_0, cond = split_batch(example(source))
    check_pin(pin, x_0)

    def apply(params: Any, x: Any) -> Any:
        t = jnp.zeros(x.shape[0], jnp.int32)
        return model.apply({"params": params}, x, t, *_conditions(cond))

    shape = list(x_0.shape[1:])
    check_applies(
        f"the model cannot be applied to the state's params and rows of {shape}",
        apply,
        params,
        x_0,
    )


def _conditions(cond: Condition | None) -> tuple[Any, ...]:
    """The arguments of a model after x_t and t."""
    return () if cond is None else (cond,)


def _drop(
    cond: Condition | None, null: Any, share: float, key: Key[Array, ""], rows: int
) -> Condition:
    """The condition, replaced by the null one in a random `share` of its rows."""
    if cond is None:
        raise InputError("drop_condition: the batches have no condition; give (x_0, cond)")
    dropped = jax.random.bernoulli(key, share, (rows,))
    return jax.tree.map(
        lambda n, c: jnp.where(dropped.reshape(-1, *(1,) * (c.ndim - 1)), n, c),
        null_like(null, cond),
        cond,
    )


@functools.partial(jit, static_argnames="static", donate_argnums=0)
def _run(
    state: TrainState,
    source: Source,
    schedule: Schedule,
    weights: Float[Array, "..."],
    null: PyTree[Shaped[Array, "..."]] | None,
    key: Key[Array, ""],
    steps: Int[Array, " steps"],
    *,
    static: _Static,
) -> tuple[TrainState, dict[str, Float[Array, "steps ..."]]]:
    o = static.options

    def loss_of(params: Any, batch: Any, key: Key[Array, ""]) -> Float[Array, ""]:
        params = sharding.gathered(params, static.mesh)
        for_t, for_noise = jax.random.split(key)
        x_0, cond = split_batch(constrain(batch, static.mesh))
        if static.drop_condition:
            cond = _drop(
                cond, null, static.drop_condition, jax.random.fold_in(key, 2), x_0.shape[0]
            )
        t = jax.random.randint(for_t, x_0.shape[:1], 0, schedule.steps)
        noise = draw_noise(for_noise, x_0.shape, x_0.dtype)
        pinned = static.pin(x_0) if static.pin else None
        x_t = q_sample(schedule, x_0, t, noise)
        x_t = pinned(x_t) if pinned else x_t
        output = static.model.apply({"params": params}, x_t, t, *_conditions(cond))
        loss = prediction_loss(
            schedule,
            output,
            x_0,
            t,
            noise,
            prediction=o.prediction,
            weights=weights,
            pinned=pinned,
        )
        return jnp.mean(loss)

    def update(state: TrainState, source: Source, key: Key[Array, ""], step: Int[Array, ""]):
        draw, rest = jax.random.split(jax.random.fold_in(key, step))
        batch = source.sample(draw, o.batch_size)
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch, rest)
        updates, moments = static.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        # Counted as the authors count: the step that begins is number `step`, from 0.
        keep = jnp.where(step < o.ema.begin, 0.0, o.ema.decay)
        keep = jnp.where(step % o.ema.every == 0, keep, 1.0)
        average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, state.average, params)
        return TrainState(params, average, moments), {"loss": loss}

    def one(state: TrainState, step: Int[Array, ""]):
        each: Any = update
        keys = key
        if static.seeds is not None:
            keys = jax.random.split(key, static.seeds)
            each = jax.vmap(update, in_axes=(0, 0 if static.per_expert else None, 0, None))
        state, metrics = each(state, source, keys, step)
        return sharding.keep(state, static.mesh), metrics

    return scan(one, state, steps)
