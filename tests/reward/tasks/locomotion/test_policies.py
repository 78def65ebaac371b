"""Files of policies, and what policies do against sbx-rl's own form of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.tasks.locomotion import policies
from tests.reward.tasks.locomotion.conftest import random_policy


def test_the_mode_is_that_of_a_squashed_gaussian():
    class Actor(nn.Module):  # as sbx-rl has it
        @nn.compact
        def __call__(self, x):
            for width in (16, 16):
                x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(3)(x), nn.Dense(3)(x)

    policy = random_policy("hopper", 1)
    params = {f"Dense_{i}": {"kernel": k, "bias": b} for i, (k, b) in enumerate(policy.layers)}
    x = np.random.default_rng(0).normal(0, 2, (50, 11))
    mean, log_std = jax.jit(lambda x: Actor().apply({"params": params}, x))(x)
    np.testing.assert_allclose(policy.act(x), np.tanh(mean), atol=1e-5)
    drawn = np.stack([policy.act(x, np.random.default_rng(i)) for i in range(2000)])
    deviation = np.arctanh(np.clip(drawn, -1 + 1e-6, 1 - 1e-6)).std(axis=0)
    expected = jnp.exp(jnp.clip(log_std, -20, 2))
    quiet = np.abs(mean) + 2 * expected < 3  # far from where tanh saturates
    assert quiet.mean() > 0.2
    np.testing.assert_allclose(deviation[quiet], expected[quiet], rtol=0.12)


def test_a_file_gives_the_same_policies(shipped, tmp_path):
    stages = shipped("walker2d")
    found = policies.policies("walker2d")
    assert list(found) == list(stages)
    x = np.random.default_rng(0).normal(0, 1, (20, 17))
    for stage, policy in stages.items():
        np.testing.assert_allclose(found[stage].act(x), policy.act(x), atol=3e-3)  # float16
        assert found[stage].about["steps"] == policy.about["steps"]


def test_files_that_are_none(shipped, tmp_path):
    shipped("hopper")
    path = tmp_path / "hopper.safetensors"
    with pytest.raises(InputError, match=r"not of Walker2d-v5 \(observations 17, actions 6\)"):
        policies.read_policies(path, "walker2d")
    with pytest.raises(InputError, match="no such file"):
        policies.read_policies(tmp_path / "none", "hopper")
    with pytest.raises(InputError, match="policies.safetensors: no such file"):
        policies.read_policies(tmp_path, "hopper")  # a run's folder, without one
    data = path.read_bytes()
    for bad in (data[:100], b"", data[:-8], data.replace(b"policies", b"p0licies")):
        path.write_bytes(bad)
        with pytest.raises(InputError, match="holds no policies"):
            policies.read_policies(path, "hopper")
    policies.write_policies(path, {"expert": random_policy("walker2d", 1)}, "halfcheetah")
    with pytest.raises(InputError, match="its policies are of halfcheetah, not walker2d: give"):
        policies.read_policies(path, "walker2d")  # both are of 17 and 6
    policy = random_policy("hopper", 1)
    kernel, bias = policy.layers[0]
    broken = policies.Policy(((kernel * np.nan, bias), *policy.layers[1:]), policy.about)
    policies.write_policies(path, {"expert": broken})
    with pytest.raises(InputError, match="'expert' is not finite"):
        policies.read_policies(path, "hopper")
    flat = policies.Policy(((kernel[0, 0], bias), *policy.layers[1:]), policy.about)
    for odd in (flat, policies.Policy(policy.layers[:1], policy.about)):
        policies.write_policies(path, {"expert": odd})
        with pytest.raises(InputError, match="its policy 'expert' has layers .* not of Hopper-v5"):
            policies.read_policies(path, "hopper")


def test_a_run_s_folder_stands_for_its_policies(tmp_path):
    policy = random_policy("hopper", 3)
    policies.write_policies(tmp_path / policies.FILE, {"late": policy}, "hopper")
    found = policies.read_policies(tmp_path, "hopper")
    np.testing.assert_allclose(found["late"].layers[0][0], policy.layers[0][0], atol=3e-3)
