"""The contract of a task: what learning, steering and reporting need of a world.

A task is one world by one name: a maze, an environment of physics, a set of images. It gives data
to learn from, starts, and an outcome for whatever plans there; commands know of it nothing else.
How a planner is used is the task's own matter: mazes ask once and follow the plan to its end,
locomotion asks every k steps and acts (`replans`), images ask once for samples (observations of
width 0) that a classifier judges. `tasks/obstacles/` is the smallest whole example.

Legend: B rows, O observation width, A action width, H rows of a plan, E episodes.
"""

import abc
import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from reward_jax.data.episodes import Episodes
from reward_jax.data.trajectory.space import Plans
from reward_jax.tasks.plane import Plane

__all__ = ["Captions", "Measure", "Outcome", "Planner", "Task"]


class Planner(Protocol):
    """Observations [B, O], in the world's own units, and a key -> a plan for each row."""

    def __call__(self, observations: np.ndarray, key: jax.Array) -> Plans: ...


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure that an outcome gives for each row.

    name: its key in files. heading: of a table's column. title: in words, of a table of nothing
    else. executed: known only where plans were executed, not of plans alone.
    """

    name: str
    heading: str
    title: str
    executed: bool
    digits: int = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What came of planning from B starts.

    measured: the task's measures by name, [B] each (bool, or a number such as a return); None for
    one that asks for execution where there was none. shown: what `Task.draw` draws, [B, ...].
    """

    measured: dict[str, np.ndarray | None]
    shown: np.ndarray

    def means(self) -> dict[str, float | None]:
        """Each measure over all rows: a share, or a mean."""
        return {k: None if v is None else float(v.mean()) for k, v in self.measured.items()}


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
    """One world. Attributes are constants of a class, or set when it is made.

    name: in files (`about["task"]`), in `--env` and in the table of `tasks/find.py`.
    environment: what others call it, such as a Gymnasium id; "" for none.
    measures: what an outcome gives. The first that asks for execution, and the first that does
    not, are those that a table of one figure shows.
    replans: whether `execute` asks its planner again on the way; sweeps then plan as they go.
    plane: where positions lie, for maps of a reward; None for a world that has none.
    packages: whose versions a report states.
    """

    name: str
    environment: str = ""
    measures: tuple[Measure, ...]
    captions: Captions
    replans: bool = False
    plane: Plane | None = None
    packages: tuple[str, ...] = ()

    @abc.abstractmethod
    def record(self, *, episodes: int, span: int, seed: int, goal: Any = None) -> Episodes:
        """Data to learn from: of a base, or with a goal (see `goal`) of an expert.

        span: environment steps of a window that is to be cut; episodes are long enough for it.
        Base and expert of one seed differ in nothing but the goal. `about` says the task, the
        environment and the goal; rewards, terminations and truncations are the world's own.
        """

    @abc.abstractmethod
    def goals(self) -> list[Any]:
        """What experts may want, as JSON: some of them, always the same and in the same order."""

    @abc.abstractmethod
    def goal(self, given: Any) -> Any:
        """A goal as JSON, from what a user gave (a number in `goals()`, or what it is itself).

        InputError, with the mend, for what is no goal, and for None where outcomes need one.
        """

    @abc.abstractmethod
    def describe(self, goal: Any) -> str:
        """What is recorded with this goal, in a few words: "walks to the goal (1, 1)"."""

    @abc.abstractmethod
    def starts(self, count: int, seed: int) -> np.ndarray:
        """Observations to plan from, [count, O]."""

    @abc.abstractmethod
    def execute(
        self,
        planner: Planner,
        starts: np.ndarray,
        *,
        key: jax.Array,
        goal: Any,
        simulate: bool = True,
    ) -> Outcome:
        """Plan from starts [B, O] and act; rows are independent of one another.

        simulate: False for what the plans tell by themselves, without the world's own steps.
        """

    @abc.abstractmethod
    def draw(self, axes: Any, shown: np.ndarray, *, goal: Any, color: str = "#0072b2") -> None:
        """Draw outcomes (`Outcome.shown`), or as much of recorded data, on matplotlib's axes."""

    @abc.abstractmethod
    def recorded(self, observations: np.ndarray) -> np.ndarray:
        """Recorded observations [B, H, O] as `draw` takes them."""

    @abc.abstractmethod
    def summarise(self, means: dict[str, float | None]) -> str:
        """The means of an outcome in a few words: "0.50 of plans end at the goal"."""

    def shown_measure(self, *, executed: bool) -> Measure | None:
        """The first measure that asks for execution, or that does not; None if there is none."""
        return next((m for m in self.measures if m.executed == executed), None)
