"""CLIP's text encoder (Radford et al. 2021), as transformers has it.

Legend: B batch, T tokens, D width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from common_jax.precision import precise
from reward_jax.models.stable_diffusion.attention import attend
from reward_jax.models.stable_diffusion.config import TextConfig
from reward_jax.models.stable_diffusion.layers import LayerNorm

__all__ = ["TextEncoder"]


class _Layer(nn.Module):
    config: TextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        y = LayerNorm(c.epsilon, name="layer_norm1")(x)
        made = (nn.Dense(c.width, name=f"self_attn.{part}_proj")(y) for part in "qkv")
        q, k, v = (part.reshape(*y.shape[:2], c.heads, -1) for part in made)
        y = attend(q, k, v, causal=True).reshape(x.shape)
        x = x + nn.Dense(c.width, name="self_attn.out_proj")(y)
        y = nn.Dense(c.hidden, name="mlp.fc1")(LayerNorm(c.epsilon, name="layer_norm2")(x))
        if c.activation == "quick_gelu":
            y = y * jax.nn.sigmoid(1.702 * y)
        else:
            y = jax.nn.gelu(y, approximate=False)
        return x + nn.Dense(c.width, name="mlp.fc2")(y)


class TextEncoder(nn.Module):
    """Tokens to the last layer's states, normalised."""

    config: TextConfig

    @nn.compact
    @precise
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        c = self.config
        x = nn.Embed(c.vocabulary, c.width, name="embeddings.token_embedding")(tokens)
        places = nn.Embed(c.length, c.width, name="embeddings.position_embedding")
        x = x + places(jnp.arange(tokens.shape[1]))[None]
        for i in range(c.layers):
            x = _Layer(c, name=f"encoder.layers.{i}")(x)
        return LayerNorm(c.epsilon, name="final_layer_norm")(x)
