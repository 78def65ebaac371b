"""Every form of attention gives the CPU form's numbers, and holds no square array of a row."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common_jax.mesh import make_mesh
from tests.tuco import random_models as rm
from tuco_jax.models import attention, attention_kernels, decoder
from tuco_jax.models.attention import _in_chunks, _in_parts, _query_parts, kernels
from tuco_jax.models.layers import block_delta, block_keys_values, whole_block
from tuco_jax.models.positions import EVERY, Positions, layer_infos

ROWS, SHARED, GROUP, WIDTH = 3, 2, 2, 16


def tensors(tokens, queries=None, dtype=jnp.float32, seed=0):
    """Random q [B, K, G, Q, h] float32; keys and values [B, K, T, h]."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(ROWS, SHARED, GROUP, queries or tokens, WIDTH))
    keys, values = rng.normal(size=(2, ROWS, SHARED, tokens, WIDTH))
    return jnp.asarray(q, jnp.float32), jnp.asarray(keys, dtype), jnp.asarray(values, dtype)


def places(tokens, kind):
    """Positions of three rows, without rotary tables."""
    lengths = np.array([[tokens], [tokens // 3], [tokens - 5]])
    columns = np.arange(tokens)[None]
    segments = None
    match kind:
        case "right":
            mask = columns < lengths
        case "left":
            mask = columns >= tokens - lengths
        case "holes":
            mask = np.random.default_rng(1).random((ROWS, tokens)) < 0.8
        case _:  # packed: prompts of unequal lengths, padding after them
            ends = np.array([[tokens // 5, tokens // 2, tokens - 9], [1, 7, 90], [60, 61, tokens]])
            segments = 1 + (columns[:, :, None] >= ends[:, None]).sum(axis=-1)
            mask = segments <= 3
            segments = jnp.asarray(np.where(mask, segments, 0))
    config = rm.config(ropes=(), rope_index=())
    return Positions.of(config, jnp.asarray(mask), segments)


def assert_same(ours, reference, at, atol=1e-5):
    """At real queries; everywhere finite."""
    a, b = (np.moveaxis(np.asarray(x), 3, 1) for x in (ours, reference))
    assert np.isfinite(a).all()
    real = np.asarray(at.mask)
    assert b[real].std() > 0.05, "a constant reference proves nothing"
    np.testing.assert_allclose(a[real], b[real], rtol=0, atol=atol)


KINDS = ["right", "left", "holes", "packed"]
LAYERS = [(0, 0.0), (0, 2.0), (37, 0.0), (37, 2.0)]  # window, cap


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("window", "cap"), LAYERS)
def test_chunks_are_parts(kind, window, cap):
    """150 tokens by 32: several blocks and chunks, the last of them filled up."""
    at, arrays = places(150, kind), tensors(150)
    reference = jax.jit(_in_parts, static_argnums=0)(cap, *arrays, at, at, jnp.int32(window))
    chunks = jax.jit(_in_chunks, static_argnames=("cap", "size"))
    ours = chunks(cap, *arrays, at, at, jnp.int32(window), size=32)
    assert_same(ours, reference, at)


@pytest.mark.parametrize("window", [0, 37])
def test_few_queries_of_packed_rows(window):
    """The last token of each prompt, against all keys of its row."""
    at, (q, keys, values) = places(150, "packed"), tensors(150)
    columns = jnp.asarray([[29, 74, 140], [0, 6, 89], [59, 60, 149]])
    picked = jnp.take_along_axis(q, columns[:, None, None, :, None], axis=3)
    query = at.pick(columns)
    whole = _in_parts(0.0, q, keys, values, at, at, jnp.int32(window))
    reference = jnp.take_along_axis(whole, columns[:, None, None, :, None], axis=3)
    for form, options in ((_in_parts, {}), (_in_chunks, dict(size=8)), (_in_chunks, {})):
        ours = form(0.0, picked, keys, values, query, at, jnp.int32(window), **options)
        assert_same(ours, reference, query)


@pytest.mark.parametrize("window", [0, 37])
def test_queries_see_a_prefix_up_to_their_start(window):
    """Behind 100 tokens that all rows follow, from three places on; in chunks and in parts."""
    own, ahead = places(50, "packed"), 100
    assert own.segments is not None
    start = jnp.asarray([0, 0, 40, ahead])[own.segments]
    shape = ROWS, ahead
    index = jnp.concatenate(
        [jnp.broadcast_to(jnp.arange(ahead), shape), own.index + start], axis=1
    )
    mask = jnp.concatenate([jnp.ones(shape, bool), own.mask], axis=1)
    segments = jnp.concatenate([jnp.full(shape, EVERY), own.segments], axis=1)
    key = Positions(index, mask, segments, None, None)
    query = dataclasses.replace(own, index=own.index + start, start=start)
    q, keys, values = tensors(ahead + 50, queries=50)
    reference = _in_parts(0.0, q, keys, values, query, key, jnp.int32(window))
    ours = _in_chunks(0.0, q, keys, values, query, key, jnp.int32(window), size=16)
    assert_same(ours, reference, query)
    # What a prompt does not see of the prefix may be anything.
    other = _in_parts(
        0.0, q, keys.at[:, :, 40:ahead].set(9.0), values, query, key, jnp.int32(window)
    )
    second = np.asarray(own.segments == 2)
    a, b = (np.moveaxis(np.asarray(x), 3, 1)[second] for x in (other, reference))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["left", "packed"])
def test_gradients_of_chunks(kind):
    """With respect to all three arrays, and along them (forward mode), with a cap and a window."""
    at, arrays = places(90, kind), tensors(90)
    real = at.mask[:, None, None, :, None]

    def loss(form, **options):
        def of(*arrays):
            out = form(2.0, *arrays, at, at, jnp.int32(21), **options)
            return jnp.sum(jnp.where(real, jnp.sin(out), 0))

        return of

    reference = jax.jit(jax.grad(loss(_in_parts), (0, 1, 2)))(*arrays)
    chunked = loss(_in_chunks, size=32)
    ours = jax.jit(jax.grad(chunked, (0, 1, 2)))(*arrays)
    for a, b in zip(ours, reference, strict=True):
        assert float(jnp.abs(b).max()) > 0.1
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    _, along = jax.jit(lambda: jax.jvp(chunked, arrays, arrays))()
    dot = sum(jnp.vdot(a, b) for a, b in zip(reference, arrays, strict=True))
    np.testing.assert_allclose(along, dot, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("window", "cap"), LAYERS)
def test_splash_is_parts(kind, window, cap):
    """The kernel itself, interpreted; 200 tokens are padded to 256."""
    at, arrays = places(200, kind), tensors(200)
    reference = _in_parts(cap, *arrays, at, at, jnp.int32(window))
    ours = attention_kernels.splash(window, cap, *arrays, at, interpret=True)
    assert_same(ours, reference, at)


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("window", [0, 37])
def test_what_cudnn_is_asked_for_is_parts(kind, window):
    """The same call by XLA, in bfloat16."""
    at, arrays = places(90, kind), tensors(90, dtype=jnp.bfloat16)
    reference = _in_parts(0.0, *arrays, at, at, jnp.int32(window))
    with jax.numpy_dtype_promotion("standard"):  # JAX's own function promotes
        ours = attention_kernels.cudnn(window, 0.0, *arrays, at, implementation="xla")
    assert_same(ours, reference, at, atol=0.03)


def test_a_kernel_has_the_derivatives_of_chunks():
    """Each window that there may be has its own kernel; jvp and grad go around both."""
    at, arrays = places(130, "packed"), tensors(130)
    windows = (0, 37, 0)

    def kernel(window, cap, q, keys, values, at):
        return attention_kernels.splash(window, cap, q, keys, values, at, interpret=True)

    def run(form, *options):
        def of(window, *arrays):
            out = form(*options, *arrays, at, at, window)
            return jnp.sum(jnp.where(at.mask[:, None, None, :, None], jnp.sin(out), 0))

        return jax.jit(jax.value_and_grad(of, 1))

    ours = run(attention._by_kernel, kernel, windows, 0.0)
    reference = run(_in_parts, 0.0)
    for window in set(windows):
        for a, b in zip(
            ours(jnp.int32(window), *arrays), reference(jnp.int32(window), *arrays), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_splash_over_a_mesh_and_under_vmap():
    """Rows over one axis, key/value heads over another: no device sees all of either."""
    mesh = make_mesh(3, 1, 2)
    at, arrays = places(200, "packed"), tensors(200)
    reference = _in_parts(0.0, *arrays, at, at, jnp.int32(37))
    cut = NamedSharding(mesh, PartitionSpec("data", "tensor"))
    spread = [jax.device_put(a, cut) for a in arrays]

    def splash(q, keys, values, interpret=False):
        return attention_kernels.splash(37, 0.0, q, keys, values, at, interpret=interpret)

    run = jax.jit(functools.partial(splash, interpret=True))
    ours = run(*spread)
    assert_same(ours, reference, at)
    assert ours.sharding.is_equivalent_to(cut, ours.ndim)
    # A TPU's compiler takes no partitioner of ours: each device's part is in the program.
    text = jax.jit(splash).trace(*spread).lower(lowering_platforms=("tpu",)).as_text()
    assert "@tpu_custom_call" in text and "CustomSPMDPartitioning" not in text
    assert "manual_computation" in text
    q, keys, values = arrays
    both = jax.vmap(run, (0, None, None))(jnp.stack([q, 2 * q]), keys, values)
    assert_same(both[0], reference, at)
    assert_same(both[1], _in_parts(0.0, 2 * q, keys, values, at, at, jnp.int32(37)), at)


def test_which_kernel(monkeypatch):
    asked: dict[str, Any] = dict(
        own=True, tokens=4096, width=128, dtype=jnp.bfloat16, segments=False, cap=0.0
    )
    for width, platforms in ((0, {"tpu"}), (128, {"tpu", "cuda"})):
        monkeypatch.setattr(attention, "cudnn_width", lambda width=width: width)
        assert kernels(**asked).keys() == platforms
    # Float32 stays float32: splash can, cuDNN cannot.
    assert kernels(**asked | dict(dtype=jnp.float32)) == {"tpu": "splash"}
    assert kernels(**asked | dict(dtype=jnp.float16)) == {"cuda": "cudnn"}
    for refused in (dict(segments=True), dict(cap=30.0), dict(width=256), dict(width=100)):
        assert kernels(**asked | refused) == {"tpu": "splash"}
    for refused in (dict(own=False), dict(tokens=512)):
        assert kernels(**asked | refused) == {}


def jaxprs(jaxpr):
    """A jaxpr and all those inside its equations."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from jaxprs(inner)


def test_products_in_splash_are_of_the_highest_precision():
    at, arrays = places(128, "right"), tensors(128)
    traced = jax.jit(lambda q, k, v: attention_kernels.splash(0, 0.0, q, k, v, at)).trace(*arrays)
    equations = [e for j in jaxprs(traced.jaxpr.jaxpr) for e in j.eqns]
    dots = [e for e in equations if e.primitive.name == "dot_general"]
    assert len(dots) == 2
    highest = jax.lax.Precision.HIGHEST
    assert all(d.params["precision"] == (highest, highest) for d in dots)


def elements(text):
    """The number of elements of the largest array in a lowered program."""
    shapes = re.findall(r"tensor<((?:\d+x)+)", text)
    return max(int(np.prod([int(n) for n in s.split("x")[:-1]])) for s in shapes)


@pytest.mark.parametrize(("dtype", "packed"), [("float32", True), ("bfloat16", False)])
def test_no_square_array_where_there_is_an_accelerator(dtype, packed):
    """Lowered from here for a TPU and a GPU, forward and backward, at 8,192 tokens."""
    tokens = 8192
    config = rm.config(windows=(0, 700, 0), max_positions=tokens, attention_softcap=3.0)
    params = jax.tree.map(lambda a: a.astype(dtype), rm.params(config, 0))

    def run(x, mask, segments):
        at = Positions.of(config, mask, segments if packed else None)
        return decoder.forward(config, params, x, at)[0]

    def slope(x, *rest):  # through a scan that keeps what it can
        return jax.grad(lambda x: jnp.sum(jnp.square(run(x, *rest))))(x)

    shapes = (
        jax.ShapeDtypeStruct((1, tokens, config.width), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), bool),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
    )
    for function in (run, slope):
        traced = jax.jit(function).trace(*shapes)
        texts = {
            p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cuda", "cpu")
        }
        assert elements(texts["tpu"]) < tokens**2 / 8
        assert elements(texts["cuda"]) < tokens**2 / 8
        assert elements(texts["cpu"]) >= tokens**2  # the reader of shapes sees what there is
        assert "tpu_custom_call" in texts["tpu"]
        assert "custom_call" not in texts["cuda"]


# Long rows are attended to in parts on the CPU, packed ones too, which changes nothing.


def long_rows(config, length, rows):
    """Three rows, padded on a side, or packed: prompts of unequal lengths and padding."""
    mask = np.arange(length) < np.array([[length], [length // 2], [1]])
    if rows != "packed":
        return Positions.of(config, jnp.asarray(mask if rows == "right" else mask[:, ::-1]))
    ends = np.array([[length // 5, length - 9], [1, length // 2], [length // 3, length]])
    segments = (np.arange(length)[None, :, None] >= ends[:, None]).sum(axis=-1) + 1
    segments = jnp.asarray(np.where(segments > 2, 0, segments))
    return Positions.of(config, segments > 0, segments)


@pytest.mark.slow
@pytest.mark.parametrize("length", [129, 514])
@pytest.mark.parametrize("rows", ["left", "right", "packed"])
@pytest.mark.parametrize("layer", [0, 1])  # the second one has a window
def test_parts_are_the_whole(length, rows, layer):
    config = rm.config(max_positions=1024)
    params = jax.tree.map(lambda x: x[layer], rm.params(config, 0)["layers"])
    info = jax.tree.map(lambda x: x[layer], layer_infos(config))
    at = long_rows(config, length, rows)
    mask = at.mask
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*mask.shape, config.width)), jnp.float32)
    keys_values = block_keys_values(config, {"params": params}, x, at, info)
    one_piece = block_delta(config, {"params": params}, x, keys_values, at, at, info)
    parts = whole_block(config, {"params": params}, x, at, info)
    for a, b in zip(parts, one_piece, strict=True):
        np.testing.assert_allclose(a[mask], b[mask], rtol=0, atol=1e-5)
        assert bool(jnp.isfinite(a).all())


@pytest.mark.parametrize("rows", ["right", "packed"])
def test_rows_that_attend_to_themselves_are_cut(rows):
    config = rm.config(max_positions=1024)
    params = jax.tree.map(lambda x: x[0], rm.params(config, 0)["layers"])
    info = jax.tree.map(lambda x: x[0], layer_infos(config))
    at = long_rows(config, 514, rows)
    x = jnp.zeros((*at.mask.shape, config.width))
    keys_values = block_keys_values(config, {"params": params}, x, at, info)
    whole = whole_block.lower(config, {"params": params}, x, at, info)
    other = block_delta.lower(config, {"params": params}, x, keys_values, at, at, info)
    products = [text.as_text().count("stablehlo.dot_general") for text in (whole, other)]
    assert products == [7 + 2 * 8, 5 + 2]  # those of q, k, v, o, gate, up and down; k and v before


def test_where_rows_are_cut():
    assert _query_parts(True, 95, 95) == [(0, 95, 95)]
    assert _query_parts(True, 97, 97)[::3] == [(0, 24, 24), (72, 97, 97)]
    assert [stop for _, stop, _ in _query_parts(True, 512, 512)] == list(range(64, 513, 64))
    assert _query_parts(False, 512, 600) == [(0, 512, 600)]
