"""Speed of planning: plans of many environments at once, as a rollout asks for them at each step.

    python -m benchmarks.plan [--environments 512] [--rounds 5] [--cases torch ancestral ...]

Hopper's size in the paper (temporal U-Net and half U-Net, horizon 32, 20 diffusion steps), random
weights, the same on both sides; plans of one noise are held to PyTorch's before anything is timed.
Beside it, DDIM of 5 steps that begins with the last plan, of the paper's networks and of the
residual MLP with the reward of an MLP. Interleaved, medians, by the clock and by processor time:
on a busy machine the latter says more. Prints a report and keeps it.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.machine import machine
from benchmarks.reward import HERE, SIZES, Ours, matmul_case, ours_of, products
from benchmarks.torch_plan import Planning
from benchmarks.torch_reward import Models, Size, make
from reward_jax.data.trajectory.normalisers import Normaliser
from reward_jax.data.trajectory.space import TrajectoryModel, TrajectorySpace
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.process import draw_noise
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.models.temporal.mlp import ResidualMLP
from reward_jax.planning.plan import planner
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.reward.relative import RelativeReward

SIZE = SIZES["hopper"]
STEPS, SKIP = 5, 1  # of DDIM, and what a warm start leaves out of them
ASKED = {"torch / ancestral": "at least 1.3", "milliseconds a plan": "at most 5 (warm)"}
CASES = ("torch", "torch_spare", "ancestral", "ddim", "warm", "mlp_ancestral", "mlp_warm")


def gaussian(size: Size) -> Normaliser:
    """Some normaliser, the same on every call."""
    rng = np.random.default_rng(1)
    offset, scale = rng.normal(size=size.transition), rng.uniform(0.5, 2, size.transition)
    return Normaliser(offset.astype(np.float32), scale.astype(np.float32), "gaussian")


def paper(ours: Ours, space: TrajectorySpace) -> tuple[TrajectoryModel, RelativeReward]:
    """The paper's networks."""
    reward = RelativeReward(ours.params, ours.schedule, ours.reward, "posterior_mean")
    return TrajectoryModel(ours.base, space), reward


def residual(ours: Ours, space: TrajectorySpace) -> tuple[TrajectoryModel, RelativeReward]:
    """MLPs in their place, as configs for CPUs have them: horizon 8."""
    space = dataclasses.replace(space, horizon=8)
    x, t = jnp.zeros((1, *space.shape)), jnp.zeros(1, jnp.int32)
    net, reward, key = ResidualMLP(), WindowMLP(widths=(256, 256)), jax.random.key(2)
    denoiser = score_from(net, net.init(key, x, t)["params"], "x0", ours.schedule)
    guide = RelativeReward(
        reward.init(key, x, t)["params"], ours.schedule, reward, "posterior_mean"
    )
    return TrajectoryModel(denoiser, space), guide


def options(size: Size, **given: Any) -> GuidanceOptions:
    return GuidanceOptions(size.scale, size.t_stopgrad, step="learned", **given)


def noise_of(key: Any, shape: tuple[int, ...], steps: int) -> torch.Tensor:
    """What `guided_sample` draws of this key."""
    first, rest = jax.random.split(key)
    keys = [first, *jax.random.split(rest, steps)]
    return torch.from_numpy(np.stack([draw_noise(k, shape) for k in keys]))


def check_agreement(theirs: Models, model: TrajectoryModel, guide: Any, size: Size) -> float:
    """The largest difference of two planners' plans, of the largest value."""
    key, observations = jax.random.key(3), np.random.default_rng(3).normal(size=(4, 11))
    n = model.space.normaliser
    made = planner(model, guide=guide, options=options(size))(observations, key)
    ours = np.concatenate([made.actions, made.observations], -1)  # type: ignore[list-item]
    noise = noise_of(key, (len(observations), *model.space.shape), size.steps)
    worst = 0.0
    for spare in (False, True):
        plans = Planning(theirs, size, np.asarray(n.offset), np.asarray(n.scale), spare)
        wanted = plans(observations, noise.to(theirs.device))
        worst = max(worst, float(np.abs(ours - wanted).max() / np.abs(wanted).max()))
    print(f"PyTorch's and JAX's plans agree within {worst:.1e} of the largest value", flush=True)
    assert worst < (1e-4 if jax.default_backend() == "cpu" else 1e-2)
    return worst


