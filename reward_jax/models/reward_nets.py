"""Reward networks: a number for each x_t. Their gradient in x_t is what is trained.

Legend: B batch, H horizon, D transition width.
"""

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from common_jax.cli.ranges import check_range
from common_jax.errors import InputError
from reward_jax.models.conv import Method
from reward_jax.models.temporal.layers import (
    Activation,
    Downsample,
    ResidualBlock,
    TimeEmbedding,
    activation,
    check_trajectories,
)

__all__ = ["Cut", "HalfUnet", "Head", "Reduce", "WindowMLP"]

Cut = Literal["contiguous", "strided"]
Reduce = Literal["sum", "mean"]
Head = Literal["linear", "activated"]


class HalfUnet(nn.Module):
    """The downsampling half of the U-Net with a scalar head: Diffuser's value function.

    Defaults are the sizes of the authors' rewards; Diffuser's are dim 32 and (1, 2, 4, 8).

    Attributes:
        dim: width of the time embedding, and unit of the channels.
        multipliers: channels of each level, in units of dim.
        act: activation; the authors' rewards have "leaky_relu", Diffuser's values "mish".
        groups: of the group norms; None for no norm.
        use_bias: of the convolutions.
        method: of convolutions (`models/conv.py`).
    """

    dim: int = 4
    multipliers: tuple[int, ...] = (16, 16, 32, 32)
    act: Activation = "silu"
    groups: int | None = 8
    use_bias: bool = True
    method: Method = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B H D"], t: Int[Array, " B"]) -> Float[Array, " B"]:
        check_trajectories(x)
        block: dict[str, Any] = dict(
            act=self.act, groups=self.groups, use_bias=self.use_bias, method=self.method
        )
        sample: dict[str, Any] = dict(use_bias=self.use_bias, method=self.method)
        time = TimeEmbedding(self.dim, self.act, name="time")(t)
        width = self.dim
        for level, multiplier in enumerate(self.multipliers):
            width = self.dim * multiplier
            x = ResidualBlock(width, name=f"down_{level}_0", **block)(x, time)
            x = ResidualBlock(width, name=f"down_{level}_1", **block)(x, time)
            x = Downsample(name=f"down_{level}_sample", **sample)(x)
        for level, part in enumerate((2, 4)):
            x = ResidualBlock(width // part, name=f"middle_{level}", **block)(x, time)
            x = Downsample(name=f"middle_{level}_sample", **sample)(x)
        flat = x.swapaxes(1, 2).reshape(x.shape[0], -1)  # channels first, as PyTorch flattens
        hidden = nn.Dense(flat.shape[-1] // 2, name="hidden")(jnp.concatenate([flat, time], -1))
        return nn.Dense(1, name="head")(activation(self.act)(hidden))[:, 0]


class WindowMLP(nn.Module):
    """An MLP over windows of the trajectory, summed or averaged over the windows.

    window = 1 is a reward of single states, of which maps are drawn; window = H sees the whole
    trajectory, and steers best.

    Attributes:
        window: time steps of a window, a divisor of H; None: all of x, whatever its shape.
        widths: of the hidden layers.
        embedding: width of the time embedding.
        act: activation. The gradient of a piecewise linear one (leaky_relu, the authors') is
            piecewise constant, and cannot be matched to a target.
        cut: "contiguous": windows of neighbouring steps; "strided": of every (H / window)-th step,
            as the authors cut them.
        reduce: how windows are combined.
        head: "linear", or "activated": one more activation and scale, as the authors have it.

    Raises InputError where the window does not divide H.
    """

    window: int | None = None
    widths: tuple[int, ...] = (64, 64)
    embedding: int = 32
    act: Activation = "silu"
    cut: Cut = "contiguous"
    reduce: Reduce = "sum"
    head: Head = "linear"

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."], t: Int[Array, " B"]) -> Float[Array, " B"]:
        act = activation(self.act)
        for name, known in (("cut", Cut), ("reduce", Reduce), ("head", Head)):
            check_range(known, getattr(self, name), name)
        windows = self._windows(x)
        time = TimeEmbedding(self.embedding, self.act, name="time")(t)
        time = jnp.broadcast_to(time[:, None], (*windows.shape[:2], self.embedding))
        y = jnp.concatenate([windows, time], -1)
        for index, width in enumerate(self.widths):
            y = act(nn.Dense(width, name=f"layer_{index}")(y))
        y = nn.Dense(1, name="head")(y)
        if self.head == "activated":
            y = nn.Dense(1, name="scale")(act(y))
        return y[..., 0].sum(1) if self.reduce == "sum" else y[..., 0].mean(1)

    def _windows(self, x: Float[Array, "B ..."]) -> Float[Array, "B windows values"]:
        """The values of each window, side by side."""
        if self.window is None:
            return x.reshape(x.shape[0], 1, -1)
        check_trajectories(x)
        batch, horizon, width = x.shape
        if self.window < 1 or horizon % self.window:
            raise InputError(f"window {self.window} does not divide the horizon {horizon}")
        count = horizon // self.window
        if self.cut == "contiguous":
            return x.reshape(batch, count, self.window * width)
        parts = x.reshape(batch, self.window, count, width).swapaxes(1, 2)
        return parts.reshape(batch, count, -1)
