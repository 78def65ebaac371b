"""A convolution as matrix products: XLA's, PyTorch's and ours are the same function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from reward_jax.models.conv import (
    MANY,
    conv1d,
    conv1d_transpose,
    conv2d,
    conv2d_doubled,
    doubled,
)

SHAPES = [
    (length, size, stride, padding)
    for length in range(1, 10)
    for size in (5, 3, 1)
    for stride in (1, 2)
    for padding in (size // 2,)
] + [
    (9, 5, 1, 0),
    (9, 3, 2, 2),
    (4, 1, 1, 2),
    (6, 5, 2, 4),
    (2, 3, 2, 1),
    (5, 5, 1, 0),
    (18, 3, 2, 1),
]


METHODS: tuple[Any, ...] = ("matmul", "lax")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def all_orders(function, x, kernel, probe):
    """Value, gradients in x and kernel, and gradients of the x-gradient's square (second order).

    The second is what gradient matching needs. A cube makes the function other than linear in x.
    """

    def total(x, kernel):
        return jnp.sum(probe * function(x, kernel) ** 3)

    def matched(x, kernel):
        return jnp.sum(jnp.square(jax.grad(total)(x, kernel)))

    return (
        function(x, kernel),
        jax.grad(total, (0, 1))(x, kernel),
        jax.grad(matched, (0, 1))(x, kernel),
    )


def assert_close(got, wanted):
    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, np.abs(b).max()))

    jax.tree.map(check, got, wanted)


@pytest.mark.parametrize("rows", [2, MANY])
def test_matmul_is_torch_is_lax(rows):
    x = [normal(i, rows, shape[0], 3) for i, shape in enumerate(SHAPES)]
    kernels = [normal(100 + i, shape[1], 3, 4) for i, shape in enumerate(SHAPES)]

    @jax.jit
    def ours(x, kernels):
        return [
            [
                conv1d(a, k, stride=stride, padding=padding, method=m)
                for m in ("matmul", "lax", "auto")
            ]
            for a, k, (_, _, stride, padding) in zip(x, kernels, SHAPES, strict=True)
        ]

    for a, k, shape, results in zip(x, kernels, SHAPES, ours(x, kernels), strict=True):
        theirs = torch.nn.functional.conv1d(
            torch.from_numpy(a).mT,
            torch.from_numpy(k).permute(2, 1, 0),
            stride=shape[2],
            padding=shape[3],
        ).mT
        for got in results:
            assert got.shape == theirs.shape, shape
            np.testing.assert_allclose(got, theirs, atol=1e-5, err_msg=str(shape))


@pytest.mark.parametrize(
    "rows, length, size, stride",
    [(2, n, *kind) for n in (1, 2, 5, 9) for kind in ((5, 1), (3, 2), (1, 2))]
    + [(MANY, 4, 5, 1), (MANY, 4, 3, 2)],
)
def test_derivatives_agree(rows, length, size, stride):
    x, kernel = normal(0, rows, length, 2), normal(1, size, 2, 3)
    padding = size // 2
    probe = normal(2, rows, (length + 2 * padding - size) // stride + 1, 3)

    @jax.jit
    def orders(x, kernel):
        return [
            all_orders(
                lambda x, k, m=method: conv1d(x, k, stride=stride, padding=padding, method=m),
                x,
                kernel,
                probe,
            )
            for method in METHODS
        ]

    ours, wanted = orders(x, kernel)
    assert_close(ours, wanted)
    assert np.abs(wanted[2][1]).max() > 1e-3


@pytest.mark.parametrize("rows, length", [(2, 1), (2, 2), (2, 5), (MANY, 1), (MANY, 2)])
def test_transpose_is_torchs_to_the_second_derivative(rows, length):
    x, kernel = normal(3, rows, length, 3), normal(4, 4, 3, 2)
    probe = normal(5, rows, 2 * length, 2)
    a, k, p = torch.from_numpy(x), torch.from_numpy(kernel), torch.from_numpy(probe)
    a, k = a.requires_grad_(), k.requires_grad_()
    y = torch.nn.functional.conv_transpose1d(a.mT, k.permute(1, 2, 0), stride=2, padding=1).mT
    first = torch.autograd.grad((p * y**3).sum(), (a, k), create_graph=True)
    second = torch.autograd.grad((first[0] ** 2).sum(), (a, k))
    wanted = jax.tree.map(lambda x: x.detach().numpy(), (y, first, second))

    @jax.jit
    def orders(x, kernel):
        return [
            all_orders(lambda x, k, m=m: conv1d_transpose(x, k, method=m), x, kernel, probe)
            for m in METHODS
        ]

    for got in orders(x, kernel):
        assert_close(got, wanted)


@pytest.mark.parametrize(("length", "taps"), [(1, 1), (2, 4), (4, 14)])
def test_taps_that_meet_only_padding_are_left_out(length, taps):
    """Of a kernel of 5, at few time steps."""
    x, kernel = jnp.ones((MANY, length, 8)), jnp.ones((5, 8, 8))
    program = jax.make_jaxpr(lambda x, k: conv1d(x, k, padding=2, method="matmul"))(x, kernel)
    products = [e.invars[0].aval.shape for e in program.eqns if e.primitive.name == "dot_general"]
    assert sum(inner for _, inner in products) == taps * 8


SHAPES_2D: list[Any] = [  # rows, columns, taps, stride, padding
    (7, 7, (3, 3), 1, 1),
    (8, 5, (3, 3), 2, 1),
    (5, 9, (5, 2), 1, ((2, 1), (0, 3))),
    (6, 6, (3, 3), 2, ((0, 1), (0, 1))),
    (4, 4, (1, 1), 1, 0),
    (5, 4, (1, 1), 2, 0),
    (9, 3, (4, 3), 3, 2),
    (1, 2, (3, 3), 1, 1),
]


@pytest.mark.parametrize(("height", "width", "taps", "stride", "padding"), SHAPES_2D)
def test_images_convolve_as_torchs(height, width, taps, stride, padding):
    x, kernel = normal(0, 2, height, width, 3), normal(1, *taps, 3, 4)
    (top, bottom), (left, right) = ((padding, padding),) * 2 if padding in range(9) else padding
    padded = torch.nn.functional.pad(
        torch.from_numpy(x).permute(0, 3, 1, 2), (left, right, top, bottom)
    )
    theirs = torch.nn.functional.conv2d(
        padded, torch.from_numpy(kernel).permute(3, 2, 0, 1), stride=stride
    ).permute(0, 2, 3, 1)
    got = conv2d(jnp.asarray(x), jnp.asarray(kernel), stride=stride, padding=padding)
    assert got.shape == theirs.shape
    np.testing.assert_allclose(got, theirs, atol=1e-5)


def test_doubled_is_each_position_four_times():
    x = np.arange(12.0, dtype=np.float32).reshape(1, 2, 3, 2)
    twice = np.repeat(np.repeat(x, 2, 1), 2, 2)
    np.testing.assert_array_equal(doubled(jnp.asarray(x), (4, 6)), twice)
    np.testing.assert_array_equal(doubled(jnp.asarray(x), (3, 5)), twice[:, :3, :5])


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (4, 5), (2, 1)])
def test_products_before_doubling_are_those_after(size):
    x, kernel = normal(0, 2, -(-size[0] // 2), -(-size[1] // 2), 2), normal(1, 3, 3, 2, 3)
    probe = normal(2, 2, *size, 3)

    @jax.jit
    def orders(x, kernel):
        return [
            all_orders(lambda x, k, m=m: conv2d_doubled(x, k, size, method=m), x, kernel, probe)
            for m in METHODS
        ]

    ours, wanted = orders(x, kernel)
    assert_close(ours, wanted)
    assert np.abs(wanted[2][1]).max() > 1e-3
    program = jax.make_jaxpr(lambda x, k: conv2d_doubled(x, k, size, method="matmul"))(x, kernel)
    assert str(program).count("dot_general[") == 1 and "conv_general" not in str(program)
