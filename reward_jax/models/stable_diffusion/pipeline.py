"""Stable Diffusion 1.x: prompts to images, images to latents, and scores of both kinds.

Arrays are [B, H, W, C]. Weights of float32 mean products in float32 on every device.

Legend: B batch, H and W height and width of images, h and w of latents, C channels of latents, L
tokens of a text, D its width.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, PyTree

from common_jax import struct
from common_jax.errors import InputError
from common_jax.precision import jit
from reward_jax import sharding
from reward_jax.diffusion.denoiser import ClassifierFree, Denoiser, score_from, steps_of
from reward_jax.diffusion.process import convert, draw_noise
from reward_jax.diffusion.schedule import Schedule
from reward_jax.models.stable_diffusion.config import (
    SchedulerConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from reward_jax.models.stable_diffusion.safety import (
    Numbers,
    SafeGuidance,
    SafeScore,
    Strength,
    as_safety,
)
from reward_jax.models.stable_diffusion.sampling import Guided, Trajectory, chain
from reward_jax.models.stable_diffusion.schedulers import SchedulerName, plan
from reward_jax.models.stable_diffusion.text import TextEncoder
from reward_jax.models.stable_diffusion.unet import UNet
from reward_jax.models.stable_diffusion.vae import Decoder, Encoder

__all__ = ["Config", "CutPrompts", "Sampled", "StableDiffusion", "Tokens"]

Params = PyTree[Float[Array, "..."]]


class CutPrompts(UserWarning):
    """Prompts have more tokens than the text encoder reads; the rest of them is left out."""


class Tokens(Protocol):
    """A tokenizer: prompts -> [B, L], cut and filled up to one length; hashable."""

    @property
    def length(self) -> int:
        """L."""
        ...

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        """The tokens; warns of `CutPrompts`."""
        ...

    def long(self, prompts: Sequence[str]) -> list[str]:
        """Those of more tokens, which are cut."""
        ...


@dataclasses.dataclass(frozen=True)
class Config:
    """What a folder says of each component."""

    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    scheduler: SchedulerConfig

    @property
    def prediction(self) -> Any:
        """What the U-Net predicts, in this package's words."""
        return "v" if self.scheduler.prediction == "v_prediction" else "epsilon"


class Sampled(NamedTuple):
    """Samples: images in -1..1, clipped to it; latents scaled, as `decode` takes them."""

    latents: Float[Array, "B h w C"]
    images: Float[Array, "B H W 3"]
    trajectory: Trajectory | None


