"""The U-Net of images: rows apart, any size, classes, and what it refuses."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import ClassifierFree, score_from
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.train import TrainingOptions, init_state, train_denoiser
from reward_jax.models.energy import energy_of
from reward_jax.models.unet2d.unet import UNet2D
from reward_jax.reward.relative import RelativeReward
from tests.reward.models.test_networks import lowered, random_params

SCHEDULE = cosine_schedule(6)
T = jnp.array([0, 3, 5])
TINY = functools.partial(UNet2D, 2, dim=8, groups=4, heads=2, patch=2)


def images(*shape):
    return jax.random.normal(jax.random.key(7), shape)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (TINY(attention=(5, 3)), (3, 10, 6, 2)),
        (TINY(multipliers=(1, 2, 3), patch=1), (3, 5, 7, 2)),
        (TINY(multipliers=(1,), classes=4), (3, 2, 4, 2)),
    ],
    ids=["attention", "odd", "one level"],
)
def test_rows_do_not_see_each_other_and_time_is_an_input(net, shape):
    x, params = images(*shape), random_params(net, shape)
    run = jax.jit(lambda x, t: net.apply({"params": params}, x, t))
    whole = run(x, T)
    assert whole.shape == x.shape and whole.dtype == x.dtype
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(run(x[order], T[order]), whole[order], atol=2e-4)
    assert np.abs(run(x, T + 1) - whole).max() > 1e-4
    # Every position sees every other one, in as few levels as these.
    moved = run(x.at[:, 0, 0].add(1.0), T) - whole
    assert np.abs(moved[:, -1, -1]).max() > 1e-6


def test_classes_are_a_condition_and_the_null_class_is_none():
    net = TINY(classes=3)
    x, params = images(3, 4, 4, 2), random_params(net, (3, 4, 4, 2))
    score = score_from(net, params, "v", SCHEDULE)
    labels = jnp.array([0, 2, 1])
    none, given = score(x, T), score(x, T, labels)
    np.testing.assert_array_equal(none, score(x, T, jnp.full(3, net.null)))
    assert np.abs(none - given).max(axis=(1, 2, 3)).min() > 1e-4
    guided = ClassifierFree(score, net.null, 2.0)(x, T, labels)
    np.testing.assert_allclose(guided, none + 2 * (given - none), rtol=1e-3, atol=1e-3)


def test_classes_are_trained_with_some_left_out():
    net: Any = TINY(classes=2, multipliers=(1,))
    x, labels = np.array(images(4, 2, 2, 2)), np.array([0, 1, 0, 1])
    adam, key = optax.adam(1e-2), jax.random.key(0)
    state = init_state(net, adam, (x[:2], labels[:2]), key)
    trained, metrics = train_denoiser(
        net,
        state,
        (x, labels),
        SCHEDULE,
        adam,
        steps=2,
        key=key,
        options=TrainingOptions(batch_size=8, steps_per_call=2),
        drop_condition=0.5,
        null=net.null,
    )
    assert np.isfinite(metrics["loss"]).all()
    moved = np.abs(trained.params["classes"]["embedding"] - state.params["classes"]["embedding"])
    assert moved.shape == (3, 8) and (moved.max(axis=1) > 0).all()


def test_two_of_them_are_an_energy_difference():
    net = TINY(multipliers=(1,))
    x = images(3, 4, 2, 2)
    base = score_from(net, random_params(net, x.shape), "v", SCHEDULE)
    other = jax.tree.map(lambda leaf: 1.1 * leaf, base.params)
    network, params = energy_of(base, base.replace(params=other))  # pyright: ignore
    guide = RelativeReward(params, SCHEDULE, network, "score")
    value, gradient = guide(x, T), guide.gradient(x, T)
    assert value.shape == (3,) and gradient.shape == x.shape
    assert np.isfinite(gradient).all() and np.abs(gradient).min(axis=(1, 2, 3)).max() > 0


@pytest.mark.parametrize(
    ("net", "shape", "said"),
    [
        (TINY(), (2, 4, 4), "x_t has shape [2, 4, 4], not [B, H, W, C]: this network is one of"),
        (TINY(), (2, 4, 4, 3), "images of [4, 4, 3] (H, W, C) have 3 channels, and this network"),
        (
            TINY(),
            (2, 4, 5, 2),
            "images of 4 x 5 cannot be cut into patches of 2 x 2: give a patch",
        ),
        (
            TINY(multipliers=()),
            (2, 4, 4, 2),
            "a U-Net needs multipliers, one a level, and a block",
        ),
        (
            TINY(attention=(4,)),
            (2, 4, 4, 2),
            "attention at [4], but the levels' longer sides are [2",
        ),
        (TINY(groups=3), (2, 4, 4, 2), "a layer of 8 channels has no 3 equal groups: give the"),
        (
            TINY(attention=(2,), heads=3),
            (2, 4, 4, 2),
            "attention of 8 channels has no 3 equal heads",
        ),
    ],
)
def test_images_and_networks_that_do_not_fit(net, shape, said):
    with pytest.raises(InputError, match=re.escape(said)):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize(
    ("net", "labels", "said"),
    [
        (TINY(), [0, 1], "a condition was given to a U-Net without classes: give it classes"),
        (TINY(classes=3), [0.0, 1.0], "the condition is float32 of shape [2]: give a label"),
        (TINY(classes=3), [0], "the condition is int32 of shape [1]: give a label"),
        (TINY(classes=3), [0, 4], "labels are 0 to 4: give 0 to 2, or 3 for none"),
    ],
)
def test_labels_that_do_not_fit(net, labels, said):
    x = jnp.zeros((2, 2, 2, 2))
    with pytest.raises(InputError, match=re.escape(said)):
        net.apply({"params": {}}, x, jnp.zeros(2, jnp.int32), jnp.array(labels))
    with pytest.raises(InputError, match="a network without classes has no null class"):
        _ = TINY().null


def test_it_lowers_for_accelerators():
    net = TINY(attention=(2,), classes=2)
    x = jnp.zeros((2, 4, 4, 2))
    params = random_params(net, x.shape)
    t = labels = jnp.zeros(2, jnp.int32)
    text = lowered(lambda p, x: net.apply({"params": p}, x, t, labels), params, x)
    assert "stablehlo.convolution" in text
