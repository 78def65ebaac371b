"""Convolutions, in the form that is quickest on the backend; it is chosen here alone.

Over time, XLA's convolutions are right on GPU and TPU, but many times slower than a matrix
product on the CPU at these sizes. There, a convolution is one product over shifted copies of the
input, without the taps that meet nothing but padding: at one time step, one of five is left. Of
many rows, one to few time steps is a product for each of them, over the steps that its taps meet:
what lies on padding (at 4 steps 6 of 20 taps) is neither copied nor multiplied, nor is it in
derivatives.

Over images XLA's are the quickest on every backend; for loops on a CPU see `diffusion/scan.py`.
Of an image whose positions are doubled a CPU takes the products before they are, which are a
quarter as many.

Legend, channels last: B batch, T and U time steps of input and output, C and F channels of input
and output, K taps of the kernel; of images, H x W positions of the input, U x V of the output, and
K x L taps.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = [
    "MANY",
    "Method",
    "chosen",
    "conv1d",
    "conv1d_transpose",
    "conv2d",
    "conv2d_doubled",
    "doubled",
]

Method = Literal["auto", "matmul", "lax"]
MANY = 256  # rows from which such products pay: with 32, a training step was slower by half
_FEW = 4  # time steps of the output: for more, second derivatives compile too slowly


def chosen(method: Method) -> Method:
    """What "auto" stands for over time: "matmul" on the CPU, "lax" elsewhere."""
    if method == "auto":
        return "matmul" if jax.default_backend() == "cpu" else "lax"
    return method


def conv1d(
    x: Float[Array, "B T C"],
    kernel: Float[Array, "K C F"],
    *,
    stride: int = 1,
    padding: int,
    method: Method = "auto",
) -> Float[Array, "B U F"]:
    """Cross-correlation with zero padding on both sides, as PyTorch's Conv1d.

    U = (T + 2 padding - K) // stride + 1. method: "auto" takes "matmul" on the CPU, else "lax".
    """
    size, length = kernel.shape[0], x.shape[1]
    out = (length + 2 * padding - size) // stride + 1
    if size == 1 and stride == 1 and padding == 0:
        return x @ kernel[0]
    if chosen(method) == "lax":
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,), [(padding, padding)], dimension_numbers=("NWC", "WIO", "NWC")
        )
    if out <= _FEW and x.shape[0] >= MANY:
        return _by_place(x, [(stride * place - padding, kernel) for place in range(out)])
    if stride == 1 and out == length:
        return _same(x, kernel, padding)
    return _of_copies(x, kernel, stride, padding)


def _by_place(
    x: Float[Array, "B T C"], places: Sequence[tuple[int, Float[Array, "_ C F"]]]
) -> Float[Array, "B U F"]:
    """A product for each time step of the output: where its first tap lies in x, and its taps."""
    rows, length, _ = x.shape
    made = []
    for start, taps in places:
        first = max(0, start)
        last = max(first, min(length, start + len(taps)))
        met = taps[first - start : last - start]
        made.append(x[:, first:last].reshape(rows, -1) @ met.reshape(-1, taps.shape[2]))
    return jnp.stack(made, 1)


def _of_copies(
    x: Float[Array, "B T C"], kernel: Float[Array, "K C F"], stride: int, padding: int
) -> Float[Array, "B U F"]:
    """One product over all taps, the input's shifted copies side by side."""
    size, length = kernel.shape[0], x.shape[1]
    out = (length + 2 * padding - size) // stride + 1
    reach = [stride * o - padding for o in (0, out - 1)]  # the first tap's column, at both ends
    first, last = max(0, -reach[1]), min(size, length - reach[0])
    before, after = max(0, -reach[0] - first), max(0, reach[1] + last - length)
    padded = jnp.pad(x, ((0, 0), (before, after), (0, 0)))
    start = reach[0] + first + before
    span = stride * (out - 1) + 1
    taps = [padded[:, i : i + span : stride] for i in range(start, start + last - first)]
    return jnp.concatenate(taps, -1) @ kernel[first:last].reshape(-1, kernel.shape[2])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _same(
    x: Float[Array, "B T C"], kernel: Float[Array, "K C F"], padding: int
) -> Float[Array, "B T F"]:
    """Stride 1, U = T: one product, each tap's results shifted to their places and summed.

    As quick as copies of the input, and a third quicker to compile. Its derivatives are twice as
    slow: they are taken from `_of_copies`.
    """
    size, length = kernel.shape[0], x.shape[1]
    shifts = [k - padding for k in range(size) if abs(k - padding) < length]
    kernel = kernel[shifts[0] + padding : shifts[-1] + padding + 1]
    products = x @ kernel.swapaxes(0, 1).reshape(x.shape[2], -1)
    products = products.reshape(*x.shape[:2], len(shifts), -1)
    total = jnp.zeros((), x.dtype)
    for tap, shift in enumerate(shifts):
        seen = products[:, max(0, shift) : min(length, length + shift), tap]
        total += jnp.pad(seen, ((0, 0), (max(0, -shift), max(0, shift)), (0, 0)))
    return total


