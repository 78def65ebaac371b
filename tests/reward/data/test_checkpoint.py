"""Models as files: round trips, and what is no model of ours."""

import dataclasses
import json
import math
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from reward_jax.data import checkpoint
from reward_jax.data.checkpoint import load_guide, load_model, save_guide, save_model
from reward_jax.data.trajectory.space import TrajectoryGuide, TrajectorySpace, check_steers
from reward_jax.diffusion.schedule import cosine_schedule, from_betas
from reward_jax.models.reward_nets import HalfUnet
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.relative import RelativeReward
from reward_jax.sharding import placement
from reward_jax.tasks.find import task_of
from tests.reward.cli_runs import model, parameters, reward, space

X = jax.random.normal(jax.random.key(7), (5, 8, 4))
T = jnp.array([0, 1, 3, 6, 7])


def same_space(a, b):
    assert dataclasses.replace(a, normaliser=None) == dataclasses.replace(b, normaliser=None)
    assert a.normaliser.kind == b.normaliser.kind
    np.testing.assert_array_equal(a.normaliser.offset, b.normaliser.offset)
    np.testing.assert_array_equal(a.normaliser.scale, b.normaliser.scale)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_denoiser_comes_back(tmp_path, schedule):
    saved = model(3, schedule=schedule, about={"task": "open", "goal": [0.5, -1.0], "ü": None})
    save_model(tmp_path / "deep" / "m.safetensors", saved)
    found = load_model(tmp_path / "deep" / "m.safetensors", TrajectorySpace)
    same_space(found.space, saved.space)
    a, b = saved.denoiser, found.denoiser
    assert (b.model, b.prediction, b.clip) == (a.model, a.prediction, a.clip)
    assert b.schedule.name == schedule
    jax.tree.map(np.testing.assert_array_equal, b.schedule, a.schedule)
    np.testing.assert_array_equal(*jax.jit(lambda *d: [each(X, T) for each in d])(b, a))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("seeds", [None, 3])
def test_a_reward_comes_back(tmp_path, seeds):
    saved = reward(1, seeds)
    save_guide(tmp_path / "reward.safetensors", saved)
    found = load_guide(tmp_path, TrajectorySpace)  # a run's directory stands for its file
    same_space(found.space, saved.space)
    assert isinstance(found.guide, RelativeReward)
    assert (found.guide.target, found.guide.seeds) == ("score", seeds)
    np.testing.assert_array_equal(found.guide(X, T), saved.guide(X, T))
    np.testing.assert_array_equal(found.schedule.betas, saved.schedule.betas)


def test_a_discriminator_and_a_half_unet_come_back(tmp_path):
    network = HalfUnet(8, (2, 4), act="leaky_relu")
    params = parameters(network, (8, 4), 2)
    guide = DiscriminatorGuide(params, network, "sigmoid")
    saved = TrajectoryGuide(guide, space(), cosine_schedule(8))
    save_guide(tmp_path / "d.safetensors", saved)
    found = load_guide(tmp_path / "d.safetensors", TrajectorySpace).guide
    assert isinstance(found, DiscriminatorGuide)
    assert (found.model, found.output) == (network, "sigmoid")
    both = jax.jit(lambda *guides: [g(X, T) for g in guides])(found, guide)
    np.testing.assert_array_equal(*both)


def test_a_directory_gives_what_is_wanted(tmp_path):
    save_model(tmp_path / "denoiser.safetensors", model())
    assert load_model(tmp_path, TrajectorySpace).space.horizon == 8
    with pytest.raises(InputError, match=r"reward\.safetensors: there is no such file; a reward "):
        load_guide(tmp_path, TrajectorySpace)


