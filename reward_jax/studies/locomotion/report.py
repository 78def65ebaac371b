"""What the locomotion study found, beside the paper: returns of every arm, gains, pictures.

Reads the folder that `studies/locomotion/run.py` fills; measures nothing.
"""

import math
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common_jax.report.figures import PALETTE, draw
from common_jax.report.findings import Figure, Findings, Table, print_tables, write
from common_jax.run import made_by
from reward_jax.diffusion.samplers import make_sampler
from reward_jax.studies.locomotion.arms import compared
from reward_jax.studies.locomotion.claims import (
    PAPER,
    PAPER_UNSEEN,
    claims_of,
    learnable,
    more,
    share_of,
)
from reward_jax.studies.locomotion.data import is_recorded
from reward_jax.studies.locomotion.models import slug
from reward_jax.studies.locomotion.settings import Config, sources
from reward_jax.studies.locomotion.summary import EXPLAINED, MAIN
from reward_jax.tasks.locomotion.collect import STEPS
from reward_jax.tasks.locomotion.robots import ROBOTS
from reward_jax.tasks.locomotion.task import LocomotionTask

__all__ = ["write_report"]


def write_report(config: Config, found: Mapping[str, Any]) -> pathlib.Path:
    """Tables on the console, and report.html and report.md in `out/report`; the page's path."""
    environments, unseen = found["environments"], found["unseen"]
    whole = (
        config.rollout.steps == STEPS
    )  # else D4RL's scores and the paper's are of other episodes
    tables = [_table("Returns", environments, whole=whole)]
    if unseen:
        tables.append(_table("The same guides, an unseen base", unseen, whole=whole))
    if whole:
        tables.append(_against_paper(environments, unseen, own=bool(_own(config))))
    tables.append(_sweeps({"the reward's own": environments, "unseen": unseen}))
    tables += [_gaps(found["robots"]), _explained(found["robots"])]
    if found["ablations"]:
        tables.append(_ablations(found))
    findings = Findings(
        title="Locomotion: steering weak robots by what a strong one wants",
        summary=_sentences(environments),
        claims=claims_of(found, whole=whole),
        tables=tables,
        figures=[
            _explained_by_t(found["robots"]),
            *(figure for name in found["robots"] if (figure := _strips(config, name))),
        ],
        method=_method(config),
        caveats=_caveats(config),
        facts=_facts(config, found),
        data=found,
    )
    print_tables(findings)
    command = f"reward-jax study locomotion --config {config.out}/config.yaml"
    return write(config.out / "report", findings, command=command)


def _method(config: Config) -> tuple[str, ...]:
    trained = ", ".join(
        f"{name}: {own.reward.kind}, {own.rounds} x {own.matching.steps} steps"
        for name, own in config.robots.items()
    )
    return (
        "For each robot a diffusion model is trained on windows of weak policies' episodes (the "
        "base), and further on a strong policy's, recoveries among them, under the base's "
        "normaliser (the expert). A network's gradient is matched to the difference of the two "
        "models' scores (Algorithm 1 of arXiv 2306.01804), several seeds at once, on noised data "
        f"and on the paths of guided chains ({trained}). A discriminator of one seed, a network "
        "over the window, is trained for as many steps in all, on noised data.",
        "Robots plan again and again, and execute the first actions of each plan. All arms have "
        f"the same test starts. {_guidance(config)} Errors "
        "are standard errors over environments; of the reward an environment's return is the mean "
        "over reward seeds, whose own error stands apart. What is said to be more is more by two "
        "standard errors of both kinds.",
        "Controls: lower temperatures of the unsteered base, the raw difference of the two scores "
        "as a guide, which needs no reward, and the expert's own plans.",
    )


def _guidance(config: Config) -> str:
    """Whose guidance arms have; where a single one is given it is nobody's choice."""
    if len(config.scales) == len(config.t_stopgrads) == 1:
        return (
            f"Every guide has scale {config.scales[0]:g} and t_stopgrad {config.t_stopgrads[0]}, "
            "given and not chosen: another may have returned more."
        )
    return (
        "Scale and t_stopgrad of each guide are those of the highest return on validation seeds "
        "(the authors chose theirs on the rollouts that they report), or the next best where "
        "that one's plans are not finite on a test start."
    )


