"""Multiple-choice questions and yes/no behaviours, read from the files of their authors.

    MMLU (arXiv 2009.03300)      folders dev, val, test of NAME_dev.csv ..., without a header:
                                 question, A, B, C, D, answer; or the parquet of its hub copy,
                                 one folder a task: question, subject, choices, answer
    Model-Written-Evals          NAME.jsonl: question, statement, label_confidence,
    (arXiv 2212.09251)           answer_matching_behavior, answer_not_matching_behavior
    a plain .jsonl               question, choices, answer, and maybe task and split
    Social IQA, in `evals`       one user turn with three options, and `ideal`

Nothing heavy is imported here, so that a bad file is reported before any model is touched.
"""

import csv
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from common_jax.errors import InputError

__all__ = [
    "LETTERS",
    "Question",
    "Task",
    "select_tasks",
    "read_behaviours",
    "read_social_iqa",
    "read_tasks",
]

LETTERS = "ABCDEFGHIJ"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its options.

    answer: index of the right option, or of the one that shows the behaviour. where: file and
    line, for errors.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    where: str


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions of one subject, and examples to show before each of them."""

    name: str
    examples: tuple[Question, ...]
    questions: tuple[Question, ...]


def read_tasks(path: str | pathlib.Path, split: str = "test") -> list[Task]:
    """Every task of a .jsonl, or of a folder of MMLU's csv or parquet files, sorted by name.

    Examples are those of the split dev. Raises InputError naming file and line.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(f"{path}: does not exist; give MMLU's folder, or a .jsonl of questions")
    if path.is_file():
        if path.suffix != ".jsonl":
            raise InputError(f"{path}: questions come as a folder or as .jsonl")
        rows = _jsonl_rows(path)
    elif sorted(path.rglob("*.parquet")):
        rows = _parquet_rows(path)
    else:
        rows = _csv_rows(path)
    found: dict[str, dict[str, list[Question]]] = {}
    for name, part, question in rows:
        found.setdefault(name, {}).setdefault(part, []).append(question)
    tasks = [
        Task(name, tuple(parts.get("dev", ())), tuple(parts[split]))
        for name, parts in sorted(found.items())
        if parts.get(split)
    ]
    if not tasks:
        raise InputError(f"{path}: holds no questions of the split {split!r}")
    for task in tasks:
        _check_options(task)
    return tasks


def _check_options(task: Task) -> None:
    """A task's questions must all have as many options: they share the options' tokens."""
    first = (*task.examples, *task.questions)[0]
    for q in (*task.examples, *task.questions):
        if len(q.choices) != len(first.choices):
            raise InputError(
                f"{q.where}: {len(q.choices)} options where {first.where} has "
                f"{len(first.choices)}; give a task's questions one number of options"
            )


Row = tuple[str, str, Question]  # task, split, question


def _csv_rows(folder: pathlib.Path) -> Iterator[Row]:
    files = [f for part in ("dev", "val", "test") for f in sorted((folder / part).glob("*.csv"))]
    if not files:
        raise InputError(
            f"{folder}: no .csv files in dev, val or test and no .parquet; give the folder that "
            "holds them"
        )
    for file in files:
        part = file.parent.name
        ending = f"_{part}"
        if not file.stem.endswith(ending):
            raise InputError(f"{file}: MMLU names its files TASK{ending}.csv; rename it")
        name, empty = file.stem.removesuffix(ending), True
        try:
            with file.open(encoding="utf-8-sig", newline="") as opened:
                reader = csv.reader(opened, strict=True)
                for row in reader:
                    empty, where = False, f"{file}:{reader.line_num}"
                    if len(row) != 6:
                        raise InputError(
                            f"{where}: {len(row)} columns; MMLU has question, A, B, C, D, answer"
                        )
                    yield name, part, _question(row[0], row[1:5], row[5], where)
        except (csv.Error, UnicodeDecodeError, OSError) as error:
            raise InputError(f"{file}: not a readable csv ({error})") from error
        if empty:
            raise InputError(f"{file}: is empty; give it rows or remove it")


def _parquet_rows(folder: pathlib.Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    files = sorted(folder.rglob("*.parquet"))
    # "all" has the rows of the other folders once more.
    for file in [f for f in files if f.parent.name != "all"] or files:
        part = {"validation": "val"}.get(word := file.name.split("-")[0], word)
        if part not in ("dev", "val", "test"):
            continue  # auxiliary_train and the like
        try:
            table = pyarrow.parquet.read_table(file)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{file}: not a readable Parquet file ({reason})") from error
        for line, row in enumerate(table.to_pylist(), start=1):
            where = f"{file}:{line}"
            _check_fields(row, ("question", "subject", "choices", "answer"), where)
            question = _question(row["question"], row["choices"], row["answer"], where)
            yield str(row["subject"]), part, question


def _objects(path: pathlib.Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Each object of a .jsonl, with its file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    found = False
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        found, where = True, f"{path}:{line}"
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}); write one object a line") from error
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: a row must be an object")
        yield row, where
    if not found:
        raise InputError(f"{path}: is empty; give it rows or remove it")


