"""The classifier, and the distance of its features."""

import jax
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.images.pixels import Images, scaled
from reward_jax.studies.images.judge import JudgeOptions, frechet_distance, train_judge
from tests.reward.studies.images.sets import CLASSES, quarters

RANDOM = np.random.default_rng(0)


def learned(options: JudgeOptions):
    pixels, labels = quarters(120, 0)
    images = Images(pixels[..., None].astype(np.uint8), labels, CLASSES, "here")
    return train_judge(images, options, jax.random.key(0))


def test_a_classifier_learns_and_judges_rows_alone():
    options = JudgeOptions(100, 32, 5e-3, width=8, features=6)
    judge = learned(options)
    fresh, truth = quarters(40, 1)
    x = np.asarray(scaled(fresh[..., None].astype(np.uint8)))
    found, features = judge.judge(x)
    assert (found == truth).mean() > 0.9 and features.shape == (40, 6)
    np.testing.assert_allclose(judge.judge(x[7:9])[1], features[7:9], atol=1e-5)


def test_a_loss_that_is_no_number_is_told_at_the_last_step_too():
    with pytest.raises(InputError, match="loss is not finite at step 3: lower judge.learning_ra"):
        learned(JudgeOptions(3, 32, 1e30, width=8, features=6))


def test_the_distance_of_normal_distributions():
    a = RANDOM.normal(size=(20000, 3))
    scale, move = np.array([1.0, 2.0, 0.5]), np.array([1.0, 0.0, -1.0])
    b = RANDOM.normal(size=(20000, 3)) * scale + move
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    expected = np.square(move).sum() + np.square(1 - scale).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.05)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    with pytest.raises(InputError, match="needs two images or more"):
        frechet_distance(a[:1], b)
