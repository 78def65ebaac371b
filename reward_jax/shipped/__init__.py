"""Models that come with the package: a base of walks in UMaze, and an expert at one goal of it."""

import pathlib

__all__ = ["PAIR"]

PAIR = pathlib.Path(__file__).parent / "umaze"  # base.safetensors, expert.safetensors
