"""Scores are those of the last-token form, whatever the batch, order, padding or devices."""

import dataclasses
import functools
import importlib
import itertools
import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tuco_jax
from common_jax.errors import InputError
from common_jax.journal import Journal
from common_jax.mesh import make_mesh
from tests.tuco import random_models as rm
from tests.tuco.tiny_tokenizer import bos_tokenizer
from tuco_jax.core.budget import default_budget
from tuco_jax.core.last_token import last_token
from tuco_jax.models.sharding import place
from tuco_jax.prompts import batching
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import (
    Prompt,
    as_prompts,
)
from tuco_jax.scoring.score import score, score_tokens

CONFIG = rm.config(vocab_size=272, max_positions=64)
TOLERANCE = 1e-5
TALK = [{"role": "user", "content": "Why?"}]


def some_prompts(count=24, seed=0):
    """Random letters of few lengths (each is a compilation), and two conversations."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice([1, 3, 6, 20, 60, 63], count)
    texts = ["".join(map(chr, rng.integers(97, 123, n))) for n in lengths]
    return [*texts, TALK, [*TALK, {"role": "assistant", "content": "Because."}]]


@pytest.fixture(scope="module")
def pair():
    return rm.full_pair(base=CONFIG)


@pytest.fixture(scope="module")
def tokenizer():
    return bos_tokenizer()


@pytest.fixture(scope="module")
def expected(pair, tokenizer):
    """One prompt at a time, left-padded: nothing shared with how `score` batches."""
    rows = encode(tokenizer, as_prompts(some_prompts()))
    alone = jax.jit(last_token)
    out = []
    for row in rows:
        ids, mask = batching.pad([row], batching.Batch((0,), 1, 80), "left")
        out.append(alone(pair, jnp.asarray(ids), jnp.asarray(mask)))
    return {
        "tuco": np.array([o.tuco[0] for o in out]),
        "layers": np.array([o.layers[:, 0] for o in out]),
        "tokens": np.array([r.size for r in rows]),
    }


def assert_same(scores, expected, order: Any = slice(None)):
    np.testing.assert_allclose(scores.tuco, expected["tuco"][order], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(scores.layers, expected["layers"][order], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(scores.tokens, expected["tokens"][order])
    assert scores.tuco.dtype == scores.layers.dtype == scores.telescoping.dtype == np.float32
    np.testing.assert_array_equal(scores.preco, 1 - scores.tuco)
    assert scores.telescoping.max() < 1e-5


def test_expected_is_worth_comparing(expected):
    assert expected["tuco"].std() > 0.02
    np.testing.assert_array_equal(expected["layers"][:, -1], expected["tuco"])


@pytest.mark.parametrize("token_budget", [1, 256, 4096, None])
def test_batch_sizes(pair, tokenizer, expected, token_budget):
    scores = score(pair, tokenizer, some_prompts(), token_budget=token_budget)
    assert_same(scores, expected)
    assert scores.ids == list(range(len(scores.tuco)))
    if token_budget == 1:
        assert {size for size, _ in scores.shapes} == {1}
    budget = token_budget or default_budget()
    assert all(size == 1 or size * length <= budget for size, length in scores.shapes)


def test_row_order(pair, tokenizer, expected):
    prompts = some_prompts()
    order = np.random.default_rng(1).permutation(len(prompts))
    assert_same(score(pair, tokenizer, [prompts[i] for i in order]), expected, order)


def test_neighbours_change_nothing(pair, tokenizer, expected):
    """Other rungs of the ladder, since the lengths are others."""
    prompts = some_prompts()
    scores = score(pair, tokenizer, prompts[5:6] + prompts[9:12])
    assert_same(scores, expected, [5, 9, 10, 11])


@pytest.mark.parametrize("layout", [(8, 1, 1), (2, 2, 2), (1, 4, 1), (1, 1, 2)])
def test_meshes(pair, tokenizer, expected, layout):
    scores = score(pair, tokenizer, some_prompts(), mesh=make_mesh(*layout))
    assert_same(scores, expected)
    assert all(size % (layout[0] * layout[1]) == 0 for size, _ in scores.shapes)
    where_it_lies = score(place(pair, make_mesh(*layout)), tokenizer, some_prompts())
    np.testing.assert_array_equal(where_it_lies.tuco, scores.tuco)
    assert where_it_lies.shapes == scores.shapes


@pytest.mark.parametrize("mesh", [None, (2, 1, 1)])
def test_pmap(pair, tokenizer, expected, mesh):
    mesh = mesh and make_mesh(*mesh)
    assert_same(score(pair, tokenizer, some_prompts(), mesh=mesh, parallel="pmap"), expected)


def alike(count=90, head=50):
    """Texts behind one header, and a few of their own."""
    rng = np.random.default_rng(2)
    header = "".join(map(chr, rng.integers(97, 123, head)))
    tails = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(1, 12, count)]
    return [*(header + tail for tail in tails), "of its own", "and so is this"]


@pytest.mark.parametrize("options", [{}, {"norm": 2, "token_budget": 100}, {"mesh": (4, 1, 2)}])
def test_what_prompts_share_is_computed_once(pair, tokenizer, options):
    if "mesh" in options:
        options = options | {"mesh": make_mesh(*options["mesh"])}
    together = score(pair, tokenizer, alike(), **options)
    apart = score(pair, tokenizer, alike(), share_prefixes=False, **options)
    np.testing.assert_allclose(together.tuco, apart.tuco, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(together.layers, apart.layers, rtol=0, atol=TOLERANCE)
    assert together.telescoping.max() < 1e-5
    assert together.shared > 0.6 and apart.shared == 0
    assert 0 <= together.padding < 0.7 and together.ids == apart.ids


def test_prompts_that_share_resume(pair, tokenizer, tmp_path):
    """A batch behind a prefix is kept, and not computed again."""
    prompts = as_prompts(alike(600))
    tokens = encode(tokenizer, prompts)
    whole = score_tokens(pair, tokens, prompts, token_budget=60)
    with Journal(tmp_path / "journal") as journal:
        journal.begin("key")
        score_tokens(pair, tokens, prompts, token_budget=60, journal=journal)
    written = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    assert len(written) > 3
    (tmp_path / "journal").write_bytes(b"".join(written[:2]))
    with Journal(tmp_path / "journal") as journal:
        journal.begin("key")
        again = score_tokens(pair, tokens, prompts, token_budget=60, journal=journal)
    assert 0 < again.resumed < len(prompts)
    np.testing.assert_array_equal(again.tuco, whole.tuco)


def test_a_run_goes_on_on_other_devices(pair, tokenizer, tmp_path):
    """To the same scores: bytes on as many; and no prompt that is done is computed again."""
    prompts = as_prompts(some_prompts(40))
    tokens, path = encode(tokenizer, prompts), tmp_path / "journal"
    whole = score_tokens(pair, tokens, prompts, token_budget=128)
    begun: list[bytes] = []  # and the journal's first line
    for devices, keep in ((1, 4), (1, 4), (4, 5), (1, 6), (4, 0)):
        mesh = make_mesh(devices) if devices > 1 else None
        with Journal(path) as journal:
            journal.begin("key")
            found = score_tokens(
                pair, tokens, prompts, token_budget=128, mesh=mesh, journal=journal
            )
        lines = path.read_bytes().splitlines(keepends=True)
        rows = [json.loads(line)[1][0] for line in lines[1:]]
        assert sorted(itertools.chain(*rows)) == list(range(len(prompts))), "each is there once"
        assert lines[: len(begun)] == begun
        assert found.resumed == sum(len(json.loads(line)[1][0]) for line in begun[1:])
        np.testing.assert_allclose(found.layers, whole.layers, rtol=0, atol=1e-6)
        if devices == 1 and len(begun) < 6:
            np.testing.assert_array_equal(found.layers, whole.layers)
        assert len(lines) > 1 + keep
        begun = lines[: 1 + keep]
        path.write_bytes(b"".join(begun))


def test_adapter_and_norm_2(tokenizer):
    pair = rm.adapter_pair(base=CONFIG)
    prompts = some_prompts(6)
    scores = score(pair, tokenizer, prompts, norm=2)
    rows = encode(tokenizer, as_prompts(prompts))
    ids, mask = batching.pad(rows, batching.Batch(tuple(range(len(rows))), len(rows), 80), "left")
    alone = jax.jit(functools.partial(last_token, norm=2))(pair, jnp.asarray(ids), mask)
    np.testing.assert_allclose(scores.tuco, alone.tuco, rtol=0, atol=TOLERANCE)
    assert np.abs(scores.tuco - score(pair, tokenizer, prompts).tuco).max() > 1e-3


def test_public_names_are_functions(pair, tokenizer):
    importlib.import_module("tuco_jax.core.decompose")  # Python would bind the modules now
    importlib.import_module("tuco_jax.scoring.score")
    assert tuco_jax.score is score
    assert callable(tuco_jax.decompose) and callable(tuco_jax.tuco)
    assert set(tuco_jax.__all__) <= set(dir(tuco_jax))
    with pytest.raises(AttributeError, match="nothing_such"):
        tuco_jax.nothing_such  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


def test_one_compilation_a_shape(pair, tokenizer):
    prompts = some_prompts(40, seed=3)
    first = score(pair, tokenizer, prompts, token_budget=512)
    compiled = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    score(pair, tokenizer, prompts, token_budget=512)
    assert len(first.shapes) < 5
    noted = dataclasses.replace(pair, notes=type(pair.notes)(("a remark",)))
    score(noted, tokenizer, prompts, token_budget=512)
    assert not compiled, "neither a second run nor a remark may recompile"
    score(pair, tokenizer, ["a longer one than all before"], token_budget=1)
    assert compiled
    jax.monitoring.unregister_event_duration_listener(listen)


def test_not_finite_names_the_prompt(pair, tokenizer):
    """One letter's embedding is not a number."""
    token = int(encode(tokenizer, as_prompts(["zzz"]))[0][-1])
    table = pair.tuned["embed"]["table"].at[token].set(jnp.nan)
    broken = dataclasses.replace(pair, tuned={**pair.tuned, "embed": {"table": table}})
    prompts = [Prompt("good", "abc", line=1), Prompt("bad", "abz", line=2)]
    with pytest.raises(InputError, match=r"prompt 'bad' \(line 2\): its score is not finite"):
        score(broken, tokenizer, prompts)
    assert np.isfinite(score(broken, tokenizer, prompts[:1]).tuco).all()


