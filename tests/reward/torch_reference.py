"""Networks, diffusion and losses of Diffuser and of the paper's authors, in PyTorch.

Independent of reward_jax, and laid out as theirs: parameters and buffers have the names that their
checkpoints have. What they draw at random (t, noise) is an argument here.

Diffuser (Janner et al. 2022) and the authors' locomotion code keep four entries a level (block,
block, attention or nothing, resampling); the authors' maze code three, without attention.
Legend: B batch, H horizon, D transition width (actions first), C channels, T diffusion steps.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "mish": nn.Mish,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
}
State = Mapping[int, Tensor]  # the observation [B, O] that is given at a time step


class Waves(nn.Module):
    """t [B] -> sines and cosines [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
        angles = t[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], 1)


def time_embedding(width: int, act: str) -> nn.Sequential:
    wide = 4 * width
    return nn.Sequential(
        Waves(width), nn.Linear(width, wide), ACTIVATIONS[act](), nn.Linear(wide, width)
    )


class ConvBlock(nn.Module):
    def __init__(self, channels: int, features: int, act: str, norm: bool, bias: bool) -> None:
        super().__init__()
        parts: dict[str, nn.Module] = {"0": nn.Conv1d(channels, features, 5, padding=2, bias=bias)}
        if norm:
            parts["2"] = nn.GroupNorm(8, features)
        parts["4"] = ACTIVATIONS[act]()
        self.block = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ResidualBlock(nn.Module):
    def __init__(
        self,
        channels: int,
        features: int,
        time: int,
        act: str = "mish",
        norm: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        first = ConvBlock(channels, features, act, norm, bias)
        self.blocks = nn.ModuleList([first, ConvBlock(features, features, act, norm, bias)])
        self.time_mlp = nn.Sequential(ACTIVATIONS[act](), nn.Linear(time, features))
        same = channels == features
        self.residual_conv = nn.Identity() if same else nn.Conv1d(channels, features, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.blocks[0](x) + self.time_mlp(time)[..., None]
        return self.blocks[1](y) + self.residual_conv(x)


class Resample(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def downsample(channels: int, bias: bool = True) -> Resample:
    return Resample(nn.Conv1d(channels, channels, 3, stride=2, padding=1, bias=bias))


def upsample(channels: int) -> Resample:
    return Resample(nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1))


class ChannelNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1))
        self.b = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(spread + 1e-5) * self.g + self.b


