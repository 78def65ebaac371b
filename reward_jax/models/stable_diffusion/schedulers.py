"""DDIM, PNDM and DDPM as diffusers has them: each a plan of numbers, and one move for all.

A scheduler's arithmetic is linear in what it remembers, so that its steps are rows of a table:

    used = new_0 e + new_1 m_0 + .. + new_4 m_3        e: the model's (guided) output
    origin = the remembered latents, or x_t
    x_0, epsilon = of `used`, epsilon or v, at `origin` with a = sqrt(abar), s = sqrt(1 - abar)
    next = to_x0 x_0 + to_epsilon epsilon + to_x origin + sigma noise

DDIM (Song et al. 2021, arXiv 2010.02502, equation 12, eta 0) and DDPM (Ho et al. 2020, equation
7) remember nothing. PNDM (Liu et al. 2022, arXiv 2202.09778, algorithm 2) remembers three outputs
and, in its first steps of Runge and Kutta, a sum of them, m_0, and the latents that it began from;
without those steps (skip_prk_steps, as published folders have it) it takes its second step twice.

x_0 is never clipped: latents have no limits, and diffusers' pipelines turn clip_sample off.

Legend: S evaluations of the model, T diffusion steps, B batch.
"""

import functools
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from common_jax import struct
from common_jax.errors import InputError
from reward_jax.diffusion.schedule import Schedule, cosine_schedule, from_betas
from reward_jax.models.stable_diffusion.config import Prediction, SchedulerConfig

__all__ = ["Memory", "Plan", "Row", "SchedulerName", "move", "plan", "remember", "schedule_of"]

SchedulerName = Literal["pndm", "ddim", "ddpm"]


@struct.dataclass
class Row:
    """One evaluation of the model, or all S of them; see the module."""

    t: Int[Array, "..."]
    new: Float[Array, "... 5"]
    a: Float[Array, "..."]
    s: Float[Array, "..."]
    to_x0: Float[Array, "..."]
    to_epsilon: Float[Array, "..."]
    to_x: Float[Array, "..."]
    sigma: Float[Array, "..."]
    sum: Float[Array, "... 2"]  # m_0 becomes sum_0 m_0 + sum_1 e
    push: Bool[Array, "..."]  # e is remembered: m_1, the oldest is lost
    keep: Bool[Array, "..."]  # x_t is kept
    use_origin: Bool[Array, "..."]


@struct.dataclass
class Plan:
    """A scheduler's rows. remembers, noisy: whether any row does."""

    rows: Row
    prediction: Prediction = struct.field(pytree_node=False)
    remembers: bool = struct.field(pytree_node=False)
    noisy: bool = struct.field(pytree_node=False)


@struct.dataclass
class Memory:
    """What PNDM remembers: a sum, the last three outputs (newest first), and latents."""

    outputs: Float[Array, "4 B ..."]
    origin: Float[Array, "B ..."]


def schedule_of(config: SchedulerConfig) -> Schedule:
    """The schedule of a scheduler's betas."""
    if config.betas is not None:
        return from_betas(np.asarray(config.betas))
    if config.beta_schedule == "squaredcos_cap_v2":
        return cosine_schedule(config.steps)
    first, last = config.beta_start, config.beta_end
    if config.beta_schedule == "linear":
        return from_betas(np.linspace(first, last, config.steps), "linear")
    return from_betas(np.linspace(first**0.5, last**0.5, config.steps) ** 2, "scaled_linear")


