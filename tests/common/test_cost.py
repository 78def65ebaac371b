"""FLOPs and bytes of products, and exchanges between devices, against what they are by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common_jax.cost import (
    collectives,
    flops_by_type,
    products,
    shard_bytes,
    uncountable,
)
from common_jax.mesh import make_mesh


def test_products_of_loops_branches_and_convolutions():
    def program(x, w, signal, taps):
        def body(x, _):
            return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x + 1, x), None

        x, _ = jax.lax.scan(body, x @ w, length=3)
        axes = ("NWC", "WIO", "NWC")
        return x, jax.lax.conv_general_dilated(signal, taps, (1,), "SAME", dimension_numbers=axes)

    x, w, signal, taps = (jnp.ones(s) for s in ((4, 8), (8, 8), (1, 6, 5), (3, 5, 2)))
    found = products(jax.make_jaxpr(program)(x, w, signal, taps))
    assert found.flops == 4 * (2 * 4 * 8 * 8) + 2 * (6 * 2) * (3 * 5)
    assert found.bytes == 4 * (4 * (32 + 64 + 32) + 30 + 30 + 12)


def test_products_by_the_type_of_their_operands():
    """Of two types the wider; of a result's none."""

    def program(x, w):
        narrow = x.astype(jnp.bfloat16)
        y = jax.lax.dot(narrow, w, preferred_element_type=jnp.float32)
        both = jax.lax.scan(lambda x, _: (jax.lax.dot(x, w), None), x, length=3)[0]
        return y, both

    found = flops_by_type(jax.make_jaxpr(program)(jnp.ones((4, 8)), jnp.ones((8, 8), "bfloat16")))
    one = 2 * 4 * 8 * 8
    assert found == {"bfloat16": one, "float32": 3 * one}


@pytest.mark.parametrize(("kind", "sent"), [("all-reduce", 1.5), ("all-gather", 3)])
def test_exchanges_in_loops_are_counted(kind, sent):
    """Of a ring of four: each sends 3/4 of what it has twice, or its own part three times."""
    mesh = make_mesh(2, 4)
    where = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def body(x, _):
        if kind == "all-gather":  # of each round's own numbers
            y = jax.lax.with_sharding_constraint(x, whole)
            return jax.lax.with_sharding_constraint(jnp.sin(y), where), None
        return x + x.sum(axis=1, keepdims=True), None

    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=where)
    compiled = jax.jit(lambda x: jax.lax.scan(body, x, length=5)[0]).lower(x).compile()
    found = [c for c in collectives(str(compiled.as_text())) if c.kind == kind]
    assert [c.times for c in found] == [5]
    one = 16 * 4 * (1 if kind == "all-reduce" else 2)  # a device's part of it, in bytes
    assert found[0].sent == one * sent
    assert found[0].shapes == (((16, 8),) if kind == "all-gather" else found[0].shapes)
    assert shard_bytes({"x": x}) == 16 * 2 * 4


@pytest.mark.parametrize(
    ("left", "right", "said"),
    [
        ((70_000, 30_000, 8), (8, 4), None),
        ((80_000, 30_000, 8), (8, 4), "a product of 80000 x 30000 x 8 and 8 x 4 numbers"),
        ((2, 8), (8, 2**31), "an array of 8 x 2147483648 numbers"),
        ((2**30, 2**30), (2**30, 2), "an array of 1073741824 x 1073741824 numbers"),
    ],
)
def test_arrays_beyond_counting(left, right, said):
    """Of a product the free axes become one; also where it is computed in a loop."""

    def program(x, y):
        return jax.lax.scan(lambda c, _: (c, (x @ y).sum()), 0.0, length=2)

    given = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (left, right))
    assert uncountable(jax.make_jaxpr(program)(*given)) == said


def test_positions_of_convolutions_beyond_counting():
    def program(signal, taps):
        axes = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(signal, taps, (1,), "SAME", dimension_numbers=axes)

    signal, taps = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2**16, 2**15, 4), (3, 4, 4)))
    assert "a product of 65536 x 32768 x 4" in str(
        uncountable(jax.make_jaxpr(program)(signal, taps))
    )


# As a TPU's compiler writes a loop, but for what is not read.
TPU = """
%body.1 (p: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {
  %all-gather.9 = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%w), channel_id=3, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={1}
}

%region_1.2 (p: (s32[], bf16[128,64])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(12)
  ROOT %lt.3 = pred[]{:T(512)} compare(%i, %constant.5), direction=LT
}

ENTRY %main.3 (p: bf16[128,64]) -> bf16[128,64] {
  %while.9 = (s32[]{:T(128)}, bf16[128,64]{1,0:T(8,128)}) while(%tuple.13), condition=%region_1.2, body=%body.1
}
"""  # noqa: E501


def test_rounds_of_a_loop_that_does_not_state_them():
    (one,) = collectives(TPU)
    assert one.times == 12 and one.sent == 64 * 64 * 2 * 7 / 8
    (one,) = collectives(TPU.replace("direction=LT", "direction=NE"))
    assert one.times == 1


# Exchanges that other work goes on beside, as GPUs' and TPUs' compilers write them.
BEGUN = """
ENTRY %main.3 (p: bf16[64,128]) -> bf16[512,128] {
  %gather.1 = (bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[512,128]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %gathered.1 = bf16[512,128]{1,0} all-gather-done(%gather.1)
  %gather.2 = ((f32[2]{0}, f32[3,5]{1,0}), (f32[8]{0}, f32[12,5]{1,0})) all-gather-start(%q, %r), replica_groups={{0,1,2,3}}, dimensions={0}
  %move.1 = (f32[6,32]{0,1}, f32[6,32]{0,1}, u32[], u32[]) collective-permute-start(%s), source_target_pairs={{0,1},{1,2}}
  %scatter.1 = ((f32[20]{0}), f32[10]{0}) reduce-scatter-start(%t), replica_groups={{0,1}}, dimensions={0}, to_apply=%add
  %sum.1 = f32[7]{0} all-reduce-start(%u), replica_groups={{0,1}}, to_apply=%add
  %sum.2 = (f32[7]{0}, f32[9]{0}) all-reduce-start(%u, %v), replica_groups={{0,1}}, to_apply=%add
}
"""  # noqa: E501


def test_of_exchanges_that_are_begun_the_results_count():
    """Neither their operands nor what else the compiler keeps with them."""
    found = collectives(BEGUN)
    assert [(one.kind, one.shapes, one.size, one.sent) for one in found] == [
        ("all-gather", ((512, 128),), 2 * 512 * 128, 2 * 512 * 128 * 7 / 8),
        ("all-gather", ((8,), (12, 5)), 4 * 68, 4 * 68 * 3 / 4),
        ("collective-permute", ((6, 32),), 4 * 192, 4 * 192),
        ("reduce-scatter", ((10,),), 40, 40),
        ("all-reduce", ((7,),), 28, 28),
        ("all-reduce", ((7,), (9,)), 64, 64),
    ]