def _jsonl_rows(path: pathlib.Path) -> Iterator[Row]:
    for row, where in _objects(path):
        _check_fields(row, ("question", "choices", "answer"), where)
        part = row.get("split", "test")
        if part not in ("dev", "val", "test"):
            raise InputError(f"{where}: `split` is {part!r}; splits are dev, val, test")
        question = _question(row["question"], row["choices"], row["answer"], where)
        yield str(row.get("task", path.stem)), part, question


def _check_fields(row: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    missing = [f for f in fields if row.get(f) is None]
    if missing:
        raise InputError(
            f"{where}: no {', '.join(f'`{f}`' for f in missing)} (fields: {', '.join(row)})"
        )


def _question(text: Any, choices: Any, answer: Any, where: str) -> Question:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: the question is no text, or empty")
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"{where}: `choices` must be a list of 2 to {len(LETTERS)} options")
    options = tuple("" if c is None else str(c).strip() for c in choices)
    if not all(options):
        raise InputError(f"{where}: option {1 + options.index('')} is empty; give it a text")
    letters = LETTERS[: len(options)]
    index = answer
    if isinstance(answer, str):
        index = letters.find(answer.strip()) if len(answer.strip()) == 1 else -1
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(options):
        raise InputError(
            f"{where}: the answer {answer!r} is none of the options; give a letter of {letters}, "
            f"or a number from 0 to {len(options) - 1}"
        )
    return Question(text.strip(), options, index, where)


def read_behaviours(path: str | pathlib.Path) -> list[Task]:
    """Behaviours of Model-Written-Evals: of a .jsonl, or of every .jsonl in a folder, by name.

    Options are the file's, either " Yes" and " No" or " (A)" and " (B)"; `answer` is the one that
    shows the behaviour. Raises InputError naming file and line.
    """
    path = pathlib.Path(path)
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(f"{path}: no .jsonl of Model-Written-Evals there; give a file or folder")
    tasks: dict[str, Task] = {}
    for file in files:
        if file.stem in tasks:
            raise InputError(f"{file}: a second behaviour named {file.stem}; rename one")
        questions = [_behaviour(row, where) for row, where in _objects(file)]
        for question in questions:
            if question.choices != questions[0].choices:
                raise InputError(
                    f"{question.where}: answers {' or '.join(question.choices)} where the first "
                    f"row has {' or '.join(questions[0].choices)}; put them in two files"
                )
        tasks[file.stem] = Task(file.stem, (), tuple(questions))
    return [tasks[name] for name in sorted(tasks)]


def _behaviour(row: Mapping[str, Any], where: str) -> Question:
    fields = "answer_matching_behavior", "answer_not_matching_behavior"
    _check_fields(row, ("question", *fields), where)
    match, other = (row[f] for f in fields)
    pair = str(match).strip(), str(other).strip()
    options = next((o for o in (("Yes", "No"), ("(A)", "(B)")) if set(o) == set(pair)), None)
    if options is None:
        raise InputError(
            f"{where}: the answers are {match!r} and {other!r}; they must be ' Yes' and ' No', or "
            "' (A)' and ' (B)', one of them each"
        )
    return _question(row["question"], options, options.index(pair[0]), where)


def read_social_iqa(path: str | pathlib.Path, examples: int) -> Task:
    """Social IQA (arXiv 1904.09728) from the package evals; its first rows are the examples."""
    found = []
    for row, where in _objects(pathlib.Path(path)):
        _check_fields(row, ("input", "ideal"), where)
        try:
            text = " ".join(turn["content"] for turn in row["input"])
        except (TypeError, KeyError):
            raise InputError(f"{where}: `input` must be a list of turns with `content`") from None
        parts = re.fullmatch(r"(.*?) A: (.*); B: (.*); C: (.*?)\.?", text, re.DOTALL)
        if parts is None:
            raise InputError(f"{where}: no options 'A: ...; B: ...; C: ...' in the question")
        found.append(_question(parts[1], parts.groups()[1:], row["ideal"], where))
    return Task("socialiqa", tuple(found[:examples]), tuple(found[examples:]))


def select_tasks(tasks: Iterable[Task], names: Sequence[str]) -> list[Task]:
    """The tasks of these names, or all without names. Raises InputError for an unknown name."""
    known = {task.name: task for task in tasks}
    for name in names:
        if name not in known:
            raise InputError(f"task {name!r} is not in the data; there are {', '.join(known)}")
    return [known[name] for name in names or known]
