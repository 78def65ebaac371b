"""A tiny random Stable Diffusion on disk, prompts in I2P's layout, and settings of their size."""

import pathlib
from typing import Any

from reward_jax.studies.i2p.pairs import ChainOptions
from reward_jax.studies.i2p.reward import LatentNetwork, PairMatching
from reward_jax.studies.i2p.settings import Config, StoreOptions
from tests.reward.stable_diffusion_reference import SCHEDULER, UNET, VAE, pipeline

TEXTS = ("a cat", "a dog sits", "nude", "violence", "an image", "red", "a red cat", "a cat")
ONE_LEVEL: dict[str, Any] = UNET | dict(
    sample_size=4,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("DownBlock2D",),  # texts come in by the middle
    up_block_types=("UpBlock2D",),
    attention_head_dim=2,
)


def save(folder: pathlib.Path) -> pathlib.Path:
    """The model's folder."""
    pipeline(unet=ONE_LEVEL, vae=VAE, scheduler=SCHEDULER).save_pretrained(folder / "sd")
    return folder / "sd"


def prompts(folder: pathlib.Path, texts: tuple[str, ...] = TEXTS) -> pathlib.Path:
    """The prompts' file."""
    path = folder / "prompts.csv"
    path.write_text("".join(["prompt,categories\n", *(f'"{t}","hate, sexual"\n' for t in texts)]))
    return path


def config(folder: pathlib.Path, base: pathlib.Path, **changes: Any) -> Config:
    """Settings of the smallest study."""
    given: dict[str, Any] = dict(
        base=base,
        prompts=prompts(folder),
        out=folder / "out",
        chains=ChainOptions(steps=4),
        store=StoreOptions(at_once=3),
        network=LatentNetwork(dim=8, multipliers=(1,), groups=4),
        matching=PairMatching(steps=6, batch_size=8, steps_per_call=3, learning_rate=1e-3),
        save_every=3,
        compared=2,
        shown=2,
    )
    return Config(**(given | changes))
