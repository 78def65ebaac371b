"""The demo's report: one self-contained HTML file.

`render` turns a `Report` into the page. Figures are SVG in data URIs, styles are inline, nothing
is loaded and no script runs. The template escapes the texts of prompts and tokens.

Legend: n prompts of a group, L layers.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from common_jax.io.files import write_text
from common_jax.report import page
from common_jax.report.figures import PALETTE, draw
from tuco_jax.evaluation.contrasts import Contrast
from tuco_jax.evaluation.statistics import Estimate, roc

__all__ = ["Group", "Report", "Token", "TokenMap", "render", "write"]


@dataclasses.dataclass(frozen=True)
class Group:
    """Prompts of one kind and their scores.

    name: short, in lower case. about: one sentence on what they are and where they are from.
    layers: beta_1 .. beta_L of the last token. tokens: lengths. mean: of tuco, with its interval.
    """

    name: str
    about: str
    texts: Sequence[str]
    tuco: Float[np.ndarray, " n"]
    layers: Float[np.ndarray, "n L"]
    tokens: Int[np.ndarray, " n"]
    mean: Estimate


class Token(NamedTuple):
    """A token's text and TuCo; special: it belongs to the chat template, not to the text."""

    text: str
    tuco: float
    special: bool


@dataclasses.dataclass(frozen=True)
class TokenMap:
    """One prompt, token by token."""

    group: str
    tuco: float
    tokens: Sequence[Token]


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    summary: sentences. method, caveats: paragraphs. facts: versions, times, errors. extremes: how
    many of a group's highest and lowest prompts are shown.
    """

    title: str
    summary: Sequence[str]
    groups: Sequence[Group]
    contrasts: Sequence[Contrast]
    maps: Sequence[TokenMap]
    method: Sequence[str]
    caveats: Sequence[str]
    facts: dict[str, str]
    extremes: int = 5


def write(path: pathlib.Path, report: Report) -> None:
    """Write the page, whole or not at all."""
    write_text(path, render(report))


def render(report: Report) -> str:
    """The page as text."""
    colors = {g.name: PALETTE[i % len(PALETTE)] for i, g in enumerate(report.groups)}
    return page.render(
        pathlib.Path(__file__).with_name("demo_report.html"),
        title=report.title,
        summary=report.summary,
        method=report.method,
        facts=report.facts,
        report=report,
        colors=colors,
        figures=_figures(report, colors),
        extremes=[_extremes(group, report.extremes) for group in report.groups],
        maps=_shaded(report.maps),
        scale=_scale(report.maps),
    )


def _figures(report: Report, colors: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Name -> (data URI, alternative text)."""
    by_name = {g.name: g for g in report.groups}
    means = "; ".join(f"{g.name} {g.mean.value:.3f}" for g in report.groups)
    aucs = "; ".join(f"{c.higher} over {c.lower} {c.auc.value:.2f}" for c in report.contrasts)
    ends = "; ".join(f"{g.name} {g.layers.mean(axis=0)[-1]:.3f}" for g in report.groups)
    count = len(report.groups)

    def histograms(axes: Any) -> None:
        values = np.concatenate([g.tuco for g in report.groups])
        margin = 0.04 * (np.ptp(values) or 1e-3)
        bins = np.linspace(values.min() - margin, values.max() + margin, 31)
        for axis, group in zip(np.atleast_1d(axes), report.groups, strict=True):
            color = colors[group.name]
            axis.hist(group.tuco, bins, color=color, alpha=0.75, edgecolor="white", linewidth=0.6)
            axis.axvline(group.mean.value, color="#14181c", linewidth=1.4)
            axis.axvspan(group.mean.low, group.mean.high, color="#14181c", alpha=0.12, linewidth=0)
            axis.set_title(group.name, color=color, fontsize=10)
            axis.grid(axis="y", visible=False)
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
        np.atleast_1d(axes)[-1].set_xlabel("TuCo of the prompt's last token")

    def profile(axis: Any) -> None:
        for group in report.groups:
            layer = np.arange(1, group.layers.shape[1] + 1)
            low, high = np.quantile(group.layers, (0.1, 0.9), axis=0)
            axis.fill_between(layer, low, high, color=colors[group.name], alpha=0.13, linewidth=0)
            axis.plot(layer, group.layers.mean(axis=0), color=colors[group.name], label=group.name)
        axis.set_xlabel("layer")
        axis.set_ylabel("share of tuning so far")
        axis.set_ylim(bottom=0)
        axis.legend()

    def curves(axis: Any) -> None:
        axis.plot([0, 1], [0, 1], color="#b6bdc4", linewidth=1, linestyle=(0, (4, 3)))
        for index, c in enumerate(report.contrasts):
            false, true = roc(by_name[c.higher].tuco, by_name[c.lower].tuco)
            axis.plot(
                false,
                true,
                color=PALETTE[index % len(PALETTE)],
                label=f"{c.higher} > {c.lower}: {c.auc.value:.2f}",
            )
        axis.set_xlabel("false positive rate")
        axis.set_ylabel("true positive rate")
        axis.set_aspect("equal")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8.5)

    return {
        "histograms": (
            draw(histograms, rows=count, height=1.0 + 0.85 * count, share_x=True),
            f"Histograms of TuCo, one a group, on one axis. Means: {means}.",
        ),
        "profile": (
            draw(profile, height=4.2),
            "Tuning's share of the sums up to each layer, at the last token: a line a group, with "
            f"a band from the 10th to the 90th percentile. At the last layer: {ends}.",
        ),
        "roc": (
            draw(curves, height=5.4),
            f"ROC curves of TuCo as a detector, one a contrast. Areas: {aucs}.",
        ),
    }


def _extremes(group: Group, count: int) -> dict[str, Any]:
    """The highest and lowest prompts of a group, each (tuco, text)."""
    order = np.argsort(-group.tuco, kind="stable")
    count = min(count, len(order) // 2)

    def rows(indices: np.ndarray) -> list[tuple[float, str]]:
        return [(float(group.tuco[i]), group.texts[int(i)]) for i in indices]

    return {"group": group, "highest": rows(order[:count]), "lowest": rows(order[-count:][::-1])}


def _scale(maps: Sequence[TokenMap]) -> tuple[float, float]:
    """The lowest and highest value on the heat map's colour scale."""
    values = [t.tuco for m in maps for t in m.tokens if not t.special]
    if not values:
        return 0.0, 1.0
    low, high = np.quantile(values, (0.02, 0.98))
    return float(low), float(max(high, low + 1e-6))


def _shaded(maps: Sequence[TokenMap]) -> list[dict[str, Any]]:
    """The maps, with a shade in [0, 1] for each token."""
    low, high = _scale(maps)

    def shade(token: Token) -> float:
        return round(min(1.0, max(0.0, (token.tuco - low) / (high - low))), 3)

    return [{"map": m, "tokens": [(t, shade(t)) for t in m.tokens]} for m in maps]
