"""Is the temporal U-Net's group norm at fault at short horizons? Denoisers alike but for the norm.

    python -m benchmarks.group_norm [--robot hopper] [--horizons 8 4] [--steps 2000] [--seeds 3]

A residual MLP over the window and the temporal U-Net, with its 8 groups, with 1, with a norm over
the channels of each time step and with none, learn x_0 from windows of the robot's expert data, as
the locomotion study trains them (20 diffusion steps, the first action weighs ten). Held-out
windows are of episodes of another seed, the same ones and the same noise for all. Measured is the
mean absolute error of the first action, which is executed, in standard deviations of an action:
at t 0, where it stands in x_t under a little noise (x_t alone, rescaled, has the error given
beside), and at the last t, where it must come of the observation; over training seeds, with
standard errors. Beside it processor ms of a training step, the median of calls of 100. Prints a
line a training, and keeps a report.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.machine import machine
from reward_jax.data.episodes import Episodes
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.diffusion.denoiser import Denoiser
from reward_jax.diffusion.process import q_sample
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Strided
from reward_jax.diffusion.train import EMA
from reward_jax.models.temporal import layers
from reward_jax.models.temporal.layers import GroupNorm
from reward_jax.models.temporal.mlp import ResidualMLP
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.planning.fit import RunContext, Training, Untrained, fit, space_of, window_source
from reward_jax.tasks.locomotion.task import TASKS, LocomotionTask

HERE = pathlib.Path(__file__).parent
DATA, PADDING = "expert", "terminal"
HELD_OUT = 5  # for as many episodes of training one is held out
estimate = jax.jit(Denoiser.x0)


def one_group(groups: int, **given: Any) -> nn.Module:
    return GroupNorm(1, **given)


def over_channels(groups: int, *, name: str, method: str) -> nn.Module:
    """Each time step by itself."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


def no_norm(groups: int, **given: Any) -> Callable[[Any], Any]:
    return lambda x: x


# What stands in a `ConvBlock` for `GroupNorm`.
NORMS: dict[str, Callable[..., Any]] = {
    "8 groups": GroupNorm,
    "1 group": one_group,
    "channels": over_channels,
    "none": no_norm,
}


class NormedUnet(TemporalUnet):
    """The temporal U-Net with one of `NORMS` in its blocks, which are made as it is traced."""

    norm: str = "8 groups"

    def __call__(self, x: Any, t: Any) -> Any:
        with mock.patch.object(layers, "GroupNorm", NORMS[self.norm]):
            return super().__call__(x, t)


@dataclasses.dataclass(frozen=True)
class Network:
    """As `fit` makes one. norm: None for the MLP."""

    norm: str | None
    width: int
    dim: int
    multipliers: tuple[int, ...]

    def make(self, space: TrajectorySpace) -> Any:
        if self.norm is None:
            return ResidualMLP(self.width)
        return NormedUnet(space.width, self.dim, self.multipliers, norm=self.norm)


def errors(denoiser: Denoiser, space: TrajectorySpace, rows: jax.Array) -> dict[str, float]:
    """Mean absolute errors of the first action of windows [N, H, D], at the first and last t."""
    found, key, last = {}, jax.random.key(1), denoiser.schedule.steps - 1
    for level in (0, last):
        t = jnp.full(len(rows), level)
        noise = jax.random.normal(jax.random.fold_in(key, level), rows.shape)
        x_t = space.pin(rows)(q_sample(denoiser.schedule, rows, t, noise))
        guesses = {f"t {level}": estimate(denoiser, x_t, t)}
        if level == 0:
            scale = denoiser.schedule.sqrt_alphas_cumprod[0]
            guesses["x_t alone"] = x_t / scale
        for name, x_0 in guesses.items():
            off = (x_0 - rows)[:, 0, : space.actions]
            found[name] = float(jnp.abs(off).mean())
    return found


def trained(
    source: Strided, space: TrajectorySpace, network: Network, training: Training, seed: int
) -> tuple[Denoiser, float]:
    """A denoiser, and the processor ms that a step of it took; the first call compiles."""
    stamps = [(0, time.process_time())]

    def on_step(done: int, metrics: dict[str, np.ndarray]) -> None:
        stamps.append((done, time.process_time()))

    begin = Untrained(cosine_schedule(20), network, None)
    context = RunContext(on_step=on_step)
    model = fit(source, space, begin, training, seed=seed, context=context)
    calls = list(itertools.pairwise(stamps))
    took = [1e3 * (b[1] - a[1]) / (b[0] - a[0]) for a, b in calls[1:] or calls]
    return model.denoiser, statistics.median(took)


def summary(values: list[float]) -> dict[str, Any]:
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error, "each": values}


def recorded(robot: str, episodes: int) -> tuple[Episodes, Episodes]:
    """Episodes to learn from, and those that are held out."""
    task, counts = LocomotionTask(robot), (episodes, max(episodes // HELD_OUT, 2))
    data, held = (
        task.record(episodes=count, span=1, seed=seed, goal=DATA)
        for seed, count in enumerate(counts)
    )
    return data, held


def measure(
    args: argparse.Namespace, data: Episodes, held: Episodes, horizon: int
) -> dict[str, Any]:
    """Every network's errors and time of a step, at one horizon."""
    space = space_of(data, horizon=horizon, stride=1, actions=True, normaliser="gaussian")
    source = window_source(data, space, PADDING)
    rows = window_source(held, space, PADDING).sample(jax.random.key(0), args.windows)
    training = Training(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=1e-3,
        prediction="x0",
        action_weight=10,
        ema=EMA(every=1),  # of the last 200 steps: of every tenth, it would lag behind so few
    )
    found: dict[str, Any] = {}
    shape = jnp.zeros((1, *space.shape)), jnp.zeros(1, jnp.int32)
    for name, norm in {"mlp": None, **{f"unet, {norm}": norm for norm in args.norms}}.items():
        network = Network(norm, args.width, args.dim, tuple(args.multipliers))
        taken: dict[str, list[float]] = {}
        for seed in range(args.seeds):
            denoiser, step = trained(source, space, network, training, seed)
            one = errors(denoiser, space, rows) | {"processor ms of a step": step}
            shown = ", ".join(f"{key} {value:.3f}" for key, value in one.items())
            print(f"horizon {horizon}, {name}, seed {seed}: {shown}", flush=True)
            for key, value in one.items():
                taken.setdefault(key, []).append(value)
        params = jax.eval_shape(network.make(space).init, jax.random.key(0), *shape)
        found[name] = {key: summary(values) for key, values in taken.items()}
        found[name]["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What the norm of a temporal U-Net costs.")
    parser.add_argument("--robot", choices=TASKS, default="hopper")
    parser.add_argument("--horizons", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--norms", choices=NORMS, nargs="+", default=list(NORMS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--windows", type=int, default=4096, help="held out")
    parser.add_argument("--width", type=int, default=ResidualMLP.width, help="of the MLP")
    parser.add_argument("--dim", type=int, default=TemporalUnet.dim, help="of the U-Net")
    parser.add_argument(
        "--multipliers", type=int, nargs="+", default=list(TemporalUnet.multipliers)
    )
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args(argv)
    began = time.process_time()
    sets = recorded(args.robot, args.episodes)
    horizons = {str(horizon): measure(args, *sets, horizon) for horizon in args.horizons}
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    report = {
        "horizons": horizons,
        "settings": settings | {"data": DATA, "error": "mean absolute, standard deviations"},
        "processor seconds": round(time.process_time() - began),
        **machine(),
    }
    print(json.dumps(report, indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"group_norm_{args.robot}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
