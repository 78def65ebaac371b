"""The authors' three steps in eager PyTorch, as quick as it gets: what we are timed against.

Gradient matching (teachers without gradients, the reward's gradient with a graph, mean square,
Adam), diffusion training (weighted mean square, given first state, Adam, averaged weights) and
guided sampling. Networks are those of the tests' reference, with the authors' layers. Adam is
fused, averages are one call for all weights, and no anomaly detection is on, as it is in theirs.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tests.reward import torch_reference as reference

__all__ = ["Diffusing", "Matching", "Models", "Sampling", "Size", "make"]


@dataclasses.dataclass(frozen=True)
class Size:
    """An environment at the paper's sizes, and how it is steered."""

    name: str
    transition: int
    actions: int
    horizon: int
    multipliers: tuple[int, ...]
    attention: bool
    scale: float
    t_stopgrad: int
    steps: int = 20
    reward_dim: int = 4
    reward_multipliers: tuple[int, ...] = (16, 16, 32, 32)
    matching_batch: int = 128
    diffusion_batch: int = 32


@dataclasses.dataclass(frozen=True)
class Models:
    """Reward, with both diffusions in it."""

    reward: reference.Reward
    device: torch.device


def make(size: Size, device: str) -> Models:
    """Random weights, the same on every call."""
    diffusions = []
    for seed in (0, 1):
        net = reference.TemporalUnet(
            size.transition, mults=size.multipliers, attention=size.attention
        )
        diffusions.append(
            reference.GaussianDiffusion(
                reference.randomise(net, seed),
                size.horizon,
                size.transition,
                size.actions,
                size.steps,
                action_weight=10.0,
            )
        )
    value = reference.ValueFunction(
        size.transition,
        size.horizon,
        size.reward_dim,
        size.reward_multipliers,
        act="leaky_relu",
        norm=False,
        bias=False,
    )
    reward = reference.Reward(reference.randomise(value, 2), *diffusions)
    return Models(reward.to(device), torch.device(device))


def _adam(module: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=2e-4, fused=True)


class _Trained:
    """Draws rows of a data set x_0 [N, H, D], which lies on the device already."""

    def __init__(self, models: Models, rows: Tensor, batch: int, steps: int) -> None:
        self.rows, self.batch, self.steps = rows.to(models.device), batch, steps
        self.device = models.device

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """x_0, t, noise."""
        picked = torch.randint(len(self.rows), (self.batch,), device=self.device)
        x_0 = self.rows[picked]
        t = torch.randint(self.steps, (self.batch,), device=self.device)
        return x_0, t, torch.randn_like(x_0)


class Matching(_Trained):
    """A reward's gradient against the difference of the teachers' means."""

    def __init__(self, models: Models, size: Size, rows: Tensor) -> None:
        super().__init__(models, rows, size.matching_batch, size.steps)
        self.reward = copy.deepcopy(models.reward)
        self.reward.s_expert.requires_grad_(False)
        self.reward.s_general.requires_grad_(False)
        self.optimizer = _adam(self.reward.model)

    def __call__(self) -> Tensor:
        x_0, t, noise = self.draw()
        loss = self.reward.loss(x_0, {}, t, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Diffusing(_Trained):
    """A diffusion, and the average of its weights: .995 every 10 steps."""

    def __init__(self, models: Models, size: Size, rows: Tensor) -> None:
        super().__init__(models, rows, size.diffusion_batch, size.steps)
        self.diffusion = copy.deepcopy(models.reward.s_general)
        self.optimizer = _adam(self.diffusion)
        self.actions, self.done = size.actions, 0
        self.average = [p.detach().clone() for p in self.diffusion.parameters()]

    def __call__(self) -> Tensor:
        x_0, t, noise = self.draw()
        loss = self.diffusion.p_losses(x_0, {0: x_0[:, 0, self.actions :]}, t, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.done % 10 == 0:
            now = [p.detach() for p in self.diffusion.parameters()]
            torch._foreach_lerp_(self.average, now, 1 - 0.995)  # type: ignore[reportPrivateImportUsage]
        self.done += 1
        return loss.detach()


class Sampling:
    """Trajectories [N, H, D] from first states [N, O], steered by the reward.

    As in the authors' code the gradient is taken at every t, and set to zero below t_stopgrad.
    """

    def __init__(self, models: Models, size: Size, states: Tensor) -> None:
        self.models, self.size = models, size
        self.states = states.to(models.device)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        size, base = self.size, self.models.reward.s_general
        cond = {0: self.states}
        shape = (len(self.states), size.horizon, size.transition)
        x = base.impose(torch.randn(shape, device=self.models.device), cond)
        options: dict[str, Any] = dict(scale=size.scale, t_stopgrad=size.t_stopgrad)
        for level in range(size.steps - 1, -1, -1):
            t = torch.full((len(x),), level, device=self.models.device)
            reward, noise = self.models.reward.model, torch.randn_like(x)
            x = base.impose(
                reference.guided_p_sample(base, reward, x, cond, t, noise, **options), cond
            )
        return x
