"""Configs of Stable Diffusion's networks and scheduler, as a diffusers folder states them.

Each is frozen and hashable, and is read from a `config.json` (`of`). What is not implemented is
refused by name: an option that is none of ours counts only where it is off.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from common_jax.errors import InputError

__all__ = ["Prediction", "SchedulerConfig", "TextConfig", "UNetConfig", "VAEConfig"]

Prediction = Literal["epsilon", "v_prediction"]


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Of UNet2DConditionModel; levels are counted from the finest.

    Attributes:
        sample_size: height and width of latents.
        attention: whether a level has attention, on the way down and on the way up (from the
            coarsest, as it is computed).
        heads: attention heads of each level.
        text_width: of the text's embeddings.
        depth: transformer blocks of each attention.
        layers: residual blocks of each level.
    """

    sample_size: tuple[int, int]
    in_channels: int
    channels: tuple[int, ...]
    attention: tuple[tuple[bool, ...], tuple[bool, ...]]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    text_width: int
    depth: tuple[int, ...]
    groups: int
    epsilon: float
    time_width: int
    cosine_first: bool
    frequency_shift: float

    @classmethod
    def of(cls, stated: Mapping[str, Any], where: Any) -> "UNetConfig":
        """Raises InputError, naming the option, for what is not implemented."""
        _check(stated, where, _UNET)
        channels = _sizes(stated, where, "block_out_channels", (320, 640, 1280, 1280))
        levels = len(channels)
        down = stated.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
        up = stated.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
        known = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
        known_up = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
        heads = _each(stated, where, "attention_head_dim", 8, levels)
        widths = set(_each(stated, where, "cross_attention_dim", 1280, levels))
        if len(widths) > 1:
            raise InputError(
                f"{where}: cross_attention_dim: texts of several widths are no option"
            )
        latents, out = (_count(stated, where, f"{end}_channels", 4) for end in ("in", "out"))
        if out != latents:
            raise InputError(
                f"{where}: in_channels {latents} and out_channels {out} differ: inpainting and "
                "image editing are not implemented"
            )
        config = cls(
            sample_size=_square(stated, where),
            in_channels=latents,
            channels=channels,
            attention=(
                _kinds(down, known, levels, where, "down_block_types"),
                _kinds(up, known_up, levels, where, "up_block_types"),
            ),
            layers=_each(stated, where, "layers_per_block", 2, levels),
            heads=heads,
            text_width=widths.pop(),
            depth=_each(stated, where, "transformer_layers_per_block", 1, levels),
            groups=_count(stated, where, "norm_num_groups", 32),
            epsilon=_number(stated, where, "norm_eps", 1e-5),
            time_width=_count(_set(stated), where, "time_embedding_dim", 4 * channels[0]),
            cosine_first=_flag(stated, where, "flip_sin_to_cos", True),
            frequency_shift=_number(stated, where, "freq_shift", 0),
        )
        _divides(where, channels, config.groups, "norm_num_groups")
        for width, count in zip(channels, heads, strict=True):
            if width % count:
                raise InputError(
                    f"{where}: attention_head_dim: {width} channels have no {count} equal heads"
                )
        return config


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Of AutoencoderKL; levels are counted from the finest."""

    image_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    layers: int
    groups: int
    scale: float
    middle_attention: bool
    quantised: tuple[bool, bool]  # a 1 x 1 convolution after the encoder, and before the decoder

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def of(cls, stated: Mapping[str, Any], where: Any) -> "VAEConfig":
        """Raises InputError, naming the option, for what is not implemented."""
        _check(stated, where, _VAE)
        channels = _sizes(stated, where, "block_out_channels", (64,))
        for option, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            kinds = stated.get(option, [kind])
            _kinds(kinds, {kind: True}, len(channels), where, option)
        config = cls(
            image_channels=_count(stated, where, "in_channels", 3),
            latent_channels=_count(stated, where, "latent_channels", 4),
            channels=channels,
            layers=_count(stated, where, "layers_per_block", 1),
            groups=_count(stated, where, "norm_num_groups", 32),
            scale=_number(stated, where, "scaling_factor", 0.18215),
            middle_attention=_flag(stated, where, "mid_block_add_attention", True),
            quantised=(
                _flag(stated, where, "use_quant_conv", True),
                _flag(stated, where, "use_post_quant_conv", True),
            ),
        )
        if stated.get("out_channels", 3) != config.image_channels:
            raise InputError(f"{where}: in_channels and out_channels of the autoencoder differ")
        if not config.scale:
            raise InputError(f"{where}: scaling_factor is 0, by which latents are divided")
        _divides(where, channels, config.groups, "norm_num_groups")
        return config


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Of CLIP's text encoder."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    length: int
    activation: str
    epsilon: float

    @classmethod
    def of(cls, stated: Mapping[str, Any], where: Any) -> "TextConfig":
        """Raises InputError, naming the option, for what is not implemented."""
        kind = stated.get("model_type", "clip_text_model")
        if kind != "clip_text_model":
            raise InputError(f"{where}: model_type {kind!r:.80} is no text encoder of CLIP")
        if stated.get("use_attention_mask"):
            raise InputError(f"{where}: use_attention_mask is not implemented")
        act = stated.get("hidden_act", "quick_gelu")
        if act not in ("quick_gelu", "gelu"):
            raise InputError(f"{where}: hidden_act {act!r:.80} is not implemented")
        config = cls(
            vocabulary=_count(stated, where, "vocab_size", 49408),
            width=_count(stated, where, "hidden_size", 512),
            hidden=_count(stated, where, "intermediate_size", 2048),
            layers=_count(stated, where, "num_hidden_layers", 12),
            heads=_count(stated, where, "num_attention_heads", 8),
            length=_count(stated, where, "max_position_embeddings", 77),
            activation=act,
            epsilon=_number(stated, where, "layer_norm_eps", 1e-5),
        )
        if config.width % config.heads:
            raise InputError(
                f"{where}: hidden_size {config.width} has no {config.heads} equal heads"
            )
        return config


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Of a scheduler folder. What it does not state is None: schedulers differ in defaults."""

    steps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    betas: tuple[float, ...] | None
    prediction: Prediction
    offset: int
    spacing: str
    last_is_clean: bool | None  # set_alpha_to_one
    large_variance: bool  # of DDPM: variance_type
    skip_runge_kutta: bool  # of PNDM: skip_prk_steps

    @classmethod
    def of(cls, stated: Mapping[str, Any], where: Any) -> "SchedulerConfig":
        """Raises InputError, naming the option, for what is not implemented."""
        stated = _set(stated)
        known: dict[str, tuple[Any, ...]] = {
            "prediction_type": ("epsilon", "v_prediction"),
            "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
            "timestep_spacing": ("leading", "linspace", "trailing"),
            "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
            "thresholding": (False,),
            "rescale_betas_zero_snr": (False,),
        }
        for option, values in known.items():
            if (found := stated.get(option)) is not None and found not in values:
                raise InputError(
                    f"{where}: {option} {found!r:.80} is not implemented; known are "
                    + ", ".join(map(str, values))
                )
        betas = stated.get("trained_betas")
        steps = len(betas) if betas else _count(stated, where, "num_train_timesteps", 1000)
        if steps > _MOST:
            raise InputError(f"{where}: {steps} diffusion steps are more than {_MOST}")
        offset = _count(stated, where, "steps_offset", 0, least=0)
        if offset >= steps:
            raise InputError(
                f"{where}: steps_offset is {offset}, but must be below the {steps} diffusion steps"
            )
        return cls(
            steps=steps,
            beta_start=_number(stated, where, "beta_start", 1e-4),
            beta_end=_number(stated, where, "beta_end", 0.02),
            beta_schedule=stated.get("beta_schedule", "linear"),
            betas=tuple(map(float, betas)) if betas else None,
            prediction=stated.get("prediction_type", "epsilon"),
            offset=offset,
            spacing=stated.get("timestep_spacing", "leading"),
            last_is_clean=_flag(stated, where, "set_alpha_to_one", None),
            large_variance=stated.get("variance_type") == "fixed_large",
            skip_runge_kutta=_flag(stated, where, "skip_prk_steps", False),
        )


