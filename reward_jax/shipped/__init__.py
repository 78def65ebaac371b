"""What comes with the package: a base and an expert of one task, and policies of others."""

import pathlib

__all__ = ["PAIR", "POLICIES"]

_HERE = pathlib.Path(__file__).parent
PAIR = _HERE / "pair"  # base.safetensors, expert.safetensors
POLICIES = _HERE / "policies"  # TASK.safetensors, each of several stages
