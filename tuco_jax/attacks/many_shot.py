"""Many-shot prompts: demonstrations as earlier turns, and controls of the same length in tokens.

Legend: S demonstrations.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common_jax.errors import InputError
from tuco_jax.prompts.messages import Message
from tuco_jax.prompts.read import Prompt

__all__ = ["Demonstration", "matched", "prompt_of", "read_demonstrations"]

CountTokens = Callable[[str], int]  # how many tokens a text has


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A question and an answer to it, as an earlier exchange of the conversation."""

    question: str
    answer: str


def read_demonstrations(path: str | pathlib.Path) -> list[Demonstration]:
    """Rows of a .jsonl file with `question` and `answer`; other fields are ignored.

    In place of `answer` a row may have `answer_matching_behavior`, as in Model-Written Evals
    (arXiv 2212.09251), whose leading blank is dropped. Raises InputError naming file and line.
    """
    path = pathlib.Path(path)
    if path.suffix != ".jsonl" or not path.is_file():
        raise InputError(f"{path}: is no .jsonl file; give one with `question` and `answer`")
    found = []
    try:
        text = path.read_text("utf-8")
    except ValueError as error:
        raise InputError(f"{path}: is not UTF-8; save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON; write one object a line") from error
        found.append(_demonstration(row, f"{path}:{number}"))
    if not found:
        raise InputError(f"{path}: holds no demonstrations")
    return found


def _demonstration(row: Any, where: str) -> Demonstration:
    """The demonstration in a row of either layout; `where` begins an error's message."""
    fields = row if isinstance(row, dict) else {}
    question = fields.get("question")
    written = "answer" not in fields and "answer_matching_behavior" in fields
    answer = fields.get("answer_matching_behavior" if written else "answer")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: `question` must be text that is not empty")
    if not isinstance(answer, str) or not answer.strip():
        field = "answer_matching_behavior" if written else "answer"
        other = "" if field in fields else ", or `answer_matching_behavior` in its place"
        raise InputError(f"{where}: `{field}` must be text that is not empty{other}")
    return Demonstration(question, answer.strip() if written else answer)


def prompt_of(name: str, shots: Sequence[Demonstration], request: str) -> Prompt:
    """The exchanges, then the request as the user's last turn."""
    messages: list[Message] = []
    for shot in shots:
        messages.append({"role": "user", "content": shot.question})
        messages.append({"role": "assistant", "content": shot.answer})
    return Prompt(name, None, (*messages, {"role": "user", "content": request}))


def matched(
    targets: Sequence[int],
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    count: CountTokens,
    *,
    seed: int = 0,
) -> list[Demonstration]:
    """S demonstrations whose running total of tokens stays close to that of `targets`.

    targets [S]: tokens of each demonstration to match. questions [S]. answers: the answers to
    choose from for each question, or one list for all questions. Each time the answer is taken
    that brings the total so far nearest to that of the targets; ties are broken at random.
    """
    rng = np.random.default_rng(seed)
    found, due = [], 0
    for i, (target, question) in enumerate(zip(targets, questions, strict=True)):
        due += target - count(question)
        choices = answers[i if len(answers) > 1 else 0]
        lengths = np.asarray([count(a) for a in choices])
        off = np.abs(lengths - due)
        best = rng.choice(np.flatnonzero(off == off.min()))
        due -= int(lengths[best])
        found.append(Demonstration(question, choices[int(best)]))
    return found
