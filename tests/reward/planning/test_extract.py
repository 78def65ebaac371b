"""What a run of an extraction is made of: its network, and diagnostics of its own matching."""

import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.models.reward_nets import HalfUnet, WindowMLP
from reward_jax.planning import extract
from tests.reward.cli_runs import model, reward, space


@pytest.mark.parametrize("gradient_at", ["x_t", "posterior_mean"])
@pytest.mark.parametrize("pin", [True, False])
def test_a_run_s_diagnostics_are_of_its_own_matching(monkeypatch, gradient_at, pin):
    asked = {}
    for name in ("explained_fraction", "antisymmetric_part", "seed_agreement"):
        monkeypatch.setattr(
            extract, name, lambda *_, name=name, **o: asked.update({name: o}) or np.zeros(8)
        )
    guide, base, expert = reward(), model(0).denoiser, model(1).denoiser
    matching = extract.Matching(gradient_at=gradient_at, pin=pin)
    extract.diagnose(guide, base, expert, jnp.zeros((2, 8, 4)), matching=matching)
    assert all(o["pin"] == (guide.space.pin if pin else None) for o in asked.values())
    assert asked["explained_fraction"]["gradient_at"] == gradient_at
    at_mean = asked["seed_agreement"]["base_score"]
    assert at_mean is (base if gradient_at == "posterior_mean" else None)


def test_options_make_their_network():
    own = space(horizon=8)
    assert extract.RewardOptions().make(own) == WindowMLP(8)
    made = extract.RewardOptions(window=2, widths=(4,), act="silu", head="activated").make(own)
    assert made == WindowMLP(2, (4,), act="silu", head="activated")
    half = extract.RewardOptions("half_unet", dim=8, multipliers=(1, 4), groups=0).make(own)
    assert half == HalfUnet(8, (1, 4), act=WindowMLP.act, groups=None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 3}, "reward.window 3 does not divide the horizon 8: choose one that does"),
        ({"kind": "half_unet", "dim": 6}, "reward.dim must be a multiple of 4"),
        ({"kind": "half_unet", "dim": 8, "multipliers": ()}, "reward.dim must be a multiple of 4"),
        ({"kind": "half_unet", "dim": 8, "groups": 3}, "multiples of 3, the last of 12"),
    ],
)
def test_options_that_do_not_fit_the_space(options, said):
    with pytest.raises(InputError, match=said):
        extract.RewardOptions(**options).make(space(horizon=8))
