"""The space of a latent diffusion model's latents, scaled as the model has them."""

from reward_jax.data.grids import GridSpace
from reward_jax.data.model import SpaceGuide

__all__ = ["LatentGuide", "LatentSpace"]


class LatentSpace(GridSpace):
    """Latents of one size."""


LatentGuide = SpaceGuide[LatentSpace]