@pytest.mark.parametrize("kind", ["model", "reward", "first format"])
@pytest.mark.parametrize("layout", [(2, 2, 2), (1, 1, 8)], ids=str)
def test_each_device_reads_its_own_part_once(tmp_path, monkeypatch, kind, layout):
    path, load = tmp_path / "m.safetensors", load_model if kind == "model" else load_guide
    if kind == "model":
        save_model(path, model(3))
    elif kind == "reward":
        save_guide(path, reward(1, 3))
    else:
        path = FIRST / "reward.safetensors"
    mesh, asked, read = make_mesh(*layout), {}, checkpoint._part

    def counted(opened, name, cut, place):
        part = read(opened, name, cut, place)
        asked.setdefault(name, []).append(part.size)
        return part

    wanted = load(path, TrajectorySpace)
    monkeypatch.setattr(checkpoint, "_part", counted)
    found = load(path, TrajectorySpace, mesh)
    both = [getattr(x, "denoiser" if kind == "model" else "guide") for x in (found, wanted)]
    trees: list[Any] = [flatten_dict(x.params, sep="/") for x in both]
    params, alone = trees
    assert set(params) == set(alone)
    for name, x in params.items():
        assert x.sharding == placement(mesh)(name, x.shape)
        np.testing.assert_array_equal(x, alone[name], err_msg=name)
        share = math.prod(x.sharding.shard_shape(x.shape))
        assert asked[f"params/{name}"] == [share] * (x.size // share), name
    assert any(len(sizes) > 1 for sizes in asked.values())


def test_nothing_is_read_of_a_file_whose_header_is_damaged(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_part", None)
    header = header_of(path)
    for change in ({"schedule": 3}, {"network": "none"}, {"space": {}}, {"clip": "x"}):
        rewrite(path, header | change)
        with pytest.raises(InputError, match="m.safetensors"):
            load_model(path, TrajectorySpace, make_mesh(1, 2, 4))


@pytest.fixture
def path(tmp_path):
    save_model(tmp_path / "m.safetensors", model())
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match="m.safetensors: corrupt, or no model of ours"):
        load_model(path, TrajectorySpace)


def test_corrupt_and_foreign(path):
    data = path.read_bytes()
    path.write_bytes(b"\xff" * 64 + data[64:])
    with pytest.raises(InputError, match="m.safetensors: corrupt"):
        load_model(path, TrajectorySpace)
    save_file({"layer.weight": np.ones((2, 2), np.float32)}, path, {"format": "pt"})
    with pytest.raises(InputError, match="no model of ours"):
        load_model(path, TrajectorySpace)


def header_of(path) -> dict[str, Any]:
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["reward_jax"])


def rewrite(path, header=None, params=None):
    header, params = header or header_of(path), params or load_file(path)
    save_file(params, path, {"reward_jax": json.dumps(header)})


def test_another_version_or_network(path):
    header = header_of(path)
    rewrite(path, header | {"format": 99})
    with pytest.raises(InputError, match=r"of another version \(99\); train it again"):
        load_model(path, TrajectorySpace)
    rewrite(path, header | {"network": "transformer"})
    with pytest.raises(InputError, match="none of this version's"):
        load_model(path, TrajectorySpace)
    rewrite(path, header | {"fields": header["fields"] | {"heads": 3}})
    with pytest.raises(InputError, match="heads"):
        load_model(path, TrajectorySpace)


FIRST = pathlib.Path(__file__).parent / "format_1"  # written by the code of November 27, 2026


def test_files_of_the_first_format_are_read():
    """Their layout differs, and nothing else."""
    wanted = np.load(FIRST / "outputs.npz")
    x, t = wanted["x"], wanted["t"]
    denoiser = load_model(FIRST, TrajectorySpace)
    reward = load_guide(FIRST / "reward.safetensors", TrajectorySpace)
    judge = load_guide(FIRST / "discriminator.safetensors", TrajectorySpace)
    assert isinstance(reward.guide, RelativeReward) and reward.guide.seeds == 2
    assert isinstance(judge.guide, DiscriminatorGuide) and not judge.guide.conditional
    for name, function in (
        ("denoiser", denoiser.denoiser),
        ("reward", reward.guide),
        ("discriminator", judge.guide),
    ):
        np.testing.assert_allclose(function(x, t), wanted[name], rtol=2e-5, atol=1e-5)
    for found in (denoiser.space, reward.space, judge.space):
        assert (found.horizon, found.stride, found.actions) == (8, 2, 1)
        assert task_of(found.about).name == "open"
        assert found.about["goal"] == [0.5, -1.0] and found.normaliser.kind == "limits"
        np.testing.assert_array_equal(found.normaliser.offset, [0, 1, -1, 0.5])
    assert reward.guide.target == "posterior_mean" and reward.schedule.steps == 6
    check_steers("base and judge", _with_schedule(denoiser, judge.schedule), judge)


