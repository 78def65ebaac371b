"""What one of several processes does beyond commands: functions of the package itself."""

import pathlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from common_jax.distributed import is_first
from common_jax.errors import InputError
from common_jax.mesh import fetch
from reward_jax.diffusion.loop import run_loop, steps_done


def old_news(folder: str) -> None:
    """Of a disk that others see late all go on from the checkpoint that process 0 sees."""
    place = pathlib.Path(folder) / "seen late"
    calls: list[int] = []

    def call(state: Any, first: int, count: int) -> Any:
        calls.append(first)
        return (state[0] + count,), {"loss": jnp.zeros(count)}

    def run(steps: int) -> float:
        how: dict[str, Any] = {"per_call": 2, "save_every": 2, "directory": place}
        return float(fetch(run_loop(call, (jnp.float32(0),), steps=steps, **how)[0][0]))

    assert run(4) == 4
    with unseen(4, late=not is_first()):
        with mock.patch.object(pathlib.Path, "is_dir", lambda path, **how: is_first()):
            assert steps_done(place) == 4
        assert run(6) == 6
    assert calls == [0, 2, 4]
    with unseen(6, late=is_first()):
        with pytest.raises(InputError, match="not all processes see the newest checkpoint: their"):
            steps_done(place)


def unseen(step: int, late: bool) -> Any:
    """A disk that, where it is late, does not show the checkpoint of a step."""
    infos: Callable[..., Any] = ocp.CheckpointManager._load_checkpoint_infos

    def shown(*args: Any, **how: Any) -> list[Any]:
        return [info for info in infos(*args, **how) if not late or info.step < step]

    return mock.patch.object(ocp.CheckpointManager, "_load_checkpoint_infos", shown)
