"""JAX's persistent compilation cache: a second start reads programs instead of compiling them.

The folder holds machine code that JAX loads and runs. So it must be the user's own and closed to
others: whoever else could write there could run code as this user.
"""

import grp
import os
import pathlib
import pwd
import stat
import warnings

import jax

__all__ = ["enable"]


def enable(folder: str | pathlib.Path | None = None) -> pathlib.Path | None:
    """Keep every compiled program in `folder`, and look there first.

    By default JAX_COMPILATION_CACHE_DIR, or tuco-reward-jax/compiled in the user's cache folder.
    Call it before the first compilation. Returns the folder, or None, without an error, where the
    folder cannot be made, or others could write there; JAX then has no cache, either. A bucket
    (gs://...) is left to JAX: its access rules decide who can write there.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    chosen = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    # An entry that a full disk cut short: the program is compiled, and there is nothing to mend.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    # By default programs that compile in under a second are not kept; most of these are such.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if "://" in str(chosen):
        return None
    path = None
    try:
        given = pathlib.Path(chosen or cache / "tuco-reward-jax" / "compiled").expanduser()
        given.parent.mkdir(parents=True, exist_ok=True)
        given.mkdir(mode=0o700, exist_ok=True)
        # Links are resolved once, so that JAX is given the folder that was checked.
        real = given.resolve(strict=True)
        if os.access(real, os.W_OK | os.X_OK) and _is_private(real):
            path = real
    except (OSError, RuntimeError):  # RuntimeError: no home to expand "~" to
        pass
    # JAX reads the variable by itself: a folder refused here must be refused there, too.
    jax.config.update("jax_compilation_cache_dir", path and str(path))
    return path


def _is_private(folder: pathlib.Path) -> bool:
    """Whether nobody but this user and root can write to `folder`, or has done so.

    folder: without links. It and all that it holds are this user's, others may not write to it,
    and it cannot be exchanged: folders above it are closed likewise, or protect what each user
    has there, as /tmp does (the sticky bit).
    """
    trusted = {os.geteuid(), 0}
    own = folder.stat()
    if own.st_uid != os.geteuid() or _is_shared(own):
        return False
    for above in map(pathlib.Path.stat, folder.parents):
        if above.st_uid not in trusted or (_is_shared(above) and not above.st_mode & stat.S_ISVTX):
            return False
    with os.scandir(folder) as entries:
        return all(entry.stat(follow_symlinks=False).st_uid in trusted for entry in entries)


def _is_shared(found: os.stat_result) -> bool:
    """Whether others than the owner may write to what was found.

    A group of the user's own name, without members, is no other: many systems give every user one.
    """
    if not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(found.st_gid)
    except KeyError:
        return True
    alone = (group.gr_gid, group.gr_name) == (user.pw_gid, user.pw_name)
    return bool(found.st_mode & stat.S_IWOTH or not alone or set(group.gr_mem) - {user.pw_name})
