"""What the I2P study found: AUC and accuracy, a histogram, the best and worst images decoded.

Reads the folder that `studies/i2p/run.py` fills; measures nothing.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from common_jax.io.files import read_arrays
from common_jax.report.figures import PALETTE, draw
from common_jax.report.findings import Claim, Figure, Findings, Table, Verdict, print_tables, write
from common_jax.run import made_by
from reward_jax.studies.i2p.pairs import CHAINS

__all__ = ["write_report"]

_FEWEST = 20  # prompts that say anything

METHOD = (
    "For each prompt and noise two chains: the base's, guided by the prompt, and the safe one, "
    "guided by Safe Latent Diffusion, too (arXiv 2211.05105). At each latent of either both "
    "guided epsilons were kept. A half U-Net's gradient was matched to their difference at every "
    "step, on the training prompts (arXiv 2306.01804, section 5.3).",
    "The reward of a latent should be higher on safe chains. The step at which it is read, and a "
    "logistic classifier of the reward alone, are chosen on the validation prompts; the figures "
    "are of the test prompts, of which neither has seen one. Intervals: 95%, over prompts.",
    "No training: the size of the difference of both epsilons, from three runs of the U-Net.",
)
CAVEATS = (
    "Safe and unsafe mean drawn with and without safe guidance: nobody has looked at the images.",
    "The authors fit and judge their classifier on the same draws, at the last step; that is the "
    "column of the same draws. They keep the next latents of both models, standardised by pixel.",
    "The reward separates chains of one model and one guidance; other models are not tested.",
)


def write_report(out: pathlib.Path, summary: Mapping[str, Any]) -> pathlib.Path:
    """Tables on the console, and report.html and report.md in `out/report`; the page's path."""
    found = summary["scores"]["reward"]
    best, scores = found["best"], _scores(out / "reward")
    low, high = best["auc_interval"]
    t = summary["t"][best["step"]]
    settings = summary["settings"]
    claim = Claim(
        "The reward of safe guidance separates safe from unsafe latents (section 5.3)",
        "accuracy of a logistic classifier of the reward, fitted and judged on the same draws",
        f"AUC {best['auc']:.3f} ({low:.3f} to {high:.3f}), accuracy {best['accuracy']:.3f} on "
        f"{summary['prompts']['test']} prompts held out",
        _verdict(summary["prompts"]["test"], low, high),
    )
    findings = Findings(
        title="Stable Diffusion: the reward of safe guidance on I2P",
        summary=[
            f"At t = {t} the reward tells safe chains from the base's with AUC {best['auc']:.3f} "
            f"({low:.3f} to {high:.3f}) on prompts held out; a classifier of it is right "
            f"{100 * best['accuracy']:.1f}% of the time.",
        ],
        claims=[claim],
        tables=[_table(summary)],
        figures=[_histogram(scores, t), _curve(summary), *_images(scores)],
        method=METHOD,
        caveats=CAVEATS,
        facts={
            "prompts": ", ".join(f"{v} {k}" for k, v in summary["prompts"].items()),
            "guidance": f"{settings['safety']}, {settings['chains']['steps']} steps of "
            f"{settings['chains']['scheduler']}",
            "eps_safe as a function": f"without momentum both ways differ by "
            f"{summary['ways']['rounding']:.1e}; of the guidance that was drawn, "
            f"{100 * summary['ways']['path']:.0f}% depends on the path",
            "stored as": settings["store"]["dtype"],
            "seconds": f"{sum(summary['seconds'].values()):.0f}, pairs apart",
            **made_by(out, "flax", "scikit-learn"),
        },
        data=summary,
    )
    print_tables(findings)
    command = f"reward-jax study i2p --config {out}/config.yaml"
    return write(out / "report", findings, command=command)


def _verdict(prompts: int, low: float, high: float) -> Verdict:
    if prompts < _FEWEST or low <= 0.5 < high:
        return "not clear"
    return "reproduced" if low > 0.5 else "not reproduced"


def _table(summary: Mapping[str, Any]) -> Table:
    rows = []
    for name, found in summary["scores"].items():
        for place in ("best", "last"):
            f = found[place]
            low, high = f["auc_interval"]
            what = f"{name}, {place} step (t = {summary['t'][f['step']]})"
            figures = (f["accuracy"], f["accuracy_same_draws"], f["pairs_in_order"])
            rows.append((what, f["auc"], f"{low:.3f} to {high:.3f}", *figures))
    columns = ("score", "AUC", "95%", "accuracy", "on the same draws", "pairs in order")
    note = "Pairs in order: of one prompt and noise, the safe chain has the higher score."
    return Table("Test prompts", columns, rows, note)


def _histogram(scores: Mapping[str, Any], t: int) -> Figure:
    both = scores["reward"]
    bins = np.histogram_bin_edges(both, 30)

    def paint(axis: Any) -> None:
        for values, name, colour in zip(both, CHAINS, PALETTE[2::-2], strict=False):
            axis.hist(values, bins=bins, alpha=0.6, color=colour, label=name)
        axis.set(xlabel="reward", ylabel="latents")
        axis.legend()

    return Figure("histogram", draw(paint), f"Rewards of the test prompts' chains at t = {t}.")


def _curve(summary: Mapping[str, Any]) -> Figure:
    def paint(axis: Any) -> None:
        for (name, found), colour in zip(summary["scores"].items(), PALETTE, strict=False):
            axis.plot(summary["t"], found["test_auc"], color=colour, label=name)
        axis.axhline(0.5, color="#8a939c", lw=1)
        axis.set(xlabel="diffusion step t", ylabel="AUC, test prompts")
        axis.legend()

    return Figure("auc", draw(paint), "AUC at each step of a chain.")


def _images(scores: Mapping[str, Any]) -> list[Figure]:
    found = []
    for name, which in (("best", "highest"), ("worst", "lowest")):
        if name not in scores:
            continue
        images, chains = scores[name], scores[f"{name}_chain"]

        def paint(axes: Any, images: Any = images, chains: Any = chains) -> None:
            for axis, image, chain in zip(
                np.atleast_1d(axes).ravel(), images, chains, strict=True
            ):
                axis.imshow(image)
                axis.set_title(str(chain), fontsize=9)
                axis.set_axis_off()

        drawn = draw(paint, width=1.8 * len(images), height=2.1, columns=len(images))
        found.append(Figure(name, drawn, f"Images of the {which} rewards, with their chain."))
    return found


def _scores(folder: pathlib.Path) -> dict[str, Any]:
    mend = f"delete {folder / 'result.json'}, and both are made again"
    return read_arrays(folder / "scores.npz", ["reward"], mend)
