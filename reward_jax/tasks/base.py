"""The contract of a task: what training, steering and reports need of a world.

A task is one world by one name: a maze, an environment of physics; or images. It gives data to
learn from, starts, and the outcome of a planner; commands know nothing else of it. How a planner
is used is up to the task: mazes call it once and follow the plan to its end, locomotion calls it
every k steps and acts (`replans`), images call it once for samples (observations of width 0).
`tasks/obstacles/` is the smallest whole example. Images are had and not recorded: their task's
`record` says so, and how data of either kind are read is `planning/kinds.py`'s.

Legend: B rows, O observation width, H rows of a plan.
"""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from common_jax.cli.ranges import PositiveInt
from common_jax.errors import InputError
from reward_jax.data.episodes import Episodes
from reward_jax.data.trajectory.space import Plans
from reward_jax.tasks.plane import Plane

__all__ = [
    "Captions",
    "Measure",
    "Outcome",
    "Planner",
    "Rollout",
    "Task",
    "TaskOption",
    "WarmPlanner",
    "error_of",
]


class Planner(Protocol):
    """Observations, in the world's own units, and a key -> a plan for each row.

    Plans are `Plans`, those of images pixels 0 .. 255, [B, H, W, C].
    """

    def __call__(self, observations: Float[np.ndarray, "B O"], key: Key[Array, ""]) -> Any: ...


class WarmPlanner(Planner, Protocol):
    """A planner that can begin with the last plans, of which `executed` rows were executed."""

    def __call__(
        self,
        observations: Float[np.ndarray, "B O"],
        key: Key[Array, ""],
        previous: Plans | None = None,
        executed: int = 0,
    ) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Measure:
    """A quantity that an outcome gives for each row.

    name: its key in files. heading: of its column in a table. title: of a table of this measure
    alone. executed: whether plans must be executed for it. digits: decimals in a table.
    """

    name: str
    heading: str
    title: str
    executed: bool
    digits: int = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """The outcome of planning from B starts.

    measured: the task's measures by name (bool, or a number such as a return); None for one that
    needs execution where there was none. shown: what `Task.draw` draws. seconds: of the clock, by
    what they went into, where the task plans as it goes. seeds: S, where rows are S blocks from
    the same starts, each steered by a seed of its own (`SeedBlocks`).
    """

    measured: dict[str, Shaped[np.ndarray, " B"] | None]
    shown: Shaped[np.ndarray, "B ..."]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    seeds: int = 1

    def means(self) -> dict[str, float | None]:
        """Each measure's mean over all rows: of a bool, the share of rows."""
        return {k: None if v is None else float(v.mean()) for k, v in self.measured.items()}

    def standard_errors(self) -> dict[str, float | None]:
        """Of those means, over starts, of which each counts by its mean over seeds.

        None of one start, and where there was no measuring.
        """
        return {k: None if v is None else _error(v.mean(axis=0)) for k, v in self._by_seed()}

    def seed_means(self) -> dict[str, list[float] | None]:
        """Each measure's mean over the starts, of each seed."""
        return {k: None if v is None else v.mean(axis=1).tolist() for k, v in self._by_seed()}

    def seed_standard_errors(self) -> dict[str, float | None]:
        """Of the means over all rows, over seeds; None of one seed, and without measuring."""
        return {k: None if v is None else _error(v.mean(axis=1)) for k, v in self._by_seed()}

    def _by_seed(self) -> Iterator[tuple[str, Float[np.ndarray, "S n"] | None]]:
        for name, value in self.measured.items():
            rows = None if value is None else np.asarray(value, np.float64)
            yield name, None if rows is None else rows.reshape(self.seeds, -1)


def _error(values: Float[np.ndarray, " n"]) -> float | None:
    return error_of(values) if len(values) > 1 else None


def error_of(values: Float[np.ndarray, " N"]) -> float:
    """The standard error of a mean of two values or more."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOption:
    """Which world.

    Args:
        env: the task, by name; a name that is none lists them.
    """

    env: str


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How a world that is planned in again and again is acted in (`Task.replans`).

    Args:
        steps: of the world, in an episode that does not end before.
        execute: actions of each plan that are executed before the next is made.
        warm_start: begin each plan with what is left of the last one (with guidance.skip); a
            `WarmPlanner` can.
    """

    steps: PositiveInt = 1000
    execute: PositiveInt = 1
    warm_start: bool = False

    def check(self, rows: int, whose: str) -> None:
        """InputError for more actions than a plan has rows; whose: the plan, in words."""
        if self.execute > rows:
            raise InputError(
                f"rollout.execute is {self.execute}, but a plan of {whose} has {rows} steps (its "
                "horizon): give as many or fewer"
            )


