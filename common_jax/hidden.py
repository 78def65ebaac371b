"""Modules that libraries import where they are installed, and that nothing here needs."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["hidden"]


@contextlib.contextmanager
def hidden(name: str) -> Iterator[None]:
    """In the block, a module that is not loaded yet is not found, as where it is not installed."""
    finders = sys.meta_path[:]
    sys.meta_path[:] = [_Without(finder, name) for finder in finders]  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        sys.meta_path[:] = finders


class _Without:
    """A finder of modules that finds all but one."""

    def __init__(self, finder: Any, name: str) -> None:
        self._finder, self._name = finder, name

    def find_spec(self, name: str, *arguments: Any, **options: Any) -> Any:
        return None if name == self._name else self._finder.find_spec(name, *arguments, **options)

    def __getattr__(self, attribute: str) -> Any:  # such as importlib.metadata asks for
        return getattr(self._finder, attribute)