def plan(config: SchedulerConfig, name: SchedulerName, steps: int) -> Plan:
    """The plan of a scheduler for so many steps.

    What a folder leaves open is as the scheduler of that name has it in diffusers: DDIM ends in
    x_0 unless set_alpha_to_one is false.

    Raises InputError for another name, and for steps that the schedule does not have.
    """
    if name not in get_args(SchedulerName):
        known = ", ".join(get_args(SchedulerName))
        raise InputError(f"scheduler {name!r} is unknown; known are {known}")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= config.steps:
        raise InputError(f"steps must be a whole number, 1 to {config.steps}, not {steps!r}")
    bar = _alphas_bar(config)
    t = _timesteps(config, steps)
    if t[-1] >= config.steps:
        raise InputError(
            f"{steps} steps begin at diffusion step {t[-1]}, where the last one is "
            f"{config.steps - 1} (steps_offset is {config.offset}): give fewer steps"
        )
    if name == "pndm":
        return _pndm(config, bar, t)
    clean = name == "ddpm" or config.last_is_clean is not False
    t = t[::-1]
    to = t - config.steps // steps if name == "ddim" else np.append(t[1:], -1)
    abar, before = bar[t], _at(bar, to, clean)
    alpha = abar / before
    table: dict[str, Any] = dict(t=t, a=np.sqrt(abar), s=np.sqrt(1 - abar))
    if name == "ddim":
        table |= dict(to_x0=np.sqrt(before), to_epsilon=np.sqrt(1 - before))
    else:
        small = (1 - before) / (1 - abar) * (1 - alpha)
        variance = 1 - alpha if config.large_variance else np.maximum(small, 1e-20)
        table |= dict(
            to_x0=np.sqrt(before) * (1 - alpha) / (1 - abar),
            to_x=np.sqrt(alpha) * (1 - before) / (1 - abar),
            sigma=np.where(t > 0, np.sqrt(variance), 0),
        )
    return Plan(_rows(table), config.prediction, False, name == "ddpm")


@functools.lru_cache(maxsize=8)
def _alphas_bar(config: SchedulerConfig) -> np.ndarray:
    """Abar in float64, from the betas that `schedule_of` takes."""
    return np.asarray(np.cumprod(1 - np.asarray(schedule_of(config).betas, np.float64)))


def _at(bar: np.ndarray, t: np.ndarray, clean: bool) -> np.ndarray:
    """What abar is at t; before the first step 1, or else abar at 0."""
    return np.where(t >= 0, bar[np.maximum(t, 0)], 1.0 if clean else bar[0])


