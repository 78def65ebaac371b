"""What the locomotion study found, beside the paper: returns of every arm, gains, pictures.

Reads the folder that `studies/locomotion/run.py` fills; measures nothing.
"""

import importlib.metadata
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from common_jax.report.figures import PALETTE, draw
from common_jax.report.findings import Claim, Figure, Findings, Table, Verdict, print_tables, write
from common_jax.run import environment
from reward_jax.studies.locomotion.arms import compared, exceeds
from reward_jax.studies.locomotion.settings import Config
from reward_jax.studies.locomotion.summary import EXPLAINED, MAIN
from reward_jax.studies.locomotion.work import ABLATED, PLAIN, slug
from reward_jax.tasks.locomotion.collect import STEPS
from reward_jax.tasks.locomotion.robots import ROBOTS
from reward_jax.tasks.locomotion.task import LocomotionTask

__all__ = ["write_report"]

# arXiv 2306.01804, locomotion, as remembered: normalized returns and standard errors.
PAPER = {
    "HalfCheetah-v5": {"unsteered": 30.38, "discriminator": 30.41, "reward": 31.65},
    "Hopper-v5": {"unsteered": 24.67, "discriminator": 25.12, "reward": 27.04},
    "Walker2d-v5": {"unsteered": 28.20, "discriminator": 27.98, "reward": 38.40},
}
PAPER_UNSEEN = {  # medium, on which no reward was trained
    "HalfCheetah-v5": {"unsteered": 59.41, "reward": 69.32},
    "Hopper-v5": {"unsteered": 58.80, "reward": 64.97},
    "Walker2d-v5": {"unsteered": 96.12, "reward": 102.05},
}


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
        tables.append(_against_paper(environments, unseen))
    tables += [_gaps(found["robots"]), _explained(found["robots"])]
    if found["ablations"]:
        tables.append(_ablations(found))
    findings = Findings(
        title="Locomotion: steering weak robots by what a strong one wants",
        summary=_sentences(environments),
        claims=_claims(found, whole=whole),
        tables=tables,
        figures=[figure for name in found["robots"] if (figure := _strips(config, name))],
        method=_method(config),
        caveats=CAVEATS,
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
        "over the window, is trained for the steps of one round on noised data.",
        "Robots plan at every step and execute the first actions of each plan. All arms have the "
        "same test seeds. Scale and t_stopgrad of each guide are those of the highest mean return "
        "on validation seeds (the authors chose theirs on the rollouts that they report). Errors "
        "are standard errors over environments; of the reward an environment's return is the mean "
        "over reward seeds, whose own error stands apart. What is said to be more is more by two "
        "standard errors of both kinds.",
        "Controls: lower temperatures of the unsteered base, the raw difference of the two scores "
        "as a guide, which needs no reward, and the expert's own plans.",
    )


OURS = "not in the paper"  # what a claim says that is asked of us, not by the paper
CAVEATS = (
    "Data are our own: policies of TQC at four stages, the base's of random to medium ones.",
    "One seed of data and of diffusion models.",
)


def _arm(one: Mapping[str, Any]) -> str:
    seeds = one["seed_standard_error"]
    apart = "" if seeds is None else f" (seeds +- {seeds:.0f})"
    return f"{one['mean']:.0f} +- {one['standard_error']:.0f}{apart}"


def _more(gap: Mapping[str, Any]) -> str:
    return f"{gap['mean']:+.0f} +- {gap['standard_error']:.0f}"


def _table(title: str, environments: Mapping[str, Any], *, whole: bool) -> Table:
    rows = []
    for identifier, arms in environments.items():
        for name, one in arms.items():
            settings = one["settings"]
            scale = f"{settings['scale']:g}"
            tried = {row["scale"] for row in one.get("validation", [])}
            if len(tried) > 1 and settings["scale"] == max(tried):
                scale += " (the largest tried)"
            rows.append(
                (
                    identifier,
                    name.replace("_", " "),
                    _arm(one),
                    *([f"{one['normalized']:.2f}"] if whole else []),
                    *(_more(one["over"][other]) for other in ("unsteered", "discriminator")),
                    f"{scale}, {settings['t_stopgrad']}",
                    " + ".join(f"{seconds:.0f}" for seconds in one["seconds"].values()),
                )
            )
    columns = ["environment", "arm", "return", *(["normalized"] if whole else [])]
    columns += ["over unsteered", "over discriminator", "scale, t_stopgrad"]
    columns += ["seconds planning + stepping"]
    return Table(title, columns, rows, "Differences are of the same environments and seeds.")


def _against_paper(environments: Mapping[str, Any], unseen: Mapping[str, Any]) -> Table:
    rows = [
        (identifier, base, name, f"{arms[name]['normalized']:.2f}", f"{figure:.2f}")
        for base, measured, paper in (
            ("the reward's own", environments, PAPER),
            ("unseen", unseen, PAPER_UNSEEN),
        )
        for identifier, arms in measured.items()
        for name, figure in paper.get(identifier, {}).items()
    ]
    return Table(
        "Normalized returns beside the paper's",
        ("environment", "base", "arm", "here", "paper (as remembered)"),
        rows,
        "Other data and other sizes: gains are to be compared, not levels.",
    )


def _gaps(robots: Mapping[str, Any]) -> Table:
    rows = [
        (ROBOTS[name].environment, _more(one["gap"]), "yes" if _learnable(one) else "no")
        for name, one in robots.items()
    ]
    columns = ("environment", "expert's plans over the base's", "above by two standard errors")
    return Table("Is there a reward to learn", columns, rows, "On validation seeds.")


def _learnable(robot: Mapping[str, Any]) -> bool:
    return bool(robot["gap"]["expert_beats_base"])


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


