"""Base and expert as two scores: what makes two models a pair, and each one's own texts.

An expert may read a prompt otherwise than its base: by another text encoder's weights, such as
those that a LoRA changes, or by another tokenizer. Both scores are given one condition, which
therefore holds the prompts' texts of both models; each score takes its own:

    base_score, expert_score = pair_scores(base, expert, 7.5)
    cond = pair_texts(base, expert, prompts)

Legend: B batch, h and w height and width of latents, C their channels, L tokens of a text, D its
width.
"""

import dataclasses
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from common_jax import struct
from common_jax.errors import InputError
from common_jax.mesh import fetch
from common_jax.precision import jit
from reward_jax.diffusion.denoiser import ClassifierFree
from reward_jax.models.stable_diffusion.pipeline import StableDiffusion
from reward_jax.models.stable_diffusion.safety import SafeGuidance

__all__ = ["PairScore", "check_pair", "pair_scores", "pair_texts", "reads_alike"]


@struct.dataclass
class PairScore:
    """A score that is given the texts of both models of a pair, and reads its own.

    score: of a text [B, L, D]. place: 0 of the base, 1 of the expert; an array, so that both are
    one program.
    """

    score: ClassifierFree
    place: Int[Array, ""]

    def __call__(
        self,
        x_t: Float[Array, "B h w C"],
        t: Int[Array, " B"],
        cond: Float[Array, "B 2 L D"] | None = None,
    ) -> Float[Array, "B h w C"]:
        """The score; raises InputError for a condition that is not `pair_texts`."""
        if cond is None or jnp.ndim(cond) != 4 or cond.shape[1] != 2:
            found = "none" if cond is None else list(jnp.shape(cond))
            raise InputError(
                f"cond is {found}, where the texts of both models, [{len(x_t)}, 2, tokens, "
                "width], belong: give pair_texts(base, expert, prompts)"
            )
        own = jax.lax.dynamic_index_in_dim(cond, self.place, axis=1, keepdims=False)
        return self.score(x_t, t, own)


def pair_scores(
    base: StableDiffusion,
    expert: StableDiffusion,
    guidance_scale: float = 7.5,
    negative: str = "",
) -> tuple[PairScore, PairScore]:
    """Both models' guided scores, for `extract_reward`, `guided_sample` and the like.

    Their condition is `pair_texts`. Raises InputError as `check_pair`.
    """
    check_pair(base, expert)
    scores = (sd.guided_score(guidance_scale, negative) for sd in (base, expert))
    one, other = (PairScore(s, jnp.asarray(i, jnp.int32)) for i, s in enumerate(scores))
    return one, other


def pair_texts(
    base: StableDiffusion, expert: StableDiffusion, prompts: Sequence[str]
) -> Float[Array, "B 2 L D"]:
    """Embeddings of prompts by both models, the base's first; see `encode_text` for errors."""
    if base.tokens.length != expert.tokens.length:
        raise InputError(
            f"base and expert read {base.tokens.length} and {expert.tokens.length} tokens: give "
            "both tokenizers one model_max_length"
        )
    return jnp.stack([sd.encode_text(prompts) for sd in (base, expert)], axis=1)


def reads_alike(base: StableDiffusion, expert: StableDiffusion) -> bool:
    """Whether two models of one architecture make the same of prompts.

    Tokenizers of other files, such as of another layout, are compared by some words.
    """
    if base.tokens != expert.tokens:
        samples = "", *string.punctuation, *SafeGuidance().concept.split()
        if not np.array_equal(base.tokens(samples), expert.tokens(samples)):
            return False
    pairs = zip(*(jax.tree.leaves(sd.text) for sd in (base, expert)), strict=True)
    return all(x is y or bool(fetch(_alike(x, y))) for x, y in pairs)


@jit
def _alike(x: Shaped[Array, "..."], y: Shaped[Array, "..."]) -> Bool[Array, ""]:
    """Whether two arrays hold the same numbers, as far as the narrower type keeps them."""
    dtype = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.array_equal(x.astype(dtype), y.astype(dtype))


def check_pair(base: StableDiffusion, expert: StableDiffusion) -> None:
    """Raise InputError where two models are no pair: other architectures, or other schedules."""
    for name in ("unet", "vae", "text"):
        for field in dataclasses.fields(getattr(base.config, name)):
            ours, theirs = (getattr(getattr(x.config, name), field.name) for x in (base, expert))
            if ours != theirs and field.name != "sample_size":
                raise InputError(
                    f"base and expert are of two architectures: {field.name} of the {name} is "
                    f"{ours} and {theirs}; give two models of one"
                )
    if base.config.prediction != expert.config.prediction:
        raise InputError(
            f"base and expert predict {base.config.prediction} and {expert.config.prediction}: "
            "give two models of one kind"
        )
    both = base.schedule.alphas_cumprod, expert.schedule.alphas_cumprod
    if both[0].shape != both[1].shape or not np.allclose(*map(np.asarray, both), atol=1e-5):
        raise InputError("base and expert have two noise schedules: give two models of one")
