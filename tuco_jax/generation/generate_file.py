"""Prompts in, answers under FTC_alpha out, token by token with their TuCo if wanted.

What `tuco-jax generate` runs. Outputs, prompts and settings are checked before any model is read.
"""

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
from common_jax.cli.options import check_seed
from common_jax.errors import InputError
from common_jax.io.files import atomic, check_writable, write_json
from common_jax.mesh import mesh_for
from common_jax.report import page as pages
from tuco_jax.generation.generate import Response, respond
from tuco_jax.generation.sampling import Sampling
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import (
    Prompt,
    read_prompts,
)
from tuco_jax.scoring.score_file import provenance
from tuco_jax.scoring.token_tuco import Piece, pieces, response_tuco

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "generate_file", "lines"]

_TEMPLATE = pathlib.Path(__file__).with_name("generate.html")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A prompt, its answer, and the answer's tokens with their TuCo (None where not asked for)."""

    prompt: Prompt
    response: Response
    pieces: Sequence[Piece] | None

    @property
    def row(self) -> dict[str, Any]:
        """What a line of the output holds."""
        given = self.prompt
        row: dict[str, Any] = {"id": given.id}
        if given.messages is None:
            row["prompt"] = given.prompt
        else:
            row["messages"] = list(given.messages)
        if given.label is not None:
            row["label"] = given.label
        row |= {"response": self.response.text, "tokens": len(self.response.tokens)}
        if self.pieces is not None:
            row["tuco"] = [{"text": p.text, "tuco": round(p.tuco, 7)} for p in self.pieces]
        return row


