"""JAX's persistent compilation cache: a second start reads programs instead of compiling them."""

import os
import pathlib

import jax

__all__ = ["enable"]


def enable(folder: str | pathlib.Path | None = None) -> pathlib.Path | None:
    """Keep every compiled program in `folder`, and look there first.

    By default JAX_COMPILATION_CACHE_DIR, or tuco-reward-jax/compiled in the user's cache folder.
    Call it before the first compilation. Returns the folder, or None where it cannot be made: a
    cache is a convenience, never a reason to stop.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    chosen = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        path = pathlib.Path(chosen or cache / "tuco-reward-jax" / "compiled").expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home to expand "~" to
        return None
    if not os.access(path, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    # By default programs that compile in under a second are not kept: ours mostly are such.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
