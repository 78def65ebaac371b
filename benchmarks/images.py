"""Speed of image networks: against eager PyTorch, and against the matmul rate.

    python -m benchmarks.images [--rounds 5] [--steps 3] [--sizes patches pixels] [--devices 2]

On a CPU; `gpu.py` measures the same on a GPU.
Training a U-Net, gradient matching and guided sampling of 28 x 28 images, the same random weights
on both sides. PyTorch runs with both formats of memory, and the quicker counts. One run, all of it
interleaved, medians, by the wall and by processor time (of one core on a busy machine: begin with
`taskset -c 0`). A floor is the products that a step cannot do without, at the rate of large
products in XLA. Ours run on the CPU as one device, and as one a core with a share of the rows.
A network of flax's own convolutions is trained as well: by the package's loop, by a loop of
`lax.scan`, and a call a step, in which XLA brings convolutions into its quick form by itself.
Prints a report and keeps it.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.sharding import Mesh

from benchmarks import torch_images as theirs
from benchmarks.machine import machine, products_alike
from benchmarks.reward import HERE, matched, matmul_case, products
from common_jax.mesh import cores, mesh_for
from common_jax.precision import jit, stated
from reward_jax import extract_reward
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.process import q_sample
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.train import EMA, TrainingOptions, init_state, train_denoiser
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.models.unet2d.unet import UNet2D
from reward_jax.reward.extract import ExtractionOptions, init_params
from reward_jax.reward.guide import guided_sample
from reward_jax.reward.relative import RelativeReward, reward_gradient


class Size(NamedTuple):
    """Networks, and rows of a step and of a chain of samples."""

    net: UNet2D
    reward: HalfUNet2D
    batch: int
    samples: int


SIZES = {
    "patches": Size(UNet2D(1), HalfUNet2D(1), 64, 64),
    "pixels": Size(UNet2D(1, 32, (1, 2, 4), patch=1), HalfUNet2D(1, 16, (1, 2), patch=1), 32, 16),
    # of the study's size for a GPU, but without its attention, which PyTorch's here has not
    "paper": Size(
        UNet2D(1, 128, (1, 2, 2), 2, patch=2), HalfUNet2D(1, 64, (1, 2, 2), patch=2), 128, 256
    ),
}
FORMS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}
STEPS, ROWS, SIDE = 10, 512, 28  # diffusion steps, of one of which the time is given
PARTS = ("training", "matching", "sampling")
ASKED = {"cpu": 1.0, "cuda": 1.5}
Case = Callable[[], "Times"]  # of a step, measured now


class Times(NamedTuple):
    """Seconds on the wall, and of processors, which alone say something on a busy machine."""

    wall: float
    processor: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of image networks.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a measurement")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["patches", "pixels"])
    parser.add_argument("--devices", type=int, default=cores(), help="that the CPU is, too")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the machine is busy (load {load:.1f}): ratios alone say something", flush=True)
    precision, mesh = products_alike(), mesh_for({"data": args.devices})
    found = {name: measure(SIZES[name], args.rounds, args.steps, mesh) for name in args.sizes}
    report = {
        "sizes": found,
        "network of a user's own": measure_own(args.rounds, args.steps),
        "rounds": args.rounds,
        "steps": args.steps,
        "devices": args.devices,
        "torch_threads": torch.get_num_threads(),
        "products (both sides)": precision,
        "load_at_start": load,
        **machine(),
    }
    print(json.dumps(report, indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "images.json").write_text(json.dumps(report, indent=2) + "\n")


def measure(
    size: Size, rounds: int, steps: int, mesh: Mesh | None, device: str = "cpu"
) -> dict[str, Any]:
    """Everything at one size, seconds a step. device: of PyTorch; ours is JAX's, and the mesh."""
    rows = np.random.default_rng(0).normal(size=(ROWS, SIDE, SIDE, 1)).astype(np.float32)
    params = [init_params(size.net, jax.random.key(seed), rows[:1]) for seed in (0, 1)]
    learned = init_params(size.reward, jax.random.key(2), rows[:1])
    check_agreement(size, params[0], learned, rows[:8], device)
    cases = torch_cases(size, params, learned, rows, steps, device)
    meshes = {"jax": None} | ({f"jax, {mesh.size} devices": mesh} if mesh else {})
    for name, where in meshes.items():
        ours = jax_cases(size, params, learned, rows, steps, where)
        cases |= {f"{name}, {part}": case for part, case in ours.items()}
    matmul, product, products_a_call = matmul_case()
    cases["matmul"] = repeated(matmul, products_a_call)
    times = interleaved(cases, rounds)
    operations = work(size, params[0], learned)
    return {
        clock: _compared(
            {name: [getattr(t, clock) for t in taken] for name, taken in times.items()},
            operations,
            product,
            meshes,
            ASKED[device],
        )
        for clock in Times._fields
    }


