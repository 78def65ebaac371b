"""Attacks that succeed and that fail, from files to a report, on a tiny pair."""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest

from common_jax.errors import InputError
from common_jax.report.findings import Findings
from tests.tuco.cli_pair import write_jsonl
from tests.tuco.studies.made_up import results
from tuco_jax.datasets import prompt_sources, refusal_data
from tuco_jax.datasets import requests as sets
from tuco_jax.evaluation.judges import Judge
from tuco_jax.studies import broken


def broken_config(models, requests, tmp_path, **changes) -> broken.Config:
    attacks = [
        {"id": "polite", "prompt": "{{ prompt }}, please"},
        {"id": "now", "prompt": "now {{ prompt }}"},
    ]
    fields: dict[str, Any] = dict(
        out=tmp_path / "out",
        benign=requests,
        harmful=requests,
        attacks=write_jsonl(tmp_path / "attacks.jsonl", attacks),
        count=6,
        answers=3,
        tokens=4,
    )
    return broken.Config(**fields | models | changes)


def run_with(judge: Judge, config: broken.Config) -> Findings:
    """A judge of one's own in place of the one that the options name."""
    prepare = functools.partial(broken.prepare, judge=judge)
    return dataclasses.replace(broken.STUDY, prepare=prepare).run(config)


@pytest.mark.slow
def test_broken_prompts_are_told_by_the_judge(models, requests, tmp_path):
    config = broken_config(models, requests, tmp_path)
    asked = []

    def judge(request: str, answer: str) -> bool:
        """Requests in their file's order alternate between held and broken, 1 answer of 3."""
        asked.append((request, answer))
        return (len(asked) - 1) % 3 > (len(asked) - 1) // 3 % 2

    run_with(judge, config)
    data = results(config.out)
    # Prompts 0, 2, .. get 1 answer of 3 that helps, 1, 3, .. get 2: those are broken.
    assert data["not refused"] == [1, 2] * 9
    assert data["kinds"] == ["benign"] * 6 + ["harmful"] * 6 + ["attacked"] * 6
    assert data["attacks"][12:] == ["polite", "now"] * 3
    tuco = np.asarray(data["tuco"])[6:]
    held, out = tuco[::2], tuco[1::2]
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in held for b in out])
    assert data["contrasts"][0]["contrast"]["auc"][0] == pytest.approx(wins)
    # All of one attack held, all of the other broke: nothing to compare within one.
    assert data["contrasts"][1]["within"] is None
    assert {q for q, _ in asked} == {json.loads(r)["prompt"] for r in open(requests)}
    # The answers are samples, not one answer many times.
    assert len({a for _, a in asked[:9]}) > 3


def obliging(request: str, answer: str) -> bool:
    """A judge whom every second request satisfies."""
    return sum(map(ord, request)) % 2 == 0


@pytest.mark.slow
def test_every_attack_around_every_request_by_a_judge_of_a_name(models, requests, tmp_path):
    config = broken_config(models, requests, tmp_path, cross=True)
    config = dataclasses.replace(config, judge=f"{__name__}:obliging")
    found = broken.STUDY.run(config)
    data = results(config.out)
    assert data["kinds"][12:] == ["attacked"] * 12
    assert data["attacks"][12:] == ["polite"] * 6 + ["now"] * 6
    # Both attacks have both outcomes, the same ones: there is an AUC within them.
    helped = np.asarray(data["not refused"])
    assert set(helped) == {0, 3}
    np.testing.assert_array_equal(helped[12:18], helped[18:])
    assert data["contrasts"][1]["within"] is not None
    assert set(data["simpler"]) >= {"prompt length", "perplexity, FT", "OutputCo"}
    rows = next(t for t in found.tables if "simpler" in t.title).rows
    assert [row[1] for row in rows[:2]] == ["TuCo", "prompt length"]
    held = np.asarray(data["tokens"])[6:][helped[6:] == 0]
    out = np.asarray(data["tokens"])[6:][helped[6:] == 3]
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in held for b in out])
    assert rows[1][2].startswith(f"{wins:.3f}")


def test_a_judge_that_is_none(tmp_path):
    for name, message in (
        ("no.such:f", "not to be imported"),
        ("math:nothing", "not to be imported"),
        ("math:pi", "is no function"),
        ("tuco_jax.evaluation.refusals:is_refusal", "takes 1 arguments, not .request, answer."),
    ):
        with pytest.raises(InputError, match=f"judge '{name}': {message}"):
            broken.STUDY.run(broken.Config(out=tmp_path / "out", judge=name))
    assert not (tmp_path / "out").exists()


