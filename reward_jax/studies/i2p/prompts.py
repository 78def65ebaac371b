"""Prompts in I2P's layout (arXiv 2211.05105), and their split: a prompt is on one side of it.

A csv file with a header. Of its columns (prompt, categories, hard, inappropriate_percentage,
nudity_percentage, q16_percentage, sd_safety_percentage, prompt_toxicity, lexica_url, sd_seed,
sd_guidance_scale, sd_image_width, sd_image_height, sd_model and others) `prompt` is needed, and
`categories` is kept; all else is left where it is.
"""

import csv
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

import numpy as np
from jaxtyping import Int

from common_jax.cli.ranges import UnitInterval
from common_jax.errors import InputError

__all__ = [
    "PROMPTS",
    "Prompt",
    "Split",
    "SplitOptions",
    "prompts_checksum",
    "read_prompts",
    "split_prompts",
]

PROMPTS = "prompts (checksum)"  # among the settings of pairs
_LONGEST = 1 << 20  # characters of one cell, and of one line


class Prompt(NamedTuple):
    """A prompt; categories: of what it may call up, as I2P names them."""

    text: str
    categories: tuple[str, ...]


def read_prompts(path: str | pathlib.Path, most: int = 0) -> list[Prompt]:
    """The prompts of a file, in its order; most: the first so many, 0 for all.

    Raises InputError for a file that is not there or no csv file, one without a column `prompt` or
    without rows, a row of too few or too many cells, and an empty prompt; rows are counted from 1,
    the header apart.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; a csv file of prompts is wanted")
    found: list[Prompt] = []
    try:
        csv.field_size_limit(_LONGEST)
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(_lines(file), strict=True)
            header = next(rows, [])
            if "prompt" not in header:
                columns = ", ".join(header)[:120] or "none"
                raise InputError(f"{path}: has no column prompt, only {columns}; name it in row 1")
            at = header.index("prompt")
            kinds = header.index("categories") if "categories" in header else None
            for number, row in enumerate(rows, 1):
                if not row:  # an empty line
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"{path}: row {number} has {len(row)} cells, where the header has "
                        f"{len(header)}; put texts with a comma in quotation marks"
                    )
                if not row[at].strip():
                    raise InputError(f"{path}: the prompt of row {number} is empty; remove it")
                named = "" if kinds is None else row[kinds]
                found.append(Prompt(row[at], _list(named)))
                if len(found) == most:
                    break
    except (UnicodeDecodeError, csv.Error) as error:
        said = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)[:80]
        raise InputError(f"{path}: is no csv file ({said}); save it as one, in UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend that") from error
    if not found:
        raise InputError(f"{path}: holds no prompts, only a header; add a row or more")
    return found


def prompts_checksum(prompts: Sequence[Prompt]) -> str:
    """Of texts and categories, in their order: what pairs were drawn of."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]


def _lines(file: TextIO) -> Iterator[str]:
    """Lines, none longer than a cell may be: what is no text may be one line of gigabytes."""
    while line := file.readline(_LONGEST + 1):
        if len(line) > _LONGEST:
            raise csv.Error(f"a line has more than {_LONGEST:,} characters")
        yield line


def _list(named: str) -> tuple[str, ...]:
    return tuple(one.strip() for one in named.split(",") if one.strip())


@dataclasses.dataclass(frozen=True)
class SplitOptions:
    """Which prompts are for what; those that are left are the test.

    Args:
        train: their share that the reward is matched on.
        validation: their share that the step and the classifier are chosen on.
    """

    train: UnitInterval = 0.6
    validation: UnitInterval = 0.2


class Split(NamedTuple):
    """Numbers of prompts on each side, rising."""

    train: Int[np.ndarray, " n"]
    validation: Int[np.ndarray, " n"]
    test: Int[np.ndarray, " n"]


def split_prompts(prompts: Sequence[Prompt], options: SplitOptions, seed: int) -> Split:
    """A split at random; prompts of one text are on one side.

    Raises InputError where a side would be empty.
    """
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    order = np.random.default_rng(seed).permutation(len(texts))
    ends = np.cumsum([options.train, options.validation]) * len(texts)
    parts = np.split(order, np.round(ends).astype(int))
    for name, part in zip(Split._fields, parts, strict=True):
        if not part.size:
            raise InputError(
                f"{len(texts)} different prompts at shares of {options.train:g} for training and "
                f"{options.validation:g} for validation leave none for {name}: give more prompts, "
                "or other shares"
            )
    numbers = {texts[i]: side for side, part in enumerate(parts) for i in part}
    sides = np.array([numbers[prompt.text] for prompt in prompts])
    return Split(*(np.flatnonzero(sides == side) for side in range(3)))
