"""Eager, jitted, sharded and under pmap: the same numbers, and one compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.cost import collectives
from common_jax.mesh import batch_sharding, constrain, make_mesh, pmap, replicate
from common_jax.partition import whole_along_fsdp
from tests.tuco import random_models as rm
from tuco_jax.core import walk
from tuco_jax.core.decompose import decompose
from tuco_jax.core.last_token import last_token, tuco
from tuco_jax.core.residual import share
from tuco_jax.finetune.batches import Batch
from tuco_jax.finetune.step import Method, OptimizerOptions, make_step, start
from tuco_jax.generation import decoding
from tuco_jax.generation.sampling import Sampling, row_keys
from tuco_jax.gradients.attribution import attribute
from tuco_jax.gradients.layer_alpha import Choices, LayerAlphaOptions, fit_layer_alpha
from tuco_jax.gradients.soft_prompt import SoftPromptOptions, Tokens, fit_soft_prompt
from tuco_jax.models import decoder
from tuco_jax.models.pair import Notes
from tuco_jax.models.positions import Positions
from tuco_jax.models.sharding import place, placement, shardings

# Every cut dimension divides by 8: nothing falls back to whole copies by accident.
CONFIG = rm.config(
    vocab_size=64, width=32, heads=8, kv_heads=8, head_dim=4, mlp_width=48,
    ropes=(rm.rope(4), rm.rope(4, 500.0)),
)  # fmt: skip
PAIRS = {
    "full": lambda: rm.full_pair(base=CONFIG),
    "adapter": lambda: rm.adapter_pair(base=CONFIG),
}
LAYOUTS = [
    ("full", (8, 1, 1)),
    ("full", (1, 8, 1)),
    ("full", (1, 1, 8)),
    ("full", (2, 2, 2)),
    ("adapter", (1, 2, 4)),
]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    return PAIRS[request.param]()


@pytest.fixture(scope="module")
def inputs():
    return rm.batch(rows=8, vocab=64)


def both(pair, tokens, mask, alpha=0.7, mesh=None):
    full = decompose(pair, tokens, mask, alpha, logits=True, mesh=mesh)
    return full, last_token(pair, tokens, mask, mesh=mesh)


@pytest.fixture(scope="module")
def expected(pair, inputs):
    return jax.jit(both)(pair, *inputs)


def assert_close(got, expected, tolerance):
    """Equal within `tolerance` of the largest entry of each array."""

    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))

    jax.tree.map(check, got, expected)


def assert_same(got, expected, mask):
    """Equal at real tokens; what stands at padding is nobody's business."""
    real = np.asarray(mask)
    (full, last), (full_expected, last_expected) = got, expected
    np.testing.assert_allclose(last.tuco, last_expected.tuco, atol=1e-6)
    np.testing.assert_allclose(last.layers, last_expected.layers, atol=1e-6)
    assert_close(last, last_expected, 1e-5)
    full, full_expected = jax.tree.map(lambda x: x[real], (full, full_expected))
    assert_close(full, full_expected, 1e-5)


@pytest.mark.slow
def test_eager_equals_jit(pair, inputs, expected):
    with jax.disable_jit():
        got = both(pair, *inputs)
    assert_same(got, expected, inputs[1])


@pytest.mark.slow
@pytest.mark.parametrize("pair, layout", LAYOUTS, ids=str, indirect=["pair"])
def test_sharded_equals_one_device(pair, inputs, expected, layout):
    mesh = make_mesh(*layout)
    spread = place(pair, mesh)
    batch = jax.device_put(inputs, batch_sharding(mesh))
    got = jax.jit(lambda p, t, m: both(p, t, m, mesh=mesh))(spread, *batch)
    assert_same(got, expected, inputs[1])
    assert got[1].ptc.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    q = spread.base["layers"]["attention"]["q"]["kernel"]
    assert q.addressable_shards[0].data.size == q.size // (layout[1] * layout[2])


