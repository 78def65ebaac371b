"""The discriminator baseline: a classifier of noised trajectories, base or expert, as a guide.

The logit of the best discriminator at x_t is log p_expert,t(x_t) - log p_base,t(x_t) (plus a
constant for unequal amounts of data): the relative reward itself, learned from data in place of
scores. The authors' guide differentiates its sigmoid, which is flat where the discriminator is
sure; the logit's gradient is not.

Legend: B batch, N rows of data; x_t has any shape of a row.
"""

import functools
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from common_jax import struct
from common_jax.checksum import checksum
from common_jax.cli.ranges import check_ranges
from common_jax.errors import InputError
from common_jax.precision import jit, precise
from reward_jax.diffusion.denoiser import Condition, steps_of
from reward_jax.diffusion.loop import (
    LoopOptions,
    OnStep,
    begin,
    check_run,
    model_checksum,
    pin_checksum,
    run_loop,
    update_checksum,
)
from reward_jax.diffusion.process import draw_noise, q_sample
from reward_jax.diffusion.scan import scan
from reward_jax.diffusion.schedule import Schedule
from reward_jax.diffusion.sources import (
    Source,
    as_source,
    example,
    source_checksum,
    split_batch,
)
from reward_jax.reward.gradients import gradient_of, one_a_row

__all__ = ["DiscriminatorGuide", "train_discriminator"]


@struct.dataclass
class DiscriminatorGuide:
    """A trained discriminator as a guide of `guided_sample`.

    output: "logit", or "sigmoid" as the authors had it. conditional: the model takes the
    condition, as it did where its data had one; else a condition is ignored.
    """

    params: PyTree[Float[Array, "..."]]
    model: Any = struct.field(pytree_node=False)
    output: Literal["logit", "sigmoid"] = struct.field(pytree_node=False, default="logit")
    conditional: bool = struct.field(pytree_node=False, default=False)

    @precise
    def __call__(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, " B"]:
        """The logit, or the sigmoid; raises InputError as a `RelativeReward` does."""
        t = steps_of(x_t, t)
        given = (cond,) if self.conditional else ()
        logit = one_a_row(self.model.apply({"params": self.params}, x_t, t, *given), x_t)
        return logit if self.output == "logit" else jax.nn.sigmoid(logit)

    def gradient(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """grad_x of the output (see `Guide`)."""
        return gradient_of(self, x_t, t, cond)


class _Static(NamedTuple):
    """What the compiled step depends on besides arrays."""

    model: Any
    update: optax.TransformUpdateFn
    batch_size: int
    pin: Any


def train_discriminator(
    model: Any,
    params: PyTree[Float[Array, "..."]],
    base: Any,
    expert: Any,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    key: Key[Array, ""],
    options: LoopOptions | None = None,
    pin: Any = None,
    on_step: OnStep | None = None,
    checkpoints: str | pathlib.Path | None = None,
    save_every: int | None = None,
) -> tuple[PyTree[Float[Array, "..."]], dict[str, Float[np.ndarray, " steps"]]]:
    """Train on x_t of both data sets, half a batch of each, by binary cross-entropy.

    model: apply({"params": params}, x_t, t[, cond]) -> logits [B], any reward network. base,
    expert: data of each, an array x_0 [N, ...], (x_0, cond) or a source. Other arguments, and why
    they are many: as of `extract_reward`, and so are errors. Returns the parameters, and metrics:
    loss, accuracy.
    """
    o = LoopOptions() if options is None else options
    check_ranges(o)
    if o.batch_size % 2:
        raise InputError(
            f"batch_size is {o.batch_size}: give an even number, since half of a batch is of each "
            "data set"
        )
    check_run(model, schedule, optimizer, steps, key, pin)
    base, expert = as_source(base), as_source(expert)
    kinds = [jax.tree.map(lambda x: x.shape[1:], example(source)) for source in (base, expert)]
    if kinds[0] != kinds[1]:
        raise InputError(f"base has rows of {kinds[0]}, expert of {kinds[1]}: give data alike")
    state = (jax.tree.map(jnp.array, params), begin(params, optimizer=optimizer, seeds=False))
    run = functools.partial(_run, static=_Static(model, optimizer.update, o.batch_size, pin))

    def call(state: Any, first: int, count: int) -> Any:
        return run(state, base, expert, schedule, key, jnp.arange(first, first + count))

    def settings() -> dict[str, Any]:
        x_0, cond = split_batch(example(base))
        given = x_0, jnp.zeros(2, jnp.int32), *(() if cond is None else (cond,))

        def apply(params: Any, *given: Any) -> Any:
            return model.apply({"params": params}, *given)

        return {
            "batch_size": o.batch_size,
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "params": checksum(state[0]),
            "model": model_checksum(apply, state[0], *given, seeds=False),
            "pin": pin_checksum(pin, x_0),
            "base": source_checksum(base, o.batch_size // 2),
            "expert": source_checksum(expert, o.batch_size // 2),
            "schedule": checksum(schedule),
            "optimizer": update_checksum(optimizer, *state, seeds=False),
        }

    (params, _), metrics = run_loop(
        call,
        state,
        steps=steps,
        per_call=o.steps_per_call,
        on_step=on_step,
        directory=checkpoints,
        save_every=save_every,
        settings=settings,
    )
    return params, metrics


@functools.partial(jit, static_argnames="static", donate_argnums=0)
def _run(
    state: tuple[PyTree[Float[Array, "..."]], Any],
    base: Source,
    expert: Source,
    schedule: Schedule,
    key: Key[Array, ""],
    steps: Int[Array, " steps"],
    *,
    static: _Static,
) -> tuple[Any, dict[str, Float[Array, " steps"]]]:
    half = static.batch_size // 2
    labels = jnp.arange(2 * half) >= half

    def loss_of(params: Any, *given: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
        logits = one_a_row(static.model.apply({"params": params}, *given), given[0])
        loss = optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))
        return jnp.mean(loss), jnp.mean((logits > 0) == labels)

    def one(state: Any, step: Int[Array, ""]):
        params, moments = state
        keys = jax.random.split(jax.random.fold_in(key, step), 4)
        halves = base.sample(keys[0], half), expert.sample(keys[1], half)
        x_0, cond = split_batch(jax.tree.map(lambda *x: jnp.concatenate(x), *halves))
        t = jax.random.randint(keys[2], (2 * half,), 0, schedule.steps)
        x_t = q_sample(schedule, x_0, t, draw_noise(keys[3], x_0.shape))
        x_t = static.pin(x_0)(x_t) if static.pin else x_t
        (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(
            params, x_t, t, *(() if cond is None else (cond,))
        )
        updates, moments = static.update(grads, moments, params)
        state = optax.apply_updates(params, updates), moments
        return state, {"loss": loss, "accuracy": right}

    return scan(one, state, steps)