class Heads(nn.Module):
    """Linear attention, 4 heads of 32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_qkv = nn.Conv1d(channels, 3 * 4 * 32, 1, bias=False)
        self.to_out = nn.Conv1d(4 * 32, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).reshape(len(x), 3, 4, 32, -1).unbind(1)
        context = torch.einsum("bhct,bhet->bhce", k.softmax(-1), v)
        out = torch.einsum("bhce,bhct->bhet", context, q / math.sqrt(32))
        return self.to_out(out.flatten(1, 2))


class Normed(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fn = Heads(channels)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fn = Normed(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


def _parts(levels: nn.ModuleList) -> Any:
    """A list of lists, as the type checker does not know it."""
    return levels


class TemporalUnet(nn.Module):
    """(x_t [B, H, D], cond, t [B]) -> [B, H, D]. entries: of a level, 4 or 3 (see the module)."""

    def __init__(
        self,
        transition: int,
        dim: int = 32,
        mults: Sequence[int] = (1, 2, 4, 8),
        attention: bool = False,
        entries: int = 4,
    ) -> None:
        super().__init__()
        assert entries == 4 or (entries == 3 and not attention)
        widths = [dim * m for m in mults]
        self.time_mlp = time_embedding(dim, "mish")
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()

        def middle(width: int) -> nn.Module:
            return Attention(width) if attention else nn.Identity()

        def level(channels: int, width: int, resample: nn.Module) -> nn.ModuleList:
            parts = [ResidualBlock(channels, width, dim), ResidualBlock(width, width, dim)]
            parts += [middle(width)] if entries == 4 else []
            return nn.ModuleList([*parts, resample])

        for i, (channels, width) in enumerate(zip([transition, *widths], widths, strict=False)):
            last = i == len(widths) - 1
            self.downs.append(level(channels, width, nn.Identity() if last else downsample(width)))
        self.mid_block1 = ResidualBlock(widths[-1], widths[-1], dim)
        self.mid_attn = middle(widths[-1])
        self.mid_block2 = ResidualBlock(widths[-1], widths[-1], dim)
        for width, above in zip(widths[-2::-1], widths[:0:-1], strict=True):
            self.ups.append(level(2 * above, width, upsample(width)))
        final = ConvBlock(dim, dim, "mish", True, True)
        self.final_conv = nn.Sequential(final, nn.Conv1d(dim, transition, 1))

    def forward(self, x: Tensor, cond: State | None, t: Tensor) -> Tensor:
        time, x, skips = self.time_mlp(t), x.mT, []
        for first, second, *rest in _parts(self.downs):
            x = second(first(x, time), time)
            for part in rest[:-1]:
                x = part(x)
            skips.append(x)
            x = rest[-1](x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, time)), time)
        for first, second, *rest in _parts(self.ups):
            x = second(first(torch.cat([x, skips.pop()], 1), time), time)
            for part in rest:
                x = part(x)
        return self.final_conv(x).mT


class ValueFunction(nn.Module):
    """(x_t [B, H, D], cond, t [B]) -> [B, 1]: the half U-Net."""

    def __init__(
        self,
        transition: int,
        horizon: int = 32,
        dim: int = 32,
        mults: Sequence[int] = (1, 2, 4, 8),
        act: str = "mish",
        norm: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        widths = [dim * m for m in mults]
        style: Any = dict(time=dim, act=act, norm=norm, bias=bias)
        self.time_mlp = time_embedding(dim, act)
        self.blocks = nn.ModuleList()
        for channels, width in zip([transition, *widths], widths, strict=False):
            pair = ResidualBlock(channels, width, **style), ResidualBlock(width, width, **style)
            self.blocks.append(nn.ModuleList([*pair, downsample(width, bias)]))
            horizon = -(-horizon // 2)
        half, quarter = widths[-1] // 2, widths[-1] // 4
        self.mid_block1 = ResidualBlock(widths[-1], half, **style)
        self.mid_down1 = downsample(half, bias)
        self.mid_block2 = ResidualBlock(half, quarter, **style)
        self.mid_down2 = downsample(quarter, bias)
        flat = quarter * -(-horizon // 4)
        self.final_block = nn.Sequential(
            nn.Linear(flat + dim, flat // 2), ACTIVATIONS[act](), nn.Linear(flat // 2, 1)
        )

    def forward(self, x: Tensor, cond: State | None, t: Tensor) -> Tensor:
        time, x = self.time_mlp(t), x.mT
        for first, second, down in _parts(self.blocks):
            x = down(second(first(x, time), time))
        x = self.mid_down1(self.mid_block1(x, time))
        x = self.mid_down2(self.mid_block2(x, time))
        return self.final_block(torch.cat([x.flatten(1), time], 1))


class SingleStepRewardMLP(nn.Module):
    """(window [B, horizon, D], cond, t [B]) -> [B, 1].

    Its last hidden layer is one number, activated and scaled: theirs is the loop over the widths
    that does not spare the output.
    """

    def __init__(
        self,
        transition: int,
        dim: int = 8,
        mults: Sequence[int] = (8, 4, 2, 1),
        embed_dim: int = 8,
        horizon: int = 1,
        act: str = "mish",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.horizon = horizon
        self.time_mlp = time_embedding(embed_dim, act)
        sizes = [horizon * transition + embed_dim, *(dim * m for m in mults), 1]
        layers = [
            nn.Sequential(nn.Linear(a, b, bias=bias), ACTIVATIONS[act]())
            for a, b in zip(sizes, sizes[1:], strict=False)
        ]
        self.mlp = nn.Sequential(*layers, nn.Linear(1, 1))

    def forward(self, x: Tensor, cond: State | None, t: Tensor) -> Tensor:
        return self.mlp(torch.cat([x.flatten(1), self.time_mlp(t)], 1))


def windowed(model: SingleStepRewardMLP, x: Tensor, cond: State | None, t: Tensor) -> Tensor:
    """[B, 1]: mean over H / horizon windows; window n holds the steps n, n + count, ..."""
    count = x.shape[1] // model.horizon
    windows = torch.stack([x[:, n::count] for n in range(count)], 1).flatten(0, 1)
    return model(windows, cond, t.repeat_interleave(count)).reshape(-1, count).mean(1, True)


def cosine_betas(steps: int) -> Tensor:
    """[T] float32, as Diffuser rounds them before it goes on."""
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    bar = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - bar[1:] / bar[:-1]).clamp(0, 0.999).float()


class Weights(nn.Module):
    """Weights [H, D] of the loss, as a buffer."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)


