"""`tuco-jax study floors`: how much of TuCo is noise, and how well simpler scores do.

Two controls that the paper lacks. Noise floors: TuCo of the base against itself, against its
weights rounded to bfloat16, and against a random change of its weights of the same Frobenius norm
as tuning's. Baselines: prompt length, perplexity under PT and under FT, and OutputCo, on the same
prompts and contrasts, with the interval of the difference to TuCo.

Legend: N prompts, L layers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from common_jax.cli.ranges import PositiveInt
from common_jax.errors import InputError
from common_jax.journal import Sections
from common_jax.mesh import fetch
from common_jax.report.figures import PALETTE, draw
from common_jax.report.findings import Claim, Figure, Findings, Table
from tuco_jax.core.checksum import weights_checksum
from tuco_jax.datasets.prompt_groups import CONTRASTS, PromptGroup, prompt_groups
from tuco_jax.evaluation.baselines import baselines_of_tokens
from tuco_jax.evaluation.contrasts import Sample, compare, contrast_table, shown, verdict
from tuco_jax.evaluation.simpler_scores import ScoreRow, simpler_table, under_each_score
from tuco_jax.evaluation.statistics import bootstrap_mean
from tuco_jax.models.decoder import Params, merge
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.encode import encode
from tuco_jax.scoring.score import score_tokens
from tuco_jax.studies.base import Study
from tuco_jax.studies.options import GroupOptions
from tuco_jax.weights.int8 import widened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["STUDY", "Config", "merged_layers", "random_change", "rounded", "same_twice"]


@dataclasses.dataclass(frozen=True)
class Config(GroupOptions):
    """Noise floors of TuCo, and simpler scores beside it.

    Args:
        floors: prompts of each group that the floors are measured on.
    """

    floors: PositiveInt = 8


def merged_layers(pair: Pair) -> Params:
    """The tuned model's layers as plain float32 weights, with low-rank factors added in."""

    def add(weights: Params, factors: Params) -> Params:
        if "a" in factors and "kernel" in weights:
            product = jnp.einsum("lir,lro->lio", factors["a"], factors["b"], precision="highest")
            return weights | {"kernel": weights["kernel"].astype(jnp.float32) + product}
        return weights | {k: add(weights[k], v) for k, v in factors.items()}

    return add(widened(pair.tuned_params["layers"]), pair.lora.get("layers", {}))


def same_twice(pair: Pair) -> Pair:
    """The base twice, each from arrays of its own."""
    return _against(pair, jax.tree.map(lambda x: x + 0, pair.base["layers"]))


def rounded(pair: Pair) -> Pair:
    """The base and the base with its layers' weights rounded to bfloat16."""
    layers = widened(pair.base["layers"])
    return _against(pair, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), layers))


def random_change(pair: Pair, seed: int = 0) -> Pair:
    """The base, and the base with Gaussian noise in each tensor of each layer.

    The noise has the norm of what tuning changed there; what tuning left alone stays as it was.
    """
    rng = np.random.default_rng(seed)
    layers = widened(pair.base["layers"])
    old, tree = jax.tree.flatten(layers)
    new = tree.flatten_up_to(merge(layers, merged_layers(pair)))
    changed = []
    for a, b in zip(old, new, strict=True):
        before, after = (np.asarray(x, np.float32) for x in fetch((a, b)))
        axes = tuple(range(1, a.ndim))
        norm = np.sqrt(np.square(after - before).sum(axis=axes, keepdims=True))
        noise = rng.standard_normal(a.shape, np.float32)
        noise *= norm / np.sqrt(np.square(noise).sum(axis=axes, keepdims=True))
        changed.append(jnp.asarray(before + noise))
    return _against(pair, tree.unflatten(changed))


def _against(pair: Pair, layers: Params) -> Pair:
    """The base, and the base with other layers."""
    return Pair(pair.base, {"layers": layers}, {}, pair.base_config, pair.base_config)


FLOORS = {
    "the same model twice": lambda pair, seed: same_twice(pair),
    "weights rounded to bfloat16": lambda pair, seed: rounded(pair),
    "a random change of the same norms": random_change,
}


class Measured(NamedTuple):
    """scores: each score of all prompts; floors: TuCo of each group's first few, by pair."""

    scores: dict[str, Float[np.ndarray, " N"]]
    floors: dict[str, Float[np.ndarray, " few"]]


def prepare(config: Config) -> list[PromptGroup]:
    """The demo's five groups of prompts."""
    groups = prompt_groups(config.prompts, config.seed)
    if config.floors > config.prompts:
        raise InputError(f"floors is {config.floors}: give 1 to {config.prompts} prompts a group")
    return groups


def measure(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    groups: list[PromptGroup],
    journal: Sections,
) -> Measured:
    """Every score of all prompts; TuCo of each floor on the first `floors` of a group."""
    prompts = [p for group in groups for p in group.prompts()]
    tokens = encode(
        tokenizer, prompts, max_tokens=pair.context, vocab_size=pair.tuned_config.vocab_size
    )
    tuco = score_tokens(pair, tokens, prompts, progress=True, journal=journal).tuco
    simpler = baselines_of_tokens(pair, tokens, prompts, journal=journal)
    scores = {"TuCo": tuco, **simpler.columns()}
    starts = np.cumsum([0, *(len(g.texts) for g in groups)])[:-1]
    rows = [int(s) + i for s in starts for i in range(config.floors)]
    floors = {"this pair": tuco[rows]}
    for name, make in FLOORS.items():
        other = make(pair, config.seed)
        chosen = [tokens[i] for i in rows], [prompts[i] for i in rows]
        own = journal.part(weights_checksum(other))
        floors[name] = score_tokens(other, *chosen, progress=True, journal=own).tuco
        del other  # before the next is made: each holds a model's layers
    return Measured(scores, floors)


