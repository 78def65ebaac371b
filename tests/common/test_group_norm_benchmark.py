"""The script on the U-Net's norm: its networks, and a run of it at a tiny size."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import group_norm
from benchmarks.group_norm import NORMS, NormedUnet
from reward_jax.models.temporal import layers
from reward_jax.models.temporal.unet import TemporalUnet

SIZE = {"transition": 3, "dim": 8, "multipliers": (1, 2)}
ROWS = jax.random.normal(jax.random.key(0), (4, 4, 3)) + 2.0, jnp.arange(4)


def applied(module):
    params = module.init(jax.random.key(1), *ROWS)
    names = {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    return params, names, jax.jit(module.apply)(params, *ROWS)


def test_with_8_groups_it_is_the_shipped_network():
    want, _, out = applied(TemporalUnet(**SIZE))
    params, _, same = applied(NormedUnet(**SIZE))
    assert jax.tree.structure(params) == jax.tree.structure(want)
    np.testing.assert_array_equal(same, out)


def test_norms_differ_and_the_shipped_network_stays():
    """Its parameters are those of every norm; none has all but these."""
    params, names, out = applied(TemporalUnet(**SIZE))
    for norm in NORMS:
        module = NormedUnet(**SIZE, norm=norm)
        own, found, _ = applied(module)
        assert found == (names - {"norm"} if norm == "none" else names)
        if norm not in ("8 groups", "none"):
            assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
            other = jax.jit(module.apply)(params, *ROWS)
            assert np.abs(np.asarray(other - out)).max() > 1e-3
    assert layers.GroupNorm is NORMS["8 groups"]


def test_a_norm_over_channels_and_one_over_all_of_them():
    x = jax.random.normal(jax.random.key(2), (2, 4, 16)) * 3.0 + 1.0
    for norm, axes in (("channels", (2,)), ("1 group", (1, 2))):
        module = NORMS[norm](8, name="norm", method="auto")
        y = module.apply(module.init(jax.random.key(0), x), x)
        want = (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + 1e-5)
        np.testing.assert_allclose(y, want, atol=1e-5)


@pytest.mark.slow
def test_a_run_at_a_tiny_size(tmp_path):
    argv = "--horizons 4 --steps 3 --batch-size 4 --seeds 2 --episodes 2 --windows 16 --width 8"
    argv += f" --dim 8 --multipliers 1 --out {tmp_path} --norms"
    group_norm.main([*argv.split(), "8 groups", "none"])
    found = json.loads((tmp_path / "group_norm_hopper.json").read_text())
    networks = found["horizons"]["4"]
    assert list(networks) == ["mlp", "unet, 8 groups", "unet, none"]
    for one in networks.values():
        for key in ("t 0", "t 19", "x_t alone", "processor ms of a step"):
            assert len(one[key]["each"]) == 2 and min(one[key]["each"]) > 0
            assert one[key]["standard_error"] is not None
        # The same windows and noise for all: .09 of a standard deviation is what t 0 adds.
        assert one["x_t alone"] == networks["mlp"]["x_t alone"]
        assert 0.04 < one["x_t alone"]["mean"] < 0.12
        assert one["t 0"]["mean"] != networks["mlp"]["t 0"]["mean"] or one is networks["mlp"]
    assert networks["unet, none"]["parameters"] < networks["unet, 8 groups"]["parameters"]
    assert found["settings"]["robot"] == "hopper" and found["versions"]["jax"]
