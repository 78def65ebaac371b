"""Compiled programs that outlive the process: a second start loads them.

JAX's own cache spares a second start the compiling, not the tracing and lowering before it, which
then take most of the time. Here the executable itself is kept, in the same folder.
"""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import pickle
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import serialize_executable

__all__ = ["program"]

_programs: dict[str, Callable[..., Any]] = {}
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def program(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """`function` compiled for arguments like `args`, which are all on one device.

    Where JAX's cache is on, it is kept under a hash of all that it depends on: the source of the
    function's package, versions, settings, device, structure and shapes. What is not found there,
    or cannot be read, is compiled.

    function: a module's, or a `functools.partial` of one, bound to what `repr` shows whole.
    """
    devices = {d for x in jax.tree.leaves(args) if isinstance(x, jax.Array) for d in x.devices()}
    device = devices.pop() if devices else jax.devices()[0]
    if devices:
        raise ValueError("a program is for one device")
    key = _key(function, args, device)
    if key not in _programs:
        folder = jax.config.values["jax_compilation_cache_dir"]
        path = pathlib.Path(folder, f"{key}.program") if folder else None
        found = _read(path, device) if path else None
        _programs[key] = found or _compile(function, args, path)
    return _programs[key]


def _key(function: Callable[..., Any], args: tuple[Any, ...], device: Any) -> str:
    bound: tuple[Any, ...] = ()
    if isinstance(function, functools.partial):
        bound = function.args, sorted(function.keywords.items())
        function = function.func
    leaves, structure = jax.tree.flatten(args)
    parts = (
        (function.__module__, function.__qualname__, bound, _source(function.__module__)),
        (str(structure), [str(jax.typeof(x)) for x in leaves]),
        _versions(),
        (sys.version, device.platform, device.device_kind, device.client.platform_version),
        (device.id, _processor()),
        os.environ.get("XLA_FLAGS"),
        # By getattr, since what a context manager sets shows there alone.
        [(name, str(getattr(jax.config, name, None))) for name in sorted(jax.config.values)],
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _source(module: str) -> str:
    """Hash of every source file of the package that a module belongs to."""
    root = sys.modules[module.partition(".")[0]].__path__[0]
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(root).rglob("*.py")):
        digest.update(repr((path.relative_to(root).as_posix(), path.read_bytes())).encode())
    return digest.hexdigest()


@functools.cache
def _versions() -> list[tuple[str, str]]:
    return [(name, importlib.metadata.version(name)) for name in _PACKAGES]


@functools.cache
def _processor() -> str:
    """What code for this machine may use; a home folder may be shared by unlike machines."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return repr(platform.uname())
    return repr(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))}))


def _read(path: pathlib.Path, device: Any) -> Callable[..., Any] | None:
    """As trusted as JAX's own cache beside it: whoever can write there can run code anyway."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            return None
        return serialize_executable.deserialize_and_load(
            *pickle.loads(content[32:]), backend=device.client, execution_devices=[device]
        )
    except Exception:  # absent, or of what this JAX cannot load
        return None


def _compile(
    function: Callable[..., Any], args: tuple[Any, ...], path: pathlib.Path | None
) -> Callable[..., Any]:
    lowered = jax.jit(function).lower(*args)
    if path is None:
        return lowered.compile()
    # A program that JAX's cache has served must not be kept: XLA's CPU backend writes it
    # incompletely then. Hence that cache is not given it either, but its threshold holds.
    served: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            served.append(event)

    least = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[least]
    jax.config.update(least, float("inf"))
    jax.monitoring.register_event_listener(listen)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
        jax.config.update(least, before)
    if not served and time.perf_counter() - start >= before:
        _write(path, compiled)
    return compiled


def _write(path: pathlib.Path, compiled: jax.stages.Compiled) -> None:
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        content = pickle.dumps(serialize_executable.serialize(compiled))
        beside.write_bytes(hashlib.sha256(content).digest() + content)
        beside.replace(path)
    except Exception:  # a full disk, or a backend that cannot: the program runs all the same
        beside.unlink(missing_ok=True)
