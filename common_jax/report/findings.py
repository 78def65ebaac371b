"""The report of a study, in one form for every study: JSON, HTML, and Markdown with its figures.

A study makes `Findings` of its measurements; `write` puts into a folder

    results.json   all measurements, with facts of the run
    report.html    one self-contained page
    report.md      the same in text and tables, its figures beside it as .svg
"""

import base64
import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as ConsoleTable

from common_jax.io.files import atomic, make_folder, write_json, write_text
from common_jax.report import page

__all__ = [
    "Claim",
    "Figure",
    "Findings",
    "Table",
    "Verdict",
    "markdown_table",
    "print_tables",
    "write",
]

# "reached" and its negation are of figures that we ask of ourselves, not of a paper's claim.
Verdict = Literal[
    "reproduced", "not reproduced", "reached", "not reached", "not clear", "not testable here"
]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper beside the result here.

    text: the claim in our words, with its section. paper: its figure there. measured: ours.
    """

    text: str
    paper: str
    measured: str
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows as they are shown: texts, whole numbers, or floats that are rounded to 3 digits."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def cells(self) -> list[list[str]]:
        """Every row as texts."""
        return [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in self.rows]


@dataclasses.dataclass(frozen=True)
class Figure:
    """name: of its file. image: a data URI of `figures.draw`. caption: what it shows."""

    name: str
    image: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Findings:
    """Everything that a study reports.

    summary, method, caveats: sentences or paragraphs. facts: models, sizes, seeds, times. data:
    what was measured, whole, for results.json.
    """

    title: str
    summary: Sequence[str]
    claims: Sequence[Claim]
    tables: Sequence[Table]
    figures: Sequence[Figure]
    method: Sequence[str]
    caveats: Sequence[str]
    facts: Mapping[str, str]
    data: Mapping[str, Any]


def write(
    folder: pathlib.Path,
    findings: Findings,
    started: float | None = None,
    command: str | None = None,
) -> pathlib.Path:
    """Write the three files, each whole or not at all; returns the page's path.

    started: `time.perf_counter()` when the study began, for its run time. command: what repeats
    the run.
    """
    make_folder(folder)
    facts = dict(findings.facts)
    if command is not None:
        facts["command"] = command
    if started is not None:
        facts["run time"] = f"{time.perf_counter() - started:.0f} s"
    claims = [dataclasses.asdict(c) for c in findings.claims]
    write_json(
        folder / "results.json",
        {"title": findings.title, "claims": claims, "facts": facts, **findings.data},
    )
    write_text(folder / "report.md", _markdown(folder, findings, facts))
    path = folder / "report.html"
    html = page.render(
        pathlib.Path(__file__).with_name("findings.html"),
        title=findings.title,
        summary=findings.summary,
        method=findings.method,
        facts=facts,
        findings=findings,
    )
    write_text(path, html)
    return path


def _markdown(folder: pathlib.Path, findings: Findings, facts: Mapping[str, str]) -> str:
    parts = [f"# {findings.title}", " ".join(findings.summary)]
    if findings.claims:
        rows = [(c.text, c.paper, c.measured, c.verdict) for c in findings.claims]
        parts.append(markdown_table(("the paper", "its figure", "here", ""), rows))
    for table in findings.tables:
        parts += [f"## {table.title}", markdown_table(table.columns, table.cells())]
        parts += [table.note] if table.note else []
    for figure in findings.figures:
        name = f"{figure.name}.svg"
        content = base64.b64decode(figure.image.partition(",")[2])
        atomic(folder / name, functools.partial(pathlib.Path.write_bytes, data=content))
        parts.append(f"![{_line(figure.caption)}]({name})")
    parts += ["## How it was measured", *findings.method]
    if findings.caveats:
        parts.append("\n".join(f"- {_line(text)}" for text in findings.caveats))
    parts.append("\n".join(f"- {name}: {_line(value)}" for name, value in facts.items()))
    return "\n\n".join(parts) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, each cell on one line."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_line(c).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(columns), "|---" * len(columns) + "|", *map(line, rows)])


def _line(text: str) -> str:
    return " ".join(text.split())


def print_tables(findings: Findings) -> None:
    """Claims and tables on the console."""
    console = Console()
    if findings.claims:
        table = ConsoleTable("the paper", "its figure", "here", "", title=findings.title)
        for c in findings.claims:
            table.add_row(c.text, c.paper, c.measured, c.verdict)
        console.print(table)
    for found in findings.tables:
        table = ConsoleTable(*found.columns, title=found.title, caption=found.note or None)
        for row in found.cells():
            table.add_row(*row)
        console.print(table)