def _rows(
    groups: Sequence[PromptGroup], found: Mapping[str, np.ndarray], seed: int
) -> list[list[ScoreRow]]:
    """The demo's contrasts, each under every score."""
    starts = np.cumsum([0, *(len(g.texts) for g in groups)])
    place = {g.name: slice(starts[i], starts[i + 1]) for i, g in enumerate(groups)}
    clusters = {g.name: None if g.clusters is None else np.asarray(g.clusters) for g in groups}

    def sample(name: str, values: np.ndarray) -> Sample:
        return Sample(name, values[place[name]], clusters[name])

    def rows(first: str, second: str) -> list[ScoreRow]:
        pairs = {n: (sample(first, v), sample(second, v)) for n, v in found.items()}
        made = under_each_score(pairs, seed=seed)
        if clusters[first] is not None or clusters[second] is None:
            return made
        return [_within(row, *pairs[row.score], seed) for row in made]

    return [
        rows(first, second) for first, second, _ in CONTRASTS if {first, second} <= place.keys()
    ]


def _within(row: ScoreRow, bare: Sample, wrapped: Sample, seed: int) -> ScoreRow:
    """Adds the AUCs within templates to a contrast of requests with the same ones in templates."""
    beside = compare(dataclasses.replace(bare, clusters=wrapped.clusters), wrapped, seed=seed)
    inside = dataclasses.replace(row.compared, within=beside.within, centred=beside.centred)
    return dataclasses.replace(row, compared=inside)


def _heights(floors: Mapping[str, np.ndarray]) -> Figure:
    rng = np.random.default_rng(0)

    def paint(axes: Any) -> None:
        for row, values in enumerate(floors.values()):
            height = row + rng.uniform(-0.25, 0.25, len(values))
            axes.plot(values, height, ".", color=PALETTE[row], alpha=0.6)
        axes.set_yticks(range(len(floors)), list(floors))
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("TuCo")

    caption = "TuCo of the same prompts for this pair and for the pairs that it is held against."
    return Figure("floors", draw(paint, height=1.2 + 0.5 * len(floors)), caption)


def findings(config: Config, groups: list[PromptGroup], measured: Measured) -> Findings:
    """TuCo against its floors, and against the best simpler score of each contrast."""
    found, floors = measured
    seed = config.seed
    rows = _rows(groups, found, seed)
    own = floors["this pair"].astype(float)
    noise = floors["a random change of the same norms"].astype(float)
    beyond = bootstrap_mean(own - noise, seed=seed)
    heights = [
        [name, len(v), *(f"{x:.2g}" for x in (v.mean(), v.min(), v.max()))]
        for name, v in floors.items()
    ]
    few = config.floors
    by_group = [
        [group.name, *(f"{v[i * few : (i + 1) * few].mean():.2g}" for v in floors.values())]
        for i, group in enumerate(groups)
    ]
    worst = [min((r.gap for r in c if r.gap), key=lambda e: e.value) for c in rows]
    claims = [
        Claim(
            "TuCo is above that of a random change of the same norms (our control)",
            "no control",
            f"{shown(beyond)} above it",
            verdict(beyond, middle=0, of=len(own)),
        )
    ]
    for contrast, gap in zip(rows, worst, strict=True):
        c = contrast[0].compared
        claims.append(
            Claim(
                f"TuCo tells {c.first} from {c.second} better than every simpler score (our "
                "control)",
                "no control",
                f"{shown(gap)} stronger than the best of them",
                verdict(gap, middle=0, of=min(c.sizes)),
            )
        )
    return Findings(
        title="Noise floors of TuCo, and simpler scores beside it",
        summary=[
            f"TuCo is {own.mean():.4f} on average; of the same model twice "
            f"{floors['the same model twice'].mean():.1e}, with weights rounded to bfloat16 "
            f"{floors['weights rounded to bfloat16'].mean():.4f}, with a random change of the "
            f"same norms {noise.mean():.4f}.",
        ],
        claims=claims,
        tables=[
            contrast_table("TuCo by contrast", [c[0].compared for c in rows]),
            simpler_table(rows),
            Table("Noise floors", ("pair", "prompts", "mean TuCo", "lowest", "highest"), heights),
            Table("Noise floors by kind of prompt, means", ("group", *floors), by_group),
        ],
        figures=[_heights(floors)],
        method=[
            "Floors hold the base against a changed base, layers alone: embedding, final norm and "
            "head have no part in TuCo. The random change is Gaussian, drawn once, and has in "
            "each layer's each tensor the Frobenius norm of what tuning changed there.",
            "Perplexity is that of the prompt's tokens after the first, chat template included.",
        ],
        caveats=[
            "One random change was drawn: intervals are over prompts, not over draws of it.",
            "The best simpler score is chosen on the same prompts that it is judged on, which "
            "favours it.",
        ],
        facts={
            "prompts a group": str(config.prompts),
            "of them on the floors": str(config.floors),
        },
        data={
            "groups": {g.name: len(g.texts) for g in groups},
            "scores": {n: v.tolist() for n, v in found.items()},
            "floors": {n: v.tolist() for n, v in floors.items()},
            "contrasts": [
                {"score": r.score, "gap": r.gap, **dataclasses.asdict(r.compared)}
                for c in rows
                for r in c
            ],
        },
    )


STUDY = Study(Config, prepare, measure, findings)
