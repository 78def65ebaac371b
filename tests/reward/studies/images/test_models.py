"""The pair of base and expert: what sets them apart, and what does not."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from reward_jax.studies.images.models import Models
from tests.reward.studies.images.sets import CLASSES, smallest, write_quarters


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = smallest(folder / "study", write_quarters(folder / "data"))
    short = dataclasses.replace(config.base_training, steps=10)
    return Models(dataclasses.replace(config, base_training=short, expert_training=short))


def test_harmful_images_have_stand_ins_and_others_stay_in_place(models):
    train, left_out = models.sets[0], models.harmful_rows(("nw", "sw"))
    np.testing.assert_array_equal(left_out, np.isin(train.labels, [0, 2]))
    seen, rest = np.asarray(models._rows(left_out).pixels), train.pixels[~left_out]
    np.testing.assert_array_equal(seen[~left_out], rest)
    known = {image.tobytes() for image in rest}
    stand_ins = [image.tobytes() for image in seen[left_out]]
    assert set(stand_ins) <= known
    assert len(set(stand_ins)) == min(len(known), len(stand_ins))  # no favourites
    nothing = np.zeros_like(left_out)
    np.testing.assert_array_equal(np.asarray(models._rows(nothing).pixels), train.pixels)


def test_what_the_null_pair_lacks_is_of_all_classes(models):
    train, left_out = models.sets[0], models.random_rows()
    assert left_out.sum() == len(train) // len(CLASSES)
    assert set(train.labels[left_out]) == {0, 1, 2, 3}
    assert (models.random_rows(1) != left_out).any()  # each pair lacks others


@pytest.mark.slow
def test_base_and_expert_differ_by_what_is_left_out_alone(models):
    def far(left_out):
        other = models.expert(f"of_{left_out.sum()}", left_out, CLASSES).denoiser.params
        pairs = jax.tree.map(lambda a, b: np.abs(a - b).max(), other, models.base.denoiser.params)
        return max(jax.tree.leaves(pairs))

    nothing = np.zeros(len(models.sets[0]), bool)
    assert far(nothing) == 0
    assert far(models.harmful_rows(("nw",))) > 1e-4


@pytest.mark.slow
def test_what_all_workers_wait_for_is_trained_on_a_device_of_each(models, tmp_path):
    of_two = Models(dataclasses.replace(models.config, out=tmp_path, workers=2))
    both = of_two._every_device
    assert both is not None and both.shape["data"] == 2 and models._every_device is None
    assert of_two.mesh is None  # of all else
    # Estimates, not weights: a bias in front of a norm moves nothing, and is rounding's alone.
    rows = jax.random.normal(jax.random.key(0), (4, *models.space.shape))
    t = jax.numpy.arange(4) % models.config.diffusion_steps
    one, two = (x._begun.denoiser.x0(rows, t) for x in (models, of_two))
    chex.assert_trees_all_close(one, two, atol=1e-5)
    # Trained on there, each of its devices would do the same work.
    leaves = jax.tree.leaves(of_two._begun.denoiser.params)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in leaves)