@struct.dataclass
class StableDiffusion:
    """A diffusers folder's model, a pytree of parameters. See `load_stable_diffusion`."""

    unet: Params
    encoder: Params
    decoder: Params
    text: Params
    schedule: Schedule
    config: Config = struct.field(pytree_node=False)
    tokens: Tokens = struct.field(pytree_node=False)

    def encode_text(self, prompts: Sequence[str]) -> Float[Array, "B L D"]:
        """Embeddings of prompts; "" is the text of none. Longer ones are cut, which is said.

        Raises InputError for no prompts, and for what is no text.
        """
        tokens = jnp.asarray(self.tokens(_texts("prompts", prompts)))
        return _encode_text(self.text, tokens, config=self.config.text)

    def epsilon(
        self, x_t: Float[Array, "B h w C"], t: Int[Array, " B"], text: Float[Array, "B L D"]
    ) -> Float[Array, "B h w C"]:
        """The noise that the model predicts at scaled, noised latents; of a v model made from v.

        Raises InputError for arrays of other shapes, and as `steps_of` for t.
        """
        t = steps_of(x_t, t, self.schedule)
        self._check_latents("x_t", x_t)
        if text.shape[::2] != (len(x_t), self.config.unet.text_width) or text.ndim != 3:
            raise InputError(
                f"text is {list(text.shape)}, where [{len(x_t)}, tokens, "
                f"{self.config.unet.text_width}] belongs: give what encode_text gives, a row each"
            )
        return _epsilon(self.unet, self.schedule, x_t, t, text, config=self.config)

    def encode(
        self, images: Float[Array, "B H W 3"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "B h w C"]:
        """Images in -1..1 as scaled latents: their mean, or with a key a draw.

        Raises InputError for images of other channels, of a size that is no multiple of the
        autoencoder's factor (8 of the published ones), of whole numbers, or with NaN.
        """
        c = self.config.vae
        _check_numbers("images", images, "scale images of 0 to 255 to x / 127.5 - 1")
        if images.ndim != 4 or images.shape[-1] != c.image_channels:
            raise InputError(
                f"images are {list(images.shape)}, where [rows, height, width, "
                f"{c.image_channels}] belongs"
            )
        if any(size % c.factor or not size for size in images.shape[1:3]):
            raise InputError(
                f"images are {images.shape[1]} x {images.shape[2]}: give sides that are multiples "
                f"of {c.factor}"
            )
        return _encode(self.encoder, images, key, config=c)

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Images of scaled latents, in -1..1 but for what the network overshoots.

        Raises InputError for latents of other channels, or with NaN.
        """
        self._check_latents("latents", latents)
        return _decode(self.decoder, latents, config=self.config.vae)

    def sample(
        self,
        prompts: Sequence[str],
        steps: int = 50,
        guidance_scale: float = 7.5,
        scheduler: SchedulerName = "pndm",
        safety: Strength | SafeGuidance | None = None,
        negative_prompts: Sequence[str] | None = None,
        latents: Float[Array, "B h w C"] | None = None,
        key: Key[Array, ""] | None = None,
        trajectory: bool = False,
    ) -> Sampled:
        """Images of prompts. Nine parameters, as the interface was agreed.

        Args:
            prompts: one for each sample.
            steps: of the scheduler; PNDM evaluates the model once more (or, with skip_prk_steps
                false, nine times).
            guidance_scale: of classifier-free guidance; up to 1 there is none, as in diffusers.
            scheduler: with the folder's own settings; see `schedulers.plan`.
            safety: Safe Latent Diffusion, by a published strength or its numbers.
            negative_prompts: what guidance leads away from, one for all or one each; by default
                no text.
            latents: the noise to begin with; by default drawn, of the model's own size.
            key: for what is drawn: those latents, and DDPM's noise.
            trajectory: also return each evaluation's x_t, t and guided epsilon.

        Raises:
            InputError: for empty prompts, latents of another shape or with NaN, a key that is
                missing, an unknown scheduler or strength, steps that there are not.
        """
        given = steps, guidance_scale, scheduler, safety, negative_prompts, latents, key
        found, seen = self.chain(prompts, *given, trajectory)
        images = _decode(self.decoder, found, config=self.config.vae)
        return Sampled(found, jnp.clip(images, -1, 1), seen)

    def chain(
        self,
        prompts: Sequence[str],
        steps: int = 50,
        guidance_scale: float = 7.5,
        scheduler: SchedulerName = "pndm",
        safety: Strength | SafeGuidance | None = None,
        negative_prompts: Sequence[str] | None = None,
        latents: Float[Array, "B h w C"] | None = None,
        key: Key[Array, ""] | None = None,
        trajectory: bool = False,
    ) -> tuple[Float[Array, "B h w C"], Trajectory | None]:
        """The latents that `sample` would decode, and the trajectory; parameters are its own."""
        prompts = _texts("prompts", prompts)
        for number, prompt in enumerate(prompts, 1):
            if not prompt.strip():
                raise InputError(f"prompt {number} is empty: say what to draw")
        made = plan(self.config.scheduler, scheduler, steps)
        guided = self._guided(prompts, guidance_scale, as_safety(safety), negative_prompts)
        if key is None and (latents is None or made.noisy):
            what = "noise of its own" if latents is not None else "latents to begin with"
            raise InputError(f"sampling draws {what}: give key=jax.random.key(0), or another")
        for_latents, for_noise = (None, None) if key is None else jax.random.split(key)
        if latents is None:
            shape = len(prompts), *self.config.unet.sample_size, self.config.unet.in_channels
            assert for_latents is not None
            latents = draw_noise(for_latents, shape)
        self._check_latents("latents", latents)
        if len(latents) != len(prompts):
            raise InputError(f"there are {len(latents)} latents for {len(prompts)} prompts")
        return chain(
            self.unet,
            self.schedule,
            made,
            jnp.asarray(latents, jnp.float32),
            guided,
            for_noise if made.noisy else None,
            model=UNet(self.config.unet),
            trajectory=trajectory,
        )

    def score(self) -> Denoiser:
        """(x_t, t, text) -> score of scaled latents, for `extract_reward` and the like."""
        return score_from(UNet(self.config.unet), self.unet, self.config.prediction, self.schedule)

    def guided_score(self, guidance_scale: float = 7.5, negative: str = "") -> ClassifierFree:
        """`score`, with classifier-free guidance."""
        scale = jnp.asarray(guidance_scale, jnp.float32)
        return ClassifierFree(self.score(), self.encode_text([negative])[0], scale)

    def safe_score(
        self,
        safety: Strength | SafeGuidance,
        guidance_scale: float = 7.5,
        scheduler: SchedulerName = "pndm",
        steps: int = 50,
    ) -> SafeScore:
        """`guided_score` with safe guidance, as a chain of such steps has it without momentum.

        Raises InputError for guidance with momentum: it depends on the path, and is no function of
        x_t and t.
        """
        found = as_safety(safety)
        assert found is not None
        if found.momentum:
            raise InputError(
                f"safe guidance with momentum {found.momentum} is no function of x_t and t: set "
                "momentum=0, or take the trajectories of sample"
            )
        t = plan(self.config.scheduler, scheduler, steps).rows.t
        last = t[found.warmup] if found.warmup < len(t) else jnp.asarray(-1)
        nothing, concept = self.encode_text(["", found.concept])
        scale = jnp.asarray(guidance_scale, jnp.float32)
        return SafeScore(self.score(), nothing, concept, scale, Numbers.of(found), last)

    def _guided(
        self,
        prompts: list[str],
        scale: float,
        safety: SafeGuidance | None,
        negative: Sequence[str] | None,
    ) -> Guided:
        """Texts are encoded at once, each that stands for all rows once."""
        if not np.isfinite(scale):
            raise InputError(f"guidance_scale is {scale}: give a number")
        count = len(prompts)
        if scale <= 1:
            if safety is not None:
                raise InputError(
                    "safe guidance needs classifier-free guidance: give a guidance_scale above 1, "
                    f"not {scale}"
                )
            number = jnp.asarray(scale, jnp.float32)
            return Guided(self.encode_text(prompts), None, None, number, None)
        negative = [""] if negative is None else _texts("negative_prompts", negative)
        if len(negative) not in (1, count):
            raise InputError(
                f"there are {len(negative)} negative prompts for {count} prompts: give one for "
                "all, or one each"
            )
        others = [*negative, *([safety.concept] if safety else [])]
        text = self.encode_text([*prompts, *others])
        every = (count, *text.shape[1:])
        nothing = jnp.broadcast_to(text[count : count + len(negative)], every)
        concept = jnp.broadcast_to(text[-1:], every) if safety else None
        numbers = Numbers.of(safety) if safety else None
        return Guided(text[:count], nothing, concept, jnp.asarray(scale, jnp.float32), numbers)

    def _check_latents(self, what: str, latents: Any) -> None:
        channels = self.config.unet.in_channels
        _check_numbers(what, latents, "draw them, or take those of encode")
        if latents.ndim != 4 or latents.shape[-1] != channels or 0 in latents.shape:
            raise InputError(
                f"{what} is {list(latents.shape)}, where [rows, height, width, {channels}] belongs"
            )


def _texts(what: str, prompts: Any) -> list[str]:
    """A list of texts; InputError where it is none."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise InputError(f"{what} are none: give one text or more")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise InputError(f"{what}: number {number} is a {type(prompt).__name__}, no text")
    return prompts


def _check_numbers(what: str, x: Any, mend: str) -> None:
    if not isinstance(x, jax.Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
        kind = getattr(x, "dtype", type(x).__name__)
        raise InputError(f"{what}: {kind}, not an array of floating numbers: {mend}")
    known = not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)
    if known and not bool(jnp.isfinite(x).all()):
        raise InputError(f"{what}: NaN or infinity in {list(x.shape)}: {mend}")


@functools.partial(jit, static_argnames="config")
def _encode_text(params: Params, tokens: Array, *, config: TextConfig) -> Array:
    found = TextEncoder(config).apply({"params": sharding.in_use(params)}, tokens)
    assert isinstance(found, jax.Array)
    return found


@functools.partial(jit, static_argnames="config")
def _epsilon(
    params: Params, schedule: Schedule, x_t: Array, t: Array, text: Array, *, config: Config
) -> Array:
    params = sharding.in_use(params)
    output: Any = UNet(config.unet).apply({"params": params}, x_t, t, text)
    return convert(schedule, output, x_t, t, config.prediction, "epsilon")


@functools.partial(jit, static_argnames="config")
def _encode(
    params: Params, images: Array, key: Key[Array, ""] | None, *, config: VAEConfig
) -> Array:
    params, weights = sharding.in_use(params), jax.tree.leaves(params)[0].dtype
    found: Any = Encoder(config).apply({"params": params}, images.astype(weights))
    mean, log_variance = (x.astype(images.dtype) for x in found)
    if key is not None:
        mean += jnp.exp(log_variance / 2) * draw_noise(key, mean.shape, mean.dtype)
    return mean * config.scale


@functools.partial(jit, static_argnames="config")
def _decode(params: Params, latents: Array, *, config: VAEConfig) -> Array:
    params, weights = sharding.in_use(params), jax.tree.leaves(params)[0].dtype
    found: Any = Decoder(config).apply(
        {"params": params}, (latents / config.scale).astype(weights)
    )
    return found.astype(latents.dtype)
