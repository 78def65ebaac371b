"""The names at the package's root."""

import pytest

import reward_jax


@pytest.mark.parametrize("name", reward_jax.__all__)
def test_every_name_of_the_root_is_there(name):
    assert getattr(reward_jax, name).__name__ == name
    assert name in dir(reward_jax)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'reward_jax' has no attribute 'noise'"):
        _ = reward_jax.noise  # pyright: ignore[reportAttributeAccessIssue]
