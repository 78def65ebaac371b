"""Speed of relative rewards: against eager PyTorch, and against the machine's matmul rate.

    python -m benchmarks.reward [--rounds 5] [--steps 5] [--sizes hopper halfcheetah]

Gradient matching (one seed, and five at once), diffusion training and guided sampling at the
paper's sizes for Hopper and HalfCheetah, random weights, the same on both sides; on a GPU where
both JAX and PyTorch have one. One run, everything interleaved, medians; a floor is the products
that a step cannot do without, at the rate of large products in XLA. Prints a report and keeps it.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks.machine import machine
from benchmarks.torch_reward import Diffusing, Matching, Models, Sampling, Size, make
from common_jax import cost
from reward_jax import extract_reward
from reward_jax.diffusion.denoiser import Denoiser, score_from
from reward_jax.diffusion.process import FirstState, action_weights, first_state
from reward_jax.diffusion.schedule import Schedule
from reward_jax.diffusion.sources import Rows
from reward_jax.diffusion.train import EMA, TrainingOptions, init_state, train_denoiser
from reward_jax.reward.extract import ExtractionOptions, init_params
from reward_jax.reward.guide import GuidanceOptions, guided_sample
from reward_jax.reward.relative import RelativeReward, reward_gradient
from reward_jax.torch_import.from_torch import load_torch
from reward_jax.torch_import.torch_state import Part

SIZES = {
    "hopper": Size("hopper", 14, 3, 32, (1, 2, 4, 8), False, 0.2, 10),
    "halfcheetah": Size("halfcheetah", 23, 6, 4, (1, 4, 8), True, 0.5, 5),
}
ASKED = {  # by section 6 of the issue: on a CPU, on a GPU
    "matching": (1.3, 3.0),
    "matching, a seed of five": (1.8, 3.0),
    "diffusion": (1.3, 3.0),
    "sampling": (1.1, 3.0),
}
SEEDS, ROWS = 5, 4096
HERE = pathlib.Path(__file__).parent
Seconds = Callable[[], float]  # of one step, measured now


@dataclasses.dataclass(frozen=True)
class Ours:
    """The same models on our side."""

    base: Denoiser
    expert: Denoiser
    reward: Any
    params: Any
    schedule: Schedule


def ours_of(theirs: Models) -> Ours:
    """By way of a checkpoint as the authors' trainer saves it."""
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name) / "state.pt"
        torch.save(theirs.reward.state_dict(), path)
        reward, params, info = load_torch(path, "reward")
        assert info.schedule is not None
        schedule = info.schedule

        def score(part: Part) -> Denoiser:
            model, weights, _ = load_torch(path, "denoiser", part=part)
            return score_from(model, weights, "x0", schedule)

        return Ours(score("s_general"), score("s_expert"), reward, params, schedule)


def check_agreement(theirs: Models, ours: Ours, x: np.ndarray) -> None:
    """What is timed against each other computes the same."""
    t = np.arange(len(x)) % ours.schedule.steps
    given = torch.from_numpy(x).to(theirs.device), None, torch.from_numpy(t).to(theirs.device)
    reward = theirs.reward
    with torch.no_grad():
        wanted = [d.model(*given) for d in (reward.s_general, reward.s_expert)]
    wanted.append(reward.gradient(*given))

    x0, gradient = jax.jit(Denoiser.x0), jax.jit(reward_gradient, static_argnums=0)
    levels = jnp.asarray(t)
    got = [x0(d, jnp.asarray(x), levels) for d in (ours.base, ours.expert)]
    got.append(gradient(ours.reward, ours.params, jnp.asarray(x), levels))
    for a, b in zip(wanted, got, strict=True):
        gap = np.abs(a.cpu().numpy() - np.asarray(b)).max() / np.abs(np.asarray(b)).max()
        print(f"PyTorch and JAX agree within {gap:.1e} of the largest value")
        assert gap < (1e-4 if jax.default_backend() == "cpu" else 1e-2)  # a GPU has TF32


