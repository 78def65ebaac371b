"""Planning as the authors do it in eager PyTorch: what `plan.py` is timed against.

Observations in an environment's units are normalised, trajectories are sampled from them, steered
by the reward, and given back in the environment's units.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from benchmarks.torch_reward import Models, Size
from tests.reward import torch_reference as reference

__all__ = ["Planning"]


@dataclasses.dataclass(frozen=True)
class Planning:
    """Observations [N, O] -> plans [N, H, D], actions first.

    spare: no gradient at steps below t_stopgrad; the authors' code computes it there, too, and
    sets it to zero. offset, scale: [D], of the Gaussian normaliser.
    """

    models: Models
    size: Size
    offset: np.ndarray
    scale: np.ndarray
    spare: bool

    @torch.no_grad()
    def __call__(self, observations: np.ndarray, noise: Tensor | None = None) -> np.ndarray:
        """noise: [1 + T, N, H, D], of the beginning and of each step; drawn where it is None."""
        size, base, device = self.size, self.models.reward.s_general, self.models.device
        states = (observations - self.offset[size.actions :]) / self.scale[size.actions :]
        cond = {0: torch.from_numpy(states.astype(np.float32)).to(device)}
        shape = (len(states), size.horizon, size.transition)

        def drawn(move: int) -> Tensor:
            return torch.randn(shape, device=device) if noise is None else noise[move]

        x = base.impose(drawn(0), cond)
        for move, level in enumerate(range(size.steps - 1, -1, -1), start=1):
            t = torch.full((len(x),), level, device=device)
            if self.spare and level < size.t_stopgrad:
                x = base.p_sample(x, cond, t, drawn(move))
            else:
                x = reference.guided_p_sample(
                    base,
                    self.models.reward.model,
                    x,
                    cond,
                    t,
                    drawn(move),
                    scale=size.scale,
                    t_stopgrad=size.t_stopgrad,
                )
            x = base.impose(x, cond)
        return x.cpu().numpy() * self.scale + self.offset
