"""The image networks and their three steps in eager PyTorch: what `benchmarks/images.py` times.

Training a denoiser (v, mean square, Adam, averaged weights), gradient matching (two teachers
without gradients, the reward's gradient with a graph, Adam) and guided sampling, ancestral. Images
have one channel, and are [B, 1, H, W]. Adam is fused, averages are one call for all weights.

Legend: B batch, C channels of the input, F of the output, H and W rows and columns.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Half", "Matching", "Sampling", "Training", "UNet", "filled"]


class Time(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        places = torch.arange(half, device=t.device)
        rates = torch.exp(places * (-math.log(10000) / (half - 1)))
        angles = t[:, None].float() * rates[None]
        x = torch.cat([angles.sin(), angles.cos()], -1)
        return self.second(F.silu(self.first(x)))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm_first = nn.GroupNorm(groups, inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(width, outputs)
        self.norm_second = nn.GroupNorm(groups, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.first(F.silu(self.norm_first(x)))
        y = y + self.time(F.silu(time))[:, :, None, None]
        y = self.second(F.silu(self.norm_second(y)))
        return y + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class _Levels(nn.Module):
    """What a U-Net and its half share; ours: the network in Flax, whose sizes it has."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.patch, self.blocks, self.widths = ours.patch, ours.blocks, []
        self.time = Time(ours.dim)
        self.add_module("in", nn.Conv2d(ours.patch**2, ours.dim, 3, padding=1))
        self._ours, last = ours, ours.dim
        for level, multiplier in enumerate(ours.multipliers):
            if level:
                self.add_module(
                    f"down_{level}_sample", nn.Conv2d(last, last, 3, stride=2, padding=1)
                )
            last = self._add(f"down_{level}", last, ours.dim * multiplier)
            self.widths.append(last)

    def _add(self, name: str, inputs: int, outputs: int) -> int:
        for block in range(self.blocks):
            made = Block(inputs, outputs, self._ours.dim, self._ours.groups)
            self.add_module(f"{name}_{block}", made)
            inputs = outputs
        return outputs

    def _run(self, name: str, x: Tensor, time: Tensor) -> Tensor:
        for block in range(self.blocks):
            x = self.get_submodule(f"{name}_{block}")(x, time)
        return x

    def _down(self, x: Tensor, time: Tensor) -> list[Tensor]:
        x = self.get_submodule("in")(F.pixel_unshuffle(x, self.patch))
        found = []
        for level in range(len(self.widths)):
            if level:
                x = self.get_submodule(f"down_{level}_sample")(x)
            x = self._run(f"down_{level}", x, time)
            found.append(x)
        return found


