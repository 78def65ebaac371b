"""A batch's arrays go to the engine of their form."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from tests.tuco import random_models as rm
from tuco_jax.core.last_token import LastTokens
from tuco_jax.core.shared_prefix import SharedPrefixes
from tuco_jax.prompts.packing import Packed, pack
from tuco_jax.prompts.prefixes import Behind, pack_shared
from tuco_jax.prompts.read import Prompt
from tuco_jax.scoring.engine import as_begun, engine_of, planned
from tuco_jax.scoring.score import score_tokens


def test_by_the_form_of_the_batch():
    rows = [np.append(np.arange(300), i).astype(np.int32) for i in range(40)]
    (behind,) = {b.shape: b for b in pack_shared(rows, 1024)}.values()
    norm_2 = functools.partial(LastTokens, norm=2)
    shared = engine_of(behind.arrays(rows), norm_2)
    assert isinstance(shared, SharedPrefixes) and isinstance(shared.rows, LastTokens)
    assert shared.prefixes.shape == (1, 304) and shared.rows.norm == 2
    plain = engine_of(pack([row.size for row in rows], 400)[0].arrays(rows), LastTokens)
    assert isinstance(plain, LastTokens)
    assert plain.segments is None, "a prompt a row"


@pytest.mark.parametrize("share", [False, True])
def test_a_plan_of_what_is_left_on_other_devices(share):
    """By the numbers of the whole list, also of what a prefix is read from."""
    rng = np.random.default_rng(0)
    rows = [
        np.append(np.arange(60), rng.integers(0, 61, n)) for n in rng.permutation(range(1, 61))
    ]
    rows = [row.astype(np.int32) for row in rows]
    pair = rm.full_pair(base=rm.config(max_positions=128))

    def plan(some: list[Any], budget: int = 512, multiple: int = 1) -> list[Packed]:
        return planned(some, pair, budget, multiple, share=share)

    whole = plan(rows)
    begun = [batch.prompts for batch in whole[1:3]]
    assert as_begun(plan, rows, []) == as_begun(plan, rows, begun) == whole and len(whole) > 3
    assert any(isinstance(batch, Behind) for batch in whole) == share
    four = functools.partial(plan, budget=800, multiple=4)
    assert as_begun(four, rows, [batch.prompts for batch in whole]) == four(rows), "all are done"
    batches = as_begun(four, rows, begun)
    done = {i for prompts in begun for i in prompts}
    left = sorted(i for batch in batches for i in batch.prompts)
    assert left == sorted({*range(len(rows))} - done)
    first = four([rows[i] for i in left])
    for batch, same in zip(batches, first, strict=True):
        found, wanted = batch.arrays(rows), same.arrays([rows[i] for i in left])
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)


ROPES: dict[str, dict[str, Any]] = {
    "LongRoPE": dict(long_frequencies=(0.9, 0.3, 0.1, 0.02), long_scale=1.1),
    "dynamic NTK": dict(dynamic_factor=2.0),
}


@pytest.fixture(params=ROPES)
def length_dependent(request):
    """Prompts behind one header, and a pair whose frequencies change beyond 80 tokens."""
    rope = dataclasses.replace(rm.rope(8), switch=80, **ROPES[request.param])
    pair = rm.adapter_pair(base=rm.config(ropes=(rope,), rope_index=(), max_positions=128))
    rng = np.random.default_rng(0)
    sizes = rng.permutation([5, 12, 18, 25, 35] * 12)
    return pair, [np.append(np.arange(60), rng.integers(0, 61, n)).astype(np.int32) for n in sizes]


def test_prompts_of_other_frequencies_share_nothing(length_dependent):
    """Every prefix has prompts of one kind alone; most share it, and scores are as ever."""
    pair, rows = length_dependent
    batches = planned(rows, pair, 512, 1, share=True)
    assert sorted(i for b in batches for i in b.prompts) == list(range(len(rows)))
    shared = [b for b in batches if isinstance(b, Behind)]
    kinds: dict[tuple[int, int], set[int]] = {}
    for number, batch in enumerate(shared):
        for row, head in zip(batch.rows, batch.follows, strict=True):
            own = {pair.tuned_config.ropes[0].kind(rows[i].size) for i in row}
            kinds.setdefault((number, head), set()).update(own)
    assert len(kinds) > 1 and all(len(own) == 1 for own in kinds.values())
    names = [Prompt(id=i) for i in range(len(rows))]
    together, apart = (
        score_tokens(pair, rows, names, token_budget=512, share_prefixes=share)
        for share in (True, False)
    )
    assert together.shared > 0.3
    np.testing.assert_allclose(together.tuco, apart.tuco, rtol=0, atol=1e-5)
    np.testing.assert_allclose(together.layers, apart.layers, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_prompts_that_grow(kind):
    """Each the beginning of the next, behind a head of all: each one's own last token is asked."""
    make = {"full": rm.full_pair, "adapter": rm.adapter_pair}[kind]
    pair = make(base=rm.config(max_positions=256))
    rng = np.random.default_rng(3)
    head = rng.integers(0, 61, 9)
    rows = []
    for _ in range(8):
        examples, question = rng.integers(0, 61, (16, 11)), rng.integers(0, 61, 6)
        bare = [np.concatenate([head, *examples[:n]]) for n in (0, 1, 2, 4, 8, 16)]
        rows += [np.append(r, question) for r in bare] + bare[2:]
    rows = [r.astype(np.int32) for r in rows]
    names = [Prompt(id=i) for i in range(len(rows))]
    together, apart = (
        score_tokens(pair, rows, names, share_prefixes=share) for share in (True, False)
    )
    assert together.shared > 0.5
    np.testing.assert_allclose(together.tuco, apart.tuco, rtol=0, atol=1e-5)
    np.testing.assert_allclose(together.layers, apart.layers, rtol=0, atol=1e-5)