def _with_schedule(model, schedule):
    denoiser = dataclasses.replace(model.denoiser, schedule=schedule)
    return dataclasses.replace(model, denoiser=denoiser)


@pytest.mark.parametrize("missing", ["normaliser", "about", "horizon", "schedule"])
def test_spoilt_files_of_the_first_format(tmp_path, missing):
    path = tmp_path / "m.safetensors"
    path.write_bytes((FIRST / "denoiser.safetensors").read_bytes())
    header = header_of(path)
    del header[missing]
    rewrite(path, header)
    with pytest.raises(InputError, match=rf"m\.safetensors: corrupt.*{missing}"):
        load_model(path, TrajectorySpace)
    rewrite(path, header_of(path) | {"about": 3, "horizon": 8, "schedule": 1, "normaliser": []})
    with pytest.raises(InputError, match=r"m\.safetensors: corrupt"):
        load_model(path, TrajectorySpace)


@pytest.mark.parametrize("missing", ["schedule", "space", "normaliser", "prediction", "fields"])
def test_a_header_that_lacks_something(path, missing):
    header = header_of(path)
    del (header["space"] if missing == "normaliser" else header)[missing]
    rewrite(path, header)
    with pytest.raises(InputError, match=rf"m\.safetensors: corrupt.*{missing}"):
        load_model(path, TrajectorySpace)


def test_another_kind(path, tmp_path):
    with pytest.raises(InputError, match="holds a denoiser, where a reward or discriminator is"):
        load_guide(path, TrajectorySpace)
    save_guide(tmp_path / "r.safetensors", reward())
    with pytest.raises(InputError, match="holds a reward, where a denoiser is wanted"):
        load_model(tmp_path / "r.safetensors", TrajectorySpace)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(path, value):
    params = load_file(path)
    name = sorted(params)[4]
    params[name].flat[1] = value
    rewrite(path, params=params)
    own = name.removeprefix("params/")
    with pytest.raises(InputError, match=f"parameter {own} is not finite; train it again"):
        load_model(path, TrajectorySpace)


def test_missing_or_not_writable(tmp_path):
    with pytest.raises(InputError, match="no.safetensors: there is no such file; a denoiser is"):
        load_model(tmp_path / "no.safetensors", TrajectorySpace)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: no folder that can be written to"):
        save_model(tmp_path / "file" / "m.safetensors", model())
    (tmp_path / "m.safetensors").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        save_model(tmp_path / "m.safetensors", model())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m.safetensors"]


@pytest.mark.parametrize("name", ["betas", "linear", "cosine"])
def test_a_schedule_of_one_s_own_comes_back(tmp_path, name):
    """By whatever name, table by table; a wrong one would be told of all that is sampled."""
    own = from_betas(np.random.default_rng(3).uniform(0.01, 0.4, 8), name)
    saved = model(3)
    saved = dataclasses.replace(saved, denoiser=cast(Any, saved.denoiser).replace(schedule=own))
    save_model(tmp_path / "m.safetensors", saved)
    found = load_model(tmp_path / "m.safetensors", TrajectorySpace).denoiser.schedule
    assert found.name == name
    jax.tree.map(np.testing.assert_array_equal, found, own)


