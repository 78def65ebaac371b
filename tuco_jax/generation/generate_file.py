"""Answer a file of prompts under FTC_alpha scaling, if wanted with the TuCo of each new token.

`tuco-jax generate` runs this. Outputs, prompts and settings are checked before any model is read.
Outputs appear whole at the end; from a journal beside them a killed run is resumed.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common_jax.cli.command_line import one_line
from common_jax.errors import InputError
from common_jax.io.files import check_writable, write_json, write_text
from common_jax.journal import Journal
from common_jax.report import page as pages
from tuco_jax.generation.options import AnswerOptions, GenerationOptions, check_turns
from tuco_jax.prompts.messages import text_of
from tuco_jax.prompts.read import Prompt, read_prompts
from tuco_jax.scoring.output import check_made, held, meta_path, prompts_checksum
from tuco_jax.scoring.score_file import provenance
from tuco_jax.weights.options import check_pair

if TYPE_CHECKING:
    from tuco_jax.generation.generate import Response
    from tuco_jax.scoring.token_tuco import Piece

__all__ = ["Answer", "generate_file", "lines"]

_TEMPLATE = pathlib.Path(__file__).with_name("generate.html")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A prompt, its answer, and the answer's tokens with their TuCo (None where not asked for)."""

    prompt: Prompt
    response: "Response"
    pieces: "Sequence[Piece] | None"

    @property
    def row(self) -> dict[str, Any]:
        """What a line of the output holds."""
        given = self.prompt
        row: dict[str, Any] = {"id": given.id}
        if given.messages is None:
            row["prompt"] = given.prompt
        else:
            row["messages"] = list(given.messages)
        if given.tools is not None:
            row["tools"] = list(given.tools)
        if given.label is not None:
            row["label"] = given.label
        row |= {"response": self.response.text, "tokens": len(self.response.tokens)}
        if self.pieces is not None:
            row["tuco"] = [{"text": p.text, "tuco": round(p.tuco, 7)} for p in self.pieces]
        return row


def generate_file(options: AnswerOptions) -> list[Answer]:
    """Answer one prompt, or every prompt of a file, in order.

    `out` gets a row for each answer: id, prompt or messages, label, response, tokens, and with
    `tuco` or `page` each token's TuCo (`token_tuco.response_tuco`). Notes about the pair are
    printed to stderr. Raises InputError, before anything is written, for whatever is wrong with
    the input, and where `out` or `page`, or the journal beside it, is of other prompts, models or
    options.
    """
    path = None if options.out is None else check_writable(options.out, (".jsonl",))
    page_path = None if options.page is None else check_writable(options.page, (".html",))
    rows = _prompts(options)
    if path is not None and options.prompts and path.exists() and path.samefile(options.prompts):
        raise InputError(f"{options.out}: is the prompts file itself; name another output")
    if options.chat:
        rows = [_as_chat(row) for row in rows]
    if not math.isfinite(options.alpha):
        raise InputError(f"alpha is {options.alpha}: give a finite number")
    check_turns(rows, options.continue_final)
    check_pair(options)
    settings = _settings(options, rows)
    outputs = [own for own in (path, page_path) if own is not None]
    # No second run, and none of other settings, loads its models.
    with held(outputs, settings), _journal(outputs, settings) as journal:
        answers, facts, special = _answers(options, rows, outputs, journal)
        for own in outputs:
            made = settings | {name: facts[name] for name in ("precision", "weights")}
            write_json(meta_path(own), facts | {"settings": made})
        if path is not None:
            text = "".join(json.dumps(a.row, ensure_ascii=False) + "\n" for a in answers)
            write_text(path, text)
        if page_path is not None:
            shown = {"base": options.base, "tuned": options.tuned, "alpha": f"{options.alpha:g}"}
            if options.temperature:
                shown |= {"temperature": f"{options.temperature:g}", "seed": str(options.seed)}
            write_text(page_path, _render(answers, shown, special))
        if journal is not None:
            journal.remove()
    return answers


def _journal(
    outputs: Sequence[pathlib.Path], settings: Mapping[str, Any]
) -> contextlib.AbstractContextManager[Journal | None]:
    """Of answers' tokens and their TuCo, beside the first output; None where there is none."""
    if not outputs:
        return contextlib.nullcontext()
    common = {name: value for name, value in settings.items() if name != "tuco"}
    return Journal(outputs[0].with_name(f"{outputs[0].name}.journal"), common)


def _settings(options: AnswerOptions, rows: Sequence[Prompt]) -> dict[str, Any]:
    """What rows of the output depend on, but for weights, and so not where models are."""
    names = {f.name for f in dataclasses.fields(GenerationOptions)} - {"batch_size", "stop"}
    found = {name: getattr(options, name) for name in ("alpha", "dtype", *sorted(names))}
    tuco = options.tuco or options.page is not None
    return {
        "prompts": prompts_checksum(rows),
        **found,
        "stop": options.stops,
        "tuco": tuco,
    }


