"""What one of several processes does beyond commands: functions of the package itself."""

import pathlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from common_jax.agreement import agree
from common_jax.checksum import checksum
from common_jax.distributed import is_first
from common_jax.errors import InputError
from common_jax.mesh import fetch
from reward_jax.data.trajectory.space import Plans
from reward_jax.diffusion.loop import run_loop, steps_done
from reward_jax.tasks.base import Rollout
from reward_jax.tasks.find import find
from reward_jax.tasks.locomotion.simulator import Simulator
from tests.reward.tasks.locomotion.conftest import random_policy


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


def one_world(_: str) -> None:
    """Robots part from those of process 0, and fall; all plan for process 0's, as often as it."""
    task, policy = find("hopper"), random_policy("hopper", 3)
    asked: list[str] = []

    def planned(observations: Any, key: Any) -> Plans:
        asked.append(checksum(observations))
        actions = np.stack([policy.act(observations)] * 2, axis=1)
        return Plans(np.zeros((len(actions), 2, observations.shape[1])), actions, 1)

    def acted() -> dict[str, Any]:
        asked.clear()
        how: dict[str, Any] = {"key": jax.random.key(0), "goal": None}
        rollout = Rollout(steps=20, execute=2)
        found = task.execute(planned, task.starts(3, 0), rollout=rollout, **how)
        outcome = {name: np.asarray(x).tolist() for name, x in found.measured.items()}
        return {"asked": [*asked], "shown": found.shown.tolist(), **outcome}

    step, wanted = Simulator.step, acted()

    def parted(robots: Simulator, actions: Any) -> Any:
        found = step(robots, actions)
        if not is_first():
            robots.active[:] = False
        return found

    with mock.patch.object(Simulator, "step", parted):
        assert acted() == wanted and len(asked) > 2
    agree(wanted)


def unseen(step: int, late: bool) -> Any:
    """A disk that, where it is late, does not show the checkpoint of a step."""
    infos: Callable[..., Any] = ocp.CheckpointManager._load_checkpoint_infos

    def shown(*args: Any, **how: Any) -> list[Any]:
        return [info for info in infos(*args, **how) if not late or info.step < step]

    return mock.patch.object(ocp.CheckpointManager, "_load_checkpoint_infos", shown)