def test_a_mixture_of_experts_over_a_mesh(inputs):
    """Each device takes its own rows through all experts; six of the eight rows do not divide."""
    config = dataclasses.replace(CONFIG, mlp_bias=False, experts=4, experts_used=2)
    pair = rm.full_pair(base=config)
    expected = jax.jit(last_token)(pair, *inputs)
    mesh = make_mesh(2, 2, 2)
    spread = place(pair, mesh)
    up = spread.base["layers"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size == up.size // 4
    run = jax.jit(lambda p, t, m: last_token(p, t, m, mesh=mesh))
    rows = jax.device_put(inputs, batch_sharding(mesh))
    compiled = run.lower(spread, *rows).compile()
    found = [x for one in collectives(str(compiled.as_text())) for x in one.shapes]
    assert (1, 4, 32, 24) in found  # experts of a layer, whole along fsdp
    assert not [x for x in found if {8, inputs[0].size} & set(x)]  # nowhere are all eight rows
    for got, count in ((compiled(spread, *rows), 8), (run(spread, *(x[:6] for x in inputs)), 6)):
        np.testing.assert_allclose(got.tuco, expected.tuco[:count], atol=1e-6)
        np.testing.assert_allclose(got.layers, expected.layers[:, :count], atol=1e-6)


@pytest.mark.parametrize("pair", ["full"], indirect=True)
def test_rows_that_do_not_divide(pair, inputs, expected):
    mesh = make_mesh(2, 2, 2)
    tokens, mask = (x[:6] for x in inputs)
    got = jax.jit(lambda p, t, m: tuco(p, t, m, mesh=mesh))(place(pair, mesh), tokens, mask)
    np.testing.assert_allclose(got, expected[1].tuco[:6], atol=1e-6)


def test_pmap_equals_jit(pair, inputs, expected):
    rows = 7  # one row is made up on the eighth device and cut off again
    tokens, mask = (x[:rows] for x in inputs)
    full_axes, last_axes = jax.tree.map(lambda _: 0, expected)
    last_axes = dataclasses.replace(last_axes, layers=1)  # beta_l stands as [L, B]
    run = pmap(both, out_axes=(full_axes, last_axes))
    got = run(replicate(pair), tokens, mask)
    full, last = expected
    wanted = (
        jax.tree.map(lambda x: x[:rows], full),
        jax.tree.map(lambda x, axis: jnp.take(x, jnp.arange(rows), axis), last, last_axes),
    )
    assert_same(got, wanted, mask)


def test_gradients_equal_on_a_mesh(inputs):
    """In alpha, embeddings and weights: the base's, the tuned model's and the factors'."""
    pair = dataclasses.replace(PAIRS["full"](), lora=rm.lora(CONFIG, 7))
    pair = jax.tree.map(lambda x: 0.7 * x, pair)  # milder: gradients near 1, not 40
    tokens, mask = inputs
    x = jax.random.normal(jax.random.key(5), (*mask.shape, CONFIG.width))

    def loss(pair, alpha, x, mesh=None):
        out = decompose(pair, mask=mask, alpha=alpha, embeddings=x, mesh=mesh)
        ratio = share(out.ptc, out.ftc)
        return jnp.square(out.hidden[mask]).mean() + ratio[mask].mean()

    alpha = jnp.array([0.3, 1.0, 1.4])[:, None]
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    wanted = jax.jit(gradient)(pair, alpha, x)
    mesh = make_mesh(2, 2, 2)
    got = jax.jit(lambda *a: gradient(*a, mesh=mesh))(
        place(pair, mesh), alpha, jax.device_put(x, batch_sharding(mesh))
    )
    assert_close(got, wanted, 1e-5)
    moved = (got[0].base["layers"], got[0].tuned["layers"], got[0].lora["layers"], *got[1:])
    assert all(float(jnp.abs(g).max()) > 1e-3 for g in jax.tree.leaves(moved) if g.ndim > 2)


def test_forward_on_a_mesh(inputs):
    pair = PAIRS["adapter"]()
    tokens, mask = inputs

    def run(params, lora, mesh=None):
        at = Positions.of(CONFIG, mask)
        x = decoder.embed(CONFIG, params, tokens, at)
        return decoder.forward(CONFIG, params, x, at, lora, hidden_states=True, mesh=mesh)

    mesh = make_mesh(2, 4, 1)
    wanted = jax.jit(run)(pair.tuned_params, pair.lora)
    spread = place(pair, mesh)
    got = jax.jit(lambda *a: run(*a, mesh=mesh))(spread.tuned_params, spread.lora)
    assert_close(got, wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("function", [tuco, functools.partial(attribute, points=2)])
def test_weights_are_gathered_and_activations_stay(function):
    """Under fsdp no product is summed over devices: collectives move weights only."""
    pair, mesh = PAIRS["full"](), make_mesh(1, 8, 1)
    batch = jax.device_put(rm.batch(rows=8, vocab=64), batch_sharding(mesh))
    lowered = jax.jit(lambda *a: function(*a, mesh=mesh)).lower(place(pair, mesh), *batch)
    text = str(lowered.compile().as_text())
    assert "all-gather" in text
    assert "all-reduce" not in text and "reduce-scatter" not in text


def test_other_values_and_notes_do_not_recompile(inputs):
    traces = []

    @jax.jit
    def score(pair, tokens, mask):
        traces.append(1)
        return tuco(pair, tokens, mask)

    first, second = (rm.full_pair(seed, base=CONFIG) for seed in (0, 5))
    a = score(first, *inputs)
    b = score(dataclasses.replace(second, notes=Notes(["RoPE bases differ"])), *inputs)
    assert len(traces) == 1
    assert float(jnp.abs(a - b).max()) > 1e-3


def test_rules_cover_every_matrix_and_fall_back_to_whole_copies():
    mesh = make_mesh(1, 2, 4)
    tree = rm.adapter_pair(base=CONFIG)
    specs = jax.tree_util.tree_leaves_with_path(shardings(tree, mesh))
    for path, sharding in specs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("kernel", "/a", "/b", "table")):
            assert any(sharding.spec), f"{name} is whole on every device"
        if "norm" in name:
            assert not any(sharding.spec)
    where = placement(mesh)
    assert tuple(where("layers/attention/q/kernel", (3, 32, 32)).spec) == (None, "fsdp", "tensor")
    assert tuple(where("lora/layers/mlp/down/a", (3, 48, 2)).spec) == (None, "tensor", None)
    assert tuple(where("tuned/head/kernel", (32, 61)).spec) == ("fsdp", None)


def test_constrain_without_a_mesh_is_nothing():
    x = jnp.ones((3, 2, 4))
    assert constrain(x, None) is x


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_research_extensions_run_where_the_pair_lies(name):
    """Attribution, soft prompts and layer alphas: over shards as on one device."""
    pair, mesh = PAIRS[name](), make_mesh(2, 2, 2)
    tokens, mask = rm.batch(rows=8, vocab=64)
    placed = place(pair, mesh)
    cut = jax.device_put((tokens, mask), batch_sharding(mesh))

    got = attribute(placed, *cut, points=2, mesh=mesh)
    want = attribute(pair, tokens, mask, points=2)
    assert_close(got, want, 1e-4)
    right = jnp.arange(tokens.shape[1])[None] < 3 + jnp.arange(8)[:, None] % 4
    options = SoftPromptOptions(vectors=2, steps=2)
    found = [fit_soft_prompt(p, Tokens(tokens, right), options) for p in (placed, pair)]
    assert_close(found[0].vectors, found[1].vectors, 1e-4)
    choices = Choices(tokens, right, jnp.tile(jnp.arange(4), (8, 1)), jnp.arange(8) % 4)
    alphas = [fit_layer_alpha(p, choices, LayerAlphaOptions(2, 0.05))[0] for p in (placed, pair)]
    assert_close(alphas[0], alphas[1], 1e-4)


def decoded(pair, tokens, mask, mesh):
    """Two tokens of each row, by the loop that decodes."""
    rows = len(tokens)
    request = decoding.Request(
        alpha=jnp.full((pair.base_config.depth, rows), 0.7),
        limits=jnp.full(rows, 4),
        before=jnp.zeros(rows, jnp.int32),
        keys=row_keys(0, jnp.arange(rows)),
        eos=jnp.asarray([1]),
        sampling=Sampling.of(),
    )
    source = walk.Stacked.of(pair)
    progress = decoding.begin(source, request, tokens, mask, room=4, mesh=mesh)
    return decoding.resume(source, request, progress, 2, mesh=mesh).tokens


def tuned(pair, tokens, mask, mesh):
    """A step of full fine-tuning on all tokens but the first."""
    optimizer = OptimizerOptions().make(4)
    step = make_step(pair.base_config, Method(None, "float32"), optimizer, mesh=mesh)
    columns = jnp.tile(jnp.arange(tokens.shape[1] - 1), (len(tokens), 1))
    weights = mask[:, 1:].astype(jnp.float32)
    batch = Batch(tokens, mask, mask.astype(jnp.int32), columns, tokens[:, 1:], weights)
    return step(start(pair.base, optimizer), {}, jax.tree.map(lambda x: x[None], batch))


PROGRAMS = {
    "score": lambda pair, tokens, mask, mesh: tuco(pair, tokens, mask, mesh=mesh),
    "decompose": lambda pair, tokens, mask, mesh: decompose(
        pair, tokens, mask, 0.7, logits=True, mesh=mesh
    ),
    "decode": decoded,
    "fine-tune": tuned,
}


def with_factors(base):
    """Of another rank than there are layers: a layer's factors are told from stacked biases."""
    return dataclasses.replace(rm.adapter_pair(base=base), lora=rm.lora(base, 1, rank=5))


HELD = {
    "full": rm.full_pair,
    "adapter": with_factors,
    "experts": lambda base: with_factors(
        dataclasses.replace(base, mlp_bias=False, experts=4, experts_used=2)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "held", "layout"),
    [
        ("score", "full", (1, 8, 1)),
        ("score", "full", (1, 1, 8)),
        *((name, "full", (2, 2, 2)) for name in PROGRAMS),
        ("score", "adapter", (2, 2, 2)),
        ("decode", "adapter", (2, 2, 2)),
        ("score", "experts", (2, 2, 2)),
    ],
    ids=str,
)
def test_no_stacked_weight_is_ever_whole(program, held, layout):
    """What devices exchange is of one layer: fsdp gathers each where it is used.

    No table is gathered, either. The head is, along fsdp, where there are logits, and summed there
    is its gradient.
    """
    config = dataclasses.replace(CONFIG, vocab_size=96, ropes=(), rope_index=())
    pair, mesh = HELD[held](base=config), make_mesh(*layout)
    batch = jax.device_put(rm.batch(rows=8, vocab=64), batch_sharding(mesh))
    run = jax.jit(lambda *a: PROGRAMS[program](*a, mesh))
    found = collectives(str(run.lower(place(pair, mesh), *batch).compile().as_text()))
    stacked, tables = set(), set()
    for path, x in jax.tree_util.tree_leaves_with_path(pair):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        where = placement(mesh)(name, x.shape)
        if any(where.spec) and "/head/" not in name:
            whole = {x.shape, whole_along_fsdp(where).shard_shape(x.shape)}
            whole -= {where.shard_shape(x.shape)}
            (stacked if "/layers/" in name else tables).update(whole)
    assert stacked and tables
    assert not [one for one in found if stacked & set(one.shapes)]
    gathered = [one for one in found if one.kind == "all-gather"]
    assert not [one for one in gathered if tables & set(one.shapes)]
    assert any(one.times > 1 for one in gathered) == (layout[1] > 1)
