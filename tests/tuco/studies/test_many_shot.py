"""Many-shot prompts and their controls, from files to a report, on a tiny pair."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest

import tuco_jax
from common_jax.errors import InputError
from tests.tuco.cli_pair import write_jsonl
from tests.tuco.studies.made_up import results, sentence
from tuco_jax.attacks.many_shot import matched, prompt_of
from tuco_jax.datasets import chat_data, prompt_sources, refusal_data
from tuco_jax.studies import many_shot
from tuco_jax.weights.load import load_pair


def test_default_answers_can_be_matched_by_refusals():
    def size(text: str) -> int:
        """About as many as tokens."""
        return len(re.findall(r"\w+|[^\w\s]", text))

    answers = prompt_sources.labelled_refusals()
    refusals = [size(text) for text in answers]
    agreeing = [size(text) for text in many_shot.OPENINGS]
    assert min(refusals) <= min(agreeing) and max(agreeing) <= max(refusals)
    targets = [agreeing[i % len(agreeing)] for i in range(128)]
    found = matched(targets, [""] * 128, [answers], size)
    have = np.cumsum([size(d.answer) for d in found])
    assert np.abs(have - np.cumsum(targets)).max() <= 4 < many_shot.SLACK


def plain(text: str) -> str:
    return " ".join(text.lower().split())


def test_no_default_control_was_trained_on():
    exchanges = prompt_sources.exchanges()
    assert len(exchanges) >= 128 and len({question for question, _ in exchanges}) == len(exchanges)
    refusals = prompt_sources.labelled_refusals()
    assert len(refusals) >= 20 and len(set(refusals)) == len(refusals)
    rows = refusal_data.training_rows(refusal_data.SplitOptions())
    rows += chat_data.training_rows(refusal_data.SplitOptions())
    trained = {plain(message["content"]) for row in rows for message in row["messages"]}
    texts = [text for exchange in exchanges for text in exchange] + refusals
    assert not trained & set(map(plain, texts))
    # Nor a part of what was, but for two words that any refusal holds.
    whole = [plain(text) for text in texts if text not in ("I can't", "I cannot")]
    assert not [text for text in whole if any(text in said for said in trained)]


def test_many_shot_controls_are_as_long(models, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_sources, "fetch", None)  # with files for all, nothing is fetched
    refusals = [{"prompt": row["text"]} for row in prompt_sources.shipped("refusals")]
    demos = [{"question": sentence(3), "answer": sentence(10)} for _ in range(5)]
    easy = [{"question": sentence(3), "answer": sentence(30)} for _ in range(5)]
    config = many_shot.Config(
        prompts=requests,
        complying=write_jsonl(tmp_path / "complying.jsonl", demos),
        harmless=write_jsonl(tmp_path / "harmless.jsonl", easy),
        refusing=write_jsonl(tmp_path / "refusing.jsonl", refusals),
        out=tmp_path / "out",
        shots=(0, 1, 4),
        count=3,
        **models,
    )
    many_shot.STUDY.run(config)
    data = results(config.out)
    tokens = {k: np.asarray(v) for k, v in data["tokens"].items()}
    tuco = {k: np.asarray(v) for k, v in data["tuco"].items()}
    for kind in ("refusing", "harmless"):
        off = np.abs(tokens[kind] - tokens["complying"])
        assert (off <= np.maximum(12, 0.05 * tokens["complying"])).all()
        np.testing.assert_allclose(tuco[kind][0], tuco["complying"][0], atol=1e-5)  # no shot
        fall = {k: v[-1] - v[1] for k, v in tuco.items()}
        assert data["beyond"][kind][0] == pytest.approx((fall["complying"] - fall[kind]).mean())
    pair, tokenizer = load_pair(models["base"], models["tuned"])
    asked = many_shot.prepare(config)[0]
    assert set(asked) < {json.loads(x)["prompt"] for x in pathlib.Path(requests).open()}
    one = prompt_of("p", [], asked[1])
    want = tuco_jax.score(pair, tokenizer, [one]).tuco[0]
    assert tuco["complying"][0, 1] == pytest.approx(float(want), abs=1e-5)
    # Answers too short to be cut to length.
    short = write_jsonl(tmp_path / "short.jsonl", [{"question": "q", "answer": "a"}] * 5)
    with pytest.raises(InputError, match="harmless demonstrations cannot be made as long as the"):
        many_shot.STUDY.run(dataclasses.replace(config, out=tmp_path / "other", harmless=short))
    with pytest.raises(InputError, match="shots holds 40: there are 5 complying demonstrations"):
        many_shot.STUDY.run(dataclasses.replace(config, out=tmp_path / "other", shots=(0, 40)))
    long = write_jsonl(tmp_path / "long.jsonl", [{"question": "q", "answer": "a" * 600}] * 5)
    with pytest.raises(InputError, match="shots holds 1: with 1 complying .* context holds 512"):
        many_shot.STUDY.run(dataclasses.replace(config, out=tmp_path / "other", complying=long))


def test_no_request_is_answered_in_its_own_prompt(requests, tmp_path):
    """Whatever the set or file; requests are drawn by the seed."""
    texts = [json.loads(x)["prompt"] for x in pathlib.Path(requests).open()]
    demos = [{"question": q, "answer": "sure, here"} for q in [*texts, "other", "more", "third"]]
    path = write_jsonl(tmp_path / "complying.jsonl", demos)
    drawn = []
    for prompts, complying, count in (
        ("advbench", "", 30),
        ("strongreject", "", 30),
        (requests, path, 5),
        ("advbench", "", 30),
    ):
        config = many_shot.Config(
            prompts=prompts,
            complying=complying,
            out=tmp_path,
            shots=(0, 1, 2),
            count=count,
            seed=len(drawn),
        )
        asked, pool, *_ = many_shot.prepare(config)
        assert len(asked) == len(set(asked)) == count
        assert not {d.question for d in pool} & set(asked)
        drawn.append(asked)
    assert drawn[0] != drawn[3]


def test_many_shot_settings(tmp_path, requests):
    for shots, message in (
        ((4, 2), "give 2 or more numbers that rise"),
        ((3,), "give 2 or more numbers that rise"),
        ((-1, 2), "shots must be 0 or more, not -1"),
    ):
        with pytest.raises(InputError, match=message):
            many_shot.STUDY.run(
                many_shot.Config(prompts=requests, out=tmp_path / "out", shots=shots)
            )
    with pytest.raises(InputError, match="count must be 2 or more, not 1"):
        many_shot.STUDY.run(many_shot.Config(prompts=requests, out=tmp_path / "out", count=1))
    files: dict[str, Any] = dict(
        complying=write_jsonl(tmp_path / "c.jsonl", [{"question": "a", "answer": "b"}] * 2),
        harmless=write_jsonl(tmp_path / "h.jsonl", [{"question": "a", "answer": "b"}] * 2),
    )
    for refusing, message in (
        ("strongreject", "strongreject: prompts come as .*, not ''"),  # no set of requests
        (write_jsonl(tmp_path / "r.jsonl", [{"words": "no"}]), "r.jsonl:1: the row has neither"),
    ):
        config = many_shot.Config(
            prompts=requests, out=tmp_path / "out", **files, shots=(0, 1), count=2
        )
        with pytest.raises(InputError, match=message):
            many_shot.STUDY.run(
                dataclasses.replace(config, out=tmp_path / "other", refusing=refusing)
            )
    demos = write_jsonl(tmp_path / "d.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(InputError, match="count is 24: there are 6 requests; give fewer"):
        many_shot.STUDY.run(
            many_shot.Config(prompts=requests, complying=demos, out=tmp_path / "out")
        )
