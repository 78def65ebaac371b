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
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.loop import begin
from reward_jax.diffusion.process import FirstState
from reward_jax.diffusion.schedule import cosine_schedule, make_schedule
from reward_jax.diffusion.sources import Strided
from reward_jax.diffusion.train import init_state, steps_of
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.planning.cost import (
    ExtractionPlanOptions,
    TrainingPlanOptions,
    plan_extraction,
    plan_training,
)
from reward_jax.planning.extract import Matching, RewardOptions
from reward_jax.planning.fit import NetworkOptions, Training, optimizer
from reward_jax.reward.extract import init_params, learn
from reward_jax.reward.targets import TargetSettings, Teachers
from reward_jax.sharding import place
from tests.reward.cli_runs import run

NETWORK = NetworkOptions(kind="mlp", width=64, blocks=1)
SMALL: dict[str, Any] = dict(network=NETWORK, horizon=8, observation=5, recorded=100)


def on_a_device(tree) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def held(program: Any, *given: Any, **static: Any) -> int:
    """Bytes on a device that a run takes: of what is left of its arrays, and its temporaries."""
    compiled = program.lower(*given, **static).compile()
    out = compiled(*given)
    left = [x for x in jax.tree.leaves((given, out)) if not x.is_deleted()]
    arrays = [x for x in left if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return on_a_device(arrays) + compiled.memory_analysis().temp_size_in_bytes


def windows() -> Strided:
    """As many as SMALL has recorded."""
    return Strided(jnp.zeros((100, 5)), jnp.zeros(100, jnp.int32), 8)


def test_training():
    training, mesh = Training(batch_size=16), make_mesh(2, 2, 2)
    options = TrainingPlanOptions(training=training, mesh=MeshOptions(2, 2, 2), **SMALL)
    found, device = plan_training(options)
    model, adam = NETWORK.make(None), optimizer(training)  # pyright: ignore[reportArgumentType]
    state = place(init_state(model, adam, jnp.zeros((1, 8, 5)), jax.random.key(0)), mesh)
    for name, tree in state._asdict().items():
        assert found.bytes[name] == on_a_device(tree)
    assert found.bytes["data"] == on_a_device(windows())
    # A forward and a backward pass of the products with matrices.
    matrices = sum(x.size for x in jax.tree.leaves(state.params) if x.ndim == 2)
    assert 0.9 * 4 * 16 * matrices < found.flops < 1.1 * 6 * 16 * matrices
    assert found.kinds() and found.binds(device) in ("links", "memory bandwidth", "compute")
    # The program that training runs, run.
    step: Any = steps_of(model, adam, training, pin=FirstState(0), mesh=mesh)
    schedule = make_schedule(options.schedule, options.diffusion_steps)
    given = schedule, jnp.ones(()), None, jax.random.key(0), jnp.arange(1)
    measured = held(step.func, state, windows(), *given, **step.keywords)
    assert found.held == pytest.approx(measured, rel=0.1)


def test_extraction():
    matching = Matching(batch_size=16, seeds=3, steps=5)
    reward = RewardOptions(widths=(64, 64))
    options = ExtractionPlanOptions(matching=matching, reward=reward, **SMALL)
    found, _ = plan_extraction(options)
    model, net = NETWORK.make(None), WindowMLP(8, reward.widths)  # pyright: ignore[reportArgumentType]
    adam, schedule = optimizer(matching), cosine_schedule(options.diffusion_steps)
    key, x = jax.random.key(0), jnp.zeros((1, 8, 5))
    models = [
        model.init(k, x, jnp.zeros(1, jnp.int32))["params"] for k in jax.random.split(key, 2)
    ]
    params = init_params(net, key, x, matching.seeds)
    assert found.bytes["reward"] == on_a_device(params)
    assert found.bytes["base"] == found.bytes["expert"] == on_a_device(models[0])
    assert found.exchanges == () and found.size == 1
    # The programs that extraction runs, run: the targets', and that which learns.
    settings = TargetSettings(matching.target, matching.gradient_at, FirstState(0), 16, None)
    base, expert = (score_from(model, one, "x0", schedule) for one in models)
    teachers = Teachers(base, expert, schedule, settings)
    targets = teachers.targets(key, windows(), jnp.arange(1), None)
    state = params, begin(params, optimizer=adam, seeds=True)
    fixed: dict[str, Any] = dict(reward=net, rule=adam.update, pin=FirstState(0), seeds=True)
    fixed |= dict(apart=False, mesh=None)
    program = jax.jit(learn.__wrapped__, static_argnames=tuple(fixed), donate_argnums=0)  # pyright: ignore
    weights = jnp.ones(schedule.steps)
    measured = held(program, state, weights, None, targets, **fixed) + on_a_device(
        (models, windows())
    )
    assert found.held == pytest.approx(measured, rel=0.1)


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
        ({"horizon": 10**15}, "horizon must be at most 2147483647 to be planned"),
        ({"recorded": 10**15}, "recorded must be at most 2147483647 to be planned"),
        ({"horizon": 2 * 10**9}, "are .* numbers, and a compiler counts 2.1e"),
        ({"diffusion_steps": 10**9}, "diffusion_steps must be at most 1000000 to be planned"),
        ({"network": NetworkOptions("mlp", blocks=10**9)}, "network.blocks must be at most 1000"),
        ({"network": NetworkOptions("mlp", width=2 * 10**9)}, "which cannot be counted"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, said):
    both: Any = (TrainingPlanOptions, plan_training), (ExtractionPlanOptions, plan_extraction)
    for options, plan in both:
        with pytest.raises(InputError, match=said):
            plan(options(**(SMALL | changes)))


@pytest.mark.parametrize("option", [("--horizon", 10**15), ("--network.dim", 8 * 10**12)])
def test_sizes_beyond_counting_are_refused_in_one_line(option, capsys):
    for command in (("train",), ("extract", "--base", "", "--expert", "")):
        assert run("plan", *command, "--observation", 4, *option) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{option[0][2:]} must be at most 2147483647 to be planned" in line


def test_an_energy_is_not_planned():
    options = ExtractionPlanOptions(reward=RewardOptions(kind="energy"), **SMALL)
    with pytest.raises(InputError, match="reward.kind energy is not planned for"):
        plan_extraction(options)
