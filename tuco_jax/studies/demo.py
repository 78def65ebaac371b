"""The demo: what tuning contributed to five kinds of prompt, on a real pair, in a minute or so.

The pair is SmolLM2-135M-Instruct and an adapter that teaches it to refuse harmful requests
(configs/tuco/finetune_refusal.yaml). Prints a table and writes a report.
"""

import dataclasses
import importlib.metadata
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from common_jax.cli.options import MeshOptions
from common_jax.errors import InputError
from common_jax.io.files import make_folder
from common_jax.mesh import mesh_for
from tuco_jax.datasets import prompt_sources as sources
from tuco_jax.datasets.refusal_data import RefusalDataConfig, harmful_split, held_out_harmless
from tuco_jax.evaluation.contrasts import Contrast
from tuco_jax.evaluation.statistics import bootstrap_auc, bootstrap_mean
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.read import Prompt
from tuco_jax.scoring.score import Scores, score
from tuco_jax.studies.report import Group, Report, write
from tuco_jax.studies.token_maps import token_maps

__all__ = ["DemoConfig", "PromptGroup", "prompt_groups", "run_demo", "study"]


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Score five groups of prompts on a pair, and report.

    Args:
        base: base model; empty for the SmolLM2-135M-Instruct that `make demo` fetches.
        tuned: tuned model or adapter; empty for the refusal adapter in the package.
        out: folder of the report.
        prompts: prompts in each group.
        maps: prompts of each group that are shown token by token.
        dtype: of the weights.
        seed: of the choice of prompts and of the bootstrap.
        mesh: devices.
    """

    base: str = ""
    tuned: str = ""
    out: pathlib.Path = pathlib.Path("runs/demo")
    prompts: int = 32
    maps: int = 2
    dtype: str = "float32"
    seed: int = 0
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


@dataclasses.dataclass(frozen=True)
class PromptGroup:
    """Prompts of one kind. clusters: for each prompt what it shares with others, or None."""

    name: str
    about: str
    texts: list[str]
    chat: bool
    clusters: list[str] | None = None

    def prompts(self) -> list[Prompt]:
        """In the form that they are scored in: a user's turn, or plain text."""
        return [
            Prompt(f"{self.name} {i}", None, ({"role": "user", "content": text},))
            if self.chat
            else Prompt(f"{self.name} {i}", text)
            for i, text in enumerate(self.texts)
        ]


CONTRASTS = (
    ("chat", "plain text", "Chat prompts have a higher TuCo than plain text"),
    ("harmful", "chat", "Harmful requests have a higher TuCo than harmless ones"),
    ("harmful", "jailbreak", "Harmful requests have a higher TuCo bare than in a jailbreak"),
    (
        "jailbreak",
        "harmless in template",
        "In one and the same template, harmful requests have a higher TuCo than harmless ones",
    ),
)


def prompt_groups(count: int, seed: int = 0) -> list[PromptGroup]:
    """The demo's groups of `count` prompts; none of them was trained on.

    Raises InputError where there are not so many.
    """
    rng = np.random.default_rng(seed)
    pools = (
        harmful_split(RefusalDataConfig()).evaluation,
        held_out_harmless(),
        sources.passages(),
    )
    most = min(map(len, pools))
    if not 2 <= count <= most:
        raise InputError(f"prompts is {count}: give 2 or more, {most} at most")
    harmful, harmless, plain = (
        [pool[int(i)] for i in sorted(rng.permutation(len(pool))[:count])] for pool in pools
    )
    templates = sources.jailbreak_templates()
    names = [list(templates)[i % len(templates)] for i in range(count)]

    def inside(texts: list[str]) -> list[str]:
        pairs = zip(names, texts, strict=True)
        return [templates[name].replace("{{ prompt }}", text) for name, text in pairs]

    return [
        PromptGroup(
            "chat", "Harmless requests and questions of our own, as a user's turn.", harmless, True
        ),
        PromptGroup("plain text", sources.PASSAGES_ARE, plain, False),
        PromptGroup(
            "harmful",
            "Requests of AdvBench that were not trained on, as a user's turn.",
            harmful,
            True,
        ),
        PromptGroup(
            "jailbreak",
            f"The same harmful requests in {len(templates)} jailbreak templates of pyrit.",
            inside(harmful),
            True,
            names,
        ),
        PromptGroup(
            "harmless in template",
            "A control: the harmless requests in the same templates.",
            inside(harmless),
            True,
            names,
        ),
    ]


