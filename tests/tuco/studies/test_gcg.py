"""The GCG study: what it measures, what it reports, and what it refuses."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco.cli_pair import save_pair, write_jsonl
from tuco_jax.attacks.gcg import attack
from tuco_jax.attacks.layout import random_strings
from tuco_jax.prompts.read import Prompt
from tuco_jax.scoring.score import score
from tuco_jax.studies import gcg
from tuco_jax.studies.gcg import Config, place
from tuco_jax.weights.load import load_pair

REQUESTS = ["tea?", "a b", "cups", "one", "two!", "milk"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture
def config(models, tmp_path) -> Config:
    prompts = write_jsonl(tmp_path / "requests.jsonl", [{"prompt": r} for r in REQUESTS])
    return Config(
        out=tmp_path / "out",
        base=models[0],
        tuned=models[1],
        prompts=prompts,
        strings=2,
        goals=1,
        count=4,
        target="ok",
        steps=2,
        candidates=6,
        topk=8,
        length=4,
        chunk=6,
        answer_tokens=2,
    )


@pytest.mark.slow
def test_it_searches_measures_and_reports(config, models, capsys):
    found = gcg.STUDY.run(config)
    out = config.out
    names = {p.name for p in out.iterdir()}
    assert {"results.json", "report.html", "report.md", "attacks.jsonl"} <= names
    data = json.loads((out / "results.json").read_text())
    assert list(data["tuco"]) == ["plain", "attack 1", "attack 2", "random 1", "random 2"]
    assert [len(s["losses"]) for s in data["searches"]] == [2, 2]
    strings = [json.loads(x)["prompt"] for x in (out / "attacks.jsonl").read_text().splitlines()]

    measured, searched, _ = gcg.prepare(config)
    assert sorted(r.text for r in measured + searched) == sorted(REQUESTS)
    measured = [r.text for r in measured]
    pair, tokenizer = load_pair(*models)
    texts = [*measured, *(place(strings[1], r, "prefix") for r in measured)]
    prompts = [
        Prompt(i, None, ({"role": "user", "content": text},)) for i, text in enumerate(texts)
    ]
    expected = score(pair, tokenizer, prompts).tuco
    np.testing.assert_allclose(data["tuco"]["plain"], expected[:4], atol=1e-5)
    np.testing.assert_allclose(data["tuco"]["attack 2"], expected[4:], atol=1e-5)
    # The strings are for a further run, never for the report.
    for name in ("results.json", "report.html", "report.md"):
        assert not any(s in (out / name).read_text() for s in strings)
    assert {c.verdict for c in found.claims} <= {
        "reproduced",
        "not reproduced",
        "not clear",
        "not testable here",
    }

    again = gcg.STUDY.run(
        dataclasses.replace(config, attacks=out / "attacks.jsonl", out=out / "b", seed=0)
    )
    for name, values in found.data["tuco"].items():
        assert again.data["tuco"][name] == pytest.approx(values)
    assert again.data["searches"] == []
    capsys.readouterr()


def test_a_killed_study_goes_on_to_the_same_end(config, models, monkeypatch, capsys):
    whole = gcg.STUDY.run(config)
    parted = dataclasses.replace(config, out=config.out.with_name("parted"))
    steps = []

    def killed(*args, **options):
        def on_step(step, loss, prompts):
            steps.append(step)
            if len(steps) == 3:  # in the second string's search
                raise KeyboardInterrupt

        return attack(*args, on_step=on_step, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gcg, "attack", killed)
        gcg.STUDY.run(parted)
    assert not (parted.out / "results.json").exists()
    first = parted.out / "search_1" / "search.json"
    done = first.read_bytes()

    again = gcg.STUDY.run(parted)
    assert first.read_bytes() == done
    assert again.data["tuco"] == whole.data["tuco"]
    seconds = json.loads(done)["seconds"]  # of the start that made it
    assert seconds > 0 and again.data["searches"][0]["seconds"] == round(seconds, 1)
    assert [s["losses"] for s in again.data["searches"]] == [
        s["losses"] for s in whole.data["searches"]
    ]
    capsys.readouterr()


@pytest.mark.slow
def test_a_file_s_own_targets_are_searched_for(config, tmp_path, monkeypatch):
    """AdvBench's columns, as published; a row without its target takes the option's."""
    rows = ["goal,target", *(f"{r},Sure {i}" for i, r in enumerate(REQUESTS[:5])), "last,"]
    path = tmp_path / "advbench.csv"
    path.write_text("\n".join(rows) + "\n")
    sought = {}

    def spied(model, tokenizer, goals, *rest, **more):
        sought.update({g.request: g.target for g in goals})
        return attack(model, tokenizer, goals, *rest, **more)

    monkeypatch.setattr(gcg, "attack", spied)
    gcg.STUDY.run(dataclasses.replace(config, prompts=str(path), count=2, strings=2, goals=2))
    assert len(sought) == 4
    known = {r: f"Sure {i}" for i, r in enumerate(REQUESTS[:5])} | {"last": "ok"}
    assert sought == {request: known[request] for request in sought}


def test_placement():
    assert place("! !", "tea?", "prefix") == "! ! tea?"
    assert place("! !", "tea?", "suffix") == "tea? ! !"


def test_random_strings_have_the_lengths_asked_for(models):
    _, tokenizer = load_pair(*models)
    found = random_strings(tokenizer, 272, [3, 7], seed=1)
    assert [len(tokenizer(s, add_special_tokens=False)["input_ids"]) for s in found] == [3, 7]
    assert found == random_strings(tokenizer, 272, [3, 7], seed=1)
    assert found != random_strings(tokenizer, 272, [3, 7], seed=2)
    with pytest.raises(InputError, match="no random string of 3 tokens in 0 draws"):
        random_strings(tokenizer, 272, [3], tries=0)


def test_bad_input_is_named_before_a_model_is_loaded(config, tmp_path):
    chats = write_jsonl(
        tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "x"}]}]
    )
    for changes, message in (
        (dict(strings=0), "strings must be 1 or more, not 0"),
        (dict(goals=0), "goals must be 1 or more, not 0"),
        (dict(count=1), "count must be 2 or more, not 1"),
        (dict(length=0), "length must be 1 or more, not 0"),
        (dict(steps=0), "steps must be 1 or more, not 0"),
        (dict(answer_tokens=-1), "answer_tokens must be 0 or more, not -1"),
        (dict(target=" "), "target must be a text"),
        (dict(count=5), r"requests\.jsonl: 6 requests, but 5 are to be measured on and 2"),
        (dict(prompts=chats), r"chats\.jsonl:1: a request is `prompt`, not `messages`"),
        (
            dict(prompts="harmbnch"),
            "no such file, nor a set; sets are advbench, strongreject, har",
        ),
        (dict(attacks=pathlib.Path(chats)), r"chats\.jsonl: prompt 1 .* has `messages`"),
        (dict(attacks=tmp_path / "none.txt"), "none.txt: the prompts file does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            gcg.STUDY.run(dataclasses.replace(config, base="nowhere", **changes))
    assert not config.out.exists()
