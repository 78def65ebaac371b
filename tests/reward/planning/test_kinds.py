"""Trajectories and images keep one contract; options of the other kind are refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from common_jax.cli import command_line
from common_jax.errors import InputError
from reward_jax.data.checkpoint import save_model
from reward_jax.data.images.pixels import (
    ImageGuide,
    ImageModel,
    ImageRows,
    Images,
    ImageSpace,
    LabelledRows,
)
from reward_jax.data.latents import LatentSpace
from reward_jax.data.model import SpaceModel
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.schedule import make_schedule
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.models.unet2d.unet import UNet2D
from reward_jax.planning.image_options import (
    ClassUNetOptions,
    HalfUNetOptions,
    ImageOptions,
)
from reward_jax.planning.kinds import (
    IMAGES,
    TRAJECTORIES,
    ImageSamples,
    WindowSamples,
    check_own,
    kind_of_data,
    kind_of_model,
    kind_of_space,
)
from reward_jax.planning.options import CutOption
from reward_jax.planning.reward_run import RewardRunOptions
from reward_jax.planning.train_run import TrainOptions
from reward_jax.reward.relative import RelativeReward
from tests.reward.cli_runs import episodes, space
from tests.reward.cli_runs import model as trajectory_model
from tests.reward.studies.images.sets import CLASSES, quarters, write_quarters

ABOUT = {"task": "images", "classes": list(CLASSES)}
SPACE = ImageSpace(8, 8, 1, ABOUT)


def model(of=SPACE, steps=6, **fields) -> ImageModel:
    network = UNet2D(of.channels, 8, (1,), **fields)
    made = score_from(network, {}, "v", make_schedule("cosine", steps), clip=1.0)
    return ImageModel(made, of, np.int32(4) if network.classes else None)


def images(count=16) -> Images:
    pixels, labels = quarters(count, 0)
    return Images(pixels[..., None].astype(np.uint8), labels, CLASSES, "here")


def test_classes_are_left_out():
    whole = images()
    samples = ImageSamples(whole, ("nw", "se"))
    assert set(samples.chosen.known_labels()) == {1, 2} and len(samples.chosen) == 8
    source = samples.source(SPACE)
    assert isinstance(source, ImageRows) and source.pixels.shape == (8, 8, 8, 1)
    with pytest.raises(InputError, match="here: every image is of a class that is left out"):
        ImageSamples(whole, CLASSES).source(SPACE)
    with pytest.raises(InputError, match="here: has no class 'bag'"):
        ImageSamples(whole, ("bag",)).source(SPACE)


def test_labels_are_a_condition_where_the_model_is_of_classes():
    source = ImageSamples(images(), by_class=True).source(SPACE)
    assert isinstance(source, LabelledRows)
    np.testing.assert_array_equal(source.labels, images().known_labels())
    other = dataclasses.replace(SPACE, about=ABOUT | {"classes": ["a", "b"]})
    with pytest.raises(InputError, match="its classes are nw, ne, sw, se, the model's a, b: giv"):
        ImageSamples(images(), by_class=True).source(other)


def test_images_are_held_out_before_classes_are_left_out():
    """So that a base's and an expert's held-out images are the same ones."""
    whole = images(32)
    parts = [ImageSamples(whole, out).hold_out(0.2, SPACE) for out in ((), ("nw",))]
    for trained, apart in parts:
        assert (len(trained.images), len(apart.images)) == (26, 6)
    for one, other in zip(*parts, strict=True):
        np.testing.assert_array_equal(one.images.pixels, other.images.pixels)
    both = [{x.tobytes() for x in one.images.pixels} for one in parts[0]]
    assert both[0] | both[1] == {x.tobytes() for x in whole.pixels} and not both[0] & both[1]
    few = ImageSamples(images(4))
    for share in (0.0, 0.1):  # none, and too few of them
        assert few.hold_out(share, SPACE) == (few, few)


def test_episodes_are_held_out():
    samples = WindowSamples(episodes(), "none")
    trained, apart = samples.hold_out(1 / 3, space(horizon=8, stride=10))
    assert (len(trained.episodes.lengths), len(apart.episodes.lengths)) == (2, 1)
    assert samples.hold_out(0.0, space()) == (samples, samples)


def test_the_kind_of_what_is_given(tmp_path):
    write_quarters(tmp_path / "idx", 8, 4)
    assert kind_of_data(tmp_path / "idx") is IMAGES
    assert kind_of_data(tmp_path / "data.hdf5") is TRAJECTORIES
    assert kind_of_space(SPACE) is IMAGES and kind_of_space(space()) is TRAJECTORIES
    save_model(tmp_path / "t.safetensors", trajectory_model())
    filled = score_from(UNet2D(1, 8, (1,)), {"w": np.ones(2)}, "v", make_schedule("cosine", 6))
    save_model(tmp_path / "i.safetensors", ImageModel(filled, SPACE))
    save_model(tmp_path / "l.safetensors", SpaceModel(filled, LatentSpace(8, 8, 4, {})))
    assert kind_of_model(tmp_path / "t.safetensors") is TRAJECTORIES
    assert kind_of_model(tmp_path / "i.safetensors") is IMAGES
    with pytest.raises(InputError, match="is a model of latents; commands know those of traject"):
        kind_of_model(tmp_path / "l.safetensors")
    with pytest.raises(InputError, match="there is no such file; a denoiser is wanted"):
        kind_of_model(tmp_path / "no.safetensors")


def test_options_of_the_other_kind_are_refused():
    for kind in (IMAGES, TRAJECTORIES):
        check_own(kind, "it is", TrainOptions(data="", out=""))
    for kind, name, value, other in (
        (IMAGES, "horizon", 8, "trajectories"),
        (IMAGES, "actions", True, "trajectories"),
        (TRAJECTORIES, "images", ImageOptions(size=8), "images"),
        (TRAJECTORIES, "unet_2d", ClassUNetOptions(dim=8), "images"),
    ):
        given: dict[str, Any] = {name: value}
        options = TrainOptions(data="", out="", **given)
        with pytest.raises(InputError) as error:
            check_own(kind, "it is", options)
        said = f"{name} is of {other}, and it is of {kind.name}: leave {name} out"
        assert str(error.value) == said
    options = RewardRunOptions(base="", expert="", out="", half_unet_2d=HalfUNetOptions(dim=8))
    assert IMAGES.reward(options) == HalfUNetOptions(dim=8)
    with pytest.raises(InputError, match="half_unet_2d is of images, and the models are of traj"):
        TRAJECTORIES.reward(options)


def test_a_pair_fits_or_is_refused():
    base, expert = model(), model()
    score, notes = IMAGES.expert_score(base, expert)
    assert score is expert.denoiser and not notes
    with pytest.raises(InputError, match="and expert differ in size: 8 x 8 x 1 and 12 x 12 x 1"):
        IMAGES.expert_score(base, model(ImageSpace(12, 12, 1, ABOUT)))
    with pytest.raises(InputError, match="base and expert differ in diffusion steps: 6 and 7"):
        IMAGES.expert_score(base, model(steps=7))
    network = HalfUNet2D(1, 8, (1,))
    for of, steps, message in (
        (SPACE, 7, "diffusion steps"),
        (ImageSpace(8, 8, 3, {}), 6, "size"),
    ):
        schedule = make_schedule("cosine", steps)
        guide = ImageGuide(RelativeReward({}, schedule, network), of, schedule)
        with pytest.raises(InputError, match=f"base and reward differ in {message}"):
            IMAGES.check_steers("base and reward", base, guide)


def test_what_a_model_to_begin_with_has():
    found = IMAGES.taken_over(model(classes=4))
    assert found["images.size"] == 8 and found["unet_2d.dim"] == 8
    assert found["unet_2d.by_class"] and found["images.classes"] == CLASSES
    assert IMAGES.taken_over(model(ImageSpace(8, 12, 1, {})))["images.size"] is None


def test_classes_are_named_by_numbers_where_they_have_no_names(tmp_path):
    write_quarters(tmp_path, 16, 4)
    argv = ["--data", str(tmp_path), "--out", "o", "--images.leave_out", "[1, 3]"]
    options = command_line.parse("reward-jax train", "", TrainOptions, argv)
    source, found = IMAGES.to_learn(options, None)
    assert isinstance(source, ImageRows) and len(source.pixels) == 8
    assert found.about["classes"] == ["0", "1", "2", "3"] and found.about["goal"] == ["1", "3"]
    named = dataclasses.replace(options, images=ImageOptions(classes=CLASSES, leave_out=("se",)))
    assert IMAGES.to_learn(named, None)[1].about["goal"] == ["se"]


def test_what_an_expert_never_saw_is_held_out(tmp_path):
    write_quarters(tmp_path, 8, 12)
    of = dataclasses.replace(SPACE, about=ABOUT | {"goal": ["nw"]})
    found = IMAGES.held_out(str(tmp_path), of)
    assert found.x_0.shape == (12, 8, 8, 1) and found.lacking is not None
    assert found.lacking.tolist() == [True, False, False, False] * 3
    assert IMAGES.held_out(str(tmp_path), SPACE).lacking is None
    assert TRAJECTORIES.held_out(str(tmp_path), space()) is None
    read = IMAGES.read(str(tmp_path), of, CutOption())
    assert read.left_out == ("nw",) and len(read.images) == 8


def test_samples_as_they_are_seen():
    x = np.full((2, 8, 8, 1), 0.0)
    assert (IMAGES.observed(x, SPACE) == 128).all()
    assert IMAGES.size(SPACE) == "8 x 8 x 1"
    assert TRAJECTORIES.size(space()) == "8 rows, one every 10 environment steps"
    rows = np.zeros((2, 8, 4))
    assert TRAJECTORIES.observed(rows, space()).shape == (2, 8, 4)
