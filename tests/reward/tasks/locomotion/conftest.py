"""Policies for tests: as shipped ones are, but of random weights."""

from typing import Any

import gymnasium
import numpy as np
import pytest

from reward_jax.tasks.locomotion import policies
from reward_jax.tasks.locomotion.robots import ROBOTS, environment, quiet


def another(name) -> Any:
    """An environment that only its test steps."""
    with quiet():
        return gymnasium.make(ROBOTS[name].environment)


def random_policy(name, seed, width=16):
    env: Any = environment(name)
    rng = np.random.default_rng(seed)
    seen, acts = env.observation_space.shape[0], env.action_space.shape[0]
    sizes = [(seen, width), (width, width), (width, acts), (width, acts)]
    layers = [
        (rng.normal(0, 1 / np.sqrt(a), (a, b)).astype("f4"), rng.normal(0, 0.1, b).astype("f4"))
        for a, b in sizes
    ]
    return policies.Policy(tuple(layers), {"steps": seed, "return": 0.5})


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """name -> its policies, written and taken for those that are shipped."""
    monkeypatch.setattr(policies, "POLICIES", tmp_path)
    policies.policies.cache_clear()

    def ship(name):
        stages = {s: random_policy(name, i) for i, s in enumerate(["early", "late", "medium"])}
        stages["expert"] = random_policy(name, 9)
        policies.write_policies(tmp_path / f"{name}.safetensors", stages)
        return stages

    yield ship
    policies.policies.cache_clear()
