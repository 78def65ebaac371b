"""Experts against every expert at every token, in each form; what the forms compute and hold."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tuco_jax.models import experts
from tuco_jax.models.experts import PerExpert

FORMS = {
    "chosen": experts.by_expert,  # on a CPU: as many blocks as are needed
    "ragged": lambda act, *a: experts._ragged(act, "float32", *a),
}
# Tokens, used of experts. Some experts are used by none; blocks are of one row, of some, of all.
SIZES = [(1, 1, 1), (3, 2, 7), (40, 3, 5), (300, 1, 2)]


def drawn(tokens, used, count, lora=False, seed=0):
    """Rows, distinct choices of which the first expert has most, and layers."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / math.sqrt(shape[-2]), jnp.float32)

    def layer(rows, columns):
        factors = (normal(count, rows, 3), normal(count, 3, columns)) if lora else None
        return PerExpert(normal(count, rows, columns), factors)

    weights = 0.5 ** np.arange(count)
    chosen = [
        rng.choice(count, used, replace=False, p=weights / weights.sum()) for _ in range(tokens)
    ]
    layers = {"gate": layer(9, 13), "up": layer(9, 13), "down": layer(13, 9)}
    return normal(tokens, 9), jnp.asarray(np.stack(chosen), jnp.int32), layers


def everywhere(x, chosen, layers):
    """Every expert at every token, of which the chosen are taken."""

    def linear(x, layer):
        kernel = layer.kernel
        if layer.lora is not None:
            kernel = kernel + jnp.einsum("eir,ero->eio", *layer.lora)
        return jnp.einsum("nei,eio->neo", x, kernel, precision="highest")

    x = jnp.broadcast_to(x[:, None], (len(x), len(layers["up"].kernel), x.shape[-1]))
    y = linear(jax.nn.silu(linear(x, layers["gate"])) * linear(x, layers["up"]), layers["down"])
    return jnp.take_along_axis(y, chosen[..., None], axis=1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_every_expert_taken_where_it_was_chosen(form, size):
    given = drawn(*size, lora=size[0] == 40)
    got = jax.jit(lambda *a: FORMS[form](jax.nn.silu, *a))(*given)
    assert got.shape == (*given[1].shape, 9) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, everywhere(*given), atol=2e-6)


def test_derivatives_in_both_modes_and_twice():
    x, chosen, layers = drawn(40, 3, 5, lora=True)
    along = drawn(40, 3, 5, lora=True, seed=1)[::2]

    def found(of):
        def loss(x, layers):
            return jnp.sum(jnp.square(of(x, chosen, layers)))

        slope = jax.grad(loss, argnums=(0, 1))
        return slope(x, layers), *jax.jvp(slope, (x, layers), along)[1:]

    want = jax.jit(lambda: found(everywhere))()
    for form in FORMS:
        got = jax.jit(lambda form=form: found(lambda *a: FORMS[form](jax.nn.silu, *a)))()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), got, want
        )


def test_mapped_over_tokens_and_over_layers():
    cases = [drawn(6, 2, 3, seed=seed) for seed in range(3)]
    x, chosen, layers = jax.tree.map(lambda *own: jnp.stack(own), *cases)
    run = functools.partial(experts.by_expert, jax.nn.silu)
    got = jax.jit(jax.vmap(run))(x, chosen, layers)
    shared = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(x, *cases[0][1:])
    for i, case in enumerate(cases):
        np.testing.assert_allclose(got[i], everywhere(*case), atol=2e-6)
        np.testing.assert_allclose(shared[i], everywhere(x[i], *cases[0][1:]), atol=2e-6)


def elements(text):
    """Those of the largest array in a lowered program."""
    shapes = re.findall(r"tensor<((?:\d+x)+)[bfi]", text)
    return max(math.prod(map(int, s[:-1].split("x"))) for s in shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_platform_computes_every_expert_at_every_token(dtype):
    tokens, used, count = 512, 2, 64
    x, chosen, layers = drawn(tokens, used, count)
    whole = jax.jit(everywhere).trace(x, chosen, layers).lower().as_text()
    assert elements(whole) >= tokens * count * 9  # the reader of shapes sees what there is
    layers = jax.tree.map(lambda a: a.astype(dtype), layers)

    def run(x, chosen, layers):
        return experts.by_expert(jax.nn.silu, x, chosen, layers, dtype)

    def slope(x, *rest):
        return jax.grad(lambda x: jnp.sum(jnp.square(run(x, *rest))))(x)

    for function in (run, slope):
        traced = jax.jit(function).trace(x, chosen, layers)
        for platform in ("cpu", "tpu", "cuda"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            ragged = platform == "tpu" or (platform == "cuda" and dtype == "bfloat16")
            assert ("ragged_dot" in text) == ragged
            assert elements(text) < tokens * count * 9
