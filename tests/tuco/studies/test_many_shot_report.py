"""What the many-shot report says follows from its curves."""

import numpy as np
import pytest

from tuco_jax.studies.many_shot_report import KINDS, Curve, findings

SHOTS, COUNT = (0, 1, 16), 40


def curves(falls):
    """TuCo that falls by so much from one demonstration to sixteen, for each kind."""
    rng = np.random.default_rng(0)
    base = rng.normal(0.3, 0.01, COUNT)
    tokens = np.tile(np.array([[20], [60], [600]]), (1, COUNT))
    return {
        kind: Curve(np.stack([base, base, base - fall + rng.normal(0, 0.005, COUNT)]), tokens)
        for kind, fall in zip(KINDS, falls, strict=True)
    }


def report(falls, files: dict[str, str] | None = None):
    files = files or {kind: "" for kind in KINDS}
    return findings(curves(falls), SHOTS, seed=0, files=files, requests="made up")


@pytest.mark.parametrize(
    ("falls", "verdicts"),
    [
        ((0.1, 0.0, 0.0), ["reproduced", "reproduced"]),
        ((0.1, 0.1, 0.0), ["reproduced", "not clear"]),
        ((0.1, 0.2, 0.0), ["reproduced", "not reproduced"]),
        ((-0.1, 0.0, 0.0), ["not reproduced", "not reproduced"]),
    ],
)
def test_verdicts(falls, verdicts):
    found = report(falls)
    got = [claim.verdict for claim in found.claims]
    assert got[0] == verdicts[0]
    assert got[1] in (verdicts[1], "not reproduced" if verdicts[1] == "not clear" else verdicts[1])
    assert [row[0] for row in found.tables[0].rows] == list(SHOTS)
    assert found.data["tuco"]["complying"][0] == pytest.approx(curves(falls)["complying"].tuco[0])
    assert "from 1 to 16 shots" in found.summary[0]


def test_files_are_named_and_default_texts_said_to_be_unseen():
    files = {"complying": "c.jsonl", "refusing": "r.jsonl", "harmless": ""}
    method = " ".join(report((0.1, 0, 0), files).method)
    assert "Complying ones: c.jsonl." in method and "wordings of r.jsonl" in method
    assert "was trained on those harmless texts" in method
