"""What a report is made of fits together, or is refused."""

import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.trajectory.space import TrajectoryGuide
from reward_jax.report.measure import Compared, Measured, PageOptions, compare
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.tasks.base import Outcome
from reward_jax.tasks.find import find
from tests.reward.cli_runs import model, reward

ABOUT = {"task": "disc", "goal": [1.7, 1.7]}


def test_three_that_fit():
    base, guide = model(about=ABOUT, actions=2), reward(about=ABOUT, actions=2)
    compared = compare(base, model(1, about=ABOUT, actions=2), guide)
    assert compared.task is find("disc") and compared.goal == [1.7, 1.7]
    assert compared.reward is guide.guide


def test_three_that_do_not_fit():
    base, guide = model(about=ABOUT, actions=2), reward(about=ABOUT, actions=2)
    judge = TrajectoryGuide(DiscriminatorGuide({}, None), guide.space, guide.schedule)
    with pytest.raises(InputError, match="is a discriminator; a reward is wanted"):
        compare(base, base, judge)
    with pytest.raises(InputError, match="base and expert differ in stride: 10 and 2"):
        compare(base, model(about=ABOUT, actions=2, stride=2), guide)
    with pytest.raises(InputError, match="base and reward differ in stride: 2 and 10"):
        compare(model(about=ABOUT, actions=2, stride=2), base, guide)
    with pytest.raises(InputError, match="had no goal"):
        compare(base, base, reward(about=ABOUT | {"goal": None}, actions=2))


def test_what_was_found_in_words():
    base, guide = model(about=ABOUT, actions=2), reward(about=ABOUT, actions=2)
    shown = np.zeros((2, 8, 2))
    near = {"planned": np.array([True, False]), "reached": None, "clear": np.ones(2)}
    outcomes = {"steered": Outcome(near, shown)}
    compared = Compared(base, base, guide, find("disc"), [1.7, 1.7])
    found = Measured(compared, PageOptions(), shown, outcomes, None)
    assert found.lines() == ["steered: 0.50 of plans end at the goal"]
