"""One optimizer step as a compiled function, and one evaluation.

Legend: M micro-batches, B rows of each. The loss of a step is the mean over all answer tokens of
all its micro-batches, so that accumulating M times B rows equals one batch of M B.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from common_jax.cli.ranges import (
    BelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    UnitInterval,
)
from tuco_jax.finetune.batches import Batch
from tuco_jax.finetune.lora import fold_scale
from tuco_jax.finetune.loss import answer_loss
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params
from tuco_jax.models.sharding import shardings

__all__ = ["Method", "OptimizerOptions", "TrainState", "make_eval", "make_step", "start"]


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """AdamW with linear warm-up, cosine decay and clipping.

    Args:
        learning_rate: its peak.
        warmup: steps until the peak; the first step has 1/warmup of it.
        final: share of the peak that is left at the last step.
        weight_decay: of matrices, never of norms and biases.
        clip: largest global norm of the gradient; 0 for no clipping.
        beta1: decay of the mean of gradients.
        beta2: decay of the mean of their squares.
        epsilon: added to the root of the latter.
    """

    learning_rate: PositiveFloat = 2e-4
    warmup: NonNegativeInt = 10
    final: UnitInterval = 0.0
    weight_decay: NonNegativeFloat = 0.0
    clip: NonNegativeFloat = 1.0
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    epsilon: PositiveFloat = 1e-8

    def schedule(self, steps: int) -> optax.Schedule:
        """Learning rate of step 0, 1, ..., steps - 1."""
        warmup = max(self.warmup, 1)
        rise = optax.linear_schedule(
            self.learning_rate / warmup, self.learning_rate, max(warmup - 1, 1)
        )
        fall = optax.cosine_decay_schedule(self.learning_rate, max(steps - warmup, 1), self.final)
        return optax.join_schedules([rise, fall], [warmup]) if self.warmup else fall

    def make(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of a run of `steps` steps."""
        clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
        adamw = optax.adamw(
            self.schedule(steps),
            b1=self.beta1,
            b2=self.beta2,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            mask=_is_matrix,
        )
        return optax.chain(clip, adamw)


def _is_matrix(params: Params) -> Any:
    names = ("kernel", "table", "a", "b")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


@dataclasses.dataclass(frozen=True)
class Method:
    """How the tuned model is made of what is trained.

    scale: an adapter's; None if all parameters are trained. dtype: of the parameters in matrix
    products; what is trained is float32.
    """

    scale: float | None
    dtype: str

    def model(self, trained: Params, base: Params) -> tuple[Params, Params]:
        """(parameters, low-rank factors) of the tuned model."""
        if self.scale is None:
            return jax.tree.map(lambda x: x.astype(self.dtype), trained), {}
        return base, fold_scale(trained, self.scale)


class TrainState(NamedTuple):
    """step: steps done, int32. trained: the adapter's factors, or all parameters."""

    step: Int[Array, ""]
    trained: Params
    optimizer: Any


def start(trained: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), trained, optimizer.init(trained))


def make_step(
    config: ModelConfig,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """The compiled (state, base parameters, batch with leaves [M, B, ...]) -> (state, metrics).

    The state is donated. Only what is trained has gradients. base may be {} if all parameters are
    trained. Metrics: loss, in nats a token, and grad_norm, before clipping, both at the parameters
    before the step.
    """

    def total(trained: Params, base: Params, batch: Batch) -> Float[Array, ""]:
        params, lora = method.model(trained, base)
        return answer_loss(config, params, lora, batch, remat=remat, mesh=mesh)

    def step(state: TrainState, base: Params, batch: Batch):
        gradient = jax.value_and_grad(total)
        if batch.tokens.shape[0] == 1:
            loss, grads = gradient(state.trained, base, Batch(*(a[0] for a in batch)))
        else:

            def accumulate(sums: Any, micro: Batch):
                return jax.tree.map(jnp.add, sums, gradient(state.trained, base, micro)), None

            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained))
            (loss, grads), _ = jax.lax.scan(accumulate, zeros, batch)
        count = jnp.sum(batch.weights)
        loss, grads = jax.tree.map(lambda x: x / count, (loss, grads))
        updates, moments = optimizer.update(grads, state.optimizer, state.trained)
        trained: Any = optax.apply_updates(state.trained, updates)
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
        state = TrainState(state.step + 1, trained, moments)
        if mesh is not None:  # else the compiler may move it, and the next call compiles anew
            state = jax.lax.with_sharding_constraint(state, shardings(state, mesh))
        return state, metrics

    return jax.jit(step, donate_argnums=0)


def make_eval(
    config: ModelConfig, method: Method, *, mesh: Mesh | None = None
) -> Callable[[Params, Params, Batch], tuple[Float[Array, ""], Float[Array, ""]]]:
    """The compiled (trained, base, batch) -> (summed loss, number of answer tokens)."""

    def evaluate(trained: Params, base: Params, batch: Batch):
        params, lora = method.model(trained, base)
        loss = answer_loss(config, params, lora, batch, mesh=mesh)
        return loss, jnp.sum(batch.weights)

    return jax.jit(evaluate)
