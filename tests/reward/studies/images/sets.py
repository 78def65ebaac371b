"""A minute set of images: a bright quarter on noise, one of four, is an image's class; a study."""

import dataclasses
import pathlib

import numpy as np

from reward_jax.diffusion.train import EMA
from reward_jax.planning.extract import Matching
from reward_jax.planning.fit import Training
from reward_jax.planning.image_options import HalfUNetOptions, UNetOptions
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.studies.images.judge import JudgeOptions
from reward_jax.studies.images.run import Config
from reward_jax.studies.images.settings import CapOptions
from tests.reward.data.images.idx_files import write_set

CLASSES = ("nw", "ne", "sw", "se")
TRAINING = Training(steps=20, batch_size=16, ema=EMA(begin=0, every=1), steps_per_call=10)
MATCHING = Matching(steps=10, batch_size=16, draws=64, seeds=1, steps_per_call=10)


def quarters(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    pixels = random.integers(0, 60, (count, 8, 8))
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 180
    return pixels, labels


def write_quarters(folder: pathlib.Path, train: int = 160, test: int = 48) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate((("train", train), ("t10k", test))):
        write_set(folder, part, *quarters(count, seed))
    return folder


def smallest(out: pathlib.Path, data: pathlib.Path) -> Config:
    return Config(
        out=out,
        data=data,
        classes=CLASSES,
        choices={"left": ("nw", "sw"), "corner": ("se",)},
        variants=("left",),
        diffusion_steps=6,
        unet=UNetOptions(dim=8, multipliers=(1,)),
        half_unet=HalfUNetOptions(dim=8, multipliers=(1,)),
        base_training=TRAINING,
        expert_training=TRAINING,
        matching=MATCHING,
        energy=None,  # half a minute of compiling
        paths=dataclasses.replace(MATCHING, path_draws=64),
        cap=CapOptions(images=16),
        judge=JudgeOptions(100, 32, 5e-3, width=8, features=6),
        validation_images=48,
        test_images=48,
        looks=(0, 2, 4),
        scales=(1.0, 2.0),
        raw_scales=(1.0,),
        sampling=GuidanceOptions(sampler="ddim", sampling_steps=3, eta=1.0),
        samples=64,
        trials=32,
    )