def generate_file(
    base: str,
    tuned: str,
    *,
    prompt: str | None = None,
    prompts: str | None = None,
    chat: bool = False,
    alpha: float = 1.0,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    tuco: bool = False,
    out: str | None = None,
    page: str | None = None,
    dtype: str = "float32",
    mesh: Mapping[str, int] | None = None,
) -> list[Answer]:
    """Answer one prompt, or every prompt of a file, in order.

    Args:
        base: the pre-trained model: a Hugging Face directory, a hub id, a .gguf file or a store.
        tuned: what tuning made of it; or a PEFT adapter directory over it.
        prompt: one text. Or `prompts`, a .jsonl, .csv, .parquet or .txt file (`read_prompts`).
        prompts: see `prompt`.
        chat: give texts to the chat template as a user's message.
        alpha: scale of tuning's contribution.
        max_new_tokens: the most tokens of an answer.
        temperature: 0 takes the most likely token.
        top_k: sample among the top_k likeliest tokens; 0: all.
        top_p: of those, among the fewest whose probabilities reach top_p.
        seed: of the samples.
        stop: texts at which an answer ends; they are left out.
        tuco: also TuCo of each token of the answers (`along.response_tuco`).
        out: .jsonl: id, prompt or messages, label, response, tokens, and tuco if asked for.
            Metadata goes beside it, to OUT.meta.json.
        page: .html: the answers, with tokens shaded by TuCo; asks for tuco.
        dtype: what weights are held in; sums are float32.
        mesh: sizes of the axes data, fsdp and tensor; one device if all are 1.

    Findings about the pair are printed to stderr. Raises InputError, before anything is written,
    for whatever is wrong with the input.
    """
    path = None if out is None else check_writable(out, (".jsonl",))
    page_path = None if page is None else check_writable(page, (".html",))
    if (prompt is None) == (prompts is None):
        raise InputError("give --prompt TEXT or --prompts FILE, one of the two")
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt is empty: give a text")
    if prompt is not None:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InputError("--prompt is not UTF-8: give it as text, or in a file") from error
    rows = [Prompt(1, prompt=prompt)] if prompts is None else read_prompts(prompts)
    if path is not None and prompts is not None and path.exists() and path.samefile(prompts):
        raise InputError(f"{out}: is the prompts file itself; name another output")
    if chat:
        rows = [_as_chat(row) for row in rows]
    if not math.isfinite(alpha):
        raise InputError(f"alpha is {alpha}: give a finite number")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: give a positive number")
    check_seed(seed)
    if "" in stop:
        raise InputError("stop holds an empty text: remove it")
    Sampling.of(temperature, top_k, top_p)

    from tuco_jax.weights.load import load_pair

    devices = mesh_for(mesh)
    pair, tokenizer = load_pair(base, tuned, dtype=dtype, mesh=devices)
    # Checked here, too, since these errors name the prompt by its id and line.
    vocab_size = pair.tuned_config.vocab_size
    encode(tokenizer, rows, max_tokens=pair.context - 1, vocab_size=vocab_size)
    for note in pair.notes:
        print(f"note: {one_line(note)}", file=sys.stderr)
    limits: Any = dict(max_new_tokens=max_new_tokens, top_k=top_k, seed=seed)
    limits |= dict(temperature=temperature, top_p=top_p, stop=stop, mesh=devices)
    responses = respond(pair, tokenizer, rows, alpha, **limits)
    found: list[Sequence[Piece] | None] = [None] * len(rows)
    if tuco or page_path is not None:
        texts, new = [r.prompt for r in responses], [r.tokens for r in responses]
        values = response_tuco(pair, texts, new, alpha)
        found = [pieces(tokenizer, ids, v) for ids, v in zip(new, values, strict=True)]
    answers = [Answer(*parts) for parts in zip(rows, responses, found, strict=True)]
    if path is not None:
        with atomic(path) as temporary:
            text = "".join(json.dumps(a.row, ensure_ascii=False) + "\n" for a in answers)
            temporary.write_text(text, "utf-8")
        settings = {"base": base, "tuned": tuned, "prompts": prompts, "dtype": dtype}
        settings |= {"alpha": alpha, "chat": chat, **limits, "stop": list(stop)}
        settings["mesh"] = dict(devices.shape) if devices is not None else None
        facts = {"notes": list(pair.notes), "family": pair.tuned_config.family}
        write_json(path.with_name(path.name + ".meta.json"), settings | facts | provenance())
    if page_path is not None:
        facts = {"base": base, "tuned": tuned, "alpha": f"{alpha:g}"}
        if temperature:
            facts |= {"temperature": f"{temperature:g}", "seed": str(seed)}
        with atomic(page_path) as temporary:
            temporary.write_text(_render(answers, facts, tokenizer), "utf-8")
    return answers


def _as_chat(row: Prompt) -> Prompt:
    if row.messages is not None:
        return row
    messages = ({"role": "user", "content": str(row.prompt)},)
    return dataclasses.replace(row, prompt=None, messages=messages)


def lines(answer: Answer, *, names: bool) -> list[str]:
    """An answer for a terminal: its text, or a line a token, TuCo first.

    names: begin with the prompt's id.
    """
    head = [f"[{answer.prompt.id}]"] if names else []
    if answer.pieces is None:
        return [*head, answer.response.text]
    return [*head, *(f"{p.tuco:.4f}  {p.text!r}" for p in answer.pieces)]


def _asked(prompt: Prompt) -> str:
    return str(prompt.messages[-1]["content"] if prompt.messages else prompt.prompt)


def _render(
    answers: Sequence[Answer], facts: dict[str, str], tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """The page of answers, tokens shaded from the 5th to the 95th percentile of their TuCo."""
    special = set(tokenizer.all_special_tokens)
    values = [p.tuco for a in answers for p in a.pieces or ()]
    low, high = np.quantile(values, (0.05, 0.95)) if values else (0.0, 1.0)
    entries = []
    for answer in answers:
        tokens = []
        for piece in answer.pieces or ():
            shade = float(np.clip((piece.tuco - low) / max(high - low, 1e-9), 0, 1))
            tokens.append((piece, shade, piece.text in special))
        entries.append((answer.prompt.id, _asked(answer.prompt), tokens))
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