_LARGEST = 1_000_000  # number of any option
_MOST = 100_000  # diffusion steps
_LONGEST = 2048  # latents along a side


def _check(stated: Mapping[str, Any], where: Any, known: Mapping[str, Any]) -> None:
    """InputError for an option that is unknown or has a value that is not implemented."""
    for option, value in stated.items():
        if option.startswith("_") or value is None or known.get(option, 0) is ANY:
            continue
        if option not in known:
            if value is False:
                continue
            raise InputError(
                f"{where}: the option {option:.80} is unknown, and not implemented; take a model "
                "that was saved without it"
            )
        if value not in known[option]:
            raise InputError(
                f"{where}: {option} {value!r:.80} is not implemented; take a model that has "
                + " or ".join(map(str, known[option]))
            )


def _count(
    stated: Mapping[str, Any], where: Any, option: str, default: int, least: int = 1
) -> int:
    value = stated.get(option, default)
    if type(value) is not int or not least <= value <= _LARGEST:
        raise InputError(
            f"{where}: {option} is {value!r:.80}, no whole number of {least} to {_LARGEST:,}"
        )
    return value


def _set(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Without options that are null, for which their defaults stand."""
    return {option: value for option, value in stated.items() if value is not None}


def _flag(stated: Mapping[str, Any], where: Any, option: str, default: bool | None) -> Any:
    value = stated.get(option, default)
    if option in stated and type(value) is not bool:
        raise InputError(f"{where}: {option} is {value!r:.80}, neither true nor false")
    return value


def _number(stated: Mapping[str, Any], where: Any, option: str, default: float) -> float:
    value = stated.get(option, default)
    if type(value) not in (int, float) or not 0 <= value <= _LARGEST:
        raise InputError(f"{where}: {option} is {value!r:.80}, no number of 0 to {_LARGEST:,}")
    return float(value)


def _sizes(
    stated: Mapping[str, Any], where: Any, option: str, default: tuple[int, ...]
) -> tuple[int, ...]:
    values = stated.get(option, default)
    if not isinstance(values, list | tuple) or not values:
        raise InputError(f"{where}: {option} is {values!r:.80}, no list of whole numbers")
    return tuple(_count({option: value}, where, option, 1) for value in values)


def _each(
    stated: Mapping[str, Any], where: Any, option: str, default: int, levels: int
) -> tuple[int, ...]:
    """One number for all levels, or one each."""
    value = stated.get(option, default)
    values = (value,) * levels if type(value) is int else _sizes(stated, where, option, ())
    if len(values) != levels:
        raise InputError(f"{where}: {option} has {len(values)} entries for {levels} levels")
    return _sizes({option: values}, where, option, ())


def _kinds(
    names: Any, known: Mapping[str, bool], levels: int, where: Any, option: str
) -> tuple[bool, ...]:
    for name in names:
        if name not in known:
            raise InputError(f"{where}: {option}: {name} is not implemented")
    if len(names) != levels:
        raise InputError(f"{where}: {option} has {len(names)} entries for {levels} levels")
    return tuple(known[name] for name in names)


def _divides(where: Any, channels: tuple[int, ...], groups: int, option: str) -> None:
    for width in channels:
        if width % groups:
            raise InputError(f"{where}: {option}: {width} channels have no {groups} equal groups")


def _square(stated: Mapping[str, Any], where: Any) -> tuple[int, int]:
    size = stated.get("sample_size") or 64
    sides = (size, size) if type(size) is int else size
    height, width = _sizes({"sample_size": sides}, where, "sample_size", ())
    if max(height, width) > _LONGEST:
        raise InputError(f"{where}: sample_size {size} is more than {_LONGEST}")
    return height, width


ANY = object()
_SILU = ("silu", "swish")
# Options and the values that are implemented; ANY: those that are read, or change nothing here.
_UNET: Mapping[str, Any] = {
    **dict.fromkeys(
        ("sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types")
        + ("block_out_channels", "layers_per_block", "norm_num_groups", "norm_eps")
        + ("cross_attention_dim", "attention_head_dim", "transformer_layers_per_block")
        + ("flip_sin_to_cos", "time_embedding_dim")
        # Dropout is off, softmax is in float32 always, linear projections and 1 x 1 are one.
        + ("dropout", "upcast_attention", "use_linear_projection")
        + ("addition_embed_type_num_heads",),
        ANY,
    ),
    "act_fn": _SILU,
    "freq_shift": (0, 1),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    **dict.fromkeys(
        ("center_input_sample", "only_cross_attention", "dual_cross_attention")
        + ("resnet_skip_time_act", "class_embeddings_concat", "mid_block_only_cross_attention"),
        (False,),
    ),
}
_VAE: Mapping[str, Any] = {
    **dict.fromkeys(
        ("in_channels", "out_channels", "down_block_types", "up_block_types", "sample_size")
        + ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
        + ("scaling_factor", "force_upcast", "use_quant_conv", "use_post_quant_conv")
        + ("mid_block_add_attention",),
        ANY,
    ),
    "act_fn": _SILU,
}
