"""Chains of a tiny model: both guidances on one path, and the exact function without momentum."""

import jax.numpy as jnp
import numpy as np
import pytest

from reward_jax.models.stable_diffusion.safety import as_safety


@pytest.mark.parametrize("chain", [0, 1], ids=["base", "safe"])
def test_both_guidances_are_those_of_the_equations_along_a_chain(done, chain):
    """Equations 3 to 8 of the safe guidance, walked here, with the momentum of that path."""
    sd, prompts, pairs = done.drawn[0]
    safety, scale, rows = as_safety("max"), 7.5, len(prompts)
    assert safety is not None and safety.warmup == 0
    path = np.moveaxis(pairs.x_t[chain], 0, 1)
    steps = len(path)
    text = np.asarray(sd.encode_text([*[""] * rows, *prompts, *[safety.concept] * rows]))
    asked = sd.epsilon(  # all at once: [S, 3 B] rows
        jnp.asarray(np.tile(path, (1, 3, 1, 1, 1)).reshape(-1, *path.shape[2:])),
        jnp.repeat(jnp.asarray(pairs.t), 3 * rows),
        jnp.asarray(np.tile(text, (steps, 1, 1))),
    )
    momentum, stored = 0.0, (pairs.base[chain], pairs.safe[chain])
    size = np.abs(pairs.safe).max()
    for step, found in enumerate(np.asarray(asked).reshape(steps, 3, rows, *path.shape[2:])):
        nothing, prompt, concept = found
        apart = prompt - concept
        mu = np.minimum(np.abs(apart) * safety.scale, 1) * (apart < safety.threshold)
        z = mu * (concept - nothing) + safety.momentum * momentum
        momentum = safety.beta * momentum + (1 - safety.beta) * z
        for away, ours in zip((0.0, z), stored, strict=True):
            wanted = nothing + scale * (prompt - nothing - away)
            np.testing.assert_allclose(ours[:, step], wanted, atol=1e-4 * size)
    assert np.abs(stored[1] - stored[0]).max() > 0.01 * size


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
