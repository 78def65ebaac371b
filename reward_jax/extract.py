"""Relative rewards: a network whose gradient is the difference of two scores (Algorithm 1).

    minimise over theta   E over t, x_0, x_t of   w(t) | grad_x r_theta(x_t, t) - target |^2,
    target = u(t) (s_expert(x_t, t) - s_base(x_t, t))

u(t) is the target's unit: 1 for "score", sqrt(1 - abar_t) for "epsilon" (the difference of the two
noise predictions, the default: of one size at every t), beta_t / sqrt(alpha_t) for
"posterior_mean" (the difference of the two means of x_{t-1}, the authors' choice). The learned r
is u(t) times the relative reward rho; `RelativeReward` keeps the unit and undoes it.

Legend: B batch, T diffusion steps, S seeds.
"""

import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common_jax.errors import InputError
from reward_jax.data.sources import Rows
from reward_jax.denoiser import Denoiser, Score, as_argument, score_and_x0
from reward_jax.diffusion import Pinned, posterior_mean, q_sample
from reward_jax.loop import OnStep, run_loop
from reward_jax.schedule import Schedule

__all__ = [
    "History",
    "RelativeReward",
    "Target",
    "Targets",
    "draw_targets",
    "extract_reward",
    "init_params",
    "reward_gradient",
    "unit",
]

Target = Literal["epsilon", "score", "posterior_mean"]
Weighting = str | jax.Array | np.ndarray | Callable[[jax.Array], jax.Array] | None


def unit(schedule: Schedule, target: Target) -> jax.Array:
    """u(t) [T]: what multiplies the difference of scores to make the target."""
    if target not in get_args(Target):
        raise InputError(f"target {target!r} is unknown; known are {', '.join(get_args(Target))}")
    if target == "score":
        return jnp.ones_like(schedule.betas)
    if target == "epsilon":
        return jnp.asarray(schedule.sqrt_one_minus_alphas_cumprod)
    return jnp.asarray(schedule.mean_per_score)