def study(
    pair: Pair,
    tokenizer: Any,
    groups: Sequence[PromptGroup],
    *,
    maps: int = 2,
    seed: int = 0,
    facts: dict[str, str] | None = None,
    progress: bool = False,
    mesh: Mesh | None = None,
) -> Report:
    """Score the groups and put everything that the report shows together."""
    prompts = [p for group in groups for p in group.prompts()]
    scores = score(pair, tokenizer, prompts, mesh=mesh, progress=progress)
    measured = _measure(groups, scores, seed)
    contrasts = _contrasts(groups, measured, seed)
    chosen = [
        (group.name, float(found.tuco[i]), group.prompts()[i])
        for group, found in zip(groups, measured, strict=True)
        for i in _to_show(found, maps)
    ]
    facts = dict(facts or {}) | _facts(scores)
    return Report(
        title="What did tuning change? TuCo, prompt by prompt",
        summary=_summary(measured),
        groups=measured,
        contrasts=contrasts,
        maps=token_maps(pair, tokenizer, chosen) if maps else [],
        method=METHOD,
        caveats=CAVEATS,
        facts=facts,
    )


def _measure(groups: Sequence[PromptGroup], scores: Scores, seed: int) -> list[Group]:
    measured, start = [], 0
    for group in groups:
        rows = slice(start, start + len(group.texts))
        start = rows.stop
        clusters = None if group.clusters is None else np.asarray(group.clusters)
        measured.append(
            Group(
                group.name,
                group.about,
                group.texts,
                scores.tuco[rows],
                scores.layers[rows],
                scores.tokens[rows],
                bootstrap_mean(scores.tuco[rows], clusters, seed=seed),
            )
        )
    return measured


def _contrasts(
    groups: Sequence[PromptGroup], measured: Sequence[Group], seed: int
) -> list[Contrast]:
    tuco = {group.name: group.tuco for group in measured}
    clusters = {g.name: None if g.clusters is None else np.asarray(g.clusters) for g in groups}
    found = []
    for higher, lower, claim in CONTRASTS:
        if higher in tuco and lower in tuco:
            auc = bootstrap_auc(
                tuco[higher], tuco[lower], (clusters[higher], clusters[lower]), seed=seed
            )
            found.append(Contrast(higher, lower, auc, claim))
    return found


def _to_show(group: Group, count: int, longest: int = 100) -> list[int]:
    """The prompts nearest to the group's median among those short enough to read."""
    near = np.argsort(np.abs(group.tuco - np.median(group.tuco)), kind="stable")
    return [int(i) for i in near if group.tokens[i] <= longest][:count]


def _summary(groups: Sequence[Group]) -> list[str]:
    total = sum(len(g.texts) for g in groups)
    ordered = sorted(groups, key=lambda g: -g.mean.value)
    return [
        "TuCo is the share of all that a model's layers add, at a prompt's last token, which is "
        "there because of its tuning: 0 where tuning changed nothing, 1 where it made everything.",
        f"It was measured for {total} prompts of {len(groups)} kinds on a language model and the "
        "same model after tuning.",
        f"It is highest for {ordered[0].name} ({ordered[0].mean.value:.3f} on average) and lowest "
        f"for {ordered[-1].name} ({ordered[-1].mean.value:.3f}).",
    ]


