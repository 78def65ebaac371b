"""Requests by language, from files to a report, on a tiny pair."""

import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco.cli_pair import write_jsonl
from tests.tuco.studies.made_up import found_command, results, sentence
from tuco_jax.studies import conjugate


def test_conjugate_compares_languages(models, tmp_path):
    folder = tmp_path / "languages"
    folder.mkdir()
    for name, length in (("English", 3), ("sw", 6), ("Malayalam", 6), ("Klingon", 4)):
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": sentence(length)} for _ in range(6)])
    config = conjugate.Config(out=tmp_path / "out", data=str(folder), **models)
    found = conjugate.STUDY.run(config)
    data = results(config.out)
    assert set(data["tuco"]) == {"English", "Swahili", "Malayalam", "Klingon"}
    assert len(data["contrasts"]) == 6 and list(data["against"]) == ["English"]
    low = data["tuco"]["Malayalam"] + data["tuco"]["Swahili"]
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in data["tuco"]["English"] for b in low])
    assert data["against"]["English"]["contrast"]["auc"][0] == pytest.approx(wins)
    assert [c.verdict for c in found.claims][1:] == ["not testable here"] * 2
    rows = next(t for t in found.tables if "simpler" in t.title).rows
    assert [row[1] for row in rows[:2]] == ["TuCo", "prompt length"]
    assert rows[0][2].startswith(f"{wins:.3f}")
    assert rows[1][2].startswith("0.000")  # three words are shorter than six
    assert f" --data {folder}" in found_command(config.out)


def test_two_names_of_one_language_are_refused(tmp_path):
    for name in ("English", "en"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "a"}])
    with pytest.raises(InputError, match="English and en are both English; keep one"):
        conjugate.STUDY.run(conjugate.Config(out=tmp_path / "out", data=str(tmp_path)))
    assert not (tmp_path / "out").exists()


def test_conjugate_without_data_says_so(tmp_path):
    found = conjugate.STUDY.run(conjugate.Config(out=tmp_path / "out"))
    assert {c.verdict for c in found.claims} == {"not testable here"}
    assert "Nothing was measured" in (tmp_path / "out" / "report.md").read_text()
