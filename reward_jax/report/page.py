"""The page of a base, an expert and the reward between them: words, facts and figures."""

import dataclasses
import importlib.metadata
import pathlib

import jax

from common_jax.precision import stated
from common_jax.report import page
from reward_jax.report.figures import page_figures, panels
from reward_jax.report.measure import Measured
from reward_jax.reward.guide import GuidanceOptions

__all__ = ["render"]

_STEP = GuidanceOptions.step
_METHOD = (
    "The difference of the scores of two diffusion models over the same {samples} is the "
    "gradient of a relative reward, expert against base (Nuti, Franzmeyer and Henriques, NeurIPS "
    "2023, arXiv 2306.01804). A network's gradient is matched to that difference on noised "
    "{samples}; no environment, rewards or labels are used."
)
_MAP = (
    "The map averages the reward of clean trajectories over the places that they visit "
    "(winsorised at 0.5% a tail, scaled to 0 .. 1). "
)
_STEERING = "To steer, each denoising step of the base first climbs the reward."


def render(measured: Measured) -> str:
    """Self-contained HTML."""
    task, kind = measured.compared.task, measured.compared.kind
    means = {name: outcome.means() for name, outcome in measured.outcomes.items()}
    unsteered, steered, _ = means.values()
    result = f"Steered by it: {task.summarise(steered)} (unsteered: {task.summarise(unsteered)})."
    if measured.maps:
        peak = measured.maps.peak
        where = f"in the goal's own {peak.place}" if peak.at_goal else f"in another {peak.place}"
        result = f"It peaks {peak.distance:.2f} {peak.unit} from the goal, {where}. {result}"
    return page.render(
        pathlib.Path(__file__).with_name("report.html"),
        title=f"What does the expert want? A reward from two diffusion models, {task.name}",
        summary=[
            f"{task.captions.story} Nobody tells what the goal is: the reward below was learned "
            "from the difference of the two models alone.",
            result,
        ],
        method=(_METHOD.format(samples=kind.name), (_MAP if measured.maps else "") + _STEERING),
        samples=kind.name,
        made=kind.made,
        facts=_facts(measured),
        captions=task.captions,
        measures=task.measures,
        means=means,
        figures=page_figures(measured),
        panels=panels(measured),
    )


def _facts(measured: Measured) -> dict[str, str]:
    compared, options = measured.compared, measured.options
    d, reward, task = compared.base.denoiser, compared.reward, compared.task
    count = sum(x.size for x in jax.tree.leaves(reward.params)) // (reward.seeds or 1)
    names = ("jax", "flax", *task.packages)
    facts = {
        "denoisers": f"{sum(x.size for x in jax.tree.leaves(d.params)):,} parameters each, "
        f"{d.prediction} prediction, {d.schedule.steps} diffusion steps, {d.schedule.name} "
        "schedule",
        compared.kind.name: compared.kind.size(compared.base.space),
        "reward": f"{count:,} parameters, {reward.seeds or 1} seeds, matched to differences of "
        f"{reward.target}",
        "guidance": _guidance(options.guidance),
    }
    if task.plane:
        facts["map"] = (
            f"{options.windows:,} trajectories of the base, {options.bins} bins to "
            f"{task.plane.cell:g} {task.plane.unit}"
        )
    return facts | {
        "device": str(jax.devices()[0].device_kind),
        "precision of products": stated(),
        "versions": ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names),
    }


def _guidance(options: GuidanceOptions) -> str:
    """What is not its default, and the scale."""
    moves = " (1 moves as far as the expert's mean would)" if options.step == _STEP else ""
    changed = [
        f"{f.name} {value}"
        for f in dataclasses.fields(options)
        if f.name != "scale" and (value := getattr(options, f.name)) != f.default
    ]
    return ", ".join([f"scale {options.scale:g}{moves}", *changed])
