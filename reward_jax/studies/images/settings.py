"""Settings of the image study, and what could not be studied with them."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Int

from common_jax.checksum import checksum
from common_jax.cli.options import CheckpointOption, DeviceOption, SeedOption
from common_jax.cli.ranges import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitInterval,
    check_ranges,
)
from common_jax.errors import InputError
from reward_jax.data.images import fashion
from reward_jax.data.images.pixels import Images, ImageSpace
from reward_jax.data.images.sets import read_sets
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.train import EMA
from reward_jax.planning.extract import Matching
from reward_jax.planning.fit import Training
from reward_jax.planning.image_options import HalfUNetOptions, UNetOptions, check_network
from reward_jax.planning.options import DiffusionOption, MatchingOption, ScalesOption
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.studies.base import WorkersOption
from reward_jax.studies.images.judge import JudgeOptions

__all__ = [
    "CHOICES",
    "CapOptions",
    "Config",
    "check",
    "check_sets",
    "load_sets",
    "seed_of",
    "split_sets",
]

CHOICES: Mapping[str, tuple[str, ...]] = {
    "sandal-boot": ("sandal", "boot"),
    "bag": ("bag",),
    "trouser": ("trouser",),
    "dress": ("dress",),
    "sneaker": ("sneaker",),
}
_FEWEST = 8  # images of a kind among those that are judged: of fewer an AUC says nothing


@dataclasses.dataclass(frozen=True)
class CapOptions:
    """How a reward is capped before it steers (`cap_reward`).

    Args:
        quantile: of the rewards of images that are not harmful: above it there is no guidance.
        width: over what range guidance ends, in standard deviations of these rewards.
        images: of validation that are not harmful, of which the quantile is taken, at every
            diffusion step; 2 or more.
    """

    quantile: UnitInterval = 0.7
    width: PositiveFloat = 0.25
    images: PositiveInt = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    SeedOption,
    DeviceOption,
    WorkersOption,
    CheckpointOption,
    ScalesOption,
    MatchingOption,
    DiffusionOption,
):
    """Extract what experts lack that were tuned on without some classes, and steer a base by it.

    Args:
        out: folder of the study; what is there already is kept.
        data: folder of images: MNIST's four IDX files, or train/CLASS and test/CLASS of PNG and
            JPEG; by default Fashion-MNIST, which is fetched.
        classes: names of the labels of IDX files; by default their numbers, and Fashion-MNIST's
            own names where the labels are its.
        size: sides of the images of a folder, scaled and cut; by default they are of one size.
        channels: of the images of a folder: 1 for grey, or 3.
        choices: names, and the classes that are called harmful under each.
        variants: those of them whose reward is also made as `energy` and `paths` say, and steers
            uncapped, too.
        unet: of the denoisers.
        half_unet: of the rewards.
        base_training: of a model of all classes, with which base and experts begin.
        expert_training: from there, of the base on all classes and of the experts on the rest.
        energy: how the difference of the models' energies is matched; null for none.
        paths: how the reward is matched further, on guided paths; null for none.
        cap: what a reward that steers does not raise further, so that high scales leave the
            shares of other classes as they are; null for none.
        null_pairs: how many experts are made that lack images of all classes, others each; of
            several, intervals are over these pairs.
        judge: of the classifier that judges samples.
        validation_images: images taken out of those to learn from, by which is chosen.
        norm_images: those of them by which the step of the scores' norm is chosen: at each look
            two network runs of an image, where the reward's takes one, of a small network.
        test_images: held-out images that are judged.
        looks: diffusion steps at which images are looked at; the loss difference takes all.
        raw_scales: guidance scales of the raw difference, each of which is tried.
        variant_scales: likewise of the variants; by default the small network's own is theirs,
            and uncapped it has all of scales.
        sampling: how samples are drawn; near the last t the two models hardly differ, a reward is
            all error there, and shifts classes that are not harmful: keep t_startgrad below.
        samples: of each arm; twice as many of the base.
        trials: samples by which a scale is chosen.
    """

    out: pathlib.Path = pathlib.Path("runs/image-study")
    data: pathlib.Path | None = None
    classes: tuple[str, ...] = ()
    size: PositiveInt | None = None
    channels: Literal[1, 3] = 1
    choices: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(CHOICES))
    variants: tuple[str, ...] = ("sandal-boot",)
    unet: UNetOptions = dataclasses.field(default_factory=UNetOptions)
    half_unet: HalfUNetOptions = dataclasses.field(default_factory=HalfUNetOptions)
    base_training: Training = dataclasses.field(default_factory=lambda: Training(steps=4000))
    expert_training: Training = dataclasses.field(
        default_factory=lambda: Training(
            steps=700, learning_rate=5e-4, ema=EMA(decay=0.99, every=1, begin=0)
        )
    )
    matching: Matching = dataclasses.field(
        default_factory=lambda: Matching(draws=25600, seeds=1, batch_size=64)
    )
    energy: Matching | None = dataclasses.field(
        default_factory=lambda: Matching(steps=50, draws=3200, seeds=1, learning_rate=1e-5)
    )
    paths: Matching | None = dataclasses.field(
        default_factory=lambda: Matching(
            steps=300, draws=3200, path_draws=3200, path_scale=2.0, seeds=1, learning_rate=3e-4
        )
    )
    cap: CapOptions | None = dataclasses.field(default_factory=CapOptions)
    null_pairs: PositiveInt = 1
    judge: JudgeOptions = dataclasses.field(default_factory=JudgeOptions)
    validation_images: PositiveInt = 1000
    norm_images: PositiveInt = 1000
    test_images: PositiveInt = 2000
    looks: tuple[NonNegativeInt, ...] = (1, 4, 7, 10, 13, 16, 20, 24, 28, 33, 38, 44)
    scales: tuple[float, ...] = (1.0, 2.0, 4.0)
    raw_scales: tuple[float, ...] = (1.0, 2.0, 4.0)
    variant_scales: tuple[float, ...] = ()
    sampling: GuidanceOptions = dataclasses.field(
        default_factory=lambda: GuidanceOptions(
            sampler="ddim", sampling_steps=25, eta=1.0, t_startgrad=44
        )
    )
    samples: PositiveInt = 512
    trials: PositiveInt = 128


def check(config: Config) -> dict[str, str]:
    """InputError for what would fail after minutes of training; reads the data.

    Returns their checksum, by what it is of.
    """
    check_ranges(config)
    if not config.choices:
        raise InputError("choices is empty: name some classes, as bag: [bag]")
    for name, classes in config.choices.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"choices: {name!r} names a folder: use letters, digits, - and _")
        if not classes:
            raise InputError(f"choices: {name} has no classes: name those that are harmful")
    if strange := [name for name in config.variants if name not in config.choices]:
        raise InputError(f"variants: {strange[0]!r} is none of {', '.join(config.choices)}")
    steps = config.diffusion_steps
    if not config.looks or max(config.looks) >= steps:
        raise InputError(f"looks are {list(config.looks)}: give some of 0 to {steps - 1}")
    if config.cap is not None and config.cap.images < 2:
        raise InputError(
            "cap.images is 1: a reward levels off at what several get; give 2 or more"
        )
    for name, fewest in (("scales", 1), ("raw_scales", 1), ("variant_scales", 0)):
        given = getattr(config, name)
        if len(given) < fewest or min(given, default=1) <= 0:
            raise InputError(f"{name} are {list(given)}: give some above 0")
    try:
        config.sampling.made_sampler().timesteps(cosine_schedule(steps))
    except InputError as error:
        raise InputError(f"sampling: {error}") from None
    if config.sampling.skip:
        raise InputError("sampling.skip is of a warm start, which samples have not: leave it")
    for name in ("matching", "energy", "paths"):
        one: Matching | None = getattr(config, name)
        if one is None:
            continue
        one.check(steps)
        if one.x_t != "mixed":
            raise InputError(f"{name}.x_t is {one.x_t}, but the study matches on mixed: leave it")
    if config.half_unet.kind != "half_unet":
        raise InputError("half_unet.kind is energy: name choices of an energy under variants")
    if config.expert_training.prediction != config.base_training.prediction:
        raise InputError("expert_training.prediction must be the base's: experts begin as it is")
    if config.data is None:
        _check_classes(config, fashion.CLASSES)  # before 30 MB are fetched
        _check_networks(config, fashion.SHAPE)
        if config.classes:
            raise InputError("classes name those of data, which is not given: leave them out")
    sets = load_sets(config)
    check_sets(config, *sets)
    images = [(one.pixels, one.known_labels(), one.classes) for one in sets]
    return {"images of data (checksum of pixels, labels and classes)": checksum(images)}


def load_sets(config: Config) -> tuple[Images, Images]:
    """The images to learn from, and those held out."""
    if config.data is None:
        folder, classes = fashion.fetch(), fashion.CLASSES
    else:
        folder, classes = config.data, config.classes
    sets = read_sets(folder, classes=classes, size=config.size, channels=config.channels)
    return sets if classes else fashion.named(*sets)


def check_sets(config: Config, train: Images, test: Images) -> None:
    """InputError where there are too few images, of a kind or in all, or networks do not fit."""
    labels = test.known_labels()
    _check_classes(config, test.classes)
    _check_networks(config, train.pixels.shape[1:])
    batch = max(config.base_training.batch_size, config.expert_training.batch_size)
    if len(train) < config.validation_images + batch:
        raise InputError(
            f"{train.source}: holds {len(train):,} images, too few for "
            f"{config.validation_images} of validation and a batch of {batch}: lower "
            "validation_images or batch_size"
        )
    if len(test) < config.test_images:
        raise InputError(
            f"{test.source}: holds {len(test):,} images, but test_images is {config.test_images}: "
            "give no more"
        )
    for name, classes in config.choices.items():
        harmful = np.isin(labels, test.numbers(classes))
        share = min(float(harmful.mean()), float((~harmful).mean()))
        fewest = share * min(config.test_images, config.validation_images, config.norm_images)
        if fewest < _FEWEST:
            raise InputError(
                f"choices: of {name} or of the other classes there are too few images: some "
                f"{fewest:.0f} of those that are judged; raise validation_images, "
                f"norm_images and test_images, until there are {_FEWEST}"
            )

    _check_cap(config, train)


def _check_cap(config: Config, train: Images) -> None:
    if config.cap is None:
        return
    order = _order(config, "train", len(train))[: config.validation_images]
    labels = train.known_labels()[order]
    for name, classes in config.choices.items():
        others = int((~np.isin(labels, train.numbers(classes))).sum())
        if config.cap.images > others:
            raise InputError(
                f"cap.images is {config.cap.images}, but of the images of validation {others} are "
                f"not harmful by {name}: give no more, or raise validation_images"
            )


def split_sets(config: Config, train: Images, test: Images) -> tuple[Images, Images, Images]:
    """Images to learn from, of validation, and of the test, drawn at random."""
    order, chosen = _order(config, "train", len(train)), _order(config, "test", len(test))
    learned, validation = order[config.validation_images :], order[: config.validation_images]
    test = test.choose(chosen[: config.test_images])
    return train.choose(learned), train.choose(validation), test


def seed_of(config: Config, purpose: str) -> int:
    """A seed of its own for each purpose, of the study's: no two share random numbers."""
    entropy = [config.seed, *purpose.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1


def _order(config: Config, which: str, count: int) -> Int[np.ndarray, " N"]:
    return np.random.default_rng(seed_of(config, f"order {which}")).permutation(count)


def _check_classes(config: Config, known: tuple[str, ...]) -> None:
    for name, classes in config.choices.items():
        for one in classes:
            if one not in known:
                numbered = known == tuple(str(number) for number in range(len(known)))
                mend = ", or give their names as classes" if numbered else ""
                raise InputError(
                    f"choices: {name}: {one!r} is no class; there are {', '.join(known)}: choose "
                    f"of them{mend}"
                )
        if not set(known) - set(classes):
            raise InputError(f"choices: {name} calls every class harmful: leave some out")


def _check_networks(config: Config, shape: tuple[int, ...]) -> None:
    """InputError for a network that images [H, W, C] do not go through; computes nothing."""
    height, width, channels = shape
    space = ImageSpace(height, width, channels, {})
    for name in ("unet", "half_unet"):
        check_network(name, getattr(config, name), space)
