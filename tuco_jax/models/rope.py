"""Rotary position embeddings (RoPE) of a Hugging Face config, as frequencies.

Sources: RoPE (arXiv 2104.09864), YaRN (2309.00071), LongRoPE (2402.13753), and the conventions of
transformers' `modeling_rope_utils`, float32 arithmetic included: at position 100,000 a rounding
error of a frequency changes the angle visibly.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from common_jax.errors import InputError
from tuco_jax.models.config import Rope

__all__ = ["resolve_rope"]


def resolve_rope(parameters: Mapping[str, Any], dim: int, max_positions: int) -> Rope:
    """A config's `rope_parameters` as a `Rope`.

    dim: features of a head that are rotated, the first ones. max_positions: the context that the
    config states. Types: default, linear, dynamic, yarn, longrope, llama3. Raises InputError for
    another type or a missing field; ArithmeticError where a frequency would not be finite.
    """
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        return _resolve(parameters, dim, max_positions)


def _resolve(parameters: Mapping[str, Any], dim: int, max_positions: int) -> Rope:
    kind = parameters["rope_type"]
    try:
        base = float(parameters["rope_theta"])
        periods = np.float32(base) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
        if kind == "default":
            return _rope(1 / periods, base)
        if kind == "linear":
            return _rope(1 / periods / np.float32(parameters["factor"]), base)
        if kind == "dynamic":
            factor = float(parameters["factor"])
            if dim == 2:
                raise ArithmeticError("dynamic NTK divides by dim - 2, and dim is 2")
            return _rope(1 / periods, base, switch=max_positions, dynamic_factor=factor)
        original = parameters.get("original_max_position_embeddings") or max_positions
        if kind == "yarn":
            return _yarn(parameters, periods, base, dim, original, max_positions)
        if kind == "longrope":
            return _longrope(parameters, periods, base, original, max_positions)
        if kind == "llama3":
            return _rope(_llama3(parameters, 1 / periods, original), base)
    except KeyError as error:
        raise InputError(f"rope_parameters of type {kind!r} lack the field {error}") from None
    raise InputError(
        f"rope_type {kind!r} is not supported; "
        "supported are default, linear, dynamic, yarn, longrope and llama3"
    )


def _rope(frequencies: np.ndarray, base: float, **fields: Any) -> Rope:
    if not np.isfinite(frequencies).all() or not math.isfinite(fields.get("scale", 1.0)):
        raise ArithmeticError("a frequency is not finite")
    return Rope(tuple(frequencies.astype(np.float32).tolist()), base=base, **fields)


def _yarn(
    p: Mapping[str, Any],
    periods: np.ndarray,
    base: float,
    dim: int,
    original: int,
    max_positions: int,
) -> Rope:
    """Low frequencies interpolated, high ones unchanged, a ramp between (YaRN, section 3.2)."""
    factor = max_positions / original if p["factor"] is None else p["factor"]

    def feature(rotations: float) -> float:
        """The (fractional) feature that turns `rotations` times in the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = feature(p.get("beta_fast") or 32), feature(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(len(periods), dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = 1 - np.clip(ramp, 0, 1)
    frequencies = 1 / (np.float32(factor) * periods) * (1 - keep) + 1 / periods * keep

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    scale = p.get("attention_factor")
    if scale is None and p.get("mscale") and p.get("mscale_all_dim"):
        scale = temperature(p["mscale"]) / temperature(p["mscale_all_dim"])
    return _rope(frequencies, base, scale=temperature(1) if scale is None else float(scale))


def _longrope(
    p: Mapping[str, Any], periods: np.ndarray, base: float, original: int, max_positions: int
) -> Rope:
    """Each frequency has its own divisor, one for short rows and one for long (LongRoPE)."""
    factor = p["factor"] if p.get("factor") is not None else max_positions / original
    scale = p.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (np.asarray(p[k], np.float32) for k in ("short_factor", "long_factor"))
    for name, divisors in (("short_factor", short), ("long_factor", long)):
        if divisors.shape != periods.shape:
            raise InputError(
                f"rope_parameters.{name} has {divisors.size} numbers; "
                f"the rotated features call for {periods.size}"
            )
    return _rope(
        1 / (short * periods),
        base,
        scale=float(scale),
        long_frequencies=tuple((1 / (long * periods)).tolist()),
        long_scale=float(scale),
        switch=original,
    )


def _llama3(p: Mapping[str, Any], frequencies: np.ndarray, original: int) -> np.ndarray:
    """Low frequencies divided by the factor, high ones unchanged, smooth between (Llama 3.1)."""
    factor, low, high = p["factor"], p["low_freq_factor"], p["high_freq_factor"]
    wavelengths = np.float32(2 * math.pi) / frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return np.where(between, blended, scaled)
