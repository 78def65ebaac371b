"""Gather the reports of all studies on several pairs in one folder, with a page of all claims.

    python -m tuco_jax.studies.collect --pairs '[runs/studies/smollm2]' --out docs/results/tuco

Each pair is a folder with one folder of results for each study, as `tuco-jax study` writes them,
named as the study, or, for further runs of it, beginning with its name (broken-wild). Reports,
figures and numbers are copied to OUT/PAIR/STUDY; the page is OUT/README.md.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from common_jax.errors import InputError
from common_jax.io.files import atomic, make_folder, read_json, write_text
from common_jax.report.findings import markdown_table
from tuco_jax.studies.catalog import STUDIES

__all__ = ["CollectConfig", "run"]

# What the page takes of a study's results.
_CLAIM = dict.fromkeys(("text", "paper", "measured", "verdict"))
_WANTED = {"title": None, "facts": dict.fromkeys(("command", "run time")), "claims": [_CLAIM]}
_COPIED = ("report.md", "results.json", "*.svg")


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """Gather the reports of all studies on several pairs in one folder.

    Args:
        pairs: folders of results, one a pair.
        out: the folder to write.
    """

    pairs: tuple[pathlib.Path, ...]
    out: pathlib.Path


def run(config: CollectConfig) -> pathlib.Path:
    """Copy the reports and write the page; returns its path."""
    names = [pair.name for pair in config.pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"two pairs are called {twice[0]}: their reports would be one; rename one"
        )
    found = {pair.name: _results(pair) for pair in config.pairs}
    for pair in config.pairs:
        for study in found[pair.name]:
            target = config.out / pair.name / study
            make_folder(target)
            for pattern in _COPIED:
                for path in sorted((pair / study).glob(pattern)):
                    atomic(target / path.name, functools.partial(shutil.copyfile, path))
    page = config.out / "README.md"
    write_text(page, _page(found))
    print(page)
    return page


def _results(pair: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The results of each study of a pair, in the order of the paper."""
    found = {}
    for study in STUDIES:
        for path in sorted(pair.glob(f"{study}*/results.json")):
            found[path.parent.name] = read_json(path, _WANTED, "run the study again")
    if not found:
        raise InputError(
            f"{pair}: holds no results; run `tuco-jax study NAME --out {pair}/NAME` first"
        )
    return found


def _rank(folder: str) -> tuple[int, str]:
    """Sorts folders by the order of the studies, then by name."""
    return next(i for i, study in enumerate(STUDIES) if folder.startswith(study)), folder


def _page(found: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    parts = [
        "# The paper's experiments, and controls that it lacks, on real pairs",
        "Each claim beside what came out, whatever came out; intervals are 95%. A claim is not "
        "testable here where what it needs is not at hand, or too few prompts fall on one side; "
        "of those that are, it is reproduced, or not, where the whole interval lies on one side "
        "of no effect, and not clear where it does not.",
    ]
    for pair, studies in found.items():
        facts: dict[str, Any] = next(iter(studies.values()))["facts"]
        times = [f"{name} {r['facts']['run time']}" for name, r in studies.items()]
        parts.append(
            f"**{pair}**: base {facts.get('base', '-')}; tuned {facts.get('tuned', '-')}; "
            f"{facts.get('weights', '-')} on {facts.get('device', '-')}. Run times: "
            f"{', '.join(times)}."
        )
    for study in sorted({name for results in found.values() for name in results}, key=_rank):
        per_pair = {pair: s[study] for pair, s in found.items() if study in s}
        if not per_pair:
            continue
        links = ", ".join(f"[{pair}]({pair}/{study}/report.md)" for pair in per_pair)
        first = next(iter(per_pair.values()))
        parts.append(f"## {first['title']}{'' if study in STUDIES else f' ({study})'}")
        parts.append(links)
        commands = [f"    {r['facts']['command']}" for r in per_pair.values()]
        parts.append("\n".join(commands))
        claims: dict[tuple[str, str], dict[str, str]] = {}
        for pair, results in per_pair.items():
            for claim in results["claims"]:
                row = claims.setdefault((str(claim["text"]), str(claim["paper"])), {})
                row[pair] = f"{claim['measured']}: **{claim['verdict']}**"
        rows = [(*key, *(row.get(pair, "-") for pair in per_pair)) for key, row in claims.items()]
        parts.append(markdown_table(("claim", "the paper", *per_pair), rows))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    import sys

    from common_jax.cli.command_line import run_alone

    sys.exit(run_alone("python -m tuco_jax.studies.collect", CollectConfig, run))