class UNet(_Levels):
    """Our `UNet2D`, without attention and classes."""

    def __init__(self, ours: Any) -> None:
        super().__init__(ours)
        last = self._add("middle", self.widths[-1], self.widths[-1])
        for level, width in reversed(list(enumerate(self.widths))):
            last = self._add(f"up_{level}", last + width, width)
            if level:
                self.add_module(f"up_{level}_sample", nn.Conv2d(width, width, 3, padding=1))
        self.norm = nn.GroupNorm(ours.groups, last)
        self.out = nn.Conv2d(last, ours.patch**2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(t)
        skips = self._down(x, time)
        x = self._run("middle", skips[-1], time)
        for level in reversed(range(len(self.widths))):
            x = self._run(f"up_{level}", torch.cat([x, skips.pop()], 1), time)
            if level:
                height, width = skips[-1].shape[2:]
                x = F.interpolate(x, scale_factor=2)[:, :, :height, :width]
                x = self.get_submodule(f"up_{level}_sample")(x)
        return F.pixel_shuffle(self.out(F.silu(self.norm(x))), self.patch)


class Half(_Levels):
    """Our `HalfUNet2D`."""

    def __init__(self, ours: Any) -> None:
        super().__init__(ours)
        self.norm = nn.GroupNorm(ours.groups, self.widths[-1])
        self.head = nn.Linear(self.widths[-1], 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self._down(x, self.time(t))[-1]
        return self.head(F.silu(self.norm(x)).mean((2, 3)))[:, 0]


def filled(module: nn.Module, params: Mapping[str, Any]) -> Any:
    """The module with our parameters."""
    for path, value in _leaves(params):
        *where, kind = [part for part in path if part != "group"]
        owner = module.get_submodule(".".join(where))
        tensor = torch.from_numpy(np.array(value))
        if kind == "kernel":
            tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.mT
        into = owner.get_parameter("bias" if kind == "bias" else "weight")
        with torch.no_grad():
            into.copy_(tensor.reshape(into.shape))
    return module


def _leaves(params: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(params, Mapping):
        yield path, params
        return
    for name, value in params.items():
        yield from _leaves(value, (*path, name))


class _Drawing:
    """Draws x_t of rows [N, 1, H, W], in one format of memory, where they are. bar: abar, [T]."""

    def __init__(self, rows: Tensor, bar: Tensor, batch: int, form: torch.memory_format) -> None:
        self.rows, self.bar, self.batch, self.form = rows, bar, batch, form

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t, the v that is to be predicted."""
        device = self.rows.device
        x_0 = self.rows[torch.randint(len(self.rows), (self.batch,), device=device)]
        x_0 = x_0.contiguous(memory_format=self.form)
        t = torch.randint(len(self.bar), (self.batch,), device=device)
        noise = torch.randn_like(x_0)
        keep, spread = (f[t, None, None, None] for f in (self.bar.sqrt(), (1 - self.bar).sqrt()))
        return keep * x_0 + spread * noise, t, keep * noise - spread * x_0


def _adam(module: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=2e-4, fused=True)


class Training(_Drawing):
    """A step of training the denoiser."""

    def __init__(self, net: nn.Module, *drawing: Any) -> None:
        super().__init__(*drawing)
        self.net = copy.deepcopy(net)
        self.adam = _adam(self.net)
        self.average = [p.detach().clone() for p in self.net.parameters()]

    def __call__(self) -> None:
        x_t, t, wanted = self.draw()
        loss = F.mse_loss(self.net(x_t, t), wanted)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        now = [p.detach() for p in self.net.parameters()]
        torch._foreach_lerp_(self.average, now, 0.005)  # type: ignore[reportPrivateImportUsage]


class Matching(_Drawing):
    """A step of gradient matching, to minus the difference of two noise predictions."""

    def __init__(
        self, reward: nn.Module, base: nn.Module, expert: nn.Module, *drawing: Any
    ) -> None:
        super().__init__(*drawing)
        self.reward, self.base, self.expert = copy.deepcopy(reward), base, expert
        self.adam = _adam(self.reward)

    def __call__(self) -> None:
        x_t, t, _ = self.draw()
        with torch.no_grad():  # epsilon of v: sqrt(abar) v + sqrt(1 - abar) x_t
            keep = self.bar.sqrt()[t, None, None, None]
            target = keep * (self.base(x_t, t) - self.expert(x_t, t))
        x_t.requires_grad_()
        slope = torch.autograd.grad(self.reward(x_t, t).sum(), x_t, create_graph=True)[0]
        loss = F.mse_loss(slope, target)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()


class Sampling:
    """Ancestral chains of the base, each step after one along the reward's gradient."""

    def __init__(
        self, base: nn.Module, reward: nn.Module, bar: Tensor, shape: Any, form: Any
    ) -> None:
        self.base, self.reward, self.bar, self.shape, self.form = base, reward, bar, shape, form

    def __call__(self) -> Tensor:
        device = self.bar.device
        x = torch.randn(self.shape, device=device).contiguous(memory_format=self.form)
        one = torch.ones((), device=device)
        for step in reversed(range(len(self.bar))):
            t = torch.full((len(x),), step, device=device)
            bar, before = self.bar[step], self.bar[step - 1] if step else one
            beta = 1 - bar / before
            x = x.detach().requires_grad_()
            slope = torch.autograd.grad(self.reward(x, t).sum(), x)[0]
            with torch.no_grad():
                x = x + slope * beta / (1 - beta).sqrt() / (1 - bar).sqrt()
                x_0 = bar.sqrt() * x - (1 - bar).sqrt() * self.base(x, t)
                x_0 = x_0.clamp(-1, 1)
                mean = before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - before) * x
                noise = torch.randn_like(x) * (beta * (1 - before) / (1 - bar)).sqrt()
                x = mean / (1 - bar) + noise
        return x