def reward_gradient(reward: Any, params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    """grad_x of the reward [B, ...], each row's own."""
    return jax.grad(lambda x: jnp.sum(reward.apply({"params": params}, x, t)))(x)


@struct.dataclass
class RelativeReward:
    """A learned reward with its unit undone: calling it gives rho(x_t, t) [B].

    params: with `seeds`, leaves have a leading axis [S] and the mean over seeds is taken.
    """

    params: Any
    schedule: Schedule
    reward: Any = struct.field(pytree_node=False)
    target: Target = struct.field(pytree_node=False, default="epsilon")
    seeds: int | None = struct.field(pytree_node=False, default=None)

    def __call__(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """Rho, up to a constant for each t."""
        return self.learned(x_t, t) / unit(self.schedule, self.target)[t]

    def learned(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The network's own output [B], in the target's unit."""
        run = functools.partial(self._apply, x_t=x_t, t=t)
        if self.seeds is None:
            return run(self.params)
        return jnp.mean(jax.vmap(run)(self.params), axis=0)

    def _apply(self, params: Any, x_t: jax.Array, t: jax.Array) -> jax.Array:
        return self.reward.apply({"params": params}, x_t, t)

    def seed(self, index: int) -> "RelativeReward":
        """The reward of one seed."""
        params = jax.tree.map(lambda x: x[index], self.params)
        return self.replace(params=params, seeds=None)  # pyright: ignore[reportAttributeAccessIssue]


class Targets(NamedTuple):
    """Draws of what is matched: at x [N, ...] and t [N], the gradient should be value [N, ...]."""

    x: jax.Array
    t: jax.Array
    value: jax.Array


class History(NamedTuple):
    """What was measured, one entry a step: loss and explained are [steps] or [steps, S].

    explained: 1 - |grad r - target|^2 / |target|^2, over the batch. target: the unit of r.
    """

    step: np.ndarray
    loss: np.ndarray
    explained: np.ndarray
    target: Target


def init_params(reward: Any, key: jax.Array, x: jax.Array, seeds: int | None = None) -> Any:
    """Parameters of a reward network for inputs like x [B, ...]; [S, ...] leaves with seeds."""
    t = jnp.zeros(x.shape[0], jnp.int32)

    def init(key: jax.Array) -> Any:
        return reward.init(key, x, t)["params"]

    return init(key) if seeds is None else jax.vmap(init)(jax.random.split(key, seeds))


class _Setting(NamedTuple):
    """What the compiled step depends on besides arrays."""

    reward: Any
    optimizer: optax.GradientTransformation
    target: Target
    gradient_at: Literal["x_t", "posterior_mean"]
    pin: Callable[[jax.Array], Pinned] | None
    batch: int
    mesh: Mesh | None


def extract_reward(
    base_score: Score,
    expert_score: Score,
    reward: Any,
    params: Any,
    batches: Any,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    key: jax.Array,
    target: Target = "epsilon",
    weighting: Weighting = None,
    seeds: int | None = None,
    on_step: OnStep | None = None,
    batch_size: int = 128,
    gradient_at: Literal["x_t", "posterior_mean"] = "x_t",
    pin: Callable[[jax.Array], Pinned] | None = None,
    steps_per_call: int = 50,
    checkpoints: str | pathlib.Path | None = None,
    save_every: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Any, History]:
    """Learn the reward of `expert_score` relative to `base_score`.

    Args:
        base_score: the base's score, (x_t [B, ...], t [B] int[, cond]) -> [B, ...]; any model's,
            see `score_from`. A pytree is an argument of the compiled step; a plain function is
            compiled in.
        expert_score: the expert's, likewise.
        reward: reward.apply({"params": params}, x_t, t) -> [B].
        params: parameters to begin with (`init_params`); with `seeds` each leaf is [S, ...].
        batches: an array x_0 [N, ...] to draw from, or (x_0, cond); a source (`data/sources.py`);
            a callable step -> batch; an iterable of batches; or `Targets` from `draw_targets`,
            and then no score is called (give the same pin). Best is data of both models, or of
            the base: the expert's alone leaves out where the two differ.
        schedule: of both models.
        optimizer: an optax optimiser.
        steps: in all; a run that goes on from a checkpoint does what is left.
        key: of all that is drawn; step i draws from fold_in(key, i).
        target: what grad r is matched to; r is then u(t) rho (see the module).
        weighting: w(t) of the loss: None for 1, [T] values, a function of t [T], or "standardise":
            one over the target's mean square at each t, or over a thousandth of the mean of all
            where that is more. Its relative errors weigh alike at every t, and cost accuracy.
        seeds: S, to train as many rewards at once. They share x_t and the teachers' answers, which
            are computed once; only their initial parameters differ.
        on_step: called with (steps done, metrics of the last call) after each compiled call.
        batch_size: B, where batches are drawn here.
        gradient_at: where grad r is taken: x_t, or the base's posterior mean, as the authors do.
        pin: x_0 -> what of it is given (`FirstState`): imposed on x_t, and not matched.
        steps_per_call: steps of one compiled call.
        checkpoints: folder of an exact resume.
        save_every: steps between checkpoints; by default there is one at the end.
        mesh: batches are cut over its data and fsdp axes.

    Returns:
        Parameters, shaped as they came, and the `History`.

    Raises:
        InputError: an iterable that ends early, or a loss that is not finite, naming the step.
    """
    setting = _Setting(reward, optimizer, target, gradient_at, pin, batch_size, mesh)
    teachers = _teachers(base_score, expert_score, schedule)
    feed = _Feed(batches)
    weights = _weights(weighting, setting, teachers, schedule, feed, key)
    start = optimizer.init if seeds is None else jax.vmap(optimizer.init)
    state = (jax.tree.map(jnp.array, params), start(params))  # a copy: the state is donated
    run = functools.partial(_run, setting=setting, seeds=seeds is not None)
    # Teachers and student are two programs: another student finds the teachers' compiled.
    ask = functools.partial(_draw_many, setting=_asking(setting))

    def call(state: Any, first: int, count: int) -> Any:
        source, fed = feed.take(first, count)
        span = jnp.arange(first, first + count)
        drawn = teachers, schedule, key, source, span, fed
        found = _draw_many.eval_shape(*drawn, **ask.keywords)
        if sum(x.size * x.dtype.itemsize for x in found) > _BYTES_AT_ONCE:
            return run(state, teachers, schedule, weights, key, source, span, fed)
        return run(state, None, schedule, weights, key, None, span, ask(*drawn))

    (params, _), metrics = run_loop(
        call,
        state,
        steps=steps,
        per_call=steps_per_call,
        on_step=on_step,
        directory=checkpoints,
        save_every=save_every,
        settings=None if checkpoints is None else _settings(setting, weights, key),
    )
    loss, explained = (metrics.get(k, np.zeros(0)) for k in ("loss", "explained"))
    return params, History(np.arange(steps - len(loss), steps) + 1, loss, explained, target)


def draw_targets(
    base_score: Score,
    expert_score: Score,
    batches: Any,
    schedule: Schedule,
    *,
    count: int,
    key: jax.Array,
    target: Target = "epsilon",
    gradient_at: Literal["x_t", "posterior_mean"] = "x_t",
    pin: Callable[[jax.Array], Pinned] | None = None,
    batch_size: int = 128,
) -> Targets:
    """Ask the teachers once, for draws that many rewards can be trained on; see `extract_reward`.

    batches: an array, (x_0, cond) or a source. count is rounded up to whole batches.
    """
    setting = _Setting(None, _NO_OPTIMIZER, target, gradient_at, pin, batch_size, None)
    feed = _Feed(batches)
    calls = jnp.arange(-(-count // batch_size))
    source, _ = feed.take(0, 1)
    if not hasattr(source, "sample"):
        raise InputError("targets are drawn from an array or a source, not from an iterable")
    teachers = _teachers(base_score, expert_score, schedule)
    asked = teachers, schedule, key, source, calls, None
    found = _draw_many(*asked, setting=_asking(setting))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


_NO_OPTIMIZER = optax.identity()
# Targets of one call that are held at once, where the teachers have a program of their own.
_BYTES_AT_ONCE = 2**28


def _asking(setting: _Setting) -> _Setting:
    """What the teachers' program depends on: not on who learns from it."""
    return setting._replace(reward=None, optimizer=_NO_OPTIMIZER)


@functools.partial(jax.jit, static_argnames="setting")
def _draw_many(teachers, schedule, key, source, steps, fed, *, setting: _Setting) -> Targets:
    """What `len(steps)` steps are trained on, [steps, B, ...]."""

    def one(_: None, given: Any) -> tuple[None, Targets]:
        return None, _drawn(teachers, schedule, key, source, given, setting)

    return jax.lax.scan(one, None, (steps, fed))[1]


def _drawn(teachers, schedule, key, source, given: Any, setting: _Setting) -> Targets:
    """The targets of one step, given its number and the batch that was fed, or None."""
    step, batch = given
    draw, noise = jax.random.split(jax.random.fold_in(key, step))
    if batch is None:
        batch = source.sample(draw, setting.batch)
    if setting.mesh is not None:
        rows = NamedSharding(setting.mesh, PartitionSpec(("data", "fsdp")))
        batch = jax.lax.with_sharding_constraint(batch, rows)
    if isinstance(batch, Targets):
        return batch
    return _targets(teachers, schedule, batch, noise, setting)


def _teachers(base: Any, expert: Any, schedule: Schedule) -> Any:
    """Both, as arguments; on a CPU two models of one network are stacked [2, ...].

    One network is compiled then, run for each: a tenth of a step's compilation at the paper's
    sizes. It costs a copy of the weights, which an accelerator's memory is too dear for.
    """
    for name, model in (("base_score", base), ("expert_score", expert)):
        if isinstance(model, Denoiser) and model.schedule.steps != schedule.steps:
            raise InputError(
                f"{name} has {model.schedule.steps} diffusion steps, the schedule "
                f"{schedule.steps}; give the schedule that the models were trained with"
            )
    base, expert = as_argument(base), as_argument(expert)
    if not isinstance(base, Denoiser) or jax.tree.structure(base) != jax.tree.structure(expert):
        return base, expert
    pairs = list(zip(jax.tree.leaves(base), jax.tree.leaves(expert), strict=True))
    alike = all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    if not alike or not all(map(_on_one_cpu, jax.tree.leaves(pairs))):
        return base, expert
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), base, expert)


def _on_one_cpu(x: Any) -> bool:
    if isinstance(x, Tracer):
        return False
    devices = x.devices() if isinstance(x, jax.Array) else {jax.devices()[0]}
    return [d.platform for d in devices] == ["cpu"]


def _targets(teachers: Any, schedule, batch: Any, key: jax.Array, setting: _Setting) -> Targets:
    """Noise a batch and ask both teachers."""
    x_0, cond = batch if isinstance(batch, tuple) else (batch, None)
    for_t, for_noise = jax.random.split(key)
    t = jax.random.randint(for_t, (x_0.shape[0],), 0, schedule.steps)
    x_t = q_sample(schedule, x_0, t, jax.random.normal(for_noise, x_0.shape, x_0.dtype))
    pinned = setting.pin(x_0) if setting.pin else None
    x_t = pinned(x_t) if pinned else x_t
    if setting.gradient_at not in ("x_t", "posterior_mean"):
        raise InputError(f"gradient_at is x_t or posterior_mean, not {setting.gradient_at!r}")
    ask = functools.partial(score_and_x0, schedule=schedule, x_t=x_t, t=t, cond=cond)
    if isinstance(teachers, Denoiser):
        scores, x_0s = jax.lax.map(ask, teachers)
        of_base, of_expert, x_0 = scores[0], scores[1], x_0s[0]
    else:
        (of_base, x_0), (of_expert, _) = map(ask, teachers)
    mean = setting.gradient_at == "posterior_mean"
    at = posterior_mean(schedule, x_0, x_t, t) if mean else x_t
    difference = of_expert - of_base
    difference = pinned.free(difference) if pinned else difference
    value = schedule.at(unit(schedule, setting.target), t, x_t) * difference
    return jax.lax.stop_gradient(Targets(at, t, value))


@functools.partial(jax.jit, static_argnames=("setting", "seeds"), donate_argnums=0)
def _run(
    state,
    teachers,
    schedule,
    weights,
    key,
    source,
    steps,
    fed,
    *,
    setting: _Setting,
    seeds: bool,
):
    """`len(steps)` steps; batches are fed [steps, B, ...], or drawn from the source."""

    def loss_of(params: Any, targets: Targets) -> tuple[jax.Array, jax.Array]:
        gradient = reward_gradient(setting.reward, params, targets.x, targets.t)
        if setting.pin:
            gradient = setting.pin(targets.x).free(gradient)
        error = jnp.square(gradient - targets.value)
        error = jnp.mean(error.reshape(error.shape[0], -1), axis=1)
        size = jnp.mean(jnp.square(targets.value))
        return jnp.mean(weights[targets.t] * error), 1 - jnp.mean(error) / size

    def update(params: Any, moments: Any, targets: Targets):
        (loss, explained), grads = jax.value_and_grad(loss_of, has_aux=True)(params, targets)
        updates, moments = setting.optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss, explained

    def one(state: Any, given: Any):
        targets = _drawn(teachers, schedule, key, source, given, setting)
        each: Any = jax.vmap(update, in_axes=(0, 0, None)) if seeds else update
        params, moments, loss, explained = each(state[0], state[1], targets)
        return (params, moments), {"loss": loss, "explained": explained}

    return jax.lax.scan(one, state, (steps, fed))


def _settings(setting: _Setting, weights: jax.Array, key: jax.Array) -> dict[str, Any]:
    """What must be the same when a run goes on, as JSON holds it."""
    return {
        "target": setting.target,
        "batch_size": setting.batch,
        "gradient_at": setting.gradient_at,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "weights": np.asarray(weights, np.float64).round(6).tolist(),
    }


class _Feed:
    """Batches in whatever form they came, as (source, None) or (None, stacked batches)."""

    def __init__(self, batches: Any) -> None:
        self._source = self._callable = self._iterator = None
        self._at = 0
        if hasattr(batches, "sample"):
            self._source = batches
        elif isinstance(batches, tuple | np.ndarray | jax.Array):
            self._source = Rows(jax.tree.map(jnp.asarray, batches))
            sizes = {x.shape[0] for x in jax.tree.leaves(self._source)}
            if len(sizes) != 1 or 0 in sizes:
                raise InputError(f"batches: arrays of one data set have {sorted(sizes)} rows")
        elif callable(batches):
            self._callable = batches
        elif isinstance(batches, Iterable):
            self._iterator: Iterator[Any] | None = iter(batches)
        else:
            raise InputError(
                f"batches: {type(batches).__name__} is no array, source, callable or iterable"
            )

    def take(self, first: int, count: int) -> tuple[Any, Any]:
        """What steps first .. first + count - 1 are trained on."""
        if self._source is not None:
            return self._source, None
        if self._callable is not None:
            found = [self._callable(step) for step in range(first, first + count)]
        else:
            assert self._iterator is not None
            found = []
            for step in range(self._at, first + count):  # a run that goes on skips what was used
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    raise InputError(
                        f"batches: the iterable ended before step {step + 1}; give one that is as "
                        "long as the steps, or an array to draw from"
                    ) from None
                if step >= first:
                    found.append(batch)
            self._at = first + count
        return None, jax.tree.map(lambda *x: jnp.stack(x), *found)


def _weights(weighting: Weighting, setting, teachers, schedule, feed, key) -> jax.Array:
    """w(t) as [T] float32."""
    if weighting is None:
        return jnp.ones(schedule.steps)
    if isinstance(weighting, str):
        if weighting != "standardise":
            raise InputError(f"weighting {weighting!r} is unknown; give values, or standardise")
        square = _mean_square(setting, teachers, schedule, feed, key)
        return jnp.where(square > 0, 1 / square, 1.0)
    values = weighting(jnp.arange(schedule.steps)) if callable(weighting) else weighting
    values = jnp.asarray(values, jnp.float32)
    if values.shape != (schedule.steps,) or not bool(jnp.isfinite(values).all()):
        raise InputError(
            f"weighting has the shape {values.shape}, or is not finite; give {schedule.steps} "
            "numbers, one a diffusion step"
        )
    return values


def _mean_square(setting, teachers, schedule, feed, key, draws: int = 4096) -> jax.Array:
    """The target's mean square at each t [T], at least a thousandth of the mean of all."""
    source, fed = feed.take(0, 1) if feed._iterator is None else (None, None)
    if source is None and fed is None:
        raise InputError("weighting: standardise needs an array, a source or a callable")
    if source is None:
        source = Rows(jax.tree.map(lambda x: x[0], fed))
    targets = source.rows if isinstance(getattr(source, "rows", None), Targets) else None
    if targets is None:
        calls = jnp.arange(max(1, draws // setting.batch)) + 2**30  # apart from the steps' draws
        targets = _draw_many(
            teachers, schedule, key, source, calls, None, setting=_asking(setting)
        )
    t = targets.t.reshape(-1)
    square = jnp.mean(jnp.square(targets.value).reshape(t.size, -1), axis=1)
    total, count = (
        jax.ops.segment_sum(x, t, schedule.steps) for x in (square, jnp.ones_like(square))
    )
    # Some 64 draws for each t, of its neighbours where its own are fewer.
    reach = min(64 * schedule.steps // t.size, schedule.steps - 1) // 2
    window = jnp.ones(2 * reach + 1)
    total, count = (jnp.convolve(x, window, mode="same") for x in (total, count))
    # At the last t little is left to tell two models apart: unbounded, its weight is all there is.
    overall = jnp.mean(square)
    mean = jnp.where(count > 0, total / jnp.maximum(count, 1), overall)
    return jnp.maximum(mean, overall / 1000)
