"""Images as a task: samples of a model, with nothing to plan from and nothing to act in.

Of the contract a planner, its outcome and the drawing fit: a planner's plans are pixels, made once
from observations of width 0. What does not fit is recording: images are had, not recorded, so
`record` says how, and no goal is known before the data are: an expert's is the classes that it
was tuned on without, which its file names.

Legend: N and B images; H, W, C height, width and channels.
"""

from typing import Any, NoReturn

import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from common_jax.errors import InputError
from reward_jax.data.images.pixels import tiled
from reward_jax.tasks.base import Captions, Measure, Outcome, Planner, Rollout, Task

__all__ = ["TASKS", "ImagesTask"]

TASKS = ("images",)


class ImagesTask(Task):
    """Images of any kind. What is measured of samples is a sign of too high a scale alone."""

    measures = (
        Measure(
            "saturated", "values at black or white", "share of values at black or white",
            executed=False, digits=3,
        ),
    )  # fmt: skip
    captions = Captions(
        story="Two diffusion models draw images: the base of its data, the expert of its own.",
        base="Images that it was trained on.",
        expert="Its own samples, from the noise used below.",
        measured="Share of values that are black or white: far from the base's, the scale is too "
        "high. What the images show, nobody judges here.",
        alt_base="images that the base learned",
        alt_expert="samples of the expert",
    )

    def __init__(self, name: str) -> None:
        self.name = name

    def record(self, *, episodes: int, span: int, seed: int, goal: Any = None) -> NoReturn:
        raise InputError(
            f"{self.name} are not recorded: give `reward-jax train` a folder of them, such as "
            "`make fashion-mnist` fetches (docs/images.md)"
        )

    def goals(self) -> list[Any]:
        """None: classes are the data's."""
        return []

    def goal(self, given: Any) -> list[str] | None:
        """Names of the classes that an expert was tuned on without; None where it says none."""
        if given is None:
            return None
        if isinstance(given, list | tuple) and all(isinstance(name, str) for name in given):
            return list(given)
        raise InputError(f"goal {given!r}: of images, give a list of the classes left out")

    def describe(self, goal: Any) -> str:
        return "images" if goal is None else f"images without {', '.join(goal)}"

    def starts(self, count: int, seed: int) -> Float[np.ndarray, "count 0"]:
        """Nothing, as often as there are samples to be made."""
        return np.zeros((count, 0), np.float32)

    def execute(
        self,
        planner: Planner,
        starts: Float[np.ndarray, "B 0"],
        *,
        key: Key[Array, ""],
        goal: Any,
        simulate: bool = True,
        rollout: Rollout | None = None,
    ) -> Outcome:
        """The samples, and how much of each is black or white."""
        made = planner(starts, key)
        extreme = (made == 0) | (made == 255)
        return Outcome({"saturated": extreme.reshape(len(made), -1).mean(axis=1)}, made)

    def draw(
        self, axes: Any, shown: UInt8[np.ndarray, "B H W C"], *, goal: Any, color: str = "#0072b2"
    ) -> None:
        """Side by side, in as many rows as columns."""
        columns = max(1, int(np.ceil(np.sqrt(len(shown)))))
        whole = tiled(shown, columns)
        grey = whole.shape[-1] == 1
        axes.imshow(
            whole[..., 0] if grey else whole, cmap="gray" if grey else None, vmin=0, vmax=255
        )
        axes.axis("off")

    def recorded(self, observations: UInt8[np.ndarray, "B H W C"]) -> UInt8[np.ndarray, "B H W C"]:
        return observations

    def summarise(self, means: dict[str, float | None]) -> str:
        return f"{means['saturated']:.3f} of values at black or white"
