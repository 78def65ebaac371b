"""What the image study found, beside what is asked of it: tables, pictures of judged images.

Reads the folder that `studies/images/run.py` fills; measures nothing.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from common_jax.io.files import read_arrays
from common_jax.report.figures import PALETTE, draw
from common_jax.report.findings import Claim, Figure, Findings, Table, print_tables, write
from common_jax.run import made_by
from reward_jax.data.images.pixels import tiled
from reward_jax.studies.images.arms import OTHERS, QUALITY, SHARE
from reward_jax.studies.images.settings import Config
from reward_jax.studies.images.summary import JUDGES
from reward_jax.studies.images.work import choice_part

__all__ = ["claims_of", "write_report"]

_OURS = "not in the paper: asked of us"
_AUC = 0.95


def write_report(config: Config, found: Mapping[str, Any]) -> pathlib.Path:
    """Tables on the console, and report.html and report.md in `out/report`; the page's path."""
    choices = found["choices"]
    tables = [_judged(found), _steered(choices)]
    if any("variants" in one for one in choices.values()):
        tables.append(_variants(choices))
    tables.append(_null(found["null"], config.null_pairs))
    findings = Findings(
        title="Images: what an expert lacks that was tuned on without some classes",
        summary=[
            f"{name}: AUC {one['auc']:.3f}; harmful samples unsteered "
            f"{one['arms']['unsteered']['harmful_share']:.3f}, steered "
            f"{one['arms']['steered']['harmful_share']:.3f}."
            for name, one in choices.items()
        ],
        claims=claims_of(found),
        tables=tables,
        figures=[figure for name in choices for figure in _figures(config, name)],
        method=_method(config, found),
        caveats=_caveats(choices),
        facts=_facts(config, found),
        data=found,
    )
    print_tables(findings)
    command = f"reward-jax study images --config {config.out}/config.yaml"
    return write(config.out / "report", findings, command=command)


def _caveats(choices: Mapping[str, Any]) -> tuple[str, ...]:
    mistaken = ", ".join(f"{one['judge_mistaken']:.4f} ({k})" for k, one in choices.items())
    return (
        "One seed of data, of models and of noise: no interval says what others would change.",
        "Steered samples are judged by a classifier, which errs, most of all between kinds of "
        "shoes and kinds of shirts. Of held-out images that are not harmful it calls so many "
        f"harmful: {mistaken}.",
    )


def claims_of(found: Mapping[str, Any]) -> list[Claim]:
    """Each beside its measurement over all choices."""
    choices, mean, null = found["choices"], found["mean_auc"], found["null"]["reward"]

    def of_each(key: str, arm: str = "steered") -> dict[str, Any]:
        return {name: one["arms"][arm][key] for name, one in choices.items()}

    def shown(values: Mapping[str, float | None]) -> str:
        return ", ".join(f"{'none' if v is None else f'{v:.3f}'} ({k})" for k, v in values.items())

    aucs = {name: one["auc"] for name, one in choices.items()}
    before, after = of_each("harmful_share", "unsteered"), of_each("harmful_share")
    shares = {k: after[k] / before[k] if before[k] else None for k in after}
    far, was = of_each("distance"), of_each("distance", "unsteered")
    quality = {k: None if far[k] is None else far[k] / was[k] for k in far}
    others = of_each("others_factor")

    def all_below(values: Mapping[str, float | None], most: float) -> bool:
        return all(v is not None and v <= most for v in values.values())

    more = mean["difference"]
    low, high = null["interval"]
    own = [one["interval"] for one in null["choices"].values()]
    hold = sum(least <= 0.5 <= most for least, most in own)
    pairs = found["settings"]["null_pairs"]
    over, within = "choices drawn anew", "images alone"
    if pairs > 1:
        over = within = f"{pairs} pairs"
    rows = (
        (
            "The reward scores held-out harmful images below the others",
            f"AUC {_AUC} or more for each choice",
            shown(aucs),
            min(aucs.values()) >= _AUC,
        ),
        (
            "One noised look judges as well as the untrained difference of denoising losses",
            "as high a mean AUC",
            f"{mean['reward']:.4f} of one network run, {mean['loss_difference']:.4f} of "
            f"{next(iter(choices.values()))['loss_difference']['network_runs']}; difference "
            f"{more['auc']:.4f} ({more['interval'][0]:.4f} to {more['interval'][1]:.4f}, over "
            "images drawn anew)",
            mean["reward"] >= mean["loss_difference"],
        ),
        (
            "A null pair's reward tells nothing apart",
            f"the interval, over {over}, holds .5",
            f"{null['auc']:.3f} ({low:.3f} to {high:.3f}); of the choices' own intervals, over "
            f"{within}, {hold} of {len(own)} hold it",
            low <= 0.5 <= high,
        ),
        (
            "Steering takes harmful samples away",
            f"at most {SHARE} of the unsteered share",
            shown(shares),
            all_below(shares, SHARE),
        ),
        (
            "and leaves the other classes' shares of the samples that are not harmful as they are",
            f"within a factor of {OTHERS}",
            shown(others),
            all_below(others, OTHERS),
        ),
        (
            "and the samples as good as the base's",
            f"a distance of at most {QUALITY} times the base's",
            shown(quality),
            all_below(quality, QUALITY),
        ),
    )
    return [
        Claim(text, f"{asked} ({_OURS})", measured, "reached" if holds else "not reached")
        for text, asked, measured, holds in rows
    ]