def _compared(
    times: Mapping[str, Sequence[float]],
    operations: Mapping[str, float],
    product: float,
    ours: Iterable[str],
    asked: float,
) -> dict[str, Any]:
    median = {name: statistics.median(taken) for name, taken in times.items()}
    rate = product / median["matmul"]
    torchs = {part: min(median[f"torch {part}, {form}"] for form in FORMS) for part in PARTS}
    return {
        "torch_over_jax": {
            part: {n: torchs[part] / median[f"{n}, {part}"] for n in ours} | {"asked": asked}
            for part in PARTS
        },
        "share_of_matmul_rate": {
            part: {n: operations[part] / rate / median[f"{n}, {part}"] for n in ours}
            for part in PARTS
        },
        "matmul_gflops": rate / 1e9,
        "seconds": median,
        "least_seconds": {name: min(taken) for name, taken in times.items()},
    }


def check_agreement(size: Size, params: Any, learned: Any, x: np.ndarray, device: str) -> None:
    """What is timed against each other computes the same."""
    t = np.arange(len(x)) % STEPS
    both = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t)
    given = [one.to(device) for one in both]
    for ours, made, kind in (
        (size.net, params, theirs.UNet),
        (size.reward, learned, theirs.Half),
    ):
        with torch.no_grad():
            wanted = theirs.filled(kind(ours), made).to(device)(*given).cpu()
        wanted = wanted.permute(0, 2, 3, 1).numpy() if wanted.ndim == 4 else wanted.numpy()
        got: Any = jit(ours.apply)({"params": made}, x, t)
        gap = np.abs(wanted - got).max() / np.abs(wanted).max()
        print(f"PyTorch and JAX agree within {gap:.1e} of the largest value")
        assert gap < (1e-4 if stated() == "float32" else 1e-2)


