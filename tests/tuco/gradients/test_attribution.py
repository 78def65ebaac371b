"""Attribution of TuCo to tokens: finite differences, completeness, prompts and their page.

By norm 2 where differences are taken: norm 1 has a kink wherever a component changes sign.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco import random_models as rm
from tests.tuco.tiny import VOCAB
from tests.tuco.tiny_tokenizer import bos_tokenizer
from tuco_jax.core.last_token import tuco
from tuco_jax.gradients.attribution import attribute, attribute_prompts, write_attribution
from tuco_jax.models import decoder
from tuco_jax.models.positions import Positions


@functools.cache
def pair():
    return rm.adapter_pair(base=rm.config(vocab_size=VOCAB, embed_scale=2.0))


def streams(tokens, mask):
    """x_0 and the mean embedding of the tuned model."""
    at = Positions.of(pair().tuned_config, mask)
    x = decoder.embed(pair().tuned_config, pair().tuned_params, tokens, at)
    return x, 2.0 * pair().base["embed"]["table"].mean(axis=0)


@jax.jit
def value(pair, x, mask):
    return tuco(pair, None, mask, embeddings=x, norm=2)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradient_is_that_of_finite_differences(side):
    tokens, mask = rm.batch(rows=3, side=side, vocab=VOCAB)
    got = attribute(pair(), tokens, mask, points=2, norm=2)
    x, mean = streams(tokens, mask)
    np.testing.assert_allclose(got.tuco, value(pair(), x, mask), atol=1e-5)
    column = int(jnp.argmax(mask[1]))
    for row, place in ((0, 4), (1, column)):
        step = jnp.zeros_like(x).at[row, place].set(0.004 * (x[row, place] - mean))
        up, down = value(pair(), x + step, mask), value(pair(), x - step, mask)
        slope = float((up - down)[row]) / 0.008
        assert abs(slope) > 1e-3
        assert float(got.gradient[row, place]) == pytest.approx(slope, rel=0.02)
    assert not np.asarray(got.gradient)[~np.asarray(mask)].any()


@pytest.mark.slow
def test_integrated_parts_sum_to_the_difference():
    """On the way from the mean embedding this random pair has slopes of 20: it takes many points.

    From a baseline nearby a few do.
    """
    tokens, mask = rm.batch(rows=3, vocab=VOCAB)
    x, mean = streams(tokens, mask)
    many = attribute(pair(), tokens, mask, points=256, norm=2)
    start = jnp.broadcast_to(mean, x.shape)
    np.testing.assert_allclose(many.baseline, value(pair(), start, mask), atol=1e-5)
    change = np.asarray(many.tuco - many.baseline)
    assert np.abs(change).min() > 0.03
    np.testing.assert_allclose(np.asarray(many.integrated).sum(axis=1), change, atol=2e-3)
    near = 0.8 * x + 0.2 * jnp.roll(x, 1, axis=1)
    few, fewer = (
        attribute(pair(), tokens, mask, baseline=near, points=n, norm=2) for n in (16, 2)
    )
    left = few.tuco - few.baseline - few.integrated.sum(axis=1)
    np.testing.assert_allclose(few.completeness_error, left, atol=1e-6)
    assert float(jnp.abs(few.tuco - few.baseline).max()) > 0.01
    assert float(jnp.abs(few.completeness_error).max()) < 1e-4
    assert float(jnp.abs(fewer.completeness_error).max()) > 10 * float(
        jnp.abs(few.completeness_error).max()
    )


@pytest.mark.slow
def test_a_baseline_of_one_s_own():
    tokens, mask = rm.batch(rows=3, vocab=VOCAB)
    x, _ = streams(tokens, mask)
    got = attribute(pair(), tokens, mask, baseline=x, points=2)
    for part in (got.gradient, got.integrated, got.completeness_error):
        assert not np.asarray(part).any()
    with pytest.raises(InputError, match="points must be 1 or more, not 0"):
        attribute(pair(), tokens, mask, points=0)


@pytest.mark.slow
def test_prompts_and_their_page(tmp_path):
    prompts = ["tea", "<b>&", [{"role": "user", "content": "hi"}]]
    found = attribute_prompts(pair(), bos_tokenizer(), prompts, points=4)
    assert ["".join(a.texts) for a in found[:2]] == ["<s>tea", "<s><b>&"]
    tokens = jnp.asarray([bos_tokenizer()("tea")["input_ids"]])
    alone = attribute(pair(), tokens, jnp.ones((1, 4), bool), points=4)
    np.testing.assert_allclose(found[0].integrated, alone.integrated[0], atol=1e-5)
    page = write_attribution(tmp_path / "a.html", found, {"model": "tiny"}).read_text()
    assert "&lt;b&gt;" not in page  # one token a character
    assert page.count("<span style") == sum(len(a.texts) for a in found)
    for a in found:
        lowers = sum(part <= 0 for part in a.integrated)
        assert lowers < len(a.texts)
    down = sum(int((a.integrated <= 0).sum()) for a in found)
    assert page.count("background: rgba(0, 114, 178, ") == down
    assert "<script" not in page and "&lt;" in page
    with pytest.raises(InputError, match="no prompts to report"):
        write_attribution(tmp_path / "b.html", [])
    with pytest.raises(InputError, match=r"output comes as \.html"):
        write_attribution(tmp_path / "b.txt", found)
    with pytest.raises(InputError, match="prompt 0: 70 tokens"):
        attribute_prompts(pair(), bos_tokenizer(), ["x" * 69])
