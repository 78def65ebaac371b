"""The locomotion study's models at their smallest, and policies of random weights."""

import contextlib

import pytest

from reward_jax.diffusion.train import EMA
from reward_jax.planning.extract import Matching, RewardOptions
from reward_jax.planning.fit import NetworkOptions, Training
from reward_jax.studies.locomotion.settings import RobotSettings, Rounds
from reward_jax.tasks.locomotion import policies
from tests.reward.tasks.locomotion.conftest import random_policy

TRAINING = Training(
    steps=20, batch_size=8, ema=EMA(begin=0, every=1), steps_per_call=10, action_weight=10
)
OWN = RobotSettings(
    horizon=4,
    diffusion_steps=6,
    network=NetworkOptions(kind="mlp", width=16, blocks=1),
    base_training=TRAINING,
    expert_training=TRAINING,
    reward=RewardOptions(widths=(8,), multipliers=(8,)),
    matching=Matching(
        steps=10,
        batch_size=8,
        draws=64,
        path_draws=48,
        seeds=2,
        steps_per_call=10,
        action_weight=5,
    ),
    rounds=2,
    distilled=Rounds(
        reward=RewardOptions(widths=(6,)),
        matching=Matching(steps=10, batch_size=8, draws=64, seeds=2, steps_per_call=10),
    ),
)


@contextlib.contextmanager
def shipped(folder):
    """Policies of random weights, always the same, in place of those that are shipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "POLICIES", folder)
        policies.policies.cache_clear()
        stages = ("early", "late", "medium", "expert")
        made = {stage: random_policy("hopper", i) for i, stage in enumerate(stages)}
        policies.write_policies(folder / "hopper.safetensors", made)
        yield
    policies.policies.cache_clear()
