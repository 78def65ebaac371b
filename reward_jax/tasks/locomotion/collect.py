"""Episodes of the robots, recorded here with the policies that are shipped, or a user's own.

What is recorded is named as D4RL names it: random, medium, expert, and medium-replay, what is met
on the way to medium.

Legend: E episodes, T steps.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Shaped

from common_jax.errors import InputError
from reward_jax.data.episodes import Episodes
from reward_jax.tasks.locomotion.policies import Policy, policies
from reward_jax.tasks.locomotion.robots import ROBOTS
from reward_jax.tasks.locomotion.simulator import Simulator, resets

__all__ = ["SETS", "STEPS", "collect"]

STEPS = 1000  # of an episode: the environments' time limit
RANDOM = "random"

# Stretches of an episode of recoveries, in steps; the noise's standard deviation in the first.
DISTURBED, RECOVERED = (5, 30), (20, 80)
SIGMA = (0.2, 1.0)


@dataclasses.dataclass(frozen=True)
class Part:
    """A share of a set's episodes. policy: a stage's, or random (uniform actions).

    recovers: noise is added to actions for a stretch, again and again, and only what follows each
    stretch is kept, as an episode of its own: how the policy gets back to what it does.
    """

    policy: str
    recovers: bool = False


# A set -> its parts, of equal shares. An expert's plans drift off data without recoveries.
SETS: dict[str, tuple[Part, ...]] = {
    "expert": (Part("expert"), Part("expert", recovers=True)),
    "medium": (Part("medium"),),
    "medium-replay": (Part(RANDOM), Part("early"), Part("late"), Part("medium")),
    "random": (Part(RANDOM),),
}


def collect(
    name: str,
    which: str,
    *,
    episodes: int,
    seed: int,
    steps: int = STEPS,
    own: Mapping[str, Policy] | None = None,
) -> Episodes:
    """A set of a robot's episodes, of `steps` steps or until it falls.

    which: a key of `SETS`. episodes: how many times a robot starts; recoveries are cut into more.
    own: policies by stage, in place of those that are shipped. Actions are drawn from the
    policies, rewards are the environment's. Raises InputError, before anything is recorded, for
    fewer episodes than the set has parts, and for a stage that has no policy.
    """
    parts = SETS[which]
    if episodes < len(parts):
        raise InputError(f"the set {which!r} has {len(parts)} parts: record as many episodes")
    stages = {part.policy: _policy(name, part.policy, own) for part in parts}
    shares = [len(rows) for rows in np.array_split(np.arange(episodes), len(parts))]
    generators = np.random.default_rng(seed).spawn(len(parts))
    found = [
        _record(name, part, stages[part.policy], count, rng, steps)
        for part, count, rng in zip(parts, shares, generators, strict=True)
    ]
    about = {
        "task": name,
        "environment": ROBOTS[name].environment,
        "goal": which,
        "seed": seed,
        "policies": {stage: dict(p.about) for stage, p in stages.items() if p is not None},
    }
    return Episodes(
        about=about, **{key: np.concatenate([part[key] for part in found]) for key in found[0]}
    )


def _policy(name: str, stage: str, own: Mapping[str, Policy] | None) -> Policy | None:
    """None for uniform actions."""
    if stage == RANDOM:
        return None
    found = policies(name) if own is None else own
    if stage not in found:
        raise InputError(f"{name} has no policy {stage!r}: it has {', '.join(found)}")
    return found[stage]


def _record(
    name: str,
    part: Part,
    policy: Policy | None,
    count: int,
    rng: np.random.Generator,
    steps: int,
) -> dict[str, np.ndarray]:
    """The arrays of `Episodes` of one part; episodes are the stretches that are kept."""
    simulator = Simulator(name, resets(name, count, int(rng.integers(2**31))))
    noise = _Noise(count, simulator.actions, rng) if part.recovers else None
    rows: dict[str, list[np.ndarray]] = {}
    for _ in range(steps):
        chosen, observations = simulator.active.copy(), simulator.observations
        if policy is None:
            actions = rng.uniform(-1, 1, (count, simulator.actions))
        else:
            actions = policy.act(observations, rng)
        if noise is not None:
            added, calm = noise.step()
            actions, chosen = np.clip(actions + added, -1, 1), chosen & calm
        actions = actions.astype(np.float32)
        step = simulator.step(actions)
        for key, values in {
            "observations": observations,
            "actions": actions,
            "rewards": step.rewards,
            "terminations": step.terminated,
            "led_to": step.observations,
            "chosen": chosen,
        }.items():
            rows.setdefault(key, []).append(
                values if values.dtype == bool else values.astype("f4")
            )
        if not simulator.active.any():
            break
    return _stretches({key: np.stack(values, axis=1) for key, values in rows.items()})


def _stretches(rows: dict[str, Shaped[np.ndarray, "E T ..."]]) -> dict[str, np.ndarray]:
    """Each run of rows to keep, as an episode that is truncated unless it terminates."""
    chosen = rows.pop("chosen")
    beyond = np.zeros((len(chosen), 1), bool)
    last = (chosen & ~np.concatenate([chosen[:, 1:], beyond], axis=1))[chosen]
    found = {key: values[chosen] for key, values in rows.items()}
    return found | {
        "led_to": found["led_to"][last],
        "truncations": last & ~found["terminations"],
        "lengths": np.diff(np.flatnonzero(last), prepend=-1),
    }


class _Noise:
    """Gaussian noise on the actions of each robot, in stretches, with calm ones between.

    A stretch has one standard deviation; lengths and deviations are drawn anew for each.
    """

    def __init__(self, count: int, width: int, rng: np.random.Generator) -> None:
        self._rng, self._width = rng, width
        self._calm = np.ones(count, bool)
        self._left = rng.integers(0, RECOVERED[1], count)  # so that robots are out of step
        self._sigma = np.zeros(count)

    def step(self) -> tuple[Float[np.ndarray, "E A"], Bool[np.ndarray, " E"]]:
        """The noise of this step, and which robots have none."""
        over = np.flatnonzero(self._left == 0)
        self._calm[over] = ~self._calm[over]
        for row in over:
            calm = self._calm[row]
            self._left[row] = self._rng.integers(*(RECOVERED if calm else DISTURBED))
            self._sigma[row] = 0.0 if calm else self._rng.uniform(*SIGMA)
        self._left -= 1
        drawn = self._rng.standard_normal((len(self._left), self._width))
        return drawn * self._sigma[:, None], self._calm.copy()
