"""Is what relative rewards are timed against the authors' own computation, and as quick?

    git clone https://github.com/FelipeNuti/diffusion-relative-rewards CODE
    python -m benchmarks.authors --code CODE/locomotion [--rounds 5] [--steps 5]

Loads our PyTorch reference's weights into the authors' own modules, checks that losses and guided
samples are the same, and times both, interleaved, in eager PyTorch: gradient matching with the
anomaly detection that they leave on and without it, diffusion training, guided sampling. Nothing
of theirs is in this repository; it wants einops.
"""

import argparse
import importlib
import json
import os
import pathlib
import statistics
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.reward import HERE, SIZES, waited
from benchmarks.torch_reward import Diffusing, Matching, Models, Sampling, Size, make


class Authors:
    """Their modules at one size, with our reference's weights."""

    def __init__(self, code: pathlib.Path, size: Size, models: Models) -> None:
        unet, diffusion, matching, functions, guides = _modules(code)
        observed = size.transition - size.actions

        def teacher() -> Any:
            net = unet.TemporalUnet(
                size.horizon,
                size.transition,
                observed,
                dim_mults=size.multipliers,
                attention=size.attention,
            )
            return diffusion.GaussianDiffusion(
                net,
                size.horizon,
                observed,
                size.actions,
                n_timesteps=size.steps,
                loss_type="l2",
                clip_denoised=False,
                predict_epsilon=False,
                action_weight=10.0,
            )

        value = unet.ValueFunction(
            size.transition,
            size.horizon,
            dim=size.reward_dim,
            dim_mults=size.reward_multipliers,
            activation="leaky_relu",
            norm="none",
            bias=False,
        )
        self.reward = matching.GradientRewardRegressor(value, teacher(), teacher(), eps_loss=0.0)
        torch.autograd.set_detect_anomaly(False)  # theirs turns it on when it is made
        self.reward.load_state_dict(models.reward.state_dict())
        self.size, self.step = size, functions.n_step_guided_p_sample
        self.guide = guides.ValueGuide(self.reward)

    def sample(self, states: Tensor) -> Tensor:
        """Trajectories [N, H, D] from first states [N, O], steered as `Sampling` steers."""
        return self.reward.s_general.conditional_sample(
            {0: states},
            verbose=False,
            sample_fn=self.step,
            return_sorted=False,
            guide=self.guide,
            scale=self.size.scale,
            t_stopgrad=self.size.t_stopgrad,
            scale_grad_by_std=False,
        ).trajectories


def _modules(code: pathlib.Path) -> list[Any]:
    """Theirs, without what their packages import besides (gym, D4RL, wandb)."""
    root = code / "diffuser"
    if not (root / "models/temporal.py").is_file():
        raise SystemExit(f"{code}: give the folder locomotion of the authors' repository")
    for name in ("", ".models", ".rrf_diffusion", ".sampling", ".utils"):
        package: Any = types.ModuleType(f"diffuser{name}")
        package.__path__ = [str(root / name.removeprefix("."))]
        sys.modules[f"diffuser{name}"] = package
    nothing = types.SimpleNamespace(update=lambda *_: None, stamp=lambda: None)
    vars(sys.modules["diffuser.utils"])["Silent"] = lambda: nothing
    names = (
        "models.temporal",
        "models.diffusion",
        "rrf_diffusion.gradient_matching",
        "sampling.functions",
        "sampling.guides",
    )
    return [importlib.import_module(f"diffuser.{name}") for name in names]


def _training(
    rows: Tensor, batch: int, loss: Callable[[Tensor], Tensor], parameters: Any, every: int = 0
) -> Callable[[], Any]:
    """A step as their trainers take it; every: steps between averages of the weights."""
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=2e-4)
    average, done = [p.detach().clone() for p in parameters], 0

    def step() -> None:
        nonlocal done
        loss(rows[torch.randint(len(rows), (batch,))]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if every and done % every == 0:
            for place, p in enumerate(parameters):
                average[place] = average[place] * 0.995 + (1 - 0.995) * p.detach()
        done += 1

    return step


def check_agreement(theirs: Authors, ours: Models, size: Size, rows: Tensor) -> dict[str, float]:
    """Largest relative gaps in losses and samples, from the same random numbers."""
    x_0, cond = rows[:64], {0: rows[:64, 0, size.actions :]}
    t = torch.arange(64) % size.steps

    def noised(run: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(1)
        return run(torch.randn_like(x_0))

    torch.manual_seed(1)
    pairs = {
        "matching's loss": (
            theirs.reward.loss(x_0, cond, t)[0],
            noised(lambda noise: ours.reward.loss(x_0, cond, t, noise)),
        )
    }
    torch.manual_seed(1)
    pairs["diffusion's loss"] = (
        theirs.reward.s_general.p_losses(x_0, cond, t)[0],
        noised(lambda noise: ours.reward.s_general.p_losses(x_0, cond, t, noise)),
    )
    torch.manual_seed(1)
    sampled = theirs.sample(cond[0])
    torch.manual_seed(1)
    pairs["guided samples"] = sampled, Sampling(ours, size, cond[0])()
    return {
        name: float((a - b).abs().max().detach() / b.abs().max().detach())
        for name, (a, b) in pairs.items()
    }


def measure(code: pathlib.Path, size: Size, rounds: int, steps: int, many: int) -> dict[str, Any]:
    """Gaps, and seconds of a step: median, least and most of the rounds."""
    models = make(size, "cpu")
    theirs = Authors(code, size, models)
    shape = 4096, size.horizon, size.transition
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    gaps = check_agreement(theirs, models, size, rows)
    print(size.name, gaps, flush=True)
    assert max(gaps.values()) < 1e-4
    states = rows[:many, 0, size.actions :]
    reward, base = Authors(code, size, models).reward, Authors(code, size, models).reward.s_general

    def matching_loss(x: Tensor) -> Tensor:
        return reward.loss(x, {})[0]

    def diffusion_loss(x: Tensor) -> Tensor:
        return base.loss(x, {0: x[:, 0, size.actions :]})[0]

    matching = _training(rows, size.matching_batch, matching_loss, reward.model.parameters())

    def watched() -> None:
        with torch.autograd.set_detect_anomaly(True):
            matching()

    cases: dict[str, tuple[Callable[[], Any], int]] = {
        "authors' matching": (watched, steps),
        "authors' matching, no anomaly detection": (matching, steps),
        "our torch matching": (Matching(models, size, rows), steps),
        "authors' diffusion": (
            _training(rows, size.diffusion_batch, diffusion_loss, base.parameters(), 10),
            steps,
        ),
        "our torch diffusion": (Diffusing(models, size, rows), steps),
        "authors' sampling": (lambda: theirs.sample(states), 1),
        "our torch sampling": (Sampling(models, size, states), 1),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):  # the first warms up
        for name, (run, count) in cases.items():
            took = waited(models.device, lambda: [run() for _ in range(count)]) / count  # noqa: B023
            if number:
                times[name].append(took)
    return {
        "relative_gaps": gaps,
        "seconds": {
            name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
            for name, t in times.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Our PyTorch reference beside the authors' code.")
    parser.add_argument("--code", type=pathlib.Path, required=True, help="their locomotion/")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of a measurement")
    parser.add_argument("--trajectories", type=int, default=512, help="sampled at once")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    load = os.getloadavg()[0]
    sizes = {
        name: measure(args.code, size, args.rounds, args.steps, args.trajectories)
        for name, size in SIZES.items()
    }
    report = {"sizes": sizes, "rounds": args.rounds, "load_at_start": load, **machine()}
    print(json.dumps(report, indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "authors.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