def _answers(
    options: AnswerOptions,
    rows: Sequence[Prompt],
    outputs: Sequence[pathlib.Path],
    journal: Journal | None,
) -> tuple[list[Answer], dict[str, Any], list[str]]:
    """The answers, facts of the run for its metadata, and the tokenizer's special tokens."""
    from common_jax.mesh import mesh_for  # not above: it takes seconds
    from tuco_jax.core.checksum import weights_checksum
    from tuco_jax.generation.generate import end_tokens, respond
    from tuco_jax.prompts.encode import encode
    from tuco_jax.scoring.fingerprint import run_fingerprint
    from tuco_jax.scoring.token_tuco import pieces, response_tuco
    from tuco_jax.weights.load import load_pair

    mesh = mesh_for(dataclasses.asdict(options.mesh))
    pair, tokenizer = load_pair(
        options.base,
        options.tuned,
        dtype=options.dtype,
        precision=options.precision,
        mesh=mesh,
        adapter=options.adapter,
    )
    weights = weights_checksum(pair) if outputs else ""
    for own in outputs:
        check_made(own, {"precision": pair.precision, "weights": weights})
    # Checked here, too, since these errors name the prompt by its id and line.
    notes = [*pair.notes]
    tokens = encode(
        tokenizer,
        rows,
        max_tokens=pair.context - 1,
        vocab_size=pair.tuned_config.vocab_size,
        continue_final=options.continue_final,
        notes=notes,
    )
    for note in notes:
        print(f"note: {one_line(note)}", file=sys.stderr)
    if journal is not None:
        journal.begin(run_fingerprint(weights, pair.precision, tokens, end_tokens(tokenizer)))
    how: Any = {f.name: getattr(options, f.name) for f in dataclasses.fields(GenerationOptions)}
    responses = respond(pair, tokenizer, rows, options.alpha, mesh=mesh, journal=journal, **how)
    found: list[Sequence[Piece] | None] = [None] * len(rows)
    if options.tuco or options.page is not None:
        texts, new = [r.prompt for r in responses], [r.tokens for r in responses]
        values = response_tuco(pair, texts, new, options.alpha, journal=journal)
        found = [pieces(tokenizer, ids, v) for ids, v in zip(new, values, strict=True)]
    answers = [Answer(*parts) for parts in zip(rows, responses, found, strict=True)]
    facts = {n: getattr(options, n) for n in ("base", "tuned", "adapter", "prompts", "dtype")}
    facts |= {
        "precision": pair.precision,
        "alpha": options.alpha,
        "chat": options.chat,
        **how,
        "stop": options.stops,
    }
    facts["mesh"] = dict(mesh.shape) if mesh is not None else None
    facts |= {"notes": notes, "family": pair.tuned_config.family, "weights": weights}
    facts["resumed_rows"] = journal.resumed["answers"] if journal is not None else 0
    return answers, facts | provenance(), list(tokenizer.all_special_tokens)


def _prompts(options: AnswerOptions) -> list[Prompt]:
    """The prompt given as text, or those of the file."""
    if bool(options.prompt) == (options.prompts is not None):
        raise InputError("give --prompt TEXT or --prompts FILE, one of the two")
    if options.prompts is not None:
        return read_prompts(options.prompts)
    if not options.prompt.strip():
        raise InputError("--prompt is empty: give a text")
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError("--prompt is not UTF-8: give it as text, or in a file") from error
    return [Prompt(1, prompt=options.prompt)]


def _as_chat(row: Prompt) -> Prompt:
    if row.messages is not None:
        return row
    messages = ({"role": "user", "content": str(row.prompt)},)
    return dataclasses.replace(row, prompt=None, messages=messages)


def lines(answer: Answer, *, names: bool) -> list[str]:
    """An answer for a terminal: its text, or a line for each token, TuCo first.

    names: begin with the prompt's id.
    """
    head = [f"[{answer.prompt.id}]"] if names else []
    if answer.pieces is None:
        return [*head, answer.response.text]
    return [*head, *(f"{p.tuco:.4f}  {p.text!r}" for p in answer.pieces)]


def _question(prompt: Prompt) -> str:
    return text_of(prompt.messages[-1]) if prompt.messages else str(prompt.prompt)


def _render(answers: Sequence[Answer], facts: dict[str, str], special: Sequence[str]) -> str:
    """The page of answers, tokens shaded from the 5th to the 95th percentile of their TuCo."""
    values = [p.tuco for a in answers for p in a.pieces or ()]
    low, high = np.quantile(values, (0.05, 0.95)) if values else (0.0, 1.0)
    entries = []
    for answer in answers:
        tokens = []
        for piece in answer.pieces or ():
            shade = float(np.clip((piece.tuco - low) / max(high - low, 1e-9), 0, 1))
            tokens.append((piece, shade, piece.text in special))
        entries.append((answer.prompt.id, _question(answer.prompt), tokens))
    facts = facts | {"tuco-reward-jax": importlib.metadata.version("tuco-reward-jax")}
    mean = f"{np.mean(values):.4f}" if values else "none"
    return pages.render(
        _TEMPLATE,
        title="TuCo along the answers",
        summary=[f"{len(answers)} answers, {len(values)} tokens, mean TuCo {mean}."],
        method=[
            "The TuCo of a generated token is tuning's share of what all layers added to the "
            "residual stream that it was chosen from: the TuCo of all the text before it "
            "(arXiv 2506.23423, Definition 4.3)."
        ],
        facts=facts,
        entries=entries,
        scale=(float(low), float(high)),
    )
