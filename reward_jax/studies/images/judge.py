"""The classifier that judges samples, trained apart from all that it judges, and its distance.

Legend: N images, B batch; H, W, C height, width and channels; K classes, F features.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, PyTree

from common_jax import struct
from common_jax.cli.ranges import PositiveFloat, PositiveInt
from common_jax.errors import InputError
from common_jax.precision import jit
from reward_jax.data.images.pixels import Images, scaled
from reward_jax.models.unet2d.layers import Conv

__all__ = [
    "Judge",
    "JudgeNet",
    "JudgeOptions",
    "frechet_distance",
    "network_of",
    "train_judge",
]

_AT_ONCE = 500  # images of a compiled call
_SIDE = 8  # positions of a side, to which convolutions halve an image


@dataclasses.dataclass(frozen=True)
class JudgeOptions:
    """The classifier, and its training.

    Args:
        steps: of Adam.
        batch_size: images of a step.
        learning_rate: of Adam, decayed along a cosine.
        width: channels of the first convolution; later ones have twice as many.
        features: of an image, on which the distance of samples is taken.
    """

    steps: PositiveInt = 1500
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 2e-3
    width: PositiveInt = 32
    features: PositiveInt = 64


class JudgeNet(nn.Module):
    """Convolutions that halve an image until 8 positions a side are left, and two layers.

    Attributes:
        classes: K.
        width, features: see `JudgeOptions`.
    """

    classes: int
    width: int
    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B K"], Float[Array, "B F"]]:
        """Logits, and the features that they are made of."""
        level = 0
        while level < 2 or max(x.shape[1:3]) > _SIDE:
            x = nn.silu(Conv(self.width * min(level + 1, 2), 3, 2, name=f"conv_{level}")(x))
            level += 1
        features = nn.silu(nn.Dense(self.features, name="features")(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes, name="head")(features), features


@struct.dataclass
class Judge:
    """A trained classifier."""

    params: PyTree[Float[Array, "..."]]
    network: JudgeNet = struct.field(pytree_node=False)

    def judge(
        self, x: Float[np.ndarray, "N H W C"]
    ) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N F"]]:
        """The class of each image (-1 .. 1), and its features."""
        found = []
        for first in range(0, len(x), _AT_ONCE):
            part = np.asarray(x[first : first + _AT_ONCE], np.float32)
            whole = np.zeros((_AT_ONCE, *part.shape[1:]), np.float32)  # one program for all
            whole[: len(part)] = part
            found.append([np.asarray(y)[: len(part)] for y in _apply(self, whole)])
        logits, features = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return logits.argmax(axis=1), features


@jit
def _apply(judge: Judge, x: Float[Array, "N H W C"]) -> tuple[Any, Any]:
    return judge.network.apply({"params": judge.params}, x)  # pyright: ignore[reportReturnType]


def network_of(images: Images, options: JudgeOptions) -> JudgeNet:
    """The classifier's network, for images like these."""
    return JudgeNet(len(images.classes), options.width, options.features)


def train_judge(images: Images, options: JudgeOptions, key: Key[Array, ""]) -> Judge:
    """Train a classifier; raises InputError where its loss is no longer finite."""
    network = network_of(images, options)
    adam = optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.steps))
    for_params, for_rows = jax.random.split(key)
    example = jnp.zeros((1, *images.pixels.shape[1:]))
    params = network.init(for_params, example)["params"]
    data = jnp.asarray(images.pixels), jnp.asarray(images.known_labels(), jnp.int32)
    state = params, adam.init(params)
    for step in range(options.steps):
        own = jax.random.fold_in(for_rows, step)
        state, loss = _learn(state, data, own, network, adam.update, options.batch_size)
        last = step + 1 == options.steps
        if (last or (step + 1) % 100 == 0) and not np.isfinite(float(loss)):
            raise InputError(
                f"the classifier's loss is not finite at step {step + 1}: lower "
                "judge.learning_rate"
            )
    return Judge(state[0], network)


@functools.partial(jit, static_argnames=("network", "update", "count"), donate_argnames="state")
def _learn(
    state: Any, data: Any, key: Any, network: JudgeNet, update: Any, count: int
) -> tuple[Any, Float[Array, ""]]:
    """A step, by itself: convolutions' backward passes are slow within a scan on a CPU."""
    pixels, labels = data
    rows = jax.random.randint(key, (count,), 0, pixels.shape[0])

    def loss_of(params: Any) -> Float[Array, ""]:
        logits: Any = network.apply({"params": params}, jnp.asarray(scaled(pixels[rows])))[0]
        right = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[rows][:, None], axis=1)
        return -jnp.mean(right)

    loss, gradient = jax.value_and_grad(loss_of)(state[0])
    moves, moments = update(gradient, state[1], state[0])
    return (optax.apply_updates(state[0], moves), moments), loss


def frechet_distance(one: Float[np.ndarray, "N F"], other: Float[np.ndarray, "M F"]) -> float:
    """Of two sets of features, as normal distributions (Heusel et al. 2017, arXiv 1706.08500).

    |m - n|^2 + tr(S + T - 2 (S T)^(1/2)), with means m, n and covariances S, T. Raises InputError
    for fewer than two rows.
    """
    if min(len(one), len(other)) < 2:
        raise InputError("a distance of features needs two images or more of each kind")
    a, b = (np.asarray(x, np.float64) for x in (one, other))
    s, t = (np.cov(x, rowvar=False) for x in (a, b))
    root = _root(s)
    cross = np.linalg.eigvalsh(root @ t @ root)
    trace = np.trace(s) + np.trace(t) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + max(trace, 0))


def _root(s: Float[np.ndarray, "F F"]) -> Float[np.ndarray, "F F"]:
    """The symmetric root of a covariance."""
    values, vectors = np.linalg.eigh(s)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