def _timesteps(config: SchedulerConfig, steps: int) -> np.ndarray:
    """The diffusion steps, rising (Lin et al. 2024, arXiv 2305.08891, table 2)."""
    total = config.steps
    if config.spacing == "linspace":
        return np.linspace(0, total - 1, steps).round().astype(int)
    if config.spacing == "leading":
        return np.arange(steps) * (total // steps) + config.offset
    return np.round(np.arange(total, 0, -total / steps)).astype(int)[::-1] - 1


def _rows(table: dict[str, Any]) -> Row:
    """Rows of what is given, and nothing else."""
    count = len(table["t"])
    zero, no = np.zeros(count), np.zeros(count, bool)
    full: dict[str, Any] = dict(
        new=np.eye(1, 5).repeat(count, 0),
        sum=np.zeros((count, 2)),
        **dict.fromkeys(("to_x0", "to_epsilon", "to_x", "sigma"), zero),
        **dict.fromkeys(("push", "keep", "use_origin"), no),
    )
    kinds = {"t": np.int32, "push": bool, "keep": bool, "use_origin": bool}
    full |= table
    return Row(
        **{k: jnp.asarray(np.asarray(v, kinds.get(k, np.float32))) for k, v in full.items()}
    )


# Adams and Bashforth: of the output and the three before it, by how many are known.
_WEIGHTS = {
    1: np.array([1.0, 0, 0, 0]),
    2: np.array([3.0, -1, 0, 0]) / 2,
    3: np.array([23.0, -16, 5, 0]) / 12,
    4: np.array([55.0, -59, 37, -9]) / 24,
}


def _pndm(config: SchedulerConfig, bar: np.ndarray, t: np.ndarray) -> Plan:
    ratio, half = config.steps // len(t), config.steps // len(t) // 2
    table: dict[str, list[Any]] = {
        name: [] for name in ("t", "new", "sum", "push", "keep", "use_origin", "at", "to")
    }

    def row(*values: Any) -> None:
        for name, value in zip(table, values, strict=True):
            table[name].append(value)

    if config.skip_runge_kutta:
        falling = np.concatenate([t[:-1], t[-2:-1], t[-1:]])[::-1]
        known = 0
    else:
        if len(t) < 4:
            raise InputError(
                f"PNDM with skip_prk_steps false takes 4 steps or more, not {len(t)}: give more "
                "steps, or another scheduler"
            )
        starts = np.repeat(t[-4:], 2) + np.tile([0, half], 4)
        starts = starts[:-1].repeat(2)[1:-1][::-1]
        for i, at in enumerate(starts):
            new = [[1.0, 0], [1.0, 0], [1.0, 0], [1 / 6, 1.0]][i % 4]
            total = [[1.0, 1 / 6], [1.0, 1 / 3], [1.0, 1 / 3], [0, 0]][i % 4]
            begins = i % 4 == 0
            to = at - (0 if i % 2 else half)
            row(at, [*new, 0, 0, 0], total, begins, begins, not begins, starts[i // 4 * 4], to)
        falling = t[:-3][::-1]
        known = 3
    for i, at in enumerate(falling):
        if config.skip_runge_kutta and i == 1:  # the second step again, with the mean of both
            row(at, [0.5, 0, 0.5, 0, 0], [0, 0], False, False, True, at + ratio, at)
            continue
        known = min(known + 1, 4)
        w = _WEIGHTS[known]
        row(at, [w[0], 0, *w[1:]], [0, 0], True, i == 0, False, at, at - ratio)
    at, to = np.array(table.pop("at")), np.array(table.pop("to"))
    if max(at.max(), max(table["t"])) >= config.steps:
        raise InputError(
            f"PNDM with {len(t)} steps reads the schedule at diffusion step {at.max()}, where the "
            f"last one is {config.steps - 1}: give fewer steps, or another scheduler"
        )
    abar, before = bar[at], _at(bar, to, bool(config.last_is_clean))
    # Equation 9: what epsilon is multiplied by.
    below = abar * np.sqrt(1 - before) + np.sqrt(abar * (1 - abar) * before)
    full = table | dict(
        a=np.sqrt(abar),
        s=np.sqrt(1 - abar),
        to_x=np.sqrt(before / abar),
        to_epsilon=-(before - abar) / below,
    )
    return Plan(_rows(full), config.prediction, True, False)


def remember(x: Float[Array, "B ..."], plan: Plan) -> Memory | None:
    """The memory before the first row; None where nothing is remembered."""
    return Memory(jnp.zeros((4, *x.shape), x.dtype), x) if plan.remembers else None


def move(
    plan: Plan,
    row: Row,
    x_t: Float[Array, "B ..."],
    output: Float[Array, "B ..."],
    noise: Float[Array, "B ..."] | None,
    memory: Memory | None,
) -> tuple[Float[Array, "B ..."], Memory | None]:
    """The next latents and the memory.

    output: the model's, guided. noise: standard normal, of a plan with noise.
    """
    used, origin = output, x_t
    if memory is not None:
        past = jnp.concatenate([output[None], memory.outputs])
        used = jnp.tensordot(row.new, past, 1, precision="highest")  # else bfloat16 on a TPU
        origin = jnp.where(row.use_origin, memory.origin, x_t)
        total = row.sum[0] * memory.outputs[0] + row.sum[1] * output
        pushed = jnp.concatenate([output[None], memory.outputs[1:3]])
        outputs = jnp.where(row.push, pushed, memory.outputs[1:])
        memory = Memory(
            jnp.concatenate([total[None], outputs]), jnp.where(row.keep, x_t, memory.origin)
        )
    if plan.prediction == "epsilon":
        epsilon, x_0 = used, (origin - row.s * used) / row.a
    else:
        epsilon, x_0 = row.a * used + row.s * origin, row.a * origin - row.s * used
    x = row.to_x0 * x_0 + row.to_epsilon * epsilon + row.to_x * origin
    return (x if noise is None else x + row.sigma * noise), memory
