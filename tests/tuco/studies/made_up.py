"""Made-up texts, and what a study leaves in its folder."""

import json
import pathlib

import numpy as np

RNG = np.random.default_rng(0)
WORDS = "tea cup sun map rope bird chair moon lamp stone river glass".split()


def sentence(length: int) -> str:
    return " ".join(RNG.choice(WORDS, length))


def results(out: pathlib.Path) -> dict:
    assert {"report.html", "report.md"} <= {p.name for p in out.iterdir()}
    return json.loads((out / "results.json").read_text())


def found_command(out: pathlib.Path) -> str:
    """What repeats a run, as its report has it."""
    return results(out)["facts"]["command"]
