import functools

import numpy as np
import pytest
import torch

from common_jax.errors import InputError
from tests.tuco import random_models as rm
from tests.tuco.interrupted import check_it_goes_on, read_back
from tests.tuco.tiny import save_tiny
from tuco_jax.core.budget import default_budget
from tuco_jax.evaluation import baselines as module
from tuco_jax.evaluation.baselines import BaselineEntry, baselines, baselines_of_tokens
from tuco_jax.prompts.prefixes import Behind
from tuco_jax.prompts.read import Prompt
from tuco_jax.scoring.engine import planned
from tuco_jax.weights.load import load_pair

LENGTHS = (2, 9, 23, 14, 9)


def test_baselines_are_those_of_transformers(tmp_path):
    models = [save_tiny(tmp_path / n, "llama", s)[0] for n, s in (("base", 0), ("tuned", 1))]
    pair, tokenizer = load_pair(str(tmp_path / "base"), str(tmp_path / "tuned"))
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 256, n).astype(np.int32) for n in LENGTHS]
    prompts = [Prompt(i, "x") for i in range(len(tokens))]
    found = baselines_of_tokens(pair, tokens, prompts)
    assert found.length.tolist() == list(LENGTHS)
    for i, row in enumerate(tokens):
        ids = torch.as_tensor(row[None].astype(np.int64))
        finals = []
        for model, got in zip(
            models, (found.base_perplexity[i], found.tuned_perplexity[i]), strict=True
        ):
            # The stream before the final norm: the last layer's own output.
            held = []
            hook = model.model.layers[-1].register_forward_hook(lambda m, a, out: held.append(out))  # noqa: B023
            with torch.no_grad():
                loss = model(ids, labels=ids).loss
            hook.remove()
            out = held[0][0] if isinstance(held[0], tuple) else held[0]
            finals.append(out.reshape(len(row), -1)[-1])
            assert got == pytest.approx(float(loss.exp()), rel=1e-4)
        pt, ft = finals
        gap = (ft - pt).abs().sum()
        assert found.output_co[i] == pytest.approx(float(gap / (pt.abs().sum() + gap)), abs=1e-5)
    # Without perplexity nothing else changes; one token is enough then.
    short = baselines_of_tokens(pair, tokens, prompts, perplexity=False)
    np.testing.assert_allclose(short.output_co, found.output_co, atol=1e-6)
    assert np.isnan(short.base_perplexity).all()
    with pytest.raises(InputError, match="prompt 0: one token has no perplexity; give two or mor"):
        baselines(pair, tokenizer, [Prompt(0, "x")])


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_what_prompts_share_is_run_once(kind):
    """Perplexity counts what is shared, too, and the step from it into each prompt's own."""
    pair = {"full": rm.full_pair, "adapter": rm.adapter_pair}[kind](base=rm.config(vocab_size=64))
    rng = np.random.default_rng(4)
    head = rng.integers(0, 64, 40)
    rows = [np.append(head, rng.integers(0, 64, n)) for n in rng.integers(1, 9, 40)]
    rows += [head[:n] for n in (1, 2, 20, 39)] + [np.append(head[:25], 7)]
    rows = [r.astype(np.int32) for r in rows]
    batches = planned(rows, pair, default_budget(), 1, share=True)
    assert any(isinstance(batch, Behind) for batch in batches)
    names = [Prompt(i, "x") for i in range(len(rows))]
    longer = [i for i, r in enumerate(rows) if r.size > 1]
    for chosen, perplexity in ((longer, True), (range(len(rows)), False)):
        given = [rows[i] for i in chosen], [names[i] for i in chosen]
        together = baselines_of_tokens(pair, *given, perplexity=perplexity)
        alone = [
            baselines_of_tokens(pair, [r], [p], perplexity=perplexity)
            for r, p in zip(*given, strict=True)
        ]
        for name in ("base_perplexity", "tuned_perplexity", "output_co"):
            want = np.concatenate([getattr(one, name) for one in alone])
            np.testing.assert_allclose(getattr(together, name), want, rtol=1e-5)


def test_batches_that_are_done_are_not_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "default_budget", lambda: 32)
    pair, rng = rm.adapter_pair(), np.random.default_rng(1)
    rows = [rng.integers(0, 61, n).astype(np.int32) for n in 2 * LENGTHS]
    names = [Prompt(i, "x") for i in range(len(rows))]

    def run(journal, rows=rows, perplexity=True):
        found = baselines_of_tokens(pair, rows, names, perplexity=perplexity, journal=journal)
        return found.columns()

    unlike = functools.partial(run, rows=rows[::-1]), functools.partial(run, perplexity=False)

    def otherwise(journal):
        monkeypatch.setattr(module, "default_budget", lambda: 64)
        return run(journal)

    check_it_goes_on(tmp_path / "journal", monkeypatch, run, unlike, otherwise)


@pytest.mark.parametrize(
    "record",
    [
        [[2], [0.5], [0.5], [0.5]],  # no such prompt
        [[0], [0.5], [0.5]],
        [[0], [0.5], [0.5], [0.5], [0.5]],
        [[0], [0.5], [0.5], [0.5, 0.5]],
        [[0], [0.5], [0.5], 0.5],
        [["0"], [0.5], [0.5], [0.5]],
        [[0], [0.5], [0.5], ["a"]],
        {},
        7,
    ],
)
def test_what_is_no_batch_is_computed_again(tmp_path, record):
    """Without perplexity there is none in a batch; a large one may be beyond float32."""
    nan, far = float("nan"), float("inf")
    read = functools.partial(BaselineEntry.read, count=2)
    good = [[1, 0], [nan, nan], [far, 0.1], [0.5, 0.2]]
    (found,) = read_back(tmp_path / "journal", read, (good, record))
    assert found.rows == [1, 0]
    np.testing.assert_array_equal(np.stack(found[1:]), np.asarray(good[1:], np.float32))