def _caveats(config: Config) -> tuple[str, ...]:
    own = _own(config)
    whose = f" of {', '.join(own)}" if len(own) < len(config.robots) else ""
    ours = (
        f"Data{whose} are our own: policies of TQC at four stages, the base's of random to medium"
    )
    seeds = "One seed of data, of diffusion models and of the discriminator: errors hold none of"
    return (*([f"{ours} ones."] if own else []), f"{seeds} theirs.")


def _own(config: Config) -> list[str]:
    """Robots some of whose data are recorded here."""
    return [n for n in config.robots if any(map(is_recorded, sources(config, n).values()))]


def _arm(one: Mapping[str, Any]) -> str:
    seeds = one["seed_standard_error"]
    apart = "" if seeds is None else f" (seeds +- {seeds:.0f})"
    return f"{one['mean']:.0f} +- {one['standard_error']:.0f}{apart}"


def _table(title: str, environments: Mapping[str, Any], *, whole: bool) -> Table:
    rows = []
    for identifier, arms in environments.items():
        for name, one in arms.items():
            rows.append(
                (
                    identifier,
                    name.replace("_", " "),
                    _arm(one),
                    *([_normalized(one)] if whole else []),
                    *(more(one["over"][other]) for other in ("unsteered", "discriminator")),
                    f"{_chosen(one, 'scale')}, {_chosen(one, 't_stopgrad')}",
                    " + ".join(f"{seconds:.0f}" for seconds in one["seconds"].values()),
                )
            )
    columns = ["environment", "arm", "return", *(["normalized"] if whole else [])]
    columns += ["over unsteered", "over discriminator", "scale, t_stopgrad"]
    columns += ["seconds planning + stepping"]
    return Table(title, columns, rows, "Differences are of the same robots and starts.")


def _normalized(one: Mapping[str, Any]) -> str:
    seeds = one["normalized_seed_standard_error"]
    apart = "" if seeds is None else f" (seeds +- {seeds:.2f})"
    return f"{one['normalized']:.2f} +- {one['normalized_standard_error']:.2f}{apart}"


def _chosen(one: Mapping[str, Any], name: str) -> str:
    """A scale or t_stopgrad, and whether it is the last of those tried; none is below 0."""
    tried = sorted({row[name] for row in one.get("validation", [])})
    value = one["settings"][name]
    edges = {tried[0]: "smallest", tried[-1]: "largest"} if len(tried) > 1 else {}
    return f"{value:g}" + (f" (the {edges[value]} tried)" if value and value in edges else "")


