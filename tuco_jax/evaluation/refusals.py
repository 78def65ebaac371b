"""Refusal rates before and after tuning, with intervals, by two lists of refusal strings.

    python -m tuco_jax.evaluation.refusals --base MODEL --tuned MODEL --prompts FOLDER --out FILE

The lists, the GCG paper's and ours, are in `datasets/refusal_strings.py`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common_jax.cli.ranges import PositiveInt, check_ranges
from common_jax.errors import InputError
from common_jax.io.files import check_writable, write_json
from common_jax.mesh import mesh_for
from tuco_jax.core.checksum import weights_checksum
from tuco_jax.datasets.refusal_strings import GCG_STRINGS, is_refusal
from tuco_jax.evaluation.statistics import wilson_interval
from tuco_jax.generation.generate import end_tokens, generate_tokens
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import Prompt, read_prompts
from tuco_jax.scoring.output import (
    FORMATS,
    check_made,
    held,
    meta_path,
    prompts_checksum,
    write_table,
)
from tuco_jax.weights.options import PairOptions, check_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "RefusalConfig",
    "RefusalRate",
    "count_refusals",
    "refusal_rates",
]


@dataclasses.dataclass(frozen=True)
class RefusalRate:
    """Share of refusals in a set of answers, with its 95% interval.

    gcg_rate: the share by the GCG paper's list. ended: share of the answers that the model ended
    itself, within the tokens that it was given; None where that was not counted.
    """

    name: str
    refused: int
    total: int
    rate: float
    low: float
    high: float
    gcg_rate: float
    ended: float | None = None


def count_refusals(
    name: str, answers: Sequence[str], ended: Sequence[bool] | None = None
) -> RefusalRate:
    """The refusal rate of one set of answers; ended: whether the model ended each itself."""
    refused = sum(map(is_refusal, answers))
    low, high = wilson_interval(refused, len(answers))
    gcg = sum(is_refusal(a, GCG_STRINGS) for a in answers) / len(answers)
    share = None if ended is None else sum(ended) / len(answers)
    return RefusalRate(
        name, refused, len(answers), refused / len(answers), low, high, round(gcg, 4), share
    )


def refusal_rates(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    sets: Mapping[str, Sequence[Prompt]],
    *,
    alphas: Sequence[float] = (0.0, 1.0),
    max_new_tokens: int = 30,
) -> tuple[dict[float, list[RefusalRate]], dict[float, dict[str, list[str]]]]:
    """Refusal rates and greedy answers of each set at each alpha.

    alpha 1 is the tuned model. alpha 0 is the base's layers with the tuned model's embedding,
    final norm and head: the base itself where tuning left those alone, as an adapter does.
    """
    rates: dict[float, list[RefusalRate]] = {}
    answers: dict[float, dict[str, list[str]]] = {}
    prompts = [p for members in sets.values() for p in members]
    ids = encode(tokenizer, prompts, vocab_size=pair.tuned_config.vocab_size)
    for alpha in alphas:
        # All sets in one call: each shape is compiled once, not once a set.
        rest = iter(
            generate_tokens(
                pair,
                ids,
                alpha,
                max_new_tokens=max_new_tokens,
                eos=end_tokens(tokenizer),
            )
        )
        answers[alpha], rates[alpha] = {}, []
        for name, members in sets.items():
            tokens = [next(rest).tolist() for _ in members]
            texts = [str(tokenizer.decode(t, skip_special_tokens=True)) for t in tokens]
            answers[alpha][name] = texts
            ended = [len(t) < max_new_tokens for t in tokens]
            rates[alpha].append(count_refusals(name, texts, ended))
    return rates, answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefusalConfig(PairOptions):
    """Refusal rates of a pair on the sets that `refusal_data` writes.

    Args:
        prompts: folder of .jsonl files, one a set, train.jsonl and watch.jsonl apart; or one file.
        out: file for the rates (.json); the answers go beside it (.answers.jsonl).
        alphas: scalings of the tuning contribution, 0 for the base and 1 for the tuned model.
        max_new_tokens: length of an answer.
    """

    prompts: pathlib.Path
    out: pathlib.Path
    alphas: tuple[float, ...] = (0.0, 1.0)
    max_new_tokens: PositiveInt = 30


def run(config: RefusalConfig) -> dict[float, list[RefusalRate]]:
    """Evaluate, print a table, write rates and answers.

    Raises InputError as `generate_file` does for files that another run has written, or writes.
    """
    check_ranges(config)
    check_pair(config)
    files = (
        [config.prompts] if config.prompts.suffix == ".jsonl" else config.prompts.glob("*.jsonl")
    )
    files = sorted(f for f in files if f.stem not in ("train", "watch"))
    if not files:
        raise InputError(f"{config.prompts}: no .jsonl files of prompts; make them first")
    sets = {f.stem: read_prompts(f) for f in files}
    answers_file = check_writable(config.out.with_suffix(".answers.jsonl"), FORMATS)
    outputs = [config.out, answers_file]
    settings = {
        "prompts": {name: prompts_checksum(rows) for name, rows in sets.items()},
        "alphas": config.alphas,
        "max_new_tokens": config.max_new_tokens,
        "dtype": config.dtype,
    }
    with held(outputs, settings):
        return _run(config, sets, outputs, settings)


def _run(
    config: RefusalConfig,
    sets: Mapping[str, list[Prompt]],
    outputs: Sequence[pathlib.Path],
    settings: Mapping[str, Any],
) -> dict[float, list[RefusalRate]]:
    from rich.console import Console
    from rich.table import Table

    from tuco_jax.weights.load import load_pair

    mesh = mesh_for(dataclasses.asdict(config.mesh))
    pair, tokenizer = load_pair(
        config.base,
        config.tuned,
        dtype=config.dtype,
        precision=config.precision,
        mesh=mesh,
        adapter=config.adapter,
    )
    made = {**settings, "precision": pair.precision, "weights": weights_checksum(pair)}
    for own in outputs:
        check_made(own, made)
    rates, answers = refusal_rates(
        pair, tokenizer, sets, alphas=config.alphas, max_new_tokens=config.max_new_tokens
    )
    table = Table(
        title="Refusals, with 95% intervals (in brackets: by the GCG paper's list); ended: share "
        f"of answers that end before {config.max_new_tokens} tokens"
    )
    table.add_column("set")
    for alpha in config.alphas:
        table.add_column(f"alpha {alpha:g}")
    for row, name in enumerate(sets):
        cells = [rates[a][row] for a in config.alphas]
        table.add_row(
            f"{name} ({cells[0].total})",
            *(
                f"{c.rate:.2f} [{c.low:.2f}, {c.high:.2f}] ({c.gcg_rate:.2f}), ended {c.ended:.2f}"
                for c in cells
            ),
        )
    Console().print(table)
    for own in outputs:
        write_json(meta_path(own), {"settings": made})
    write_json(config.out, {str(a): [dataclasses.asdict(r) for r in rates[a]] for a in rates})
    rows = [
        (alpha, name, prompt.id, text, is_refusal(text))
        for alpha, by_set in answers.items()
        for name, texts in by_set.items()
        for prompt, text in zip(sets[name], texts, strict=True)
    ]
    columns = ("alpha", "set", "id", "answer", "refusal")
    write_table(outputs[1], dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))
    return rates


if __name__ == "__main__":
    import sys

    from common_jax.cli.command_line import run_alone

    sys.exit(run_alone("python -m tuco_jax.evaluation.refusals", RefusalConfig, run))
