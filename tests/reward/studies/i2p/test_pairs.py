"""Chains of a tiny model: both guidances on one path, and the exact function without momentum."""

import numpy as np

from reward_jax.models.stable_diffusion.safety import as_safety
from reward_jax.studies.i2p.pairs import guided_along


def along(done, chain):
    """What is found anew on a chain's path, and what was stored of it; [S, B, h, w, C]."""
    sd, prompts, pairs = done.drawn[0]
    safety = as_safety("max")
    assert safety is not None
    path = np.moveaxis(pairs.x_t[chain], 0, 1)
    found = guided_along(sd, path, pairs.t, prompts, safety, 7.5)
    stored = [np.moveaxis(x[chain], 0, 1) for x in (pairs.base, pairs.safe)]
    return [np.asarray(x) for x in found], stored


def test_on_the_safe_chain_s_path_both_guidances_are_what_the_chain_had(done):
    """The momentum too, which sampling gathered in a program of its own."""
    found, stored = along(done, 1)
    scale = np.abs(stored[1]).max()
    np.testing.assert_allclose(found[0], stored[0], atol=1e-4 * scale)
    np.testing.assert_allclose(found[1], stored[1], atol=1e-4 * scale)
    assert np.abs(stored[1] - stored[0]).max() > 0.01 * scale


def test_chains_begin_alike_and_follow_their_own_epsilon(done):
    _, prompts, pairs = done.drawn[0]
    assert prompts == ["a cat", "a dog sits", "nude"] and pairs.x_t.shape == (2, 3, 5, 4, 4, 4)
    np.testing.assert_array_equal(pairs.x_t[0, :, 0], pairs.x_t[1, :, 0])
    # At the same latents, with no momentum yet, both chains have the same epsilons.
    scale = np.abs(pairs.safe).max()
    np.testing.assert_allclose(pairs.base[0, :, 0], pairs.base[1, :, 0], atol=1e-4 * scale)
    np.testing.assert_allclose(pairs.safe[0, :, 0], pairs.safe[1, :, 0], atol=1e-4 * scale)
    assert (np.abs(pairs.x_t[0] - pairs.x_t[1]).max((2, 3, 4))[:, 1:] > 1e-3).all()
    assert not np.array_equal(pairs.x_t[0, 0, 0], pairs.x_t[0, 1, 0])  # a noise for each row
    assert np.abs(pairs.last[0] - pairs.x_t[0, :, -1]).max() > 0


def test_the_base_s_path_is_sampling_s_own(done):
    sd, prompts, pairs = done.drawn[0]
    out = sd.sample(
        prompts, steps=4, guidance_scale=7.5, latents=pairs.x_t[0, :, 0], trajectory=True
    )
    scale = np.abs(pairs.base).max()
    np.testing.assert_allclose(pairs.x_t[0], np.moveaxis(out.trajectory.x_t, 0, 1), atol=1e-5)
    stored = np.moveaxis(pairs.base[0], 0, 1)
    np.testing.assert_allclose(out.trajectory.epsilon, stored, atol=1e-4 * scale)


def test_the_two_ways(done):
    """Without momentum they agree; with it, a part of the guidance depends on the path."""
    ways = done.summary["ways"]
    assert ways["rounding"] < 1e-3 and 0.05 < ways["path"] < 2
