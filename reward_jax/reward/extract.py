"""Relative rewards: a network whose gradient is the difference of two scores (Algorithm 1).

    minimise over theta   E over t, x_0, x_t of   w(t) | grad_x r_theta(x_t, t) - target |^2

with the target of `targets.py`, which is u(t) times the difference of scores. The learned r is
thus u(t) times the relative reward rho; `RelativeReward` (`relative.py`) divides by u(t).

Legend: B batch, N rows of data, T diffusion steps, S seeds; x_t has any shape of a row.
"""

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
from common_jax.cli.ranges import check_ranges
from common_jax.errors import InputError
from common_jax.precision import jit
from reward_jax import sharding
from reward_jax.diffusion.denoiser import Score
from reward_jax.diffusion.loop import (
    OnStep,
    begin,
    check_applies,
    check_pin,
    check_run,
    check_seeds,
    model_checksum,
    pin_checksum,
    quick_jit,
    run_loop,
    update_checksum,
)
from reward_jax.diffusion.process import Pinned
from reward_jax.diffusion.scan import scan
from reward_jax.diffusion.schedule import Schedule
from reward_jax.diffusion.sources import split_batch
from reward_jax.reward.relative import reward_gradient
from reward_jax.reward.targets import (
    ExtractionOptions,
    Feed,
    Target,
    Targets,
    TargetSettings,
    Teachers,
    mean_square,
)

__all__ = [
    "ExtractionOptions",
    "History",
    "extract_reward",
    "init_params",
    "learn",
]

Weighting = (
    str
    | Float[Array, " T"]
    | Float[np.ndarray, " T"]
    | Callable[[Int[Array, " T"]], Float[Array, " T"]]
    | None
)


class History(NamedTuple):
    """Metrics of each step, of each seed where there are seeds.

    step: from 1. explained: 1 - |grad r - target|^2 / |target|^2, over the batch. target: the name
    of what was matched, which says the unit of r.
    """

    step: Int[np.ndarray, " steps"]
    loss: Float[np.ndarray, " steps"] | Float[np.ndarray, "steps S"]
    explained: Float[np.ndarray, " steps"] | Float[np.ndarray, "steps S"]
    target: Target


@functools.partial(jit, static_argnames=("reward", "seeds"))
def init_params(
    reward: Any, key: Key[Array, ""], x: Float[Array, "B ..."], seeds: int | None = None
) -> PyTree[Float[Array, "..."]]:
    """Random parameters of a reward network; leaves are [S, ...] with seeds.

    x: an example of its input, whose values are not used.
    """
    t = jnp.zeros(x.shape[0], jnp.int32)

    def init(key: Key[Array, ""]) -> Any:
        return reward.init(key, x, t)["params"]

    return init(key) if seeds is None else jax.vmap(init)(jax.random.split(key, seeds))


