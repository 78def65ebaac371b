"""The tables of names: each of our parameters and each of theirs once, axes that fit."""

import pytest

from reward_jax.torch_import import torch_keys


@pytest.mark.parametrize(
    "rows",
    [
        *(lambda n=n, e=e: torch_keys.unet(n, e) for n in (1, 3) for e in (3, 4)),
        *(lambda n=n: torch_keys.half_unet(n) for n in (1, 4)),
        *(lambda n=n: torch_keys.mlp(n) for n in (1, 3)),
    ],
)
def test_names_are_there_once_and_axes_are_kept(rows):
    found = list(rows())
    ours, theirs = [path for path, _ in found], [name for _, (name, _) in found]
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    for path, (_, layout) in found:
        before, after = layout.split("->")
        assert sorted(before.replace("1", "")) == sorted(after), path
        assert path.endswith(("kernel", "bias", "scale"))
