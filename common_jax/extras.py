"""Optional dependencies: the error about a missing module names the extra to install.

    with extras.named():
        import gymnasium

The extras are listed in pyproject.toml alone: the installed project's metadata has them.
"""

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator

from common_jax.errors import InputError

__all__ = ["named", "reason"]

PROJECT = "tuco-reward-jax"
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+).*?\bextra\s*==\s*['\"](?P<extra>[\w-]+)['\"]")


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Raise InputError naming the extra where an import in this block lacks a module of one."""
    try:
        yield
    except ModuleNotFoundError as error:
        if why := reason(error):
            raise InputError(why) from error
        raise


def reason(error: ModuleNotFoundError) -> str | None:
    """The line that says what to install, or None where no extra brings the module."""
    module = (error.name or "").partition(".")[0]
    try:
        requirements = importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:  # run from files that nobody installed
        return None
    for requirement in requirements:
        found = _REQUIREMENT.match(requirement)
        if found and f"{_plain(found['name'])}_".startswith(f"{_plain(module)}_"):  # sbx of sbx-rl
            extra = f"{PROJECT}[{found['extra']}]"
            return (
                f"{module} is not installed: install {extra} "
                f"(where the code lies: pip install -c constraints.txt '.[{found['extra']}]')"
            )
    return None


def _plain(name: str) -> str:
    """A distribution's name as a module's: gymnasium_robotics of gymnasium-robotics."""
    return re.sub(r"[-_.]+", "_", name).lower()
