"""Targets on the paths that guided sampling takes, off the data that rewards are matched on.

x_t of data noised at random (q(x_t)) is where two models were trained; a guide moves samples to
elsewhere, and what a reward says there decides the outcome. So targets are drawn on guided chains,
too: guided by the raw difference of the scores, or by the reward at hand, in rounds.

Legend: B batch, N draws, S steps of the sampler; x_t has any shape of a row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from common_jax.cli.ranges import check_ranges
from common_jax.errors import InputError
from common_jax.mesh import fetch
from reward_jax.diffusion.denoiser import Score
from reward_jax.diffusion.process import Pinned
from reward_jax.diffusion.schedule import Schedule
from reward_jax.diffusion.sources import as_source, split_batch
from reward_jax.reward.gradients import Guide
from reward_jax.reward.guide import GuidanceOptions, guided_sample
from reward_jax.reward.targets import (
    ExtractionOptions,
    Target,
    Targets,
    TargetSettings,
    Teachers,
    check_draws,
)

__all__ = ["draw_path_targets", "join_targets"]


def draw_path_targets(
    base_score: Score,
    expert_score: Score,
    batches: Any,
    schedule: Schedule,
    *,
    guide: Guide,
    count: int,
    key: Key[Array, ""],
    target: Target = "epsilon",
    guidance: GuidanceOptions | None = None,
    options: ExtractionOptions | None = None,
    pin: Callable[[Float[Array, "B ..."]], Pinned] | None = None,
    mesh: Mesh | None = None,
) -> Targets:
    """Targets at every x_t of guided chains of the base, as `draw_targets` gives them of q(x_t).

    batches: x_0 [N, ...] or a source, from whose rows chains are pinned (with `pin`; without, they
    are not used): data, or where the world was met under a guide (`Watched` and `start_rows` of
    `planning/plan.py`). guide, guidance: what steers the chains, and how. count: how many, rounded
    up to whole chains of whole batches. Twelve parameters: those of `draw_targets`, and two of
    guidance.
    """
    o = ExtractionOptions() if options is None else options
    g = GuidanceOptions() if guidance is None else guidance
    check_draws(count, key)
    check_ranges(o)
    settings = TargetSettings(target, o.gradient_at, pin, o.batch_size, mesh)
    teachers = Teachers(base_score, expert_score, schedule, settings)
    source = as_source(batches)
    levels = g.made_sampler().timesteps(schedule)
    found = []
    for batch in range(-(-count // (o.batch_size * len(levels)))):
        for_rows, for_chain = jax.random.split(jax.random.fold_in(key, batch))
        x_0, cond = split_batch(source.sample(for_rows, o.batch_size))
        chain = guided_sample(
            base_score,
            schedule,
            x_0.shape,
            key=for_chain,
            guide=guide,
            options=g,
            pinned=pin(x_0) if pin else None,
            cond=cond,
            chain=True,
            mesh=mesh,
        )[:-1]
        t = jnp.broadcast_to(levels[:, None], chain.shape[:2])
        found.append(teachers.at(chain, t, cond))
    made = jax.tree.map(lambda *x: jnp.concatenate(x).reshape(-1, *x[0].shape[2:]), *found)
    finite = np.isfinite(fetch(made.x)).reshape(len(made.x), -1).all(axis=1)
    if not finite.all():
        raise InputError("guided chains are not finite: lower guidance.scale")
    return made


def join_targets(*parts: Targets) -> Targets:
    """Targets of several draws as one, such as of q(x_t) and of paths.

    Raises InputError for targets of different units.
    """
    units = {(part.target, part.gradient_at) for part in parts}
    if len(units) != 1:
        raise InputError(f"targets of {len(units)} units cannot be joined: {sorted(units)}")
    x, t, value = (
        jnp.concatenate([getattr(part, n) for part in parts]) for n in ("x", "t", "value")
    )
    return dataclasses.replace(parts[0], x=x, t=t, value=value)
