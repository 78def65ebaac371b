"""What the locomotion study found, beside the paper: returns of every arm, gains, pictures.

Reads the folder that `studies/locomotion/run.py` fills; measures nothing.
"""

import importlib.metadata
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from common_jax.report.figures import PALETTE, draw
from common_jax.report.findings import Claim, Figure, Findings, Table, Verdict, print_tables, write
from common_jax.run import environment
from reward_jax.studies.locomotion.settings import Config
from reward_jax.studies.locomotion.summary import MAIN
from reward_jax.studies.locomotion.work import ABLATED
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
PAPER_GAIN = 0.16  # of the mean of the three, reward over unsteered


def write_report(config: Config, found: Mapping[str, Any]) -> pathlib.Path:
    """Tables on the console, and report.html and report.md in `out/report`; the page's path."""
    environments = found["environments"]
    findings = Findings(
        title="Locomotion: steering weak robots by what a strong one wants",
        summary=_sentences(environments),
        claims=_claims(environments),
        tables=[
            _table("Returns", environments),
            _against_paper(environments, found["unseen"]),
            *(
                [_table("The same guides, an unseen base", found["unseen"])]
                if found["unseen"]
                else []
            ),
            _explained(found["robots"]),
            *([_ablations(found)] if found["ablations"] else []),
        ],
        figures=[_strips(config, name) for name in found["robots"]],
        method=METHOD,
        caveats=CAVEATS,
        facts=_facts(config, found),
        data=found,
    )
    print_tables(findings)
    command = f"reward-jax study locomotion --config {config.out}/config.yaml"
    return write(config.out / "report", findings, command=command)


METHOD = (
    "For each robot a diffusion model is trained on windows of weak policies' episodes (the "
    "base), and further on a strong policy's, recoveries among them, under the base's normaliser "
    "(the expert). A network's gradient is matched to the difference of the two models' scores "
    "(Algorithm 1 of arXiv 2306.01804), several seeds at once; a discriminator has the same "
    "network and steps.",
    "Robots plan at every step and execute the first actions of each plan. All arms have the same "
    "test seeds. Scale and t_stopgrad of each guide are those of the highest mean return on "
    "validation seeds (the authors chose theirs on the rollouts that they report). Errors are "
    "standard errors over environments; of the reward an environment's return is the mean over "
    "reward seeds, whose own error stands apart.",
    "Controls: lower temperatures of the unsteered base, the raw difference of the two scores as "
    "a guide, which needs no reward, and the expert's own plans.",
)
CAVEATS = (
    "Data are our own: policies of TQC at four stages, the base's of random to medium ones.",
    "One seed of data and of diffusion models.",
)


def _arm(one: Mapping[str, Any]) -> str:
    seeds = one["seed_standard_error"]
    apart = "" if seeds is None else f" (seeds +- {seeds:.0f})"
    return f"{one['mean']:.0f} +- {one['standard_error']:.0f}{apart}"


def _table(title: str, environments: Mapping[str, Any]) -> Table:
    names = list(dict.fromkeys(name for arms in environments.values() for name in arms))
    rows = []
    for identifier, arms in environments.items():
        for name in names:
            one = arms[name]
            gain, over = one["over_unsteered"], one["over_discriminator"]
            settings = one["settings"]
            rows.append(
                (
                    identifier,
                    name.replace("_", " "),
                    _arm(one),
                    f"{one['normalized']:.2f}",
                    f"{gain['mean']:+.0f} +- {gain['standard_error']:.0f}",
                    f"{over['mean']:+.0f} +- {over['standard_error']:.0f}",
                    f"{settings['scale']:g}, {settings['t_stopgrad']}",
                    " + ".join(f"{seconds:.0f}" for seconds in one["seconds"].values()),
                )
            )
    columns = ("environment", "arm", "return", "normalized", "over unsteered")
    columns += ("over discriminator", "scale, t_stopgrad", "seconds planning + stepping")
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
        "Other data, other sizes and other episodes: gains are to be compared, not levels.",
    )