@dataclasses.dataclass(frozen=True)
class Captions:
    """Sentences of a report.

    story: what base and expert do. base, expert: what each picture shows. measured: how outcomes
    are measured. alt_base, alt_expert: the pictures in a few words.
    """

    story: str
    base: str
    expert: str
    measured: str
    alt_base: str
    alt_expert: str


class Task(abc.ABC):
    """One world. Attributes are constants of a class, or set when a task is made.

    name: in files (`about["task"]`), in `--env` and in the table of `tasks/find.py`.
    environment: its name elsewhere, such as a Gymnasium id; "" for none.
    measures: what an outcome gives. A table with room for one shows the first that needs
    execution, or the first that does not.
    captions: the sentences of its reports.
    replans: whether `execute` calls its planner again on the way; sweeps then plan as they go.
    terminates: whether an episode can end in a terminal state; where none can, flags in data that
    say so are not followed. widths: of observations and actions, which data are held to; None
    where data may have any.
    plane: where positions lie, for maps of a reward; None for a world without positions.
    packages: those whose versions a report states.
    """

    name: str
    environment: str = ""
    measures: tuple[Measure, ...]
    captions: Captions
    replans: bool = False
    terminates: bool = True
    widths: tuple[int, int] | None = None
    plane: Plane | None = None
    packages: tuple[str, ...] = ()

    @abc.abstractmethod
    def record(self, *, episodes: int, span: int, seed: int, goal: Any = None) -> Episodes:
        """Data to learn from: a base's, or with a goal (see `goal`) an expert's.

        span: environment steps of a window; episodes are long enough for it. Base and expert of
        one seed differ in nothing but the goal. `about` says the task, the environment and the
        goal; rewards, terminations and truncations are the world's own.
        """

    def with_policies(self, path: str) -> "Task":
        """The same world, in which a file's policies act when data are recorded.

        Raises InputError for a file that holds none of this world, and where none act.
        """
        raise InputError(f"{self.name} is recorded without policies: leave policies out")

    @abc.abstractmethod
    def goals(self) -> list[Any]:
        """Example goals of experts, as JSON: always the same, in the same order; [] for none."""

    @abc.abstractmethod
    def goal(self, given: Any) -> Any:
        """A goal as JSON, from what a user gave: a number in `goals()`, or the goal itself.

        Raises InputError that says what to give where it is not a goal, and for None where
        outcomes need one.
        """

    @abc.abstractmethod
    def describe(self, goal: Any) -> str:
        """What is recorded with this goal, in a few words: "walks to the goal (1, 1)"."""

    @abc.abstractmethod
    def starts(self, count: int, seed: int) -> Float[np.ndarray, "count O"]:
        """Observations to plan from."""

    @abc.abstractmethod
    def execute(
        self,
        planner: Planner,
        starts: Float[np.ndarray, "B O"],
        *,
        key: Key[Array, ""],
        goal: Any,
        simulate: bool = True,
        rollout: Rollout | None = None,
    ) -> Outcome:
        """Plan from these starts and act; rows are independent of one another.

        simulate: False for the measures of the plans alone, without steps of the world. rollout:
        by default `Rollout()`; of no meaning to a task that plans once.
        """

    @abc.abstractmethod
    def draw(
        self, axes: Any, shown: Shaped[np.ndarray, "B ..."], *, goal: Any, color: str = "#0072b2"
    ) -> None:
        """Draw outcomes (`Outcome.shown`), or recorded data, on matplotlib's axes."""

    @abc.abstractmethod
    def recorded(self, observations: Shaped[np.ndarray, "B ..."]) -> Shaped[np.ndarray, "B ..."]:
        """Recorded observations [B, H, O], or images, as `draw` takes them."""

    @abc.abstractmethod
    def summarise(self, means: dict[str, float | None]) -> str:
        """The means of an outcome in a few words: "0.50 of plans end at the goal"."""

    def shown_measure(self, *, executed: bool) -> Measure | None:
        """The first measure that needs execution, or that does not; None if there is none."""
        return next((m for m in self.measures if m.executed == executed), None)
