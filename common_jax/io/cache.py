"""Where fetched files are kept."""

import os
import pathlib

__all__ = ["cache"]

_ROOT = pathlib.Path(__file__).parents[2]
_CHECKOUT = (_ROOT / "pyproject.toml").is_file()


def cache() -> pathlib.Path:
    """The folder of assets: $TUCO_REWARD_CACHE, else the checkout's (or the user's) .cache."""
    default = _ROOT / ".cache" if _CHECKOUT else "~/.cache/tuco-reward-jax"
    return pathlib.Path(os.environ.get("TUCO_REWARD_CACHE") or default).expanduser()
