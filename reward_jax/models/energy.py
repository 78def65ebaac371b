"""A reward made of two denoisers: the difference of their energies.

    r(x, t) = E_base(x, t) - E_expert(x, t),   E(x, t) = |x - sqrt(abar) D(x, t)|^2 / 2 (1 - abar)

with D a denoiser's estimate of x_0 (Salimans and Ho 2021, "Should EBMs model the energy or the
score?", equation 8). Were D's Jacobian 0, -grad E would be the score; so the difference is near
the relative reward before any training, and both denoisers are then tuned by matching gradients.

Legend: B batch; x has any shape of a row; of trajectories H, D: horizon and transition width.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import Denoiser, Score
from reward_jax.diffusion.process import Prediction, check_shape, convert
from reward_jax.diffusion.schedule import make_schedule

__all__ = ["EnergyDifference", "energy_of"]


class EnergyDifference(nn.Module):
    """r in units of a score: extract it with target "score".

    Attributes:
        base, expert: the denoisers' networks; the parameters are theirs, under these names.
        predictions: what each predicts.
        schedule: name of both models' schedule.
        steps: T.
        actions: of trajectories, A: of the first row only the first A values count, for the rest
            is pinned, and a denoiser's output there is untrained; None: all values count.
    """

    base: Any
    expert: Any
    predictions: tuple[Prediction, Prediction] = ("epsilon", "epsilon")
    schedule: str = "cosine"
    steps: int = 50
    actions: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."], t: Int[Array, " B"]) -> Float[Array, " B"]:
        schedule = make_schedule(self.schedule, self.steps)
        keep = schedule.at(schedule.sqrt_alphas_cumprod, t, x)
        noise = schedule.at(schedule.sqrt_one_minus_alphas_cumprod, t, x)
        energies = []
        for network, prediction in zip((self.base, self.expert), self.predictions, strict=True):
            output = check_shape("a denoiser", network(x, t), x)
            x_0 = convert(schedule, output, x, t, prediction, "x0")
            away = (x - keep * x_0) / noise * self._counted(x.shape[1:])
            energies.append(jnp.square(away).reshape(x.shape[0], -1).sum(axis=1) / 2)
        return energies[0] - energies[1]

    def _counted(self, shape: tuple[int, ...]) -> Float[np.ndarray, "1 ..."]:
        counted = np.ones((1, *shape), np.float32)
        if self.actions is not None:
            counted[:, 0, self.actions :] = 0
        return counted


def energy_of(
    base: Score, expert: Score, *, actions: int | None = None
) -> tuple[EnergyDifference, PyTree[Float[Array, "..."]]]:
    """The difference of two denoisers' energies, and the parameters to begin with: their own.

    actions: see `EnergyDifference`. Where a denoiser clips its estimate of x_0, the energy is of
    the estimate before that, which has a gradient. Raises InputError for what is no denoiser, and
    for a schedule that is none of those by name.
    """
    if not (isinstance(base, Denoiser) and isinstance(expert, Denoiser)):
        name = "expert" if isinstance(base, Denoiser) else "base"
        raise InputError(
            f"{name} is no denoiser in the base's own coordinates, of which an energy could be "
            "made: train the expert from the base (--init)"
        )
    schedule = base.schedule
    named = make_schedule(schedule.name, schedule.steps)
    if float(jnp.abs(named.alphas_cumprod - schedule.alphas_cumprod).max()) > 1e-6:
        raise InputError(f"the schedule {schedule.name!r} of the base is not the one of that name")
    network = EnergyDifference(
        base.model,
        expert.model,
        (base.prediction, expert.prediction),
        schedule.name,
        schedule.steps,
        actions,
    )
    return network, {"base": base.params, "expert": expert.params}