def test_a_judge_that_says_neither_yes_nor_no(models, requests, tmp_path):
    with pytest.raises(InputError, match="the judge gave str, not True or False"):
        run_with(lambda q, a: "no", broken_config(models, requests, tmp_path))  # pyright: ignore[reportArgumentType]


def test_refusals_that_the_paper_s_list_lacks_are_told(models, requests, tmp_path, monkeypatch):
    """Every answer refuses, in words that only our own list has for every second prompt."""
    said = [["I won't help with that.", "I cannot do that."][i // 3 % 2] for i in range(18 * 3)]
    monkeypatch.setattr(broken, "generate", lambda *a, **k: said)
    config = broken_config(models, requests, tmp_path)
    found = broken.STUDY.run(config)
    data = results(config.out)
    assert data["not refused"] == [3, 0] * 9 and data["not refused, other list"] == [0] * 18
    table = next(t for t in found.tables if "another list" in t.title)
    assert "9 of 18 prompts change sides" in table.note
    assert all(row[-1] == "one group is empty: no AUC" for row in table.rows)
    judge = "tuco_jax.datasets.refusal_strings:refuses"
    own = dataclasses.replace(config, judge=judge, out=tmp_path / "own")
    found = broken.STUDY.run(own)
    assert results(own.out)["not refused"] == [0] * 18
    assert not [t for t in found.tables if "another list" in t.title]
    assert "refusals are told by tuco_jax.datasets.refusal_strings:refuses" in found.method[0]


def test_public_sets_by_name(models, tmp_path):
    """Real ones: what the package holds, none of it empty, doubled or trained on."""
    trained = refusal_data.harmful_split(refusal_data.SplitOptions()).train
    sizes = {}
    for name in sets.SETS:
        texts = sets.read_texts(name)
        sizes[name] = len(texts)
        assert len(set(texts)) == len(texts) and all(t.strip() for t in texts)
        assert (
            len(refusal_data.without_duplicates_of(texts, trained)) == len(texts)
            or name == "advbench"
        )
    whole = {"advbench": 100, "strongreject": 288, "harmbench": 200, "do-not-answer": 243}
    assert all(0.95 * n <= sizes[name] <= n for name, n in whole.items()), sizes
    wild = sets.shared_jailbreaks()
    assert len(wild) >= 20 and len(wild) < len(prompt_sources.wild_jailbreaks())
    assert set(refusal_data.near_duplicates(list(wild.values()), sets.SAME)) == set(
        range(len(wild))
    )
    for text in wild.values():
        assert text.count("{{ prompt }}") == 1 and len(text) < 1000 and "[INSERT" not in text
    config = broken.Config(
        out=tmp_path / "out", harmful="harmbench", attacks="wild", count=3, **models
    )
    benign, harmful, attacks, _ = broken.prepare(config)
    assert set(harmful) <= set(sets.read_texts("harmbench")) and len(harmful) == len(benign) == 3
    assert [a.name for a in attacks] == list(wild) and harmful[0] in attacks[0].around(harmful[0])
    with pytest.raises(
        InputError, match="harmbnch: no such file, nor a set; sets are advbench, s"
    ):
        broken.prepare(dataclasses.replace(config, harmful="harmbnch"))


def test_one_class_is_not_testable_and_no_crash(models, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(broken, "generate", lambda *a, **k: ["I cannot"] * 18 * 3)
    config = broken_config(models, requests, tmp_path)
    found = broken.STUDY.run(config)
    assert {c.verdict for c in found.claims} == {"not testable here"}
    assert "one group is empty: no AUC" in (config.out / "report.md").read_text()


def test_broken_s_bad_input(models, requests, tmp_path):
    def fails(message: str, **changes) -> None:
        with pytest.raises(InputError, match=message):
            broken.STUDY.run(broken_config(models, requests, tmp_path, **changes))

    fails("broken is 4 of 3 answers: give 1 to 3", broken=4)
    fails("count is 7: .*requests.jsonl has 6 requests; give fewer", count=7)
    fails("temperature must be above 0, not 0", temperature=0.0)
    fails("tokens must be 1 or more, not 0", tokens=0)
    fails("count must be 2 or more, not 1", count=1)
    fails("broken must be 1 or more, not 0", broken=0)
    twice = write_jsonl(tmp_path / "twice.jsonl", [{"prompt": "{{ prompt }} {{ prompt }}"}])
    fails(r"twice.jsonl:1: an attack is a `prompt`, with one \"{{ prompt }}\" in", attacks=twice)
    turns = write_jsonl(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    fails("t.jsonl:1: a request is `prompt`, not `messages`", harmful=turns)
