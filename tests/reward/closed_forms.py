"""Mixtures of Gaussians under the variance-preserving schedule: everything about them is known.

With x_0 ~ sum_k w_k N(m_k, S_k), x_t ~ sum_k w_k N(sqrt(abar) m_k, abar S_k + (1 - abar) I).
Legend: K components, D dimensions, B batch, T diffusion steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from reward_jax.diffusion.process import q_sample
from reward_jax.diffusion.schedule import Schedule


@struct.dataclass
class Mixture:
    """A score, (x_t [B, D], t [B]) -> [B, D], with its exact log density."""

    log_weights: Any  # [K]
    means: Any  # [K, D]
    axes: Any  # [K, D, D], eigenvectors of the covariances in columns
    spread: Any  # [K, D], their eigenvalues
    schedule: Schedule

    def log_density(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Up to a constant, [B]."""
        bar = self.schedule.alphas_cumprod[t][:, None, None]
        away = x[:, None] - jnp.sqrt(bar) * self.means[None]
        y = jnp.einsum("bkd,kde->bke", away, self.axes)
        variance = bar * self.spread[None] + 1 - bar
        parts = -(jnp.square(y) / variance + jnp.log(variance)).sum(-1) / 2
        return jax.nn.logsumexp(parts + self.log_weights[None], axis=1)

    def __call__(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        return jax.grad(lambda x: self.log_density(x, t).sum())(x)

    def draw(self, key: jax.Array, count: int) -> jax.Array:
        which, normal = jax.random.split(key)
        k = jax.random.categorical(which, self.log_weights, shape=(count,))
        y = jax.random.normal(normal, (count, self.means.shape[-1])) * jnp.sqrt(self.spread[k])
        return self.means[k] + jnp.einsum("bde,be->bd", self.axes[k], y)


@struct.dataclass
class LogRatio:
    """The exact relative reward, as a guide or a reward that is to be judged."""

    base: Mixture
    expert: Mixture

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.expert.log_density(x, t) - self.base.log_density(x, t)


def mixture(
    seed: int, schedule: Schedule, *, dimensions: int, components: int, apart: float = 1.0
) -> Mixture:
    """Random means (about `apart` from 0), rotations, spreads and weights."""
    rng = np.random.default_rng(seed)
    shape = (components, dimensions, dimensions)
    axes = np.linalg.qr(rng.normal(size=shape))[0]
    return Mixture(
        jnp.asarray(np.log(rng.dirichlet(np.full(components, 5.0))), jnp.float32),
        jnp.asarray(apart * rng.normal(size=shape[:2]), jnp.float32),
        jnp.asarray(axes, jnp.float32),
        jnp.asarray(rng.uniform(0.15, 0.8, shape[:2]), jnp.float32),
        schedule,
    )


def both(base: Mixture, expert: Mixture, key: jax.Array, count: int) -> jax.Array:
    """x_0 [count, D], half of it each one's."""
    a, b = jax.random.split(key)
    return jnp.concatenate([base.draw(a, count // 2), expert.draw(b, count - count // 2)])


def at_level(schedule: Schedule, x_0: jax.Array, level: int, key: jax.Array) -> Any:
    """(x_t, t) with every row at one level."""
    t = jnp.full(x_0.shape[0], level)
    return q_sample(schedule, x_0, t, jax.random.normal(key, x_0.shape)), t


@struct.dataclass
class LinearScore:
    """x_t -> matrix x_t at every t: over a base of zeros, a target that may be no gradient."""

    matrix: Any

    def __call__(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        return x @ self.matrix.T
