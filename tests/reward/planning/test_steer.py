"""Steering and sweeping from Python, without files."""

import jax
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.trajectory.space import TrajectoryGuide
from reward_jax.planning.steer import SweepOptions, both_outcomes, steer_by, sweep_outcomes
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.gradients import ScoreDifference
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.tasks.find import find
from tests.reward.cli_runs import model, reward

ABOUT = {"task": "disc", "goal": [1.7, 1.7]}
KEY = jax.random.key(0)


def made(seed=0):
    return model(seed, about=ABOUT, actions=2), reward(seed, about=ABOUT, actions=2)


def test_a_sweep_has_what_each_setting_gives_by_itself(monkeypatch):
    base, guide = made()
    steering = steer_by(base, guide, options=GuidanceOptions(temperature=0.5))
    starts = steering.task.starts(3, 0)
    options = SweepOptions(scales=(0.0, 4.0), t_stopgrads=(0, 5), execute=True)
    rows = list(sweep_outcomes(steering, starts, options, key=KEY))
    settings = [[(one.scale, one.t_stopgrad) for one in row] for row in rows]
    assert settings == [[(0.0, 0), (0.0, 5)], [(4.0, 0), (4.0, 5)]]
    both = both_outcomes(
        steer_by(base, guide, options=GuidanceOptions(temperature=0.5, scale=4.0)), starts, key=KEY
    )
    for name, one in (("unsteered", rows[0][0]), ("steered", rows[1][0])):
        np.testing.assert_allclose(one.outcome.shown, both[name].shown, atol=1e-4)
        assert one.outcome.means()["reached"] is not None
    assert np.abs(both["steered"].shown - both["unsteered"].shown).max() > 1e-3
    # Where the task asks again on the way, it plans as it goes.
    monkeypatch.setattr(steering.task, "replans", True)
    planned = SweepOptions(scales=(0.0, 4.0), t_stopgrads=(0, 5))
    again = list(sweep_outcomes(steering, starts, planned, key=KEY))
    for one, other in zip(sum(rows, []), sum(again, []), strict=True):
        np.testing.assert_allclose(one.outcome.shown, other.outcome.shown, atol=1e-4)
        assert other.outcome.means()["reached"] is None


def test_what_steers():
    base, guide = made()
    assert steer_by(base, guide).guide is guide.guide
    assert steer_by(base, guide).goal == [1.7, 1.7] and steer_by(base, guide).notes == ()
    assert steer_by(base, guide, goal="0").goal == [-1.7, -1.7]
    raw = steer_by(base, made(1)[0]).guide
    assert isinstance(raw, ScoreDifference) and raw.base is base.denoiser
    judge = TrajectoryGuide(DiscriminatorGuide({}, None), guide.space, guide.schedule)
    found = steer_by(base, judge, output="sigmoid").guide
    assert isinstance(found, DiscriminatorGuide) and found.output == "sigmoid"
    assert steer_by(base, guide).task is find("disc")


def test_what_cannot_be_steered_is_refused():
    base, guide = made()
    with pytest.raises(InputError, match="base and reward differ in horizon: 16 and 8"):
        steer_by(model(0, about=ABOUT, actions=2, horizon=16), guide)
    with pytest.raises(InputError, match="had no goal; give one"):
        steer_by(base, reward(about=ABOUT | {"goal": None}, actions=2))
    for options in (SweepOptions(scales=()), SweepOptions(t_stopgrads=())):
        with pytest.raises(InputError, match="scales and t_stopgrads need a number each"):
            sweep_outcomes(steer_by(base, guide), np.zeros((1, 2)), options, key=KEY)