class GaussianDiffusion(nn.Module):
    """A denoiser with the tables of its schedule, all [T] float32."""

    def __init__(
        self,
        model: nn.Module,
        horizon: int,
        transition: int,
        actions: int,
        steps: int,
        *,
        epsilon: bool = False,
        clip: bool = False,
        action_weight: float = 1.0,
        betas: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.actions, self.steps = model, actions, steps
        self.epsilon, self.clip = epsilon, clip
        betas = cosine_betas(steps) if betas is None else betas
        alphas = 1 - betas
        bar = torch.cumprod(alphas, 0)
        before = torch.cat([torch.ones(1), bar[:-1]])
        variance = betas * (1 - before) / (1 - bar)
        tables = {
            "betas": betas,
            "alphas_cumprod": bar,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - bar).log(),
            "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * before.sqrt() / (1 - bar),
            "posterior_mean_coef2": (1 - before) * alphas.sqrt() / (1 - bar),
        }
        for name, table in tables.items():
            self.register_buffer(name, table)
        weights = torch.ones(horizon, transition)
        weights[0, :actions] = action_weight
        self.loss_fn = Weights(weights)

    def at(self, table: str, t: Tensor) -> Tensor:
        """[B, 1, 1]."""
        return self.get_buffer(table)[t][:, None, None]

    def impose(self, x: Tensor, cond: State) -> Tensor:
        """X with the given observations in their places."""
        x = x.clone()
        for step, observation in cond.items():
            x[:, step, self.actions :] = observation
        return x

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        keep, add = (self.at(f"sqrt_{n}alphas_cumprod", t) for n in ("", "one_minus_"))
        return keep * x_0 + add * noise

    def p_mean_variance(self, x: Tensor, cond: State, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [B, H, D] of p(x_{t-1} | x_t), its variance and clipped log variance [B, 1, 1]."""
        x_0 = self.model(x, cond, t)
        if self.epsilon:
            scale, noise = (self.at(f"sqrt_{n}_alphas_cumprod", t) for n in ("recip", "recipm1"))
            x_0 = scale * x - noise * x_0
        if self.clip:
            x_0 = x_0.clamp(-1, 1)
        mean = self.at("posterior_mean_coef1", t) * x_0 + self.at("posterior_mean_coef2", t) * x
        log = self.at("posterior_log_variance_clipped", t)
        return mean, self.at("posterior_variance", t), log

    def p_losses(self, x_0: Tensor, cond: State, t: Tensor, noise: Tensor) -> Tensor:
        """Weighted mean square of the error; the given states are imposed on input and output.

        With epsilon prediction they are so imposed on a predicted noise: a constant in the loss.
        """
        x = self.impose(self.q_sample(x_0, t, noise), cond)
        output = self.impose(self.model(x, cond, t), cond)
        error = (output - (noise if self.epsilon else x_0)) ** 2
        return (error * self.loss_fn.get_buffer("weights")).mean()

    def p_sample(self, x: Tensor, cond: State, t: Tensor, noise: Tensor) -> Tensor:
        """x_{t-1}, given states not yet imposed; no noise at t = 0."""
        mean, _, log = self.p_mean_variance(x, cond, t)
        return mean + (0.5 * log).exp() * noise * (t > 0)[:, None, None]


class Reward(nn.Module):
    """The reward beside its two teachers, as the authors' gradient-matching checkpoints hold it.

    The model is any of the two above; an MLP is applied to windows.
    """

    def __init__(
        self, model: nn.Module, expert: GaussianDiffusion, base: GaussianDiffusion
    ) -> None:
        super().__init__()
        self.model, self.s_expert, self.s_general = model, expert, base

    def forward(self, x: Tensor, cond: State | None, t: Tensor) -> Tensor:
        if isinstance(self.model, SingleStepRewardMLP):
            return windowed(self.model, x, cond, t)
        return self.model(x, cond, t)

    def gradient(self, x: Tensor, cond: State | None, t: Tensor, create: bool = False) -> Tensor:
        """Gradient [B, H, D] of the reward in x."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            total = self(x, cond, t).sum()
        return torch.autograd.grad(total, x, create_graph=create)[0]

    def loss(self, x_0: Tensor, cond: State, t: Tensor, noise: Tensor) -> Tensor:
        """Mean square of grad r(mu_base, t) - (mu_expert - mu_base), the means at x_t."""
        with torch.no_grad():
            x_t = self.s_expert.q_sample(x_0, t, noise)
            expert, _, _ = self.s_expert.p_mean_variance(x_t, cond, t)
            base, _, _ = self.s_general.p_mean_variance(x_t, cond, t)
        return functional.mse_loss(self.gradient(base, cond, t, create=True), expert - base)


class Discriminator(nn.Module):
    """Expert (1) against base (0) on noised trajectories."""

    def __init__(self, model: nn.Module, diffusion: GaussianDiffusion) -> None:
        super().__init__()
        self.model, self.diffusion = model, diffusion

    def loss(self, x_0: Tensor, label: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Binary cross entropy of the logit at x_t; label [B, 1]."""
        logit = self.model(self.diffusion.q_sample(x_0, t, noise), None, t)
        return functional.binary_cross_entropy_with_logits(logit, label)

    def forward(self, x: Tensor, cond: State | None, t: Tensor) -> Tensor:
        """The probability [B, 1], which is what the authors' guide differentiates."""
        return torch.sigmoid(self.model(x, cond, t))


@torch.no_grad()
def guided_p_sample(
    diffusion: GaussianDiffusion,
    guide: nn.Module,
    x: Tensor,
    cond: State,
    t: Tensor,
    noise: Tensor,
    *,
    scale: float,
    t_stopgrad: int = 0,
    guide_steps: int = 1,
    by_variance: bool = False,
) -> Tensor:
    """One step down with x moved along the guide's gradient first; guide(x, cond, t) -> [B, 1]."""
    for _ in range(guide_steps):
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            total = guide(leaf, cond, t).sum()
        gradient = torch.autograd.grad(total, leaf)[0]
        if by_variance:
            gradient = gradient * diffusion.at("posterior_log_variance_clipped", t).exp()
        gradient[t < t_stopgrad] = 0
        x = diffusion.impose(x + scale * gradient, cond)
    return diffusion.p_sample(x, cond, t, noise)


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Every parameter drawn anew, norms and biases too: zeros and ones would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 and "norm" not in name else 16
            mean = 1.0 if name.endswith((".2.weight", ".g")) and "final_block" not in name else 0.0
            parameter.copy_(mean + drawn / math.sqrt(fan_in))
    return module
