"""Eight fake CPU devices for every test, strict arrays, and quick compilation.

Strict: arrays of different rank or dtype meet only where the code says how, or it is an error.
Quick, for tests compile more than they run: LLVM's expensive passes are off, fusions are emitted
the older way (a third of the compiler's time; an XLA that has lost the flag says so when it
starts), and what one test process compiled the others read from a cache in the git-ignored
`.cache/`. None changes what a matrix product computes.
"""

import functools
import gc
import os
import pathlib
import re
import signal
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache/jax-tests")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import optax
import pytest

# A shell's background job ignores Ctrl-C, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# In this process alone: what a test starts in another one runs as users run it.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def _as_users_have_it(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call


# What of optax mixes counts and floats, and is not ours to mend.
_cosine = optax.cosine_decay_schedule
optax.cosine_decay_schedule = lambda *args, **kwargs: _as_users_have_it(_cosine(*args, **kwargs))
optax.tree.bias_correction = _as_users_have_it(optax.tree.bias_correction)


@pytest.fixture(autouse=True, scope="session")
def _threads():
    import torch

    torch.set_num_threads(1)


_MAPS, _PAGES = 20_000, 4 * 2**30 // 4096


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Forget compiled programs before a process has too many memory maps, or too much memory.

    Each program takes some of both; one that reaches vm.max_map_count (65,530) crashes, and two
    that pass 8 GiB each leave no room for what tests start.
    """
    yield
    maps, memory = pathlib.Path("/proc/self/maps"), pathlib.Path("/proc/self/statm")
    if not maps.exists():
        return
    resident = int(memory.read_text().split()[1])
    if resident > _PAGES or len(maps.read_bytes().splitlines()) > _MAPS:
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Names of tests are the same in every process, or they cannot be shared among some."""
    addresses = [item.nodeid for item in items if re.search(r"\b0x[0-9a-f]{8,}", item.nodeid)]
    if addresses:
        raise pytest.UsageError(f"an address is in the name of a test: {addresses[0]}")