def waited(device: torch.device, case: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    case()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def torch_cases(theirs: Models, size: Size, rows: np.ndarray, steps: int, many: int) -> Any:
    x_0 = torch.from_numpy(rows)
    matching, diffusing = Matching(theirs, size, x_0), Diffusing(theirs, size, x_0)
    sampling = Sampling(theirs, size, x_0[:many, 0, size.actions :])

    def repeated(step: Callable[[], Any]) -> Seconds:
        return lambda: waited(theirs.device, lambda: [step() for _ in range(steps)]) / steps

    return {
        "torch matching": repeated(matching),
        "torch diffusion": repeated(diffusing),
        "torch sampling": lambda: waited(theirs.device, sampling),
    }


def _stamped(run: Callable[..., Any], steps: int, calls: int = 3) -> list[float]:
    """When a training run began, and when each of its compiled calls of `steps` steps ended."""
    stamps = [time.perf_counter()]
    run(
        steps=calls * steps,
        steps_per_call=steps,
        on_step=lambda *_: stamps.append(time.perf_counter()),
    )
    return stamps


def _step(run: Callable[..., Any], steps: int) -> Seconds:
    """Seconds of a step, without what a run sets up before its first call ends."""

    def seconds() -> float:
        _, first, *_, last = stamps = _stamped(run, steps)
        return (last - first) / (steps * (len(stamps) - 2))

    return seconds


def jax_runs(ours: Ours, size: Size, rows: np.ndarray) -> dict[str, Callable[..., Any]]:
    """The training runs: (steps, steps_per_call, on_step) -> result."""
    adam, key = optax.adam(2e-4), jax.random.key(0)
    x_0 = Rows(jnp.asarray(rows))
    five = init_params(ours.reward, key, x_0.rows[:1], SEEDS)
    state = init_state(ours.base.model, adam, x_0.rows[:1], key, params=ours.base.params)
    weights = action_weights(size.horizon, size.transition, size.actions, 10.0)
    pin = FirstState(size.actions)

    def matching(params: Any, seeds: int | None) -> Callable[..., Any]:
        def run(steps_per_call: int, **options: Any) -> Any:
            return extract_reward(
                ours.base,
                ours.expert,
                ours.reward,
                params,
                x_0,
                ours.schedule,
                adam,
                key=key,
                target="posterior_mean",
                options=ExtractionOptions(
                    size.matching_batch, steps_per_call, gradient_at="posterior_mean"
                ),
                seeds=seeds,
                **options,
            )

        return run

    def diffusion(steps_per_call: int, **options: Any) -> Any:
        return train_denoiser(
            ours.base.model,
            jax.tree.map(jnp.copy, state),  # a run takes its state over
            x_0,
            ours.schedule,
            adam,
            key=key,
            options=TrainingOptions(
                size.diffusion_batch, steps_per_call, prediction="x0", ema=EMA(begin=0)
            ),
            weights=weights,
            pin=pin,
            **options,
        )

    return {
        "jax matching": matching(ours.params, None),
        "jax matching, five": matching(five, SEEDS),
        "jax diffusion": diffusion,
    }


def jax_sampling(ours: Ours, size: Size, rows: np.ndarray, many: int) -> Callable[[], jax.Array]:
    reward = RelativeReward(ours.params, ours.schedule, ours.reward, "posterior_mean")
    states = jnp.asarray(rows[:many, 0, size.actions :])
    return lambda: guided_sample(
        ours.base,
        ours.schedule,
        (many, size.horizon, size.transition),
        key=jax.random.key(0),
        guide=reward,
        options=GuidanceOptions(size.scale, size.t_stopgrad, step="learned"),
        pinned=first_state(states, size.horizon, size.transition),
    )


def matched(reward: Any, params: Any, x: jax.Array, t: jax.Array) -> Any:
    """The student's part of matching: the gradient, by parameters, of a gradient by x."""
    return jax.grad(lambda p: jnp.sum(jnp.square(reward_gradient(reward, p, x, t))))(params)


def parts(ours: Ours, size: Size, rows: np.ndarray, many: int) -> dict[str, Seconds]:
    """What steps of matching and of sampling are made of, each a program of its own."""
    adam, (few, several) = optax.adam(2e-4), (size.matching_batch, many)
    x, t = jnp.asarray(rows), jnp.arange(len(rows)) % ours.schedule.steps
    student = jax.jit(matched, static_argnums=0)
    gradient = jax.jit(reward_gradient, static_argnums=0)
    x0, update = jax.jit(Denoiser.x0), jax.jit(adam.update)
    slopes, moments = ours.params, adam.init(ours.params)
    made: dict[str, Callable[[], Any]] = {
        "matching: one teacher": lambda: x0(ours.base, x[:few], t[:few]),
        "matching: student": lambda: student(ours.reward, ours.params, x[:few], t[:few]),
        "matching: Adam": lambda: update(slopes, moments),
        "sampling step: denoiser": lambda: x0(ours.base, x[:several], t[:several]),
        "sampling step: reward": lambda: gradient(
            ours.reward, ours.params, x[:several], t[:several]
        ),
    }

    def seconds(case: Callable[[], Any]) -> float:
        started = time.perf_counter()
        jax.block_until_ready([case() for _ in range(5)])
        return (time.perf_counter() - started) / 5

    return {name: functools.partial(seconds, case) for name, case in made.items()}


def work(ours: Ours, size: Size, many: int) -> dict[str, float]:
    """Floating-point operations of the products of each step, without taps on padding alone."""
    model = ours.base.model.clone(method="matmul")
    base = dataclasses.replace(ours.base, model=model)  # type: ignore[type-var]
    reward = ours.reward.clone(method="matmul")

    def given(batch: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        shape = (batch, size.horizon, size.transition)
        return jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)

    def denoised(params: Any, x: jax.Array, t: jax.Array) -> Any:
        def loss(p: Any) -> jax.Array:
            return jnp.sum(jnp.square(base.model.apply({"params": p}, x, t)))

        return jax.grad(loss)(params)

    def climbed(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        return reward_gradient(reward, params, x, t)

    few, several = given(size.matching_batch), given(many)
    teacher = products(base.x0, *few)
    student = products(functools.partial(matched, reward), ours.params, *few)
    denoiser, climb = products(base.x0, *several), products(climbed, ours.params, *several)
    return {
        "matching": 2 * teacher + student,
        "matching, five": 2 * teacher + SEEDS * student,
        "diffusion": products(denoised, base.params, *given(size.diffusion_batch)),
        "sampling": size.steps * (denoiser + climb),
        "matching: one teacher": teacher,
        "matching: student": student,
        "matching: Adam": 0.0,
        "sampling step: denoiser": denoiser,
        "sampling step: reward": climb,
    }


def products(function: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of a function's matrix products, which are not run."""
    return cost.products(jax.make_jaxpr(function)(*args)).flops


def matmul_case() -> tuple[Seconds, float, int]:
    """Seconds of a product in XLA, its floating-point operations, and how many one call takes."""
    rng = np.random.default_rng(0)
    width, calls = (2048, 10) if jax.default_backend() == "cpu" else (4096, 100)
    a, b = (jnp.asarray(rng.normal(size=(n, width)), jnp.float32) for n in (width // 2, width))
    matmul = jax.jit(jnp.matmul)

    def seconds() -> float:
        started = time.perf_counter()
        jax.block_until_ready([matmul(a, b) for _ in range(calls)])
        return (time.perf_counter() - started) / calls

    return seconds, float(width**3), calls  # 2 * width / 2 * width * width


def measure(size: Size, rounds: int, steps: int, many: int, device: str) -> dict[str, Any]:
    """Everything at one size."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(ROWS, size.horizon, size.transition)).astype(np.float32)
    theirs = make(size, device)
    ours = ours_of(theirs)
    check_agreement(theirs, ours, rows[:32])

    runs, sampling = jax_runs(ours, size, rows), jax_sampling(ours, size, rows, many)
    matmul, product, _ = matmul_case()
    cases: dict[str, Seconds] = torch_cases(theirs, size, rows, steps, many)
    for name, case in cases.items():
        print(f"{size.name}: first run of {name}: {case():.3f} s a step", flush=True)
    first = {}
    for name, run in runs.items():
        began, ready, *_, last = stamps = _stamped(run, steps)
        first[name] = ready - began - (last - ready) / (len(stamps) - 2)
        cases[name] = _step(run, steps)
    first["jax sampling"] = waited(theirs.device, lambda: jax.block_until_ready(sampling()))
    cases["jax sampling"] = lambda: waited(
        theirs.device, lambda: jax.block_until_ready(sampling())
    )
    for name, case in parts(ours, size, rows, many).items():
        case()
        cases[f"jax {name}"] = case
    first["jax sampling"] -= cases["jax sampling"]()
    for name, seconds in first.items():
        print(f"{size.name}: {name} compiled in {seconds:.1f} s", flush=True)
    matmul()
    times: dict[str, list[float]] = {name: [] for name in [*cases, "matmul"]}
    for _ in range(rounds):
        for name, case in (cases | {"matmul": matmul}).items():
            times[name].append(case())

    median = {name: statistics.median(t) for name, t in times.items()}
    rate = product / median["matmul"]
    operations = work(ours, size, many)
    floor = {name: flops / rate for name, flops in operations.items()}
    asked = {name: pair[device != "cpu"] for name, pair in ASKED.items()}
    ratio = {
        "matching": median["torch matching"] / median["jax matching"],
        "matching, a seed of five": SEEDS
        * median["torch matching"]
        / median["jax matching, five"],
        "diffusion": median["torch diffusion"] / median["jax diffusion"],
        "sampling": median["torch sampling"] / median["jax sampling"],
    }
    return {
        "torch_over_jax": {n: {"measured": r, "asked": asked[n]} for n, r in ratio.items()},
        "compile_seconds (asked of matching: 8)": first,
        "share_of_matmul_rate": {n: floor[n] / median[f"jax {n}"] for n in floor},
        "floor_seconds": floor,
        "gflop": {n: flops / 1e9 for n, flops in operations.items()},
        "matmul_gflops": rate / 1e9,
        "seconds": {
            n: {"median": median[n], "min": min(t), "max": max(t)} for n, t in times.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of relative rewards.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of a measurement")
    parser.add_argument("--trajectories", type=int, default=512, help="sampled at once")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--torch-threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    torch.set_num_threads(args.torch_threads)
    load = os.getloadavg()[0]  # on a busy machine PyTorch's threads wait for each other
    if load > 0.5:
        print(f"the machine is busy (load {load:.1f}): these times will say little", flush=True)
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = True  # as XLA does, and cuDNN
    device = "cuda" if on_gpu else "cpu"
    sizes = {
        name: measure(SIZES[name], args.rounds, args.steps, args.trajectories, device)
        for name in args.sizes
    }
    report = {
        "sizes": sizes,
        "rounds": args.rounds,
        "steps": args.steps,
        "trajectories": args.trajectories,
        "torch_on": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch_threads": torch.get_num_threads(),
        "load_at_start": load,
        **machine(),
    }
    print(json.dumps(report, indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    name = "reward_gpu.json" if on_gpu else "reward.json"
    (args.out / name).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