def test_too_long(pair, tokenizer):
    long = "a" * 200
    with pytest.raises(InputError, match="prompt 1: 201 tokens, .* holds 64"):
        score(pair, tokenizer, ["a", long])
    cut = score(pair, tokenizer, ["a", long], truncate=True)
    assert cut.tokens.tolist() == [2, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": 3}, "norm must be 1 or 2, not 3"),
        ({"parallel": "vmap"}, "parallel must be jit or pmap, not 'vmap'"),
        ({"token_budget": 0}, "token_budget must be 1 or more, not 0"),
        ({"parallel": "pmap", "mesh": (1, 2, 1)}, "pmap is for data alone"),
    ],
)
def test_bad_options(pair, tokenizer, options, message):
    if "mesh" in options:
        options = options | {"mesh": make_mesh(*options["mesh"])}
    with pytest.raises(InputError, match=message):
        score(pair, tokenizer, ["a"], **options)


def test_an_answer_that_is_left_open(pair, tokenizer):
    begun = [*TALK, {"role": "assistant", "content": "Because"}]
    closed, open_turn = (
        score(pair, tokenizer, [begun], continue_final=c).tokens[0] for c in (False, True)
    )
    assert closed == open_turn + 1


def test_an_answer_that_the_template_closes_is_told_once(pair, tokenizer):
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Be"}]
    with pytest.warns(
        UserWarning, match="1 of 2 prompts end with an .*; continue_final"
    ) as caught:
        closed = score(pair, tokenizer, [talk, talk[:1]])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = score(pair, tokenizer, [talk, talk[:1]], continue_final=True)
        score(pair, tokenizer, [talk[:1], "Be"])
    assert opened.tokens[0] < closed.tokens[0] and opened.tokens[1] == closed.tokens[1]
