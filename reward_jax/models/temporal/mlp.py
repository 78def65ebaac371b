"""A residual MLP over whole windows: quicker than a U-Net, and better at short horizons.

Legend: B batch, H horizon, D transition width.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from reward_jax.models.temporal.layers import Activation, TimeEmbedding, activation

__all__ = ["ResidualMLP"]


class ResidualMLP(nn.Module):
    """Blocks h + W2 act(W1 norm(h) + time) over all values of x_t side by side.

    Each row and value has weights of its own, so that the horizon is fixed by the parameters.

    Attributes:
        width: of every layer.
        blocks: how many.
        embedding: width of the time embedding.
        act: activation.
    """

    width: int = 512
    blocks: int = 2
    embedding: int = 32
    act: Activation = "silu"

    @nn.compact
    def __call__(self, x: Float[Array, "B H D"], t: Int[Array, " B"]) -> Float[Array, "B H D"]:
        act = activation(self.act)
        time = TimeEmbedding(self.embedding, self.act, name="time")(t)
        flat = x.reshape(x.shape[0], -1)
        h = nn.Dense(self.width, name="in")(flat)
        for block in range(self.blocks):
            inner = nn.Dense(self.width, name=f"first_{block}")(
                nn.LayerNorm(name=f"norm_{block}")(h)
            )
            inner = act(inner + nn.Dense(self.width, name=f"time_{block}")(time))
            h = h + nn.Dense(self.width, name=f"second_{block}")(inner)
        h = act(nn.LayerNorm(name="norm")(h))
        return jnp.reshape(nn.Dense(flat.shape[1], name="out")(h), x.shape)
