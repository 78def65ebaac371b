"""The last-token form is the full form at the last tokens."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.tuco import random_models as rm
from tests.tuco.core.forms import at_last, decompose, last_token
from tests.tuco.torch_reference import reference
from tuco_jax.core.last_token import last_token as eager_last_token
from tuco_jax.core.residual import share
from tuco_jax.weights.load import open_pair


def test_both_forms_agree_on_a_mixture_of_experts_with_an_adapter():
    """An adapter of attention, router and every expert; both models choose experts."""
    config = rm.config(mlp_bias=False, experts=5, experts_used=2)
    pair, (tokens, mask) = rm.adapter_pair(base=config), rm.batch(side="left")
    out = decompose(pair, tokens, mask)
    real = np.asarray(mask)
    np.testing.assert_allclose(
        (out.embeddings + out.ptc + out.ftc)[real], out.hidden[real], atol=2e-5
    )
    scored = last_token(pair, tokens, mask)
    ptc, ftc = (at_last(x, mask) for x in (out.ptc, out.ftc))
    np.testing.assert_allclose(scored.tuco, share(ptc, ftc, 1), atol=1e-6)
    assert float(scored.telescoping.max()) < 1e-5
    assert float(scored.tuco.min()) > 0.01


@pytest.mark.parametrize("norm", [1, 2])
def test_last_token_form_equals_the_full_form(pair, inputs, norm):
    tokens, mask = inputs
    out = decompose(pair, tokens, mask, layers=True, parts=True)
    ptc, ftc = (at_last(x, mask).cumsum(0) for x in (out.ptc, out.ftc))
    expected = share(ptc, ftc, norm)
    scored = last_token(pair, tokens, mask, norm=norm)
    np.testing.assert_allclose(scored.layers, expected, atol=1e-6)
    np.testing.assert_allclose(scored.tuco, expected[-1], atol=1e-6)
    np.testing.assert_allclose(scored.ptc, ptc[-1], atol=2e-5)
    np.testing.assert_allclose(scored.ftc, ftc[-1], atol=2e-5)
    np.testing.assert_allclose(scored.ftc_mlp, at_last(out.ftc_mlp, mask).sum(0), atol=2e-5)
    assert float(scored.telescoping.max()) < 1e-5
    assert float(scored.tuco.min()) > 0.01  # a pair that differs must not score zero


def published(seed):
    """A random model in float64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.06,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.double().eval()


def test_each_precision_is_as_exact_as_it_says():
    """Against float64: three parts err no more than float32, two by 1e-5, one by 1e-3."""
    base, tuned = published(0), published(1)
    with torch.no_grad():  # near each other, as a tuned model is
        for old, new in zip(base.parameters(), tuned.parameters(), strict=True):
            new.copy_((old + 0.3 * new).bfloat16())
            old.copy_(old.bfloat16())
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 200, (16, 24))
    mask = np.arange(24) < rng.integers(4, 25, (16, 1))
    exact = reference(base, tuned, tokens, mask).tuco.numpy()
    errors = {}
    for precision in ("float32", "bfloat16x3", "bfloat16x2", "bfloat16"):
        models = [(m.float().state_dict(), m.config) for m in (base, tuned)]
        opened = open_pair(*models, dtype="bfloat16", precision=precision)
        found = last_token(opened.load()[0], jnp.asarray(tokens), jnp.asarray(mask)).tuco
        errors[precision] = np.abs(np.asarray(found, np.float64) / exact - 1)
    mean = {name: error.mean() for name, error in errors.items()}
    assert errors["float32"].max() < 1e-6
    assert mean["bfloat16x3"] <= mean["float32"]
    assert errors["bfloat16x3"].max() <= errors["float32"].max()
    assert errors["bfloat16x2"].max() < 1e-5
    assert mean["bfloat16x3"] < mean["bfloat16x2"] < 1e-5 < mean["bfloat16"] < 1e-3
    assert errors["bfloat16"].max() < 2e-3  # 2^-9: a rounding to the 8 bits of bfloat16


def products_with_weights(precision, platform, rows=8):
    """How often each product by a matrix is lowered, by the operands' types with their shapes."""
    pair = jax.tree.map(lambda x: x.astype(jnp.bfloat16), rm.full_pair()).at(precision)
    traced = jax.jit(eager_last_token).trace(pair, *rm.batch(rows, 11))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    found = collections.Counter()
    for line in dots:
        ((left, right),) = re.findall(r": \(tensor<(\S+)>, tensor<(\S+)>\)", line)
        if right.count("x") == 2:  # attention's have batches
            found[left, right] += 1
    assert len(dots) > found.total()
    return found


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_each_part_is_one_pass_in_bfloat16(platform):
    """And none by weights is left in float32. Parts of 64 rows or fewer are stacked in one."""
    whole = products_with_weights("float32", platform)
    assert whole.total() >= 14  # seven of each model
    few = 0
    for parts, precision in enumerate(("bfloat16", "bfloat16x2", "bfloat16x3"), 1):
        wanted = collections.Counter()
        for (left, right), count in whole.items():
            assert left.endswith("xf32") and right.endswith("xf32")
            left, right = left.replace("f32", "bf16"), right.replace("f32", "bf16")
            rows = math.prod(map(int, left.split("x")[:-2]))
            if parts > 1 and rows <= 64:
                wanted[f"{parts}x{left}", right] += count
                few += count
            else:
                wanted[left, right] += parts * count
        assert products_with_weights(precision, platform) == wanted
    assert 0 < few < 2 * whole.total()
