"""What a pass of the temporal U-Net takes beside its floor, at the paper's two sizes.

    python -m benchmarks.unet [--rows 512] [--rounds 15]

The floor is what no arrangement of the same products goes below: each kind of product timed by
itself at its own shape (small ones are far from the rate of large ones), and the bytes that the
compiled pass moves beside its products, over the bandwidth. By processor time, medians: of one
core's work, whatever else the machine does. Prints a report and keeps it.
"""

import argparse
import collections
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import machine
from benchmarks.reward import HERE, SIZES
from benchmarks.torch_reward import Size
from common_jax.cost import each_product
from reward_jax.models.temporal.unet import TemporalUnet

BYTES = 4
STREAMED = 1 << 20  # numbers of an array that bandwidth is measured with: it stays in the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args()
    report = {name: measure(size, args.rows, args.rounds) for name, size in SIZES.items()}
    report |= {"rows": args.rows, **machine()}
    print(json.dumps(report, indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "unet.json").write_text(json.dumps(report, indent=2) + "\n")


def measure(size: Size, rows: int, rounds: int) -> dict[str, Any]:
    """A pass over `rows` windows and its floor, in milliseconds of processor time."""
    network = TemporalUnet(size.transition, 32, size.multipliers, attention=size.attention)
    x = jax.random.normal(jax.random.key(0), (rows, size.horizon, size.transition))
    t = jnp.arange(rows) % 20
    params = network.init(jax.random.key(1), x[:1], t[:1])
    run = jax.jit(network.apply).lower(params, x, t).compile()
    found: Any = run.cost_analysis()
    moved = float(found["bytes accessed"])

    kinds = _kinds(jax.make_jaxpr(network.apply)(params, x, t))
    cases = {kind: _Product(*kind) for kind in kinds}
    large = _Product(((1024, 2048), (2048, 2048)), (((1,), (0,)), ((), ())))
    numbers = jnp.ones(STREAMED)
    add = jax.jit(lambda y: y + 1)
    whole = _used(lambda: run(params, x, t), rounds)
    alone = {kind: _used(case.run, rounds) / case.calls for kind, case in cases.items()}
    rate = large.operations / (_used(large.run, rounds) / large.calls)
    bandwidth = 2 * BYTES * STREAMED / _used(lambda: add(numbers), rounds)

    operations = sum(count * cases[kind].operations for kind, count in kinds.items())
    rest = max(moved - sum(count * cases[kind].bytes for kind, count in kinds.items()), 0.0)
    products = sum(count * alone[kind] for kind, count in kinds.items())
    floor = products + rest / bandwidth
    return {
        "pass": 1e3 * whole,
        "floor": 1e3 * floor,
        "floor: products by themselves": 1e3 * products,
        "floor: other bytes over bandwidth": 1e3 * rest / bandwidth,
        "floor / pass": floor / whole,
        "share of the matmul rate": operations / rate / whole,
        "gflop": operations / 1e9,
        "matmul gflops": rate / 1e9,
        "bandwidth, GB/s": bandwidth / 1e9,
    }


class _Product:
    """A kind of product: a few of them in one program. operations, bytes: of one."""

    calls = 4

    def __init__(self, shapes: tuple[tuple[int, ...], ...], dimensions: Any) -> None:
        rng = np.random.default_rng(0)
        pairs = [
            [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
            for _ in range(self.calls)
        ]

        def one(left: Any, right: Any) -> Any:
            return jax.lax.dot_general(left, right, dimensions)

        program = jax.jit(lambda pairs: [one(*pair) for pair in pairs])
        self.run = lambda: program(pairs)
        out = jax.eval_shape(one, *pairs[0]).shape
        over = math.prod(shapes[0][axis] for axis in dimensions[0][0])
        self.operations = 2.0 * math.prod(out) * over
        self.bytes = BYTES * sum(math.prod(shape) for shape in (*shapes, out))


def _kinds(program: Any) -> Mapping[Any, int]:
    """Kinds of products in a program, by shapes and axes, and how many there are of each."""
    found: collections.Counter[Any] = collections.Counter()
    for equation, times in each_product(program):
        shapes = tuple(tuple(v.aval.shape) for v in equation.invars)
        found[shapes, equation.params["dimension_numbers"]] += times
    return found


def _used(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of processor time, the median."""
    jax.block_until_ready(run())
    found = []
    for _ in range(rounds):
        began = time.process_time()
        jax.block_until_ready(run())
        found.append(time.process_time() - began)
    return statistics.median(found)


if __name__ == "__main__":
    main()
