"""Greedy Coordinate Gradient, held to PyTorch's autograd and to whole passes."""

import contextlib
import dataclasses
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from common_jax.errors import InputError
from tests.tuco import random_models as rm
from tests.tuco.tiny import VOCAB, save_tiny
from tests.tuco.tiny_tokenizer import bos_tokenizer
from tuco_jax.attacks import gcg
from tuco_jax.attacks.gcg import Options, attack
from tuco_jax.attacks.layout import Goal, lay_out
from tuco_jax.attacks.target_loss import (
    Pieces,
    cached_prompts,
    candidate_losses,
    token_gradient,
)
from tuco_jax.models.pair import single
from tuco_jax.weights.load import load_model

GOALS = [Goal("tea?", "Yes"), Goal("cups", "Sure")]

SMALL = Options(steps=4, candidates=12, topk=8, start="! ! !", chunk=5)


@pytest.fixture(scope="module")
def tokenizer():
    return bos_tokenizer()


@pytest.fixture(scope="module")
def model():
    config = rm.config(vocab_size=VOCAB, max_positions=96)
    return single(config, rm.params(config, 0), rm.lora(config, 1))


def pieces(seed: int = 0, sizes=(7, 4, 3, 5), vocab: int = VOCAB) -> Pieces:
    rng = np.random.default_rng(seed)
    return Pieces(*(rng.integers(0, vocab, n).astype(np.int32) for n in sizes))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_gradient_is_pytorch_s_by_the_one_hot_rows(family, tmp_path):
    reference, _ = save_tiny(tmp_path, family)
    loaded = load_model(str(tmp_path))
    model = single(loaded.config, loaded.params)
    p = pieces()
    # A second, longer prompt, so that the first one is padded in front and behind.
    cached, _ = cached_prompts(model, [p, pieces(1, (9, 4, 6, 7))])
    got = np.asarray(token_gradient(model, cached, jnp.asarray(p.attack)))

    ids = torch.from_numpy(p.whole).long()
    one_hot = torch.nn.functional.one_hot(ids, VOCAB).float()
    rows = one_hot[7:11].clone().requires_grad_()
    whole = torch.cat([one_hot[:7], rows, one_hot[11:]])
    table: Any = reference.get_input_embeddings()
    # Gemma's table scales its rows itself.
    scale = (table(ids[:1]) / table.weight[ids[:1]]).mean().detach()
    embeddings = scale * (whole @ table.weight.detach())
    logits = reference(inputs_embeds=embeddings[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[-6:-1], ids[-5:])
    loss.backward()
    assert rows.grad is not None
    expected = rows.grad.numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    own, _ = candidate_losses(model, cached, jnp.asarray(p.attack)[None])
    assert float(own[0]) == pytest.approx(float(loss.detach()), rel=1e-5)


def test_defaults_are_the_authors():
    """500 steps of 512 candidates of the 256 best tokens a place, from 20 marks."""
    options = Options()
    assert (options.steps, options.candidates, options.topk) == (500, 512, 256)
    assert options.start.split() == ["!"] * 20 and options.placement == "suffix"
    assert options.progressive and options.stop and not options.non_ascii and options.refilter


def test_candidates_change_one_place_to_one_of_the_best():
    rng = np.random.default_rng(0)
    gradient = jnp.asarray(rng.normal(size=(5, 40)), jnp.float32)
    allowed = jnp.arange(40) % 2 == 0
    tokens = jnp.asarray([1, 3, 5, 7, 9])
    drawn = gcg._sample(jax.random.key(0), gradient, tokens, allowed, topk=6, count=35)
    changed = np.asarray(drawn != tokens[None])
    assert (changed.sum(axis=1) == 1).all() and (changed.sum(axis=0) == 7).all()
    for row, place in zip(np.asarray(drawn), changed.argmax(axis=1), strict=True):
        better = (np.asarray(gradient)[place, ::2] < gradient[place, row[place]]).sum()
        assert row[place] % 2 == 0 and better < 6


def test_candidates_are_batched_by_the_token_budget(model, monkeypatch):
    (cached,) = cached_prompts(model, [pieces()])  # 12 tokens behind those that are cached
    monkeypatch.setattr(gcg, "default_budget", lambda: 100)
    for candidates, rows in ((3, 3), (8, 8), (9, 5), (12, 6), (17, 6)):
        options = dataclasses.replace(SMALL, candidates=candidates, chunk=None)
        assert gcg._batch(options, cached) == rows
    assert gcg._batch(SMALL, cached) == 5
    monkeypatch.setattr(gcg, "default_budget", lambda: 1)
    assert gcg._batch(dataclasses.replace(SMALL, chunk=None), cached) == 1


def test_loss_falls_and_chunks_do_not_matter(model, tokenizer):
    options = dataclasses.replace(SMALL, steps=6, progressive=False)
    found = attack(model, tokenizer, GOALS, options)
    for chunk in (3, None):
        again = attack(model, tokenizer, GOALS, dataclasses.replace(options, chunk=chunk))
        assert again.tokens == found.tokens and again.text == found.text
        np.testing.assert_allclose(again.losses, found.losses, rtol=1e-5)
    layouts = lay_out(tokenizer, GOALS, options.start, options.placement)
    start, end = (
        np.mean(
            [
                candidate_losses(model, s, jnp.asarray(ids)[None])[0][0]
                for s in cached_prompts(model, [own.pieces for own in layouts])
            ]
        )
        for ids in (layouts[0].pieces.attack, np.asarray(found.tokens, np.int32))
    )
    assert found.loss == min(found.losses) == pytest.approx(float(end), rel=1e-5)
    assert end < start - 0.05
    assert tokenizer(found.text, add_special_tokens=False)["input_ids"] == found.tokens


def test_a_killed_run_goes_on_to_the_same_end(model, tokenizer, tmp_path):
    whole = attack(model, tokenizer, GOALS, SMALL)
    path = tmp_path / "attack"

    def killed(step: int, loss: float, prompts: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack(model, tokenizer, GOALS, SMALL, checkpoint=path, on_step=killed)
    assert json.loads((path / "search.json").read_text())["step"] == 2
    steps: list[int] = []
    again = attack(
        model, tokenizer, GOALS, SMALL, checkpoint=path, on_step=lambda s, *_: steps.append(s)
    )
    assert again == whole and steps == [2, 3]
    assert attack(model, tokenizer, GOALS, SMALL, checkpoint=path) == whole
    fewer = dataclasses.replace(SMALL, topk=SMALL.topk - 1)
    with pytest.raises(
        InputError, match=rf"attack: the run there has topk {SMALL.topk}, not {fewer.topk}; give"
    ):
        attack(model, tokenizer, GOALS, fewer, checkpoint=path)
    with pytest.raises(
        InputError, match=r"there has prompts \(their checksum\) .*; give the same"
    ):
        attack(model, tokenizer, GOALS[::-1], SMALL, checkpoint=path)
    other = dataclasses.replace(model, lora={})
    with pytest.raises(
        InputError, match=r"there has both models' weights \(their checksum\) .*; give the same"
    ):
        attack(other, tokenizer, GOALS, SMALL, checkpoint=path)
    stored = json.loads((path / "settings.json").read_text())  # as it was named before
    stored["prompts (their digest)"] = stored.pop("prompts (their checksum)")
    stored["weights (their digest)"] = stored.pop("both models' weights (their checksum)")[::-1]
    (path / "settings.json").write_text(json.dumps(stored))
    assert attack(model, tokenizer, GOALS, SMALL, checkpoint=path) == whole
    with pytest.raises(InputError, match=r"there has prompts \(their checksum\) "):
        attack(model, tokenizer, GOALS[::-1], SMALL, checkpoint=path)
    (path / "search.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"it has no tokens; delete it, and the search begins anew"
    ):
        attack(model, tokenizer, GOALS, SMALL, checkpoint=path)


def test_a_search_shows_its_progress_from_where_it_goes_on(
    model, tokenizer, tmp_path, monkeypatch
):
    begun, updates = [], []

    @contextlib.contextmanager
    def bar(what: str, total: int, *, start: int, show: bool):
        begun.append((what, total, start, show))
        yield types.SimpleNamespace(update=lambda done, note: updates.append((done, note)))

    monkeypatch.setattr(gcg, "bar", bar)
    path = tmp_path / "attack"
    short = dataclasses.replace(SMALL, steps=1)
    attack(model, tokenizer, GOALS, short, checkpoint=path)
    found = attack(model, tokenizer, GOALS, SMALL, checkpoint=path, progress="string 1")
    assert begun == [("", 1, 0, False), ("string 1", 4, 1, True)]
    assert [done for done, _ in updates] == [1, 2, 3, 4]
    assert updates[-1][1] == f"loss {found.losses[-1]:.3f} on {found.prompts[-1]} prompts"


def test_a_prompt_is_added_once_the_string_succeeds(model, tokenizer, monkeypatch):
    def losses(succeed):
        def fake(model, cached, candidates, chunk, match):
            count = len(candidates)
            return np.arange(count, dtype=np.float32) + 1, np.full(count, succeed(cached))

        return fake

    monkeypatch.setattr(gcg, "_all_losses", losses(lambda cached: True))
    found = attack(model, tokenizer, GOALS, SMALL)
    assert found.prompts == [1, 2] and found.succeeded
    going_on = attack(model, tokenizer, GOALS, dataclasses.replace(SMALL, stop=False))
    assert going_on.prompts == [1, 2, 2, 2] and going_on.succeeded
    monkeypatch.setattr(gcg, "_all_losses", losses(lambda cached: False))
    found = attack(model, tokenizer, GOALS, SMALL)
    assert found.prompts == [1, 1, 1, 1] and not found.succeeded


def test_bad_input_is_named(model, tokenizer):
    for changes, message in (
        (dict(steps=0), "steps must be 1 or more, not 0"),
        (dict(candidates=0), "candidates must be 1 or more, not 0"),
        (dict(match=-1), "match must be 0 or more, not -1"),
        (dict(placement="middle"), "placement must be prefix or suffix, not 'middle'"),
        (dict(start=" ! "), "start must be a text without blanks"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(SMALL, **changes)
    for goals, message in (
        ([], "no goals: give one request"),
        ([GOALS[0], Goal("x", " ")], "goal 2: request and target must be texts, not empty"),
        ([GOALS[0], Goal("x" * 90, "y")], r"goal 2: \d+ tokens with string and target, but the"),
    ):
        with pytest.raises(InputError, match=message):
            attack(model, tokenizer, goals, SMALL)
    config = dataclasses.replace(model.tuned_config, vocab_size=90)
    small = single(config, model.base, model.lora)
    with pytest.raises(InputError, match="goal 1: token 25[0-9] is beyond the model's vocabulary"):
        attack(small, tokenizer, GOALS, SMALL)
    trimmed = bos_tokenizer()
    trimmed.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(InputError, match="goal 1: the chat template changes the user's text"):
        lay_out(trimmed, GOALS, "! ! !", "suffix")
