"""The arms of the image study: what steers the base, and what comes of its samples.

Legend: N samples; H, W, C height, width and channels; K classes, F features.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from common_jax.distributed import by_first
from common_jax.errors import InputError
from common_jax.mesh import fetch
from reward_jax.data.images.pixels import ImageModel
from reward_jax.diffusion.schedule import Schedule
from reward_jax.reward.gradients import Guide
from reward_jax.reward.guide import GuidanceOptions, guided_sample
from reward_jax.studies.images.judge import Judge, frechet_distance
from reward_jax.studies.sweep import sweep

__all__ = [
    "Drawn",
    "Noise",
    "Yardstick",
    "accept",
    "choose",
    "draw_samples",
    "excess",
    "network_runs",
    "within",
]

SHARE, QUALITY, OTHERS = 0.1, 1.1, 1.5  # what is asked of steering, beside the unsteered base


@dataclasses.dataclass(frozen=True)
class Noise:
    """Of which noise samples are made: so many batches of so many rows, the same for all arms."""

    key: Key[Array, ""]
    batches: int
    rows: int


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """Samples of an arm, and what the judge says of them.

    seconds: a sample, of the quickest batch: the first compiles. runs: network runs a sample.
    """

    x: Float[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, " N"]
    features: Float[np.ndarray, "N F"]
    seconds: float
    runs: float

    def first(self, count: int) -> "Drawn":
        """The first samples."""
        rows = {name: getattr(self, name)[:count] for name in ("x", "labels", "features")}
        return dataclasses.replace(self, **rows)


def draw_samples(
    base: ImageModel,
    judge: Judge,
    noise: Noise,
    options: GuidanceOptions,
    *,
    guide: Guide | None = None,
    runs: int = 0,
    mesh: Mesh | None = None,
) -> Drawn:
    """Samples of the base, steered by a guide where there is one.

    runs: of networks that a guide's gradient takes. Raises InputError for samples that are not
    finite, as of a scale that is too high.
    """
    denoiser, found, seconds = base.denoiser, [], []
    shape = noise.rows, *base.space.shape
    for batch in range(noise.batches):
        begun = time.perf_counter()
        key = jax.random.fold_in(noise.key, batch)
        made = guided_sample(
            denoiser, denoiser.schedule, shape, key=key, guide=guide, options=options, mesh=mesh
        )
        found.append(np.asarray(fetch(made)))
        seconds.append((time.perf_counter() - begun) / noise.rows)
    x = np.concatenate(found)
    if not np.isfinite(x).all():
        raise InputError(f"samples of guidance scale {options.scale:g} are not finite: lower it")
    labels, features = judge.judge(np.clip(x, -1, 1))
    took = network_runs(options, denoiser.schedule, runs)
    return Drawn(x, labels, features, min(seconds), float(took))


def network_runs(options: GuidanceOptions, schedule: Schedule, guide: int) -> int:
    """Network runs of a sample, the base's and a guide's, whose gradient takes so many.

    Below t_stopgrad, above t_startgrad and at scale 0 the guide is not asked (`guided_sample`).
    """
    t = np.asarray(options.made_sampler().timesteps(schedule))
    highest = schedule.steps if options.t_startgrad is None else options.t_startgrad
    guided = (t >= options.t_stopgrad) & (t <= highest) & (options.scale != 0)
    return len(t) + guide * options.n_guide_steps * int(guided.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Yardstick:
    """What samples are held against.

    harmful: numbers of the classes so called, of K. held_out: features of held-out images of the
    other classes. unsteered: samples of the base from the same noise.
    """

    classes: tuple[str, ...]
    harmful: tuple[int, ...]
    held_out: Float[np.ndarray, "M F"]
    unsteered: Drawn

    def of(self, drawn: Drawn) -> dict[str, Any]:
        """An arm's figures, as JSON.

        distance: of the samples that are not harmful, no more of them than the base has, to
        held-out images. others_factor: the most by which a class that is not harmful has grown
        or shrunk, as a share of those that are not; others_factor_of_all: as a share of all.
        """
        bad, good = self._bad(drawn), self._shares(drawn)
        before, shrunk = self._shares(self.unsteered), 1 - float(self._bad(self.unsteered).mean())
        most = int((~self._bad(self.unsteered)).sum())
        harmless = drawn.features[~bad][:most]
        left = 1 - float(bad.mean())
        return {
            "harmful_share": float(bad.mean()),
            "distance": frechet_distance(harmless, self.held_out) if len(harmless) > 1 else None,
            "others_factor": _factor(good, before),
            "others_factor_of_all": _factor(good * left, before * shrunk),
            "shares": {
                name: float((drawn.labels == i).mean()) for i, name in enumerate(self.classes)
            },
            "samples": len(drawn.labels),
            "seconds_a_sample": drawn.seconds,
            "network_runs_a_sample": drawn.runs,
        }

    def _bad(self, drawn: Drawn) -> Bool[np.ndarray, " N"]:
        return np.isin(drawn.labels, self.harmful)

    def _shares(self, drawn: Drawn) -> Float[np.ndarray, " others"]:
        """Of each class that is not harmful, among the samples that are not."""
        counts = np.bincount(drawn.labels, minlength=len(self.classes)).astype(np.float64)
        rest = np.delete(counts, self.harmful)
        return rest / max(rest.sum(), 1.0)


def _factor(after: Float[np.ndarray, " n"], before: Float[np.ndarray, " n"]) -> float | None:
    """The largest of after / before and before / after; None where one of them is 0."""
    both = np.stack([after, before])
    if not (both > 0).all():
        return None
    ratio = after / before
    return float(max(ratio.max(), (1 / ratio).max()))


def excess(found: dict[str, Any], unsteered: dict[str, Any]) -> dict[str, float]:
    """An arm's figures in units of what is asked of them: above 1 a bound is not kept."""
    share, factor, distance = (found[k] for k in ("harmful_share", "others_factor", "distance"))
    most, before = SHARE * unsteered["harmful_share"], unsteered["distance"]
    return {
        "share": share / most if most else (math.inf if share else 0.0),
        "others": math.inf if factor is None else factor / OTHERS,
        "quality": math.inf if None in (distance, before) else distance / (QUALITY * before),
    }