def _auc(one: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    return f"{one['auc']:.3f} ({low:.3f} to {high:.3f})"


def _judged(found: Mapping[str, Any]) -> Table:
    rows = []
    for name, one in found["choices"].items():
        for judge in JUDGES:
            own = one[judge]
            rows.append(
                (
                    name,
                    judge.replace("_", " "),
                    _auc(own),
                    str(own.get("t", "all")),
                    str(own["network_runs"]),
                    f"{1000 * own['seconds_a_judgement']:.2f}",
                )
            )
    for judge in JUDGES:
        mean = f"{found['mean_auc'][judge]:.4f}"
        rows.append(("mean", judge.replace("_", " "), mean, "", "", ""))
    columns = ("harmful", "judged by", "AUC (95%)", "t", "network runs", "ms an image")
    return Table("Held-out images, told apart", columns, rows, "t is chosen on other images.")


def _steered(choices: Mapping[str, Any]) -> Table:
    rows = []
    for name, one in choices.items():
        for arm, own in one["arms"].items():
            rows.append((name, arm.replace("_", " "), *_arm(own)))
    return Table("Samples of the base", ("harmful", "arm", *_COLUMNS), rows, _NOTE)


_COLUMNS = ("scale", "harmful", "distance", "others", "of all", "runs a sample", "ms a sample")
_NOTE = (
    "Distance: of features of the samples that are not harmful to those of held-out images. "
    "Others: the factor by which another class has grown or shrunk most, among those that are not "
    "harmful, which is what is asked to stay. Of all: the same as shares of all samples, where "
    "the others grow as the harmful go."
)


def _arm(own: Mapping[str, Any]) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return (
        f"{own['scale']:g}" if "scale" in own else "",
        f"{own['harmful_share']:.3f}",
        number(own["distance"]),
        number(own["others_factor"]),
        number(own["others_factor_of_all"]),
        f"{own['network_runs_a_sample']:.0f}",
        f"{1000 * own['seconds_a_sample']:.0f}",
    )


def _variants(choices: Mapping[str, Any]) -> Table:
    rows = []
    for name, one in choices.items():
        trained = f"{one['seconds']['reward']:.0f}"
        arm = one["arms"]["steered"]
        rows.append((name, "small network", _auc(one["reward"]), trained, *_arm(arm)))
        for variant, own in one.get("variants", {}).items():
            more = own["training_seconds"]
            judged, seconds = own["judged"], trained if variant == "uncapped" else f"{more:.0f}"
            rows.append((name, variant, _auc(judged), seconds, *_arm(own["arm"])))
    columns = ("harmful", "reward", "AUC (95%)", "seconds of training", *_COLUMNS)
    note = "The energy begins as the denoisers are; paths, and uncapped, are of the small network."
    return Table("Other rewards of the same models", columns, rows, note)


def _null(null: Mapping[str, Any], pairs: int) -> Table:
    rows = []
    for judge in JUDGES:
        rows.append(("mean", judge.replace("_", " "), _auc(null[judge])))
        rows += [
            (name, judge.replace("_", " "), _auc(one))
            for name, one in null[judge]["choices"].items()
        ]
    note = "Intervals of choices are over images, of the mean over choices, too."
    if pairs > 1:
        note = f"Means over {pairs} pairs, and intervals over these."
    return Table("The null pair", ("harmful", "judged by", "AUC (95%)"), rows, note)


def _figures(config: Config, name: str) -> list[Figure]:
    """A histogram and a ROC, judged images, and samples of every arm."""
    from sklearn.metrics import roc_curve  # slow to import

    folder = config.out / choice_part(name)
    judged, pictures = (read_arrays(folder / f"{x}.npz") for x in ("judged", "pictures"))
    harmful = judged["harmful"]
    classes = " and ".join(config.choices[name])

    def curves(axes: Any) -> None:
        bins = np.linspace(judged["reward"].min(), judged["reward"].max(), 50)
        for kind, color, label in (
            (~harmful, PALETTE[0], "others"),
            (harmful, PALETTE[2], classes),
        ):
            axes[0].hist(
                judged["reward"][kind], bins, color=color, alpha=0.6, density=True, label=label
            )
        axes[0].set(xlabel="reward of a noised image", yticks=[])
        axes[0].legend(loc="upper left")
        for judge, color in zip(JUDGES, (PALETTE[0], PALETTE[1], PALETTE[4]), strict=True):
            wrong, right, _ = roc_curve(harmful, -judged[judge])
            axes[1].plot(wrong, right, color=color, label=judge.replace("_", " "))
        axes[1].set(xlabel="others below the bound", ylabel="harmful below it", xlim=(0, 1))
        axes[1].legend(loc="lower right")

    def extremes(axes: Any) -> None:
        for axis, kind in zip(axes, ("best", "worst"), strict=True):
            _show(axis, tiled(pictures[kind], 10), f"judged {kind}")

    def samples(axes: Any) -> None:
        arms = ("unsteered", "steered", "raw_difference", "rejection")
        for axis, arm in zip(np.ravel(axes), arms, strict=True):
            _show(axis, tiled(pictures[arm][:40], 10), arm.replace("_", " "))

    return [
        Figure(
            f"curves_{name}",
            draw(curves, width=8.0, height=3.2, columns=2),
            f"{name}: rewards of held-out images of {classes}, and of the others; and how many "
            "harmful images lie below a bound, against how many others.",
        ),
        Figure(
            f"extremes_{name}",
            draw(extremes, width=8.0, height=2.2, rows=2),
            f"{name}: the held-out images that the reward judges best, and worst.",
        ),
        Figure(
            f"samples_{name}",
            draw(samples, width=8.0, height=4.2, rows=2, columns=2),
            f"{name}: samples of the base, steered, by the raw difference, and those that "
            "rejection by the reward keeps; all but the last of the same noise.",
        ),
    ]


def _show(axis: Any, picture: UInt8[np.ndarray, "H W C"], title: str) -> None:
    gray = picture.shape[-1] == 1
    axis.imshow(picture[..., 0] if gray else picture, cmap="gray" if gray else None)
    axis.set_title(title, fontsize=9)
    axis.axis("off")
    axis.set_anchor("NW")


def _method(config: Config, found: Mapping[str, Any]) -> tuple[str, ...]:
    few = min(config.norm_images, config.validation_images)
    return (
        "A diffusion model is trained on all classes, and from there, equally long, on all of "
        "them (the base) and on those that are not harmful (an expert for each choice): with the "
        "same noise and the same images, but that each harmful one has a stand-in, so that the "
        "two differ by nothing else. A network's gradient is matched to the difference of the two "
        "models' scores (Algorithm 1 of arXiv 2306.01804). It judges a held-out image by one run, "
        "at one diffusion step, with one draw of noise; the step is "
        f"that of the highest AUC on {config.validation_images} images of validation. The "
        f"difference of denoising losses takes {len(config.looks)} steps and both models, the "
        f"norm of the difference of scores one step, chosen likewise on {few} of the images, and "
        "both models.",
        *_capped(config),
        "All arms but rejection are drawn from the same noise; the scale of each guide that has "
        f"several is chosen on other noise ({config.trials} samples of each): of the three bounds "
        "that are asked, the one that is kept worst counts, one more harmful sample added; while "
        "the best scale is the smallest or the largest, the next one is tried, too. A classifier "
        f"that was trained apart, right of {found['base']['judge_accuracy']:.3f} of the test "
        "images, says what is harmful; its last features give the distance (of Heusel et al. "
        "2017, there of Inception's) to held-out images that are not harmful, the same for all "
        "arms; where a scale is chosen, to those of validation. Rejection keeps an unsteered "
        "sample with the probability that its reward gives.",
        "A null pair are the base and one that is made as the experts are, but without images "
        "of all classes, as many as one class has; its reward judges at the step that each "
        "choice's own does.",
    )


def _capped(config: Config) -> tuple[str, ...]:
    if (cap := config.cap) is None:
        return ()
    return (
        "A reward that steers is capped: at each diffusion step it levels off, over "
        f"{cap.width:g} of their standard deviations, at what it gives the {cap.quantile:g} "
        f"quantile of {cap.images} noised images of validation that are not harmful. Samples as "
        "good as that are left as they are, so that the scale can be high without raising small "
        "differences among the other classes to its power.",
    )


def _facts(config: Config, found: Mapping[str, Any]) -> dict[str, str]:
    parts = [found["base"], found["null"], *found["choices"].values()]
    seconds = sum(sum(part["seconds"].values()) for part in parts)
    return {
        "data": str(config.data or "Fashion-MNIST"),
        "images": f"{config.test_images} judged, {config.validation_images} of validation",
        "samples": f"{config.samples} of each arm",
        "seconds in sum": f"{seconds:.0f}",
        **made_by(config.out, "flax"),
    }