def cases(
    theirs: Models, ours: Ours, size: Size, space: TrajectorySpace, many: int
) -> dict[str, Callable[[], Any]]:
    """Each makes `many` plans from observations in an environment's units."""
    observations = np.random.default_rng(0).normal(size=(many, size.transition - size.actions))
    n, key = space.normaliser, jax.random.key(0)

    def torched(spare: bool) -> Callable[[], Any]:
        made = Planning(theirs, size, np.asarray(n.offset), np.asarray(n.scale), spare)
        return lambda: made(observations)

    few = dict(sampler="ddim", sampling_steps=STEPS)

    def planned(network: Any, warm: bool, **given: Any) -> Callable[[], Any]:
        model, guide = network(ours, space)
        skip = SKIP if warm else 0
        make_plans = planner(model, guide=guide, options=options(size, skip=skip, **given))
        if not warm:
            return lambda: make_plans(observations, key)
        rows = np.random.default_rng(2).normal(size=(many, *model.space.shape))
        last = model.space.plans(rows)
        return lambda: make_plans(observations, key, last, 1)

    return {
        "torch": torched(False),
        "torch_spare": torched(True),
        "ancestral": planned(paper, False),
        "ddim": planned(paper, False, **few),
        "warm": planned(paper, True, **few),
        "mlp_ancestral": planned(residual, False),
        "mlp_warm": planned(residual, True, **few),
    }


def work(ours: Ours, size: Size, space: TrajectorySpace, many: int) -> dict[str, float]:
    """Floating-point operations of each case's products."""
    t = jax.ShapeDtypeStruct((many,), jnp.int32)
    guided = size.steps - size.t_stopgrad
    levels = np.round(size.steps * np.arange(STEPS, 0, -1) / STEPS) - 1
    warm = levels[SKIP:]
    flops = {}
    for name, network in (("", paper), ("mlp_", residual)):
        model, guide = network(ours, space)
        x = jax.ShapeDtypeStruct((many, *model.space.shape), jnp.float32)
        one, climb = products(model.denoiser.x0, x, t), products(guide.learned_gradient, x, t)
        for case, moves, climbs in (
            ("ancestral", size.steps, guided),
            ("ddim", len(levels), (levels >= size.t_stopgrad).sum()),
            ("warm", len(warm), (warm >= size.t_stopgrad).sum()),
        ):
            flops[name + case] = float(moves * one + climbs * climb)
    return flops


def timed(case: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of the processors."""
    wall, used = time.perf_counter(), time.process_time()
    case()
    return time.perf_counter() - wall, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of planning.")
    parser.add_argument("--environments", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--torch-threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    torch.set_num_threads(args.torch_threads)
    loads = [os.getloadavg()[0]]
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    theirs = make(SIZE, device)
    ours = ours_of(theirs)
    space = TrajectorySpace(SIZE.horizon, 1, SIZE.actions, gaussian(SIZE), {})
    gap = check_agreement(theirs, *paper(ours, space), SIZE)
    made = cases(theirs, ours, SIZE, space, args.environments)
    matmul, product, _ = matmul_case()
    runs = {name: functools.partial(timed, made[name]) for name in args.cases}
    runs["matmul"] = functools.partial(timed, matmul)
    for name, run in runs.items():
        print(f"first run of {name}: {run()[0]:.2f} s", flush=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(run())
    loads.append(os.getloadavg()[0])
    clock, used = (
        {name: statistics.median(pair[i] for pair in taken) for name, taken in times.items()}
        for i in (0, 1)
    )
    calls = 10  # of a measurement of the matmul
    rate = calls * product / used["matmul"]  # a second of processor time
    flops = work(ours, SIZE, space, args.environments)

    def over(seconds: dict[str, float]) -> dict[str, float]:
        return {
            f"{a} / {b}": seconds[a] / seconds[b]
            for a in ("torch", "torch_spare")
            for b in ("ancestral",)
            if a in seconds and b in seconds
        }

    report = {
        "asked": ASKED,
        "plans_agree_within": gap,
        "ratio": {"clock": over(clock), "processor": over(used)},
        "milliseconds_a_plan": {
            n: {
                "clock": 1e3 * clock[n] / args.environments,
                "processor": 1e3 * used[n] / args.environments,
            }
            for n in args.cases
        },
        "share_of_matmul_rate (processor time)": {
            n: flops[n] / rate / used[n] for n in args.cases if n in flops
        },
        "gflop": {n: f / 1e9 for n, f in flops.items()},
        "matmul_gflops (one core)": rate / 1e9,
        "seconds (clock, processor)": times,
        "environments": args.environments,
        "ddim": {"steps": STEPS, "skipped by a warm start": SKIP},
        "load before and after": loads,
        "torch_threads": torch.get_num_threads(),
        **machine(),
    }
    print(json.dumps(report, indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    name = "plan.json" if device == "cpu" else "plan_gpu.json"
    (args.out / name).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
