"""Wrappers' parts of names."""

import pytest

from common_jax.io.wrapped_names import unwrapped


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("layers.0.weight", "layers.0.weight"),
        ("_orig_mod.module.layers.0.weight", "layers.0.weight"),
        ("layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.weight", "layers.0.weight"),
        ("submodule.modules.bias", "submodule.modules.bias"),
    ],
)
def test_parts_of_wrappers_are_taken_off(name, plain):
    assert unwrapped(name) == plain
