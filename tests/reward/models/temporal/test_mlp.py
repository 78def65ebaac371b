"""The residual MLP against the same network in PyTorch, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from reward_jax.models.temporal.mlp import ResidualMLP
from tests.reward.torch_reference import ACTIVATIONS, randomise, time_embedding


class Reference(nn.Module):
    def __init__(self, values: int, width: int, blocks: int, embedding: int, act: str):
        super().__init__()
        self.act = ACTIVATIONS[act]()
        self.time = time_embedding(embedding, act)
        self.inward, self.outward = nn.Linear(values, width), nn.Linear(width, values)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        sizes = (width, embedding, width)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width, eps=1e-6), *(nn.Linear(n, width) for n in sizes)])
            for _ in range(blocks)
        )

    def forward(self, x, t):
        time, h = self.time(t), self.inward(x.flatten(1))
        for norm, first, of_time, second in self.layers:  # pyright: ignore
            h = h + second(self.act(first(norm(h)) + of_time(time)))
        return self.outward(self.act(self.norm(h))).reshape(x.shape)


def dense(layer):
    return {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()}


def norm(layer):
    return {"scale": layer.weight.detach().numpy(), "bias": layer.bias.detach().numpy()}


@pytest.mark.parametrize("act", ["mish", "silu"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_it_is_the_network_that_it_says_it_is(act, blocks):
    theirs = randomise(Reference(5 * 7, 24, blocks, 16, act), 3)
    assert isinstance(theirs, Reference)
    params = {
        "time": {"first": dense(theirs.time[1]), "second": dense(theirs.time[3])},
        "in": dense(theirs.inward),
        "out": dense(theirs.outward),
        "norm": norm(theirs.norm),
    }
    for i, (n, first, of_time, second) in enumerate(theirs.layers):  # pyright: ignore
        params |= {f"norm_{i}": norm(n), f"first_{i}": dense(first)}
        params |= {f"time_{i}": dense(of_time), f"second_{i}": dense(second)}
    net = ResidualMLP(24, blocks, 16, act)
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(4, 5, 7)).astype("f4"), np.array([0, 3, 11, 19])
    assert jax.tree.structure(
        jax.eval_shape(net.init, jax.random.key(0), x, t)["params"]
    ) == jax.tree.structure(params)

    def total(x):
        made = net.apply({"params": params}, x, jnp.asarray(t))
        assert isinstance(made, jax.Array)
        return jnp.sum(jnp.sin(made)), made

    (_, ours), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(x))
    given = torch.tensor(x, requires_grad=True)
    made = theirs(given, torch.tensor(t))
    torch.sin(made).sum().backward()
    np.testing.assert_allclose(ours, made.detach().numpy(), atol=1e-5, rtol=1e-5)
    assert given.grad is not None
    np.testing.assert_allclose(gradient, given.grad.numpy(), atol=1e-5, rtol=1e-5)


def test_its_size_is_what_the_trial_had():
    """512 wide, two blocks: 1.2 million parameters at Hopper's windows of 8 rows of 14."""
    x = jax.ShapeDtypeStruct((1, 8, 14), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    made = jax.eval_shape(ResidualMLP().init, jax.random.key(0), x, t)
    assert sum(leaf.size for leaf in jax.tree.leaves(made)) == pytest.approx(1.2e6, rel=0.05)