DAMAGED_SCHEDULES = {
    "a table gone": ({"betas": None}, "tables lack betas"),
    "one too many": ({"gammas": [0.5] * 8}, "tables lack gammas, or should not have it"),
    "another length": ({"posterior_x0": [0.5] * 7}, "posterior_x0 is not 8 finite numbers"),
    "another shape": ({"betas": [[0.1]] * 8}, "betas is not 8 finite numbers"),
    "not finite": ({"mean_per_score": [0.1] * 7 + [np.nan]}, "mean_per_score is not 8 finite"),
    "no numbers": ({"betas": ["x"] * 8}, "could not convert"),
    "above 1": ({"alphas_cumprod": [1.1] + [0.5] * 7}, "alphas_cumprod do not fall from"),
    "below 0": ({"alphas_cumprod": [0.5] * 7 + [-0.1]}, "alphas_cumprod do not fall from"),
    "rises": ({"alphas_cumprod": [0.5] * 7 + [0.6]}, "alphas_cumprod do not fall from"),
    "another name": (None, "schedule 'sigmoid' is unknown"),
}


@pytest.mark.parametrize("case", DAMAGED_SCHEDULES)
def test_a_damaged_schedule_is_refused(path, case):
    changes, message = DAMAGED_SCHEDULES[case]
    header, own = header_of(path), cosine_schedule(8)
    described = {"name": "sigmoid", "steps": 8}
    if changes is not None:
        tables = {k: np.asarray(v).tolist() for k, v in vars(own).items() if k != "name"}
        described["tables"] = {k: v for k, v in (tables | changes).items() if v is not None}
    rewrite(path, header | {"schedule": described})
    with pytest.raises(InputError, match=rf"m\.safetensors: corrupt, .*{message}"):
        load_model(path, TrajectorySpace)


@pytest.mark.parametrize("steps", [0, 1.5, True, 10**12, "8"])
def test_a_schedule_of_no_number_of_steps_is_refused(path, steps):
    rewrite(path, header_of(path) | {"schedule": {"name": "cosine", "steps": steps}})
    with pytest.raises(InputError, match=r"m\.safetensors: corrupt, .*its schedule has .* steps"):
        load_model(path, TrajectorySpace)


def test_a_conditional_denoiser_keeps_the_condition_that_stands_for_none(tmp_path):
    saved = model()
    for null in (jnp.arange(3), {"text": {"tokens": jnp.ones((2, 3))}, "label": jnp.asarray(7)}):
        save_model(tmp_path / "m.safetensors", dataclasses.replace(saved, null=null))
        found = load_model(tmp_path / "m.safetensors", TrajectorySpace).null
        assert jax.tree.structure(found) == jax.tree.structure(null)
        jax.tree.map(np.testing.assert_array_equal, found, null)
    with pytest.raises(InputError, match="m.safetensors: files hold parameters and conditions"):
        pair = (jnp.ones(2), jnp.ones(3))
        save_model(tmp_path / "m.safetensors", dataclasses.replace(saved, null=pair))


def test_a_conditional_discriminator_stays_conditional(tmp_path):
    network = HalfUnet(8, (2, 4))
    guide = DiscriminatorGuide({"w": jnp.ones(2)}, network, conditional=True)
    save_guide(tmp_path / "d.safetensors", TrajectoryGuide(guide, space(), cosine_schedule(8)))
    found = load_guide(tmp_path / "d.safetensors", TrajectorySpace).guide
    assert isinstance(found, DiscriminatorGuide) and found.conditional


def test_a_parameter_that_is_a_group_is_refused(path):
    params = load_file(path)
    params["params/out"] = np.ones(2, np.float32)
    rewrite(path, params=params)
    with pytest.raises(InputError, match=r"m\.safetensors: corrupt, .*out"):
        load_model(path, TrajectorySpace)


def test_a_network_of_no_known_kind_is_not_written(tmp_path):
    class Other(nn.Module):
        width: int = 3

    saved = reward(0, None)
    other: Any = saved.guide
    other = dataclasses.replace(saved, guide=other.replace(reward=Other()))
    with pytest.raises(InputError, match="a model of Other cannot be written"):
        save_guide(tmp_path / "r.safetensors", other)
    assert not list(tmp_path.iterdir())
