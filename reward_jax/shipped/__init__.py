"""Models that come with the package: a base and an expert of one task, which their files name."""

import pathlib

__all__ = ["PAIR"]

PAIR = pathlib.Path(__file__).parent / "pair"  # base.safetensors, expert.safetensors