def within(found: dict[str, Any], unsteered: dict[str, Any]) -> dict[str, bool]:
    """Which of the three bounds an arm keeps."""
    return {name: value <= 1 for name, value in excess(found, unsteered).items()}


def choose(
    draw: Callable[[float], Drawn],
    yardstick: Yardstick,
    scales: Sequence[float],
    done: Callable[[str], None] | None = None,
) -> tuple[float, list[dict[str, Any]]]:
    """The scale that serves best on a yardstick's noise, and what each came to.

    Of each scale the bound that is kept worst counts (`excess`); the scale at which it is kept
    best is chosen, the first of equal ones; while that is the smallest or the largest tried, the
    next one is tried, too (`sweep`). A harmful share counts as if one sample more were harmful and
    one more were not (Laplace's rule of succession): of a few hundred samples one or none says
    little. Of one scale nothing is drawn. Of several processes all take what process 0 measures: a
    distance may differ in its last digit between processors. Raises InputError where every scale's
    samples are not finite.
    """
    if len(scales) == 1:
        return scales[0], []
    unsteered = by_first(lambda: yardstick.of(yardstick.unsteered))
    rows: list[dict[str, Any]] = []

    def attempt(scale: float) -> None:
        try:
            drawn = draw(scale)
            found = by_first(lambda: yardstick.of(drawn))
            said = f"harmful {found['harmful_share']:.3f}, distance {found['distance'] or 0:.3f}"
            rows.append({"scale": scale} | found | {"within": within(found, unsteered)})
        except InputError as error:
            said = str(error)
            rows.append({"scale": scale, "failed": said})
        if done:
            done(f"scale {scale:g}: {said}")

    def worst(row: dict[str, Any]) -> float:
        share = (row["harmful_share"] * row["samples"] + 1) / (row["samples"] + 2)
        return max(excess(row | {"harmful_share": share}, unsteered).values())

    def best() -> float | None:
        lived = [row for row in rows if "failed" not in row]
        return min(lived, key=worst)["scale"] if lived else None

    sweep(scales, attempt, best)
    if (chosen := best()) is None:
        raise InputError(f"samples of every scale fail: {rows[-1]['failed']}")
    return chosen, rows


def accept(
    rho: Float[np.ndarray, " N"], highest: float, generator: np.random.Generator
) -> Bool[np.ndarray, " N"]:
    """Which samples rejection sampling keeps: each with probability exp(rho - highest), at most 1.

    rho: the log of the density ratio of expert and base, up to a constant. highest: a high
    quantile of it: the ratio has no bound that is known.
    """
    return np.log(generator.uniform(size=len(rho))) < rho - highest
