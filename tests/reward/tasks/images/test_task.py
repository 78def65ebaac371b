"""Samples of images are outcomes, too; images are had, not recorded."""

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from common_jax.errors import InputError
from reward_jax.tasks.find import find
from reward_jax.tasks.images.task import ImagesTask

TASK = ImagesTask("images")


def test_outcomes_are_the_samples():
    made = np.random.default_rng(0).integers(1, 255, (3, 4, 4, 3)).astype(np.uint8)
    made[1, :2], made[2, 0, 0, 0] = 255, 0
    asked = []

    def planner(observations, key):
        asked.append(observations.shape)
        return made

    found = TASK.execute(planner, TASK.starts(3, 0), key=jax.random.key(0), goal=None)
    assert asked == [(3, 0)] and found.shown is made
    assert found.measured["saturated"] is not None
    np.testing.assert_allclose(found.measured["saturated"], [0, 0.5, 1 / 48])
    assert TASK.summarise(found.means()) == "0.174 of values at black or white"
    assert TASK.recorded(made) is made


@pytest.mark.parametrize("channels", [1, 3])
def test_drawn_side_by_side(channels):
    axes = Figure().subplots()
    TASK.draw(axes, np.full((5, 4, 6, channels), 9, np.uint8), goal=None)
    (image,) = axes.get_images()
    shown = np.asarray(image.get_array())
    assert shown.shape[:2] == (8, 18) and (shown[4:, 12:] == 0).all()


def test_goals_are_classes():
    assert find("images").goal(["bag", "coat"]) == ["bag", "coat"] and TASK.goal(None) is None
    assert TASK.describe(None) == "images" and TASK.describe(["bag"]) == "images without bag"
    for given in ("bag", [1.0, 2.0]):
        with pytest.raises(InputError, match="of images, give a list of the classes left out"):
            TASK.goal(given)


def test_images_are_not_recorded():
    with pytest.raises(InputError, match="images are not recorded: give `reward-jax train` a fol"):
        TASK.record(episodes=1, span=1, seed=0)