def _ablations(found: Mapping[str, Any]) -> Table:
    """Each change beside what it was changed from."""
    rows = []
    settings = found["settings"]["ablations"]
    robots = list(dict.fromkeys(settings[name]["robot"] for name in found["ablations"]))
    for robot in robots:
        identifier = ROBOTS[robot].environment
        whole = found["environments"].get(identifier)
        every = {"as above": whole} if whole else {}
        every |= {
            f"{name} ({', '.join(_changed(*item) for item in one['change'].items())})": one
            for name, one in found["ablations"].items()
            if settings[name]["robot"] == robot
        }
        for name, arms in every.items():
            change = _more(compared(arms["reward"], whole["reward"])) if whole else ""
            share = _share(arms, "reward", "raw_difference")
            shown = "" if share is None else f"{share:.2f}"
            rows.append((identifier, name, *(_arm(arms[arm]) for arm in ABLATED), change, shown))
    names = (arm.replace("_", " ") for arm in ABLATED)
    columns = ("environment", "change", *names, "reward, changed", "gain / raw difference's")
    return Table("Ablations", columns, rows, "One change each, on the same test seeds.")


def _changed(option: str, value: Any) -> str:
    """One change, as a table has it."""
    shown = " ".join(map(str, value)) if isinstance(value, list) else value
    return f"{option} {shown}"


def _share(arms: Mapping[str, Any], arm: str, of: str) -> float | None:
    """An arm's gain over the unsteered base, as a share of another's; None of no gain."""
    whole = arms[of]["over"]["unsteered"]
    return arms[arm]["over"]["unsteered"]["mean"] / whole["mean"] if exceeds(whole) else None


def _gain(arms: Mapping[str, Any], arm: str, measure: str) -> float | None:
    """Relative gain over the unsteered base; None where that is not above 0."""
    base = arms["unsteered"][measure]
    return arms[arm][measure] / base - 1 if base > 0 else None


def _sentences(environments: Mapping[str, Any]) -> list[str]:
    found = []
    for identifier, arms in environments.items():
        parts = [f"{name.replace('_', ' ')} {arms[name]['mean']:.0f}" for name in MAIN]
        found.append(f"{identifier}: returns {', '.join(parts)}.")
    return found


def _claims(found: Mapping[str, Any], *, whole: bool) -> list[Claim]:
    environments = found["environments"]
    measure = "normalized" if whole else "mean"
    of_paper = [PAPER[i] for i in environments if i in PAPER] if whole else []
    no_reward = not all(_learnable(one) for one in found["robots"].values())

    def verdict(paper: str, holds: bool) -> Verdict:
        if no_reward:
            return "not testable here"
        if paper.startswith(OURS):
            return "reached" if holds else "not reached"
        return "reproduced" if holds else "not reproduced"

    def beats(claim: str, paper: str, other: str, measured: Mapping[str, Any], more: str) -> Claim:
        gaps = [arms["reward"]["over"][other] for arms in measured.values()]
        text = more + ", ".join(f"{_more(g)} ({i})" for g, i in zip(gaps, measured, strict=True))
        return Claim(claim, paper, text, verdict(paper, all(exceeds(g) for g in gaps)))

    def mean(arm: str) -> str:
        return f"{np.mean([one[arm] for one in of_paper]):.2f}" if of_paper else "not said"

    gains = [_gain(arms, "reward", measure) for arms in environments.values()]
    known = [gain for gain in gains if gain is not None]
    said = f"{100 * np.mean(known):+.0f}% on the mean: " if len(known) == len(gains) else ""
    remembered = "as remembered"
    claims = [
        beats(
            "Steering by the reward raises returns",
            f"normalized {mean('unsteered')} to {mean('reward')} ({remembered})",
            "unsteered",
            environments,
            said,
        ),
        beats(
            "The reward steers better than a discriminator",
            f"normalized {mean('reward')} against {mean('discriminator')} ({remembered})",
            "discriminator",
            environments,
            "",
        ),
    ]
    controls = [n for n in next(iter(environments.values()))["reward"]["over"] if n not in PLAIN]
    claims += [
        beats(f"The reward does more than {name}", OURS, name, environments, "")
        for name in controls
    ]
    if found["unseen"]:
        claims.append(
            beats(
                "The same reward raises the returns of a base that it has not seen",
                f"normalized 71.44 to 78.78, mean of three ({remembered})",
                "unsteered",
                found["unseen"],
                "",
            )
        )
    for claim, arm, of, least in (
        ("The reward gains as much as the raw difference of the scores", "reward",
         "raw_difference", 0.8),
        ("A cheap network distilled from the reward's mean over seeds gains as much", "distilled",
         "ensemble", 0.9),
    ):  # fmt: skip
        shares = {i: _share(a, arm, of) for i, a in environments.items() if arm in a}
        if shares:
            text = ", ".join(
                f"{'no gain to share' if v is None else f'{v:.2f}'} ({i})"
                for i, v in shares.items()
            )
            fine = all(v is not None and v >= least for v in shares.values())
            paper = f"{OURS}; asked at least {least:g} of it"
            claims.append(Claim(claim, paper, text, verdict(paper, fine)))
    return claims


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
    names = ("jax", "flax", "gymnasium", "mujoco")
    seconds = sum(sum(one["seconds"].values()) for one in found["robots"].values())
    return {
        "environments": ", ".join(found["environments"]),
        "test episodes": f"{config.environments}, of the reward for each of its seeds; "
        f"{config.rollout.steps} steps at most, {config.rollout.execute} executed of each plan",
        "validation episodes": f"{config.validation} for each setting",
        "seconds in sum": f"{seconds:.0f}",
        "device": str(jax.devices()[0].device_kind),
        "revision": str(environment()["revision"]),
        "versions": ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names),
    }