@_same.defjvp
def _same_jvp(padding: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(lambda x, kernel: _of_copies(x, kernel, 1, padding), primals, tangents)


def conv1d_transpose(
    x: Float[Array, "B T C"], kernel: Float[Array, "4 C F"], *, method: Method = "auto"
) -> Float[Array, "B 2*T F"]:
    """PyTorch's ConvTranspose1d with kernel 4, stride 2 and padding 1.

    out[o] = sum over i of x[i] kernel[o + 1 - 2 i].
    """
    length = x.shape[1]
    if chosen(method) == "lax":
        return jax.lax.conv_general_dilated(
            x,
            kernel[::-1],
            (1,),
            [(2, 2)],
            lhs_dilation=(2,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
    if 2 * length <= _FEW and x.shape[0] >= MANY:
        even, odd = kernel[3::-2], kernel[2::-2]
        return _by_place(x, [p for i in range(length) for p in ((i - 1, even), (i, odd))])
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    pairs = jnp.concatenate([padded[:, :-1], padded[:, 1:]], -1)  # (x[i - 1], x[i]), i = 0 .. T
    even = pairs[:, :-1] @ jnp.concatenate([kernel[3], kernel[1]])
    odd = pairs[:, 1:] @ jnp.concatenate([kernel[2], kernel[0]])
    return jnp.stack([even, odd], 2).reshape(x.shape[0], 2 * length, -1)


def conv2d(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "K L C F"],
    *,
    stride: int = 1,
    padding: int | Sequence[tuple[int, int]],
) -> Float[Array, "B U V F"]:
    """Cross-correlation with zero padding, as PyTorch's Conv2d; `lax`'s on every backend.

    padding: of all four sides, or ((top, bottom), (left, right)). U = (H + top + bottom - K) //
    stride + 1, and V likewise.
    """
    pads = ((padding, padding),) * 2 if isinstance(padding, int) else tuple(padding)
    if kernel.shape[:2] == (1, 1) and stride == 1 and pads == ((0, 0), (0, 0)):
        return x @ kernel[0, 0]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def doubled(x: Float[Array, "B H W C"], size: tuple[int, ...]) -> Float[Array, "B U V C"]:
    """Each position four times, cut to U x V: twice the sides, or one less where that was odd."""
    rows, height, width, channels = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None], (rows, height, 2, width, 2, channels))
    return wide.reshape(rows, 2 * height, 2 * width, channels)[:, : size[0], : size[1]]


def conv2d_doubled(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "3 3 C F"],
    size: tuple[int, ...],
    *,
    method: Method = "auto",
) -> Float[Array, "B U V F"]:
    """`conv2d` of `doubled(x, size)`, which keeps its sides.

    method: "matmul" is one product, all taps of each position of x, and sums of what it gives,
    which is quicker on a CPU: of 7 x 7 positions a third of the products, and no convolution that
    loops would slow. "auto" takes it there, else "lax".
    """
    if chosen(method) == "lax":
        return conv2d(doubled(x, size), kernel, padding=1)
    return _doubled_after(x, kernel, tuple(size))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _doubled_after(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"], size: tuple[int, ...]
) -> Float[Array, "B U V F"]:
    """All taps of each position side by side, as a product gives them.

    Derivatives are quicker where each tap is an array of its own, which takes the value thrice as
    long: they are taken from that.
    """
    taps = jnp.einsum("bhwc,klcf->bhwklf", x, kernel)
    return _summed(_summed(taps, size[0], 1, 3), size[1], 2, 3)


@_doubled_after.defjvp
def _doubled_after_jvp(
    size: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    def apart(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"]) -> Any:
        taps = jnp.einsum("bhwc,klcf->klbhwf", x, kernel)
        return _summed(_summed(taps, size[0], 2, 0), size[1], 2, 0)

    return _doubled_after(*primals, size), jax.jvp(apart, primals, tangents)[1]


def _summed(taps: Float[Array, "..."], size: int, axis: int, by: int) -> Float[Array, "..."]:
    """The sums of three taps along an axis whose positions are doubled to `size`.

    by: the axis of the taps, which is lost; `axis` is counted without it.
    """
    first, middle, last = (tap.squeeze(by) for tap in jnp.split(taps, 3, by))
    length = first.shape[axis]

    def part(x: Float[Array, "..."], begin: int, end: int, move: int) -> Float[Array, "..."]:
        """Places begin to end of x, moved by so many, between zeros."""
        found = jax.lax.slice_in_dim(x, begin, end, axis=axis)
        edges = begin + move, length - end - move
        return jnp.pad(found, [edges if i == axis else (0, 0) for i in range(x.ndim)])

    # Of an odd size nothing lies beside the last place.
    even = part(first, 0, length - 1, 1) + middle + part(last, 0, size // 2, 0)
    odd = first + middle + part(last, 1, length, -1)
    pair = jnp.stack([even, odd], axis + 1)
    pair = pair.reshape(*even.shape[:axis], 2 * length, *even.shape[axis + 1 :])
    return jax.lax.slice_in_dim(pair, 0, size, axis=axis)