def extract_reward(
    base_score: Score,
    expert_score: Score,
    reward: Any,
    params: PyTree[Float[Array, "..."]],
    batches: Any,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    key: Key[Array, ""],
    target: Target = "epsilon",
    weighting: Weighting = None,
    entries: Float[Array, "..."] | Float[np.ndarray, "..."] | None = None,
    seeds: int | None = None,
    on_step: OnStep | None = None,
    options: ExtractionOptions | None = None,
    pin: Callable[[Float[Array, "B ..."]], Pinned] | None = None,
    checkpoints: str | pathlib.Path | None = None,
    save_every: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[PyTree[Float[Array, "..."]], History]:
    """Learn the reward of `expert_score` relative to `base_score`.

    Args:
        base_score: the base's score, (x_t [B, ...], t [B] int[, cond]) -> [B, ...]; `score_from`
            makes one of any model. A pytree is an argument of the compiled step; a plain function
            is compiled in.
        expert_score: the expert's, likewise.
        reward: reward.apply({"params": params}, x_t, t) -> [B].
        params: parameters to begin with (`init_params`); with `seeds` each leaf is [S, ...].
        batches: an array x_0 [N, ...] to draw from, or (x_0, cond) with cond a tree of [N, ...]; a
            source (`diffusion/sources.py`); a callable step -> batch, called once a step; an
            iterable of batches; or
            `Targets` from `draw_targets`, and then no score is called (give the same target,
            pin and gradient_at; all but the pin are checked), or these as `Drawn`. Data
            of both models, or of the base, are best: the expert's alone leave out the places in
            which the two differ. The reward has no condition: one reward fits all.
        schedule: of both models.
        optimizer: an optax optimizer.
        steps: in all; a resumed run does those that are left.
        key: of all random numbers; step i draws from fold_in(key, i).
        target: what grad r is matched to; r is then u(t) rho (see the module).
        weighting: w(t) of the loss: None for 1, [T] values, a function of t [T], or "standardise":
            one over the target's mean square at each t, or over a thousandth of the mean of all
            where that is more. Relative errors then count alike at every t; accuracy falls.
        entries: weights of the squared error of each entry of x, broadcastable to a row; such as
            `action_weights`, for the action that is executed. None for 1.
        seeds: S, to train as many rewards at once. They share x_t and the teachers' scores,
            which are computed once, unless options.apart; only their initial parameters differ.
        on_step: called with (steps done, metrics of the last call) after each compiled call.
        options: by default `ExtractionOptions()`.
        pin: x_0 -> `Pinned`, such as `FirstState`: entries imposed on x_t, and not matched.
        checkpoints: folder of checkpoints, from which a run resumes exactly; InputError where it
            is of other models, data, parameters, optimizer or options. Of what an iterable or a
            callable gives, the first batch is compared; a resumed run is exact where a callable
            gives the same batch whenever it is asked for a step.
        save_every: steps between checkpoints; by default there is one at the end.
        mesh: batches are sharded over its data and fsdp axes, parameters, the models' too, over
            fsdp and tensor (`reward_jax/sharding.py`).

    Returns:
        The trained parameters, of the shapes given, and the `History`.

    Raises:
        InputError: an iterable that ends early, or a loss that is not finite, naming the step;
            data that are no floating numbers, a reward that does not give one number a row, models
            of another schedule, parameters without the axis of seeds.

    More than eight parameters, since arrays, functions and folders are not options.
    """
    o = ExtractionOptions() if options is None else options
    check_ranges(o)
    apart = o.apart and seeds is not None
    rows = o.batch_size * (seeds if apart and seeds else 1)
    settings = TargetSettings(target, o.gradient_at, pin, rows, mesh)
    check_run(reward, schedule, optimizer, steps, key, pin)
    teachers = Teachers(base_score, expert_score, schedule, settings)
    feed = Feed(batches)
    check_seeds(params, seeds)
    _check_fit(reward, params, teachers, feed, pin, seeds=seeds)
    weights = _weights(weighting, teachers, schedule, feed, key, o.batch_size)
    by_entry = _by_entry(entries, feed)
    moments = begin(params, optimizer=optimizer, seeds=seeds is not None)
    state = (jax.tree.map(jnp.array, params), moments)  # a copy: the state is donated
    state = sharding.place(state, mesh)
    step = functools.partial(
        learn,
        reward=reward,
        rule=optimizer.update,
        pin=pin,
        seeds=seeds is not None,
        apart=apart,
        mesh=mesh,
    )

    def call(state: Any, first: int, count: int) -> Any:
        source, fed = feed.take(first, count)
        measured = []
        for targets in teachers.in_parts(key, source, jnp.arange(first, first + count), fed):
            state, metrics = step(state, weights, by_entry, targets)
            measured.append(metrics)
        if len(measured) > 1:
            return state, jax.tree.map(lambda *x: jnp.concatenate(x), *measured)
        return state, measured[0]

    def run_settings() -> dict[str, Any]:
        many, example = seeds is not None, feed.example()
        x = example.x if isinstance(example, Targets) else split_batch(example)[0]
        given = x, jnp.zeros(x.shape[0], jnp.int32)
        return {
            "target": settings.target,
            "batch_size": settings.batch_size,
            "gradient_at": settings.gradient_at,
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            **_weights_of(weighting, weights),
            "entries": checksum(by_entry),
            "seeds": seeds,
            **({"apart": True} if apart else {}),
            "params": checksum(params),
            "reward": model_checksum(
                functools.partial(reward_gradient, reward), params, *given, seeds=many
            ),
            "pin": pin_checksum(pin, x),
            **feed.checksums(o.batch_size),
            "schedule": checksum(schedule),
            "optimizer": update_checksum(optimizer, params, moments, seeds=many),
            **teachers.checksums(feed),
        }

    (trained, _), metrics = run_loop(
        call,
        state,
        steps=steps,
        per_call=o.steps_per_call,
        on_step=on_step,
        directory=checkpoints,
        save_every=save_every,
        settings=run_settings,
    )
    loss, explained = (metrics.get(k, np.zeros(0)) for k in ("loss", "explained"))
    return trained, History(np.arange(steps - len(loss), steps) + 1, loss, explained, target)


@quick_jit(static_argnames=("reward", "rule", "pin", "seeds", "apart", "mesh"), donate_argnums=0)
def learn(
    state: tuple[PyTree[Float[Array, "..."]], Any],
    weights: Float[Array, " T"],
    by_entry: Float[Array, "..."] | None,
    targets: Targets,
    *,
    reward: Any,
    rule: optax.TransformUpdateFn,
    pin: Any,
    seeds: bool,
    apart: bool,
    mesh: Mesh | None,
) -> tuple[Any, dict[str, Float[Array, "steps ..."]]]:
    """The program of `extract_reward`: a step for each batch of targets [steps, B, ...].

    state: parameters and moments. by_entry: weights of entries, with an axis of rows. rule: the
    optimizer's update.
    """

    def loss_of(params: Any, targets: Targets) -> tuple[Float[Array, ""], Float[Array, ""]]:
        params = sharding.gathered(params, mesh)
        gradient = reward_gradient(reward, params, targets.x, targets.t)
        if pin:
            gradient = pin(targets.x).free(gradient)
        error = jnp.square(gradient - targets.value)
        of_rows = jnp.mean(error.reshape(error.shape[0], -1), axis=1)
        explained = 1 - jnp.mean(of_rows) / jnp.mean(jnp.square(targets.value))
        if by_entry is not None:
            of_rows = jnp.mean((by_entry * error).reshape(error.shape[0], -1), axis=1)
        return jnp.mean(weights[targets.t] * of_rows), explained

    def update(params: Any, moments: Any, targets: Targets):
        (loss, explained), grads = jax.value_and_grad(loss_of, has_aux=True)(params, targets)
        updates, moments = rule(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss, explained

    def one(state: Any, targets: Targets):
        each: Any = update
        if apart:
            count = jax.tree.leaves(state[0])[0].shape[0]
            targets = jax.tree.map(functools.partial(_blocks, count), targets)
        if seeds:
            each = jax.vmap(update, in_axes=(0, 0, 0 if apart else None))
        params, moments, loss, explained = each(state[0], state[1], targets)
        return sharding.keep((params, moments), mesh), {"loss": loss, "explained": explained}

    return scan(one, state, targets)


def _blocks(count: int, x: Shaped[Array, "B ..."]) -> Shaped[Array, "S n ..."]:
    """Rows of each seed; InputError where they cannot be of one number."""
    if x.shape[0] % count:
        raise InputError(
            f"a batch of {x.shape[0]} rows cannot be cut into {count} seeds' own: give a "
            "multiple, or leave out apart"
        )
    return x.reshape(count, -1, *x.shape[1:])


def _weights_of(weighting: Weighting, weights: Float[Array, " T"]) -> dict[str, Any]:
    """Of weights in a run's settings: a name counts, not what it gives, for rounding may vary."""
    if isinstance(weighting, str):
        return {"weighting": weighting}
    return {"weights": [float(f"{w:.6g}") for w in np.asarray(weights)]}


def _check_fit(
    reward: Any, params: Any, teachers: Teachers, feed: Feed, pin: Any, *, seeds: int | None
) -> None:
    """Raise InputError where reward, parameters, scores, data and pin do not fit one another."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(f"params: {name} is {jnp.result_type(leaf)}, not floating numbers")
    batch = feed.example()
    x = batch.x if isinstance(batch, Targets) else split_batch(batch)[0]
    check_pin(pin, x)
    if not isinstance(batch, Targets):
        teachers.check(*split_batch(batch))
    one = params if seeds is None else jax.tree.map(lambda leaf: leaf[0], params)
    shape = list(x.shape[1:])
    check_applies(
        f"the reward cannot be applied to its params and rows of {shape}",
        functools.partial(reward_gradient, reward),
        one,
        x,
        jnp.zeros(x.shape[0], jnp.int32),
    )


def _by_entry(entries: Any, feed: Feed) -> Float[Array, "..."] | None:
    """Weights of entries with an axis of rows, float32; InputError where they do not fit a row."""
    if entries is None:
        return None
    example = feed.example()
    x = example.x if isinstance(example, Targets) else split_batch(example)[0]
    try:
        found = jnp.asarray(entries, jnp.float32)
    except (TypeError, ValueError):
        raise InputError(f"entries are {entries!r}: give a weight for each entry") from None
    fine = bool((jnp.isfinite(found) & (found >= 0)).all() & (found > 0).any())
    sound = fine and found.ndim == x.ndim - 1
    if not sound or any(a not in (1, b) for a, b in zip(found.shape, x.shape[1:], strict=True)):
        raise InputError(
            f"entries are of shape {list(found.shape)}, below 0, all 0 or not finite: give a "
            f"weight for each entry of a row, {list(x.shape[1:])}"
        )
    return found[None]


def _weights(
    weighting: Weighting,
    teachers: Teachers,
    schedule: Schedule,
    feed: Feed,
    key: Key[Array, ""],
    batch: int,
) -> Float[Array, " T"]:
    """w(t), float32."""
    if weighting is None:
        return jnp.ones(schedule.steps)
    if isinstance(weighting, str):
        if weighting != "standardise":
            raise InputError(f"weighting {weighting!r} is unknown; give values, or standardise")
        square = mean_square(teachers, schedule, feed, key, batch)
        return jnp.where(square > 0, 1 / square, 1.0)
    values = weighting(jnp.arange(schedule.steps)) if callable(weighting) else weighting
    values = jnp.asarray(values, jnp.float32)
    fine = (values >= 0) & jnp.isfinite(values)
    if values.shape != (schedule.steps,) or not bool(fine.all()):
        raise InputError(
            f"weighting has the shape {values.shape}, or is negative or not finite; give "
            f"{schedule.steps} numbers, one a diffusion step"
        )
    return values