METHOD = (
    "Each layer of the tuned model is run beside the same layer of the base model on the tuned "
    "model's residual stream. What the base's layer adds is the pre-training component, PTC; what "
    "the tuned layer adds beyond that is the fine-tuning component, FTC. TuCo is |FTC| / "
    "(|PTC| + |FTC|), with both summed over all layers at the last token, in the L1 norm "
    "(Definition 4.3 of Nuti, Franzmeyer and Henriques, ICML 2025, arXiv 2506.23423).",
    "The layer profile takes the sums up to each layer; the token maps take the sums over all "
    "layers at each token.",
)
CAVEATS = (
    "No prompt shown here was among those that the adapter in the package was trained on; of "
    "another pair that cannot be said.",
    "TuCo says how much tuning moves the residual stream, not whether the answer is a refusal.",
    "Chat prompts go through the model's chat template, up to where its answer begins; plain text "
    "does not. That contrast is one of format, too: even a random change of the weights shows it.",
    "A template moves TuCo by itself, whatever it holds: compare jailbreaks with the harmless "
    "requests in the same templates before reading anything into their mean.",
    "Intervals are 95% percentile intervals of 2000 bootstrap draws. Groups made with templates "
    "are resampled by whole templates, since their prompts are not independent. They say nothing "
    "of another pair, or of an adapter trained with another seed.",
)


def _facts(scores: Scores) -> dict[str, str]:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "transformers")
    )
    return {
        "telescoping error": f"{scores.telescoping.max():.1e} at most, of |x_L - x_0 - PTC - FTC| "
        "in the largest |x_L|",
        "tokens scored": f"{int(scores.tokens.sum()):,}",
        "scoring": f"{scores.seconds['run']:.1f} s, and {scores.seconds['compile']:.1f} s to "
        "compile",
        "device": f"{jax.devices()[0].device_kind}, sums in float32",
        "versions": versions,
    }


def _print(report: Report) -> None:
    console = Console()
    means = Table(title="TuCo by kind of prompt")
    for column in ("group", "prompts", "mean tokens", "mean TuCo", "95% interval"):
        means.add_column(column, justify="left" if column == "group" else "right")
    for g in report.groups:
        means.add_row(
            g.name,
            str(len(g.texts)),
            f"{g.tokens.mean():.0f}",
            f"{g.mean.value:.4f}",
            f"{g.mean.low:.4f} to {g.mean.high:.4f}",
        )
    aucs = Table(title="AUC: probability that the first has the higher TuCo (0.5 is chance)")
    for column in ("first > second", "AUC", "95% interval", "first higher?"):
        aucs.add_column(column, justify="left" if "first" in column else "right")
    for c in report.contrasts:
        interval = f"{c.auc.low:.3f} to {c.auc.high:.3f}"
        aucs.add_row(f"{c.higher} > {c.lower}", f"{c.auc.value:.3f}", interval, c.verdict)
    console.print(means)
    console.print(aucs)


def run_demo(config: DemoConfig) -> pathlib.Path:
    """Load the pair, score, print the tables, write the report; returns the report's path."""
    from tuco_jax.datasets.assets import fetch
    from tuco_jax.weights.load import load_pair

    started = time.perf_counter()
    if config.seed < 0 or config.maps < 0:
        raise InputError("seed and maps must be 0 or more")
    groups = prompt_groups(config.prompts, config.seed)
    base = config.base or str(next(fetch("smollm2").glob("*.gguf")))
    tuned = config.tuned or str(sources.DATA / "smollm2-refusal")
    devices = mesh_for(dataclasses.asdict(config.mesh))
    pair, tokenizer = load_pair(base, tuned, dtype=config.dtype, mesh=devices)
    make_folder(config.out)
    loaded = time.perf_counter() - started
    facts = {
        "base": config.base or "SmolLM2-135M-Instruct, Q4_1 GGUF, read as float32",
        "tuned": config.tuned or "the same with a refusal adapter (LoRA), in the package",
        "weights": config.dtype,
        "loading": f"{loaded:.1f} s",
    }
    if pair.notes:
        facts["notes on the pair"] = "; ".join(pair.notes)
        for note in pair.notes:
            print(f"note: {note}")
    report = study(
        pair,
        tokenizer,
        groups,
        maps=config.maps,
        seed=config.seed,
        facts=facts,
        progress=True,
        mesh=devices,
    )
    path = config.out / "report.html"
    write(path, report)
    _print(report)
    print(f"{time.perf_counter() - started:.0f} s in all. Report: {path.resolve()}")
    return path
