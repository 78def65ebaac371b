"""Planned steps against the state that is really trained; and the paper's configs as they are."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from common_jax.cli.options import MeshOptions
from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from reward_jax.cli import main
from reward_jax.diffusion.train import init_state
from reward_jax.planning.cost import (
    ExtractionPlanOptions,
    TrainingPlanOptions,
    plan_extraction,
    plan_training,
)
from reward_jax.planning.extract import Matching, RewardOptions
from reward_jax.planning.fit import NetworkOptions, Training, optimizer
from reward_jax.sharding import place

NETWORK = NetworkOptions(kind="mlp", width=64, blocks=1)
SMALL: dict[str, Any] = dict(network=NETWORK, horizon=8, observation=5, recorded=100)


def on_a_device(tree) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def test_training():
    training, mesh = Training(batch_size=16), make_mesh(2, 2, 2)
    found, device = plan_training(
        TrainingPlanOptions(training=training, mesh=MeshOptions(2, 2, 2), **SMALL)
    )
    model, adam = NETWORK.make(None), optimizer(training)  # pyright: ignore[reportArgumentType]
    state = place(init_state(model, adam, jnp.zeros((1, 8, 5)), jax.random.key(0)), mesh)
    for name, tree in state._asdict().items():
        assert found.bytes[name] == on_a_device(tree)
    assert found.bytes["data"] == 100 * (5 + 1) * 4
    # A forward and a backward pass of the products with matrices.
    matrices = sum(x.size for x in jax.tree.leaves(state.params) if x.ndim == 2)
    assert 0.9 * 4 * 16 * matrices < found.flops < 1.1 * 6 * 16 * matrices
    assert found.kinds() and found.binds(device) in ("links", "memory bandwidth", "compute")


def test_extraction():
    matching = Matching(batch_size=16, seeds=3, steps=5)
    reward = RewardOptions(widths=(16, 16))
    found, _ = plan_extraction(ExtractionPlanOptions(matching=matching, reward=reward, **SMALL))
    params = sum(x.size for x in jax.tree.leaves(_window_params(reward)))
    assert found.bytes["reward"] == 3 * 4 * params
    assert found.bytes["base"] == found.bytes["expert"] > 0
    assert found.exchanges == () and found.size == 1


def _window_params(reward: RewardOptions) -> Any:
    from reward_jax.models.reward_nets import WindowMLP

    net = WindowMLP(8, reward.widths)
    t = jnp.zeros(1, jnp.int32)
    return jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 8, 5)), t)["params"])


def test_the_papers_config_on_the_command_line(tmp_path, capsys):
    out = tmp_path / "figures.json"
    argv = ["plan", "extract", "--config", "configs/reward/paper_hopper_extract.yaml"]
    network = ["--network.kind", "mlp", "--network.width", "32"]  # quicker than a U-Net
    widths = ["--observation", "11", "--action", "3", "--diffusion_steps", "20"]
    small = ["--reward.multipliers", "[4, 4]", "--matching.seeds", "2"]
    assert main([*argv, *network, *widths, *small, "--figures", str(out)]) == 0
    assert "1 x H100 80 GB" in capsys.readouterr().out
    assert json.loads(out.read_text())["bytes_a_device"]["reward"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": MeshOptions(-1)}, "a plan wants each size"),
        ({"mesh": MeshOptions(99)}, "this process has 8 in use"),
        ({"network": NetworkOptions(dim=12)}, "network.dim must be a multiple of 8"),
        ({"observation": 0}, "observation must be 1 or more"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, said):
    both: Any = (TrainingPlanOptions, plan_training), (ExtractionPlanOptions, plan_extraction)
    for options, plan in both:
        with pytest.raises(InputError, match=said):
            plan(options(**(SMALL | changes)))


def test_an_energy_is_not_planned():
    options = ExtractionPlanOptions(reward=RewardOptions(kind="energy"), **SMALL)
    with pytest.raises(InputError, match="reward.kind energy is not planned for"):
        plan_extraction(options)