def interleaved(cases: Mapping[str, Case], rounds: int) -> dict[str, list[Times]]:
    """Times of each case, each run once before: every round runs all of them once."""
    for name, case in cases.items():
        print(f"first run of {name}: {case().wall:.4f} s a step", flush=True)
    times: dict[str, list[Times]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(case())
    return times


def repeated(run: Callable[[], Any], steps: int, rounds: int = 1) -> Case:
    """Times of one of `steps` steps, of which a run does `steps / rounds`."""

    def taken() -> Times:
        began = now()
        for _ in range(rounds):
            jax.block_until_ready(run())
        return Times(*((b - a) / steps for a, b in zip(began, now(), strict=True)))

    return taken


def now() -> Times:
    return Times(time.perf_counter(), time.process_time())


def torch_cases(
    size: Size, params: Any, learned: Any, rows: np.ndarray, steps: int, device: str
) -> dict[str, Case]:
    bar = torch.from_numpy(np.asarray(cosine_schedule(STEPS).alphas_cumprod).copy()).to(device)
    x_0, found = torch.from_numpy(rows).permute(0, 3, 1, 2).to(device), {}
    for name, form in FORMS.items():
        base, expert = (
            theirs.filled(theirs.UNet(size.net), p).to(device, memory_format=form) for p in params
        )
        reward = theirs.filled(theirs.Half(size.reward), learned).to(device, memory_format=form)
        drawing = x_0, bar, size.batch, form
        runs = (
            (theirs.Training(base, *drawing), steps, steps),
            (theirs.Matching(reward, base, expert, *drawing), steps, steps),
            (theirs.Sampling(base, reward, bar, (size.samples, 1, SIDE, SIDE), form), STEPS, 1),
        )
        for part, (run, count, rounds) in zip(PARTS, runs, strict=True):
            found[f"torch {part}, {name}"] = repeated(
                functools.partial(_silent, run), count, rounds
            )
    return found


def _silent(run: Callable[[], Any]) -> None:
    run()  # PyTorch is done when it returns, but for a GPU
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def jax_cases(
    size: Size, params: Any, learned: Any, rows: np.ndarray, steps: int, mesh: Mesh | None
) -> dict[str, Case]:
    schedule, adam, key = cosine_schedule(STEPS), optax.adam(2e-4), jax.random.key(0)
    base, expert = (score_from(size.net, p, "v", schedule, clip=1.0) for p in params)
    state = init_state(size.net, adam, rows[:1], key, params=params[0])
    guide = RelativeReward(learned, schedule, size.reward)

    def training(**loop: Any) -> Any:
        options = TrainingOptions(size.batch, steps, "v", EMA(begin=0, every=1))
        return train_denoiser(
            size.net, state, rows, schedule, adam, key=key, options=options, mesh=mesh, **loop
        )

    def matching(**loop: Any) -> Any:
        options = ExtractionOptions(size.batch, steps)
        return extract_reward(
            base,
            expert,
            size.reward,
            learned,
            rows,
            schedule,
            adam,
            key=key,
            options=options,
            mesh=mesh,
            **loop,
        )

    shape = size.samples, SIDE, SIDE, 1
    sample = functools.partial(
        guided_sample, base, schedule, shape, key=key, guide=guide, mesh=mesh
    )
    return {
        "training": functools.partial(_step, training, steps),
        "matching": functools.partial(_step, matching, steps),
        "sampling": repeated(sample, STEPS),
    }


def _step(run: Callable[..., Any], steps: int) -> Times:
    """Times of a step, without what a run sets up before its first compiled call ends."""
    stamps: list[Times] = []
    run(steps=2 * steps, on_step=lambda *_: stamps.append(now()))
    return Times(*((b - a) / steps for a, b in zip(*stamps, strict=True)))


def work(size: Size, params: Any, learned: Any) -> dict[str, float]:
    """Floating-point operations of the products of each step."""

    def given(rows: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        x = jax.ShapeDtypeStruct((rows, SIDE, SIDE, 1), jnp.float32)
        return x, jax.ShapeDtypeStruct((rows,), jnp.int32)

    def denoise(params: Any, x: jax.Array, t: jax.Array) -> Any:
        return size.net.apply({"params": params}, x, t)

    def trained(params: Any, x: jax.Array, t: jax.Array) -> Any:
        return jax.grad(lambda p: jnp.sum(jnp.square(denoise(p, x, t))))(params)

    student = functools.partial(matched, size.reward)
    climb = functools.partial(reward_gradient, size.reward)
    few, several = given(size.batch), given(size.samples)
    return {
        "training": products(trained, params, *few),
        "matching": 2 * products(denoise, params, *few) + products(student, learned, *few),
        "sampling": products(denoise, params, *several) + products(climb, learned, *several),
    }


class Convolutions(nn.Module):
    """What a user may write: a denoiser of flax's convolutions, not of ours."""

    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        y = nn.Conv(self.width, (3, 3))(x)
        y = y + nn.Dense(self.width)(t.astype(x.dtype)[:, None])[:, None, None]
        for _ in range(2):
            y = y + nn.Conv(self.width, (3, 3))(nn.silu(nn.GroupNorm(8)(y)))
        return nn.Conv(x.shape[-1], (3, 3))(nn.silu(y))


def measure_own(rounds: int, steps: int, batch: int = 32) -> dict[str, Any]:
    """A step of training such a network, seconds: in each kind of loop, and alone."""
    net, adam, key = Convolutions(), optax.adam(2e-4), jax.random.key(0)
    rows = np.random.default_rng(0).normal(size=(ROWS, SIDE, SIDE, 1)).astype(np.float32)
    schedule, state = cosine_schedule(STEPS), init_state(net, adam, rows[:1], key)

    def one(carry: Any, step: Any) -> tuple[Any, Any]:
        params, moments = carry
        keys = jax.random.split(jax.random.fold_in(key, step), 3)
        x_0 = jnp.asarray(rows)[jax.random.randint(keys[0], (batch,), 0, ROWS)]
        t = jax.random.randint(keys[1], (batch,), 0, STEPS)
        noise = jax.random.normal(keys[2], x_0.shape)

        def loss(params: Any) -> jax.Array:
            output: Any = net.apply({"params": params}, q_sample(schedule, x_0, t, noise), t)
            return jnp.square(output - noise).mean()

        value, slope = jax.value_and_grad(loss)(params)
        updates, moments = adam.update(slope, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    begun = state.params, adam.init(state.params)
    alone, looped = jit(one), jit(lambda carry: jax.lax.scan(one, carry, jnp.arange(steps)))

    def training(**loop: Any) -> Any:
        options = TrainingOptions(batch, steps, "epsilon", EMA(begin=0, every=1))
        return train_denoiser(net, state, rows, schedule, adam, key=key, options=options, **loop)

    cases: dict[str, Case] = {
        "train_denoiser": functools.partial(_step, training, steps),
        "a call a step": repeated(functools.partial(alone, begun, 0), steps, steps),
        "lax.scan": repeated(functools.partial(looped, begun), steps),
    }
    times = interleaved(cases, rounds)
    seconds = {
        clock: {
            n: statistics.median(getattr(t, clock) for t in taken) for n, taken in times.items()
        }
        for clock in Times._fields
    }
    over = {
        clock: {n: s / found["a call a step"] for n, s in found.items()}
        for clock, found in seconds.items()
    }
    return {"batch": batch, "seconds": seconds, "over a call a step": over}


if __name__ == "__main__":
    main()
