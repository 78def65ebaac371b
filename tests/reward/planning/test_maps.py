"""A reward's map from Python: windows, scores, bins; each seed's."""

import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.trajectory.space import TrajectoryGuide
from reward_jax.planning.maps import each_seed, map_of, plane_of
from reward_jax.planning.plan import score_windows
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.tasks.find import find, task_and_goal
from reward_jax.tasks.plane import heat_map
from tests.reward.cli_runs import reward

ABOUT = {"task": "disc", "goal": [1.7, 1.7]}


def windows(count=300):
    return np.random.default_rng(0).uniform(-1, 1, (count, 8, 4)).astype(np.float32)


def test_a_map_is_of_the_positions_in_the_world_s_own_units():
    guide, rows = reward(about=ABOUT, actions=2), windows()
    plane = plane_of(find("disc"))
    found = map_of(plane, guide, rows, bins=2, t=3)
    positions = guide.space.normaliser.restore(rows.astype(np.float64))[..., 2:]
    scores = score_windows(guide.guide, rows, t=3)
    expected = heat_map(positions, scores, (-2, 2, -2, 2), bins=2)
    np.testing.assert_allclose(found.values, expected.values)
    np.testing.assert_array_equal(found.counts, expected.counts)
    assert np.abs(found.values - map_of(plane, guide, rows, bins=2).values).max() > 1e-3


def test_each_seed_by_itself():
    guide, rows = reward(seeds=3), windows(5)
    own = [score_windows(one.guide, rows) for one in each_seed(guide)]
    assert len(own) == 3 and all(np.abs(own[0] - other).max() > 1e-3 for other in own[1:])
    np.testing.assert_allclose(np.mean(own, axis=0), score_windows(guide.guide, rows), atol=1e-5)
    alone = reward(seeds=None)
    assert each_seed(alone) == [alone]


def test_what_has_no_map_or_no_seeds_is_refused(monkeypatch):
    guide = reward(about=ABOUT, actions=2)
    plane = plane_of(find("disc"))
    for t in (8, -1):
        with pytest.raises(InputError, match=f"t is {t}: give 0 to 7"):
            map_of(plane, guide, windows(), bins=2, t=t)
    judge = DiscriminatorGuide({}, None)
    with pytest.raises(InputError, match="a discriminator has no seeds; a reward is wanted"):
        each_seed(TrajectoryGuide(judge, guide.space, guide.schedule))
    monkeypatch.setattr(find("disc"), "plane", None)
    with pytest.raises(InputError, match="disc has no plane in which a map could be drawn"):
        plane_of(find("disc"))


def test_the_goal_is_that_of_the_data_or_the_one_given():
    task, goal = task_and_goal(ABOUT)
    assert task is find("disc") and goal == [1.7, 1.7]
    assert task_and_goal(ABOUT, "0")[1] == [-1.7, -1.7]
    with pytest.raises(InputError, match="had no goal; give one"):
        task_and_goal({"task": "disc", "goal": None})