def _explained(robots: Mapping[str, Any]) -> Table:
    kinds = {
        "explained": "on data, noised",
        "explained_on_raw_paths": "on paths of the raw difference",
        "explained_on_own_paths": "on its own paths",
    }
    rows = []
    for name, one in robots.items():
        for key, where in kinds.items():
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
        every = {"as above": found["environments"][identifier]} | {
            f"{name} ({', '.join(f'{k} {v:g}' for k, v in one['change'].items())})": one
            for name, one in found["ablations"].items()
            if settings[name]["robot"] == robot
        }
        for name, arms in every.items():
            share = _share(arms, "reward", "raw_difference")
            rows.append((identifier, name, *(_arm(arms[arm]) for arm in ABLATED), f"{share:.2f}"))
    names = (arm.replace("_", " ") for arm in ABLATED)
    columns = ("environment", "change", *names, "reward's gain / raw difference's")
    return Table("Ablations", columns, rows, "One change each, on the same test seeds.")


def _share(arms: Mapping[str, Any], arm: str, of: str) -> float:
    """An arm's gain over the unsteered base, as a share of another's."""
    return arms[arm]["over_unsteered"]["mean"] / arms[of]["over_unsteered"]["mean"]


def _gains(environments: Mapping[str, Any], arm: str) -> list[float]:
    """Relative gains over the unsteered base, of the normalized score."""
    return [
        arms[arm]["normalized"] / arms["unsteered"]["normalized"] - 1
        for arms in environments.values()
    ]


def _sentences(environments: Mapping[str, Any]) -> list[str]:
    found = []
    for identifier, arms in environments.items():
        parts = [f"{name.replace('_', ' ')} {arms[name]['mean']:.0f}" for name in MAIN]
        found.append(f"{identifier}: returns {', '.join(parts)}.")
    return found


def _claims(environments: Mapping[str, Any]) -> list[Claim]:
    def verdict(holds: bool) -> Verdict:
        return "reproduced" if holds else "not reproduced"

    def beats(arm: str, over: str) -> bool:
        return all(
            arms[arm][over]["mean"] > 2 * arms[arm][over]["standard_error"]
            for arms in environments.values()
        )

    names = ", ".join(environments)
    gain = float(np.mean(_gains(environments, "reward")))
    over = [arms["reward"]["over_unsteered"] for arms in environments.values()]
    closer = [_share(arms, "reward", "raw_difference") for arms in environments.values()]
    distilled = [
        _share(arms, "distilled", "reward")
        for arms in environments.values()
        if "distilled" in arms
    ]
    mean = {
        name: float(np.mean([arms[name]["normalized"] for arms in environments.values()]))
        for name in MAIN
    }
    return [
        Claim(
            f"Steering by the reward raises returns ({names})",
            f"+{100 * PAPER_GAIN:.0f}% on the mean of three (as remembered)",
            f"{100 * gain:+.0f}%; "
            + ", ".join(f"{o['mean']:+.0f} +- {o['standard_error']:.0f}" for o in over),
            verdict(beats("reward", "over_unsteered") and gain > 0),
        ),
        Claim(
            "The reward steers better than a discriminator, on the mean",
            "32.36 against 27.84 (as remembered)",
            f"{mean['reward']:.2f} against {mean['discriminator']:.2f}",
            verdict(mean["reward"] > mean["discriminator"]),
        ),
        Claim(
            "The reward's gain beside that of the raw difference of the scores (not in the paper)",
            "",
            ", ".join(f"{share:.2f}" for share in closer),
            "reproduced" if min(closer) >= 0.8 else "not clear",
        ),
        *(
            [
                Claim(
                    "A cheap network distilled from the reward gains as much (not in the paper)",
                    "",
                    ", ".join(f"{share:.2f} of the reward's gain" for share in distilled),
                    "reproduced" if min(distilled) >= 0.9 else "not clear",
                )
            ]
            if distilled
            else []
        ),
    ]


def _strips(config: Config, name: str) -> Figure:
    """An episode of each main arm, side by side in time."""
    task = LocomotionTask(name)
    with np.load(config.out / name / "shown.npz") as stored:
        shown = {arm: stored[arm] for arm in ("unsteered", "reward", "expert")}

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
