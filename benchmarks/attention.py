"""Memory of one layer's attention by length, as compilers plan it: nothing is run.

python -m benchmarks.attention [OUT]

One row of 8 query and 2 key/value heads of 64 features, float32, causal, no window. `parts` and
`chunks` are compiled on the CPU, where XLA says what it will hold beside inputs and result;
programs lowered for TPU and GPU are read for their largest array. Megabytes (2^20 bytes).
"""

import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import machine
from tuco_jax.models import attention
from tuco_jax.models.positions import Positions

TOKENS = (1024, 4096, 8192, 32768)
HEADS, SHARED, WIDTH = 8, 2, 64
BYTES = {"i1": 1, "i8": 1, "ui8": 1, "bf16": 2, "f16": 2, "i64": 8, "f64": 8}  # others: 4
COLUMNS = {
    "inputs": "inputs, result",
    "parts": "parts",
    "parts_gradient": "parts, gradient",
    "chunks": "chunks",
    "chunks_gradient": "chunks, gradient",
    "tpu": "TPU's largest",
    "gpu": "GPU's largest",
}


def own(index: jax.Array) -> Positions:
    """A row of real tokens."""
    return Positions(index, index >= 0, None, None, None)


def form(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def run(q, keys, values, index, window):
        at = own(index)
        return function(0.0, q, keys, values, at, at, window)

    return run


def gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.grad(lambda *args: jnp.sum(jnp.square(function(*args))), (0, 1, 2))


def attend(q, keys, values, index, window):
    at = own(index)
    return attention.attend(q, keys, values, at, at, window, (0,))


def planned(function: Callable[..., Any], shapes: Any) -> float:
    """Megabytes that the compiled program holds beside its inputs and its result."""
    analysis = jax.jit(function).lower(*shapes).compile().memory_analysis()
    assert analysis is not None, "this backend plans no memory"
    return analysis.temp_size_in_bytes / 2**20


def largest(function: Callable[..., Any], shapes: Any, platform: str) -> float:
    """Megabytes of the largest array in the program lowered for a platform."""
    text = jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    arrays = re.findall(r"tensor<((?:\d+x)+)(\w+)>", text)
    return (
        max(
            np.prod([int(n) for n in shape.split("x")[:-1]]) * BYTES.get(dtype, 4)
            for shape, dtype in arrays
        ).item()
        / 2**20
    )


def row(tokens: int) -> dict[str, float]:
    shared = jax.ShapeDtypeStruct((1, SHARED, tokens, WIDTH), jnp.float32)
    index = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    window = jax.ShapeDtypeStruct((), jnp.int32)
    split = jax.ShapeDtypeStruct((1, SHARED, HEADS // SHARED, tokens, WIDTH), jnp.float32)
    inside = split, shared, shared, index, window
    outside = jax.ShapeDtypeStruct((1, tokens, HEADS, WIDTH), jnp.float32), *inside[1:]
    parts, chunks = form(attention._in_parts), form(attention._in_chunks)
    return {
        "inputs": (2 * split.size + 2 * shared.size) * 4 / 2**20,
        "parts": planned(parts, inside),
        "parts_gradient": planned(gradient(parts), inside),
        "chunks": planned(chunks, inside),
        "chunks_gradient": planned(gradient(chunks), inside),
        "tpu": largest(attend, outside, "tpu"),
        "gpu": largest(attend, outside, "cuda"),
    }


def main(out: pathlib.Path) -> None:
    rows = {tokens: row(tokens) for tokens in TOKENS}
    print("tokens", *(f"{name:>17}" for name in COLUMNS.values()))
    for tokens, values in rows.items():
        print(f"{tokens:6}", *(f"{values[name]:17,.1f}" for name in COLUMNS))
    report = {"unit": "MiB", "columns": COLUMNS, "rows": rows, **machine()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "attention.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    default = pathlib.Path(__file__).parent / "results"
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default)
