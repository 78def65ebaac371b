"""Web text against chat, from files to a report, on a tiny pair."""

import json
import pathlib

import numpy as np
import pytest

import tuco_jax
from common_jax.errors import InputError
from tests.tuco.cli_pair import write_jsonl
from tests.tuco.studies.made_up import results, sentence
from tests.tuco.tiny import tiny_tokenizer
from tests.tuco.tiny_tokenizer import BOS, bos_tokenizer
from tuco_jax.studies import web_chat
from tuco_jax.weights.load import load_pair


@pytest.mark.parametrize("make, before", [(tiny_tokenizer, []), (bos_tokenizer, [BOS])])
def test_windows_are_pieces_of_the_texts(make, before):
    texts = [sentence(n) for n in (30, 2, 40, 50)]
    pieces = web_chat.windows(make(), texts, 60, most=9, seed=1)
    assert len(pieces) == 3
    for piece, text in zip(pieces, [t for t in texts if len(t) >= 60], strict=True):
        assert piece[: len(before)].tolist() == before and len(piece) == 60 + len(before)
        own = make().decode(piece[len(before) :].tolist())
        assert own in text and len(own) == 60
    again = web_chat.windows(make(), texts, 60, most=9, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(pieces, again, strict=True))
    with pytest.raises(InputError, match="window is 999, but 0 of 4 texts have so many tokens; "):
        web_chat.windows(make(), texts, 999, most=9)


def test_web_chat_scores_the_windows_themselves(models, requests, tmp_path):
    web = write_jsonl(tmp_path / "web.jsonl", [{"prompt": sentence(30)} for _ in range(5)])
    config = web_chat.Config(
        out=tmp_path / "out", web=web, chat=requests, window=40, prompts=5, **models
    )
    found = web_chat.STUDY.run(config)
    data = results(config.out)
    assert set(data["tuco"]) == {"chat", "chat as plain text", "web text as a turn", "web text"}
    assert data["tokens"]["web text"] == [40] * 5
    for claim, (first, second) in zip(
        found.claims,
        (
            ("chat", "web text"),
            ("chat as plain text", "web text"),
            ("chat", "web text as a turn"),
        ),
        strict=True,
    ):
        pairs = [(a, b) for a in data["tuco"][first] for b in data["tuco"][second]]
        wins = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
        assert claim.measured.startswith(f"AUC {wins:.3f} [")
        assert claim.measured in (config.out / "report.md").read_text()
    pair, tokenizer = load_pair(models["base"], models["tuned"])
    texts = [json.loads(line)["prompt"] for line in pathlib.Path(web).read_text().splitlines()]
    pieces = web_chat.windows(tokenizer, texts, 40, most=5)
    whole = [str(tokenizer.decode(p.tolist())) for p in pieces]
    want = tuco_jax.score(pair, tokenizer, whole).tuco
    np.testing.assert_allclose(data["tuco"]["web text"], want, atol=1e-5)
    turned = [[{"role": "user", "content": text}] for text in whole]
    want = tuco_jax.score(pair, tokenizer, turned).tuco
    np.testing.assert_allclose(data["tuco"]["web text as a turn"], want, atol=1e-5)


def test_web_chat_s_bad_input(tmp_path, requests):
    turns = write_jsonl(
        tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "x"}]}] * 2
    )
    with pytest.raises(InputError, match=r"t.jsonl:1: web text is `prompt`, not `messages`"):
        web_chat.STUDY.run(web_chat.Config(out=tmp_path / "out", web=turns, chat=requests))
    with pytest.raises(InputError, match="window must be 1 or more, not 0"):
        web_chat.STUDY.run(web_chat.Config(out=tmp_path / "out", window=0))
    one = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "x"}])
    with pytest.raises(InputError, match="one.jsonl: one chat prompt; give 2 or more"):
        web_chat.STUDY.run(web_chat.Config(out=tmp_path / "out", web=requests, chat=one))
    assert not (tmp_path / "out").exists()