def _sweeps(bases: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns on validation seeds, of the scales and then of the other stops."""
    swept = [
        (identifier, base, name, one["validation"])
        for base, environments in bases.items()
        for identifier, arms in environments.items()
        for name, one in arms.items()
        if "validation" in one
    ]
    scales = sorted({row["scale"] for *_, rows in swept for row in rows})
    shown = []
    for identifier, base, name, rows in swept:
        first = rows[0]["t_stopgrad"]
        by_scale = {row["scale"]: _swept(row) for row in rows if row["t_stopgrad"] == first}
        later = [f"{r['t_stopgrad']}: {_swept(r)}" for r in rows if r["t_stopgrad"] != first]
        cells = (by_scale.get(scale, "") for scale in scales)
        shown.append((identifier, base, name.replace("_", " "), *cells, ", ".join(later)))
    columns = ("environment", "base", "arm", *(f"scale {scale:g}" for scale in scales))
    return Table(
        "Sweeps, on validation seeds",
        (*columns, "t_stopgrad, at the best scale"),
        shown,
        "Mean returns; where the best of the scales given is at an edge, those beyond it, too.",
    )


def _swept(row: Mapping[str, Any]) -> str:
    return "fails" if row["return"] is None else f"{row['return']:.0f}"


def _against_paper(
    environments: Mapping[str, Any], unseen: Mapping[str, Any], *, own: bool
) -> Table:
    rows = []
    for base, measured, paper in (
        ("the reward's own", environments, PAPER),
        ("unseen", unseen, PAPER_UNSEEN),
    ):
        both = {i: (measured[i], paper[i]) for i in measured if i in paper}
        rows += [
            (identifier, base, arm, _normalized(arms[arm]), _of_paper(figure))
            for identifier, (arms, figures) in both.items()
            for arm, figure in figures.items()
        ]
        if len(both) == len(paper):  # the paper's last row is of all of its robots
            rows += [
                (
                    "mean",
                    base,
                    arm,
                    _normalized(_mean([arms[arm] for arms, _ in both.values()])),
                    f"{np.mean([figures[arm][0] for _, figures in both.values()]):.2f}",
                )
                for arm in next(iter(paper.values()))
            ]
    return Table(
        "Normalized returns beside the paper's",
        ("environment", "base", "arm", "here", "paper (as remembered)"),
        rows,
        f"Other {'data and other sizes' if own else 'versions of the environments'}: gains are to "
        "be compared, not levels.",
    )


def _of_paper(figure: tuple[float, float | None]) -> str:
    mean, error = figure
    return f"{mean:.2f}" + ("" if error is None else f" +- {error:.2f}")


def _mean(arms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One arm on the mean of robots, whose errors are independent."""
    found: dict[str, Any] = {"normalized": np.mean([one["normalized"] for one in arms])}
    for kind in ("normalized_standard_error", "normalized_seed_standard_error"):
        errors = [one[kind] for one in arms]
        found[kind] = None if None in errors else math.hypot(*errors) / len(errors)
    return found


def _gaps(robots: Mapping[str, Any]) -> Table:
    rows = [
        (ROBOTS[name].environment, more(one["gap"]), "yes" if learnable(one) else "no")
        for name, one in robots.items()
    ]
    columns = ("environment", "expert's plans over the base's", "above by two standard errors")
    return Table("Is there a reward to learn", columns, rows, "On validation seeds.")


def _explained(robots: Mapping[str, Any]) -> Table:
    kinds = ("on data, noised", "on paths of the raw difference", "on its own paths")
    rows = []
    for name, one in robots.items():
        for key, where in zip(EXPLAINED, kinds, strict=True):
            values = np.array(one["diagnostics"][key], np.float64)
            thirds = [np.nanmean(part) for part in np.array_split(values, 3)]
            rows.append((ROBOTS[name].environment, where, *(f"{v:.2f}" for v in thirds)))
    columns = ("environment", "share of the difference that the reward explains")
    return Table("Explained", (*columns, "first third of t", "second", "last"), rows)


def _explained_by_t(robots: Mapping[str, Any]) -> Figure:
    """What the reward explains, on data and on its own paths, of each robot."""

    def paint(axis: Any) -> None:
        for (name, one), color in zip(robots.items(), PALETTE, strict=False):
            on_data, _, on_paths = (one["diagnostics"][key] for key in EXPLAINED)
            label = ROBOTS[name].environment
            axis.plot(on_paths, color=color, label=f"{label}, its own paths")
            axis.plot(on_data, color=color, linestyle=":", label=f"{label}, data, noised")
        axis.set_xlabel("diffusion step t")
        axis.set_ylabel("share explained")
        axis.legend()

    caption = "Share of the difference of the scores that the reward explains, by diffusion step."
    return Figure("explained", draw(paint, width=6.4), caption)


def _ablations(found: Mapping[str, Any]) -> Table:
    """Each change beside what it was changed from."""
    rows = []
    settings = found["settings"]["ablations"]
    robots = list(dict.fromkeys(settings[name]["robot"] for name in found["ablations"]))
    for robot in robots:
        identifier = ROBOTS[robot].environment
        whole = found["environments"].get(identifier)
        own = {"diagnostics": found["robots"][robot]["diagnostics"]} if whole else {}
        every = {"as above": whole | own} if whole else {}
        every |= {
            f"{name} ({', '.join(_changed(*item) for item in one['change'].items())})": one
            for name, one in found["ablations"].items()
            if settings[name]["robot"] == robot
        }
        for name, arms in every.items():
            change = more(compared(arms["reward"], whole["reward"])) if whole else ""
            of_arms = (*(_arm(arms[arm]) for arm in MAIN), _best_temperature(arms))
            share = share_of(arms, "reward", "raw_difference")
            explained = _means_explained(arms["diagnostics"])
            scale = _chosen(arms["reward"], "scale")
            rows.append((identifier, name, *of_arms, scale, change, share, *explained))
    names = (*(arm.replace("_", " ") for arm in MAIN), "best temperature")
    rest = ("the reward's scale", "reward, changed", "gain / raw difference's")
    columns = ("environment", "change", *names, *rest, "explained on data", "on its own paths")
    note = "One change each, on the same test seeds. Shares explained are means over t."
    return Table("Ablations", columns, rows, note)


def _means_explained(diagnostics: Mapping[str, Any]) -> tuple[str, str]:
    """What the reward explains of data and on its own paths."""
    on_data, _, on_paths = (
        f"{np.nanmean(np.array(diagnostics[key], np.float64)):.2f}" for key in EXPLAINED
    )
    return on_data, on_paths


def _changed(option: str, value: Any) -> str:
    """One change, as a table has it."""
    shown = " ".join(map(str, value)) if isinstance(value, list) else value
    return f"{option} {shown}"


def _best_temperature(arms: Mapping[str, Any]) -> str:
    """The best temperature's returns; blank where none was asked for."""
    tried = [one for name, one in arms.items() if name.startswith("temperature ")]
    if tried:
        return _arm(max(tried, key=lambda one: one["mean"]))
    settings = arms["unsteered"]["settings"]
    draws_noise = make_sampler(settings["sampler"], eta=settings["eta"]).draws_noise
    return "" if draws_noise else "none: no noise is drawn"


def _sentences(environments: Mapping[str, Any]) -> list[str]:
    found = []
    for identifier, arms in environments.items():
        parts = [f"{name.replace('_', ' ')} {arms[name]['mean']:.0f}" for name in MAIN]
        found.append(f"{identifier}: returns {', '.join(parts)}.")
    return found


def _strips(config: Config, name: str) -> Figure | None:
    """An episode of each main arm, side by side in time; None where the frames are gone."""
    task, shown, path = LocomotionTask(name), {}, config.out
    try:
        for arm in ("unsteered", "reward", "expert"):
            path = config.out / name / "arms" / f"{slug(arm)}.npz"
            with np.load(path) as stored:
                shown[arm] = stored["frames"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        print(f"{path}: cannot be read; the report has no strips of {name}", flush=True)
        return None

    def paint(axes: Any) -> None:
        colors = (PALETTE[1], PALETTE[0], PALETTE[3])
        for axis, (arm, frames), color in zip(np.ravel(axes), shown.items(), colors, strict=True):
            task.draw(axis, frames[:1], goal=None, color=color)
            axis.set_title(arm, fontsize=9)

    image = draw(paint, width=9.0, height=6.0, rows=3, columns=1)
    return Figure(
        f"strips_{name}",
        image,
        f"{ROBOTS[name].environment}: the first test episode, ten figures evenly spaced in time, "
        "under each how far it has come.",
    )


def _facts(config: Config, found: Mapping[str, Any]) -> dict[str, str]:
    seconds = sum(sum(one["seconds"].values()) for one in found["robots"].values())
    return {
        "environments": ", ".join(found["environments"]),
        **_data(found["robots"]),
        "test episodes": f"{config.environments}, of the reward for each of its seeds; "
        f"{config.rollout.steps} steps at most, {config.rollout.execute} executed of each plan",
        "validation episodes": f"{config.validation} for each setting",
        "seconds in sum": f"{seconds:.0f}",
        **made_by(config.out, "flax", "gymnasium", "mujoco"),
    }


def _data(robots: Mapping[str, Any]) -> dict[str, str]:
    """What each model learned from."""
    return {
        f"data of {name}": "; ".join(
            f"{which}: {one['source']}, {one['episodes']} episodes"
            + (f", {one['held_out']} more held out" if one["held_out"] else "")
            for which, one in robot["data"].items()
        )
        for name, robot in robots.items()
    }
