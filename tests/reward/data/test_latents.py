"""The space of latents, as files hold it."""

import pytest

from reward_jax.data.latents import LatentSpace
from reward_jax.data.spaces import describe, make


def test_a_space_comes_back():
    space = LatentSpace(8, 12, 4, {"task": "i2p"})
    assert make(describe(space), LatentSpace, "f") == space and space.shape == (8, 12, 4)
    assert space.pin is None


@pytest.mark.parametrize(
    "change", [{"height": 0}, {"width": 2.5}, {"channels": True}, {"about": 3}]
)
def test_what_describes_none(change):
    described = LatentSpace(8, 12, 4, {}).describe() | change
    with pytest.raises(ValueError, match="not 1 or more|its about is no mapping"):
        LatentSpace.make(described)
