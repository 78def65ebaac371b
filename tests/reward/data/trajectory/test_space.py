"""The space of trajectories: what fits what, units, and descriptions of none."""

import dataclasses
import json

import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.trajectory.normalisers import Normaliser
from reward_jax.data.trajectory.space import TrajectorySpace, check_same_space, check_steers
from tests.reward.cli_runs import model, reward, space


def test_a_guide_steers_only_in_its_own_coordinates():
    n = space().normaliser
    moved = Normaliser(n.offset + 0.1, n.scale, n.kind)
    check_steers("base and reward", model(), reward())
    for base, message in (
        (model(steps=12), "base and reward differ in diffusion steps: 12 and 8"),
        (model(schedule="linear"), "differ in schedule: linear and cosine"),
        (model(normaliser=moved), "differ in their normalisers"),
        (model(horizon=16), "differ in horizon: 16 and 8"),
    ):
        with pytest.raises(InputError, match=message):
            check_steers("base and reward", base, reward())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "its horizon is 0, not 1 or more"),
        ({"horizon": 8.0}, "its horizon is 8.0"),
        ({"stride": True}, "its stride is True"),
        ({"actions": -1}, "its actions is -1"),
        ({"actions": 4}, "its actions leave no observation of 4 dimensions"),
        ({"about": None}, "its about is no mapping"),
        ({"normaliser": {"scale": [1.0]}}, "offset and scale are no two lists of one length"),
        ({"normaliser": {"scale": [1, 1, 0, 1]}}, "its scale not above 0"),
        ({"normaliser": {"offset": [0, 0, np.inf, 0]}}, "its normaliser's offset is not finite"),
        ({"normaliser": {"kind": "robust"}}, "its normaliser is of no known kind"),
    ],
)
def test_descriptions_of_no_trajectories(changes, message):
    described = space().describe()
    for name, value in changes.items():
        described[name] = described[name] | value if name == "normaliser" else value
    with pytest.raises(ValueError, match=message):
        TrajectorySpace.make(json.loads(json.dumps(described)))


def test_plans_are_in_the_world_s_own_units():
    own = dataclasses.replace(space(), actions=1)
    rows = np.random.default_rng(0).normal(size=(2, 8, 4))
    plans = own.plans(rows)
    assert plans.actions is not None and (plans.stride, own.width, own.shape) == (10, 4, (8, 4))
    whole = np.concatenate([plans.actions, plans.observations], axis=-1)
    np.testing.assert_allclose(whole, own.normaliser.restore(rows))
    np.testing.assert_allclose(own.normalise(plans.observations), rows[..., 1:], rtol=1e-5)


def test_data_from_elsewhere_need_not_name_their_task():
    named, nameless, other = (space(about=a) for a in ({"task": "a"}, {}, {"task": "b"}))
    check_same_space("both", named, nameless)
    with pytest.raises(InputError, match="both differ in task: a and b; train both alike"):
        check_same_space("both", named, other)
