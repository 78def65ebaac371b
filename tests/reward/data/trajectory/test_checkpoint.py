"""Models as files: round trips, what is no model of ours, an expert in the base's terms."""

import dataclasses
import json
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import struct
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from common_jax.errors import InputError
from reward_jax.data.trajectory.checkpoint import (
    TrajectoryGuide,
    TrajectoryModel,
    check_same_terms,
    expert_in_base_terms,
    load_guide,
    load_model,
    save_guide,
    save_model,
)
from reward_jax.data.trajectory.normalisers import Normaliser
from reward_jax.data.trajectory.terms import Converted
from reward_jax.diffusion.denoiser import Denoiser
from reward_jax.diffusion.process import q_sample
from reward_jax.diffusion.schedule import Schedule, cosine_schedule, from_betas, make_schedule
from reward_jax.models.reward_nets import HalfUnet
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.extract import RelativeReward
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
    saved = model(3, schedule=schedule, about={"maze": "open", "goal": [0.5, -1.0], "ü": None})
    save_model(tmp_path / "deep" / "m.safetensors", saved)
    found = load_model(tmp_path / "deep" / "m.safetensors")
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
    found = load_guide(tmp_path)  # a run's directory stands for its file
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
    found = load_guide(tmp_path / "d.safetensors").guide
    assert isinstance(found, DiscriminatorGuide)
    assert (found.model, found.output) == (network, "sigmoid")
    both = jax.jit(lambda *guides: [g(X, T) for g in guides])(found, guide)
    np.testing.assert_array_equal(*both)


def test_a_directory_gives_what_is_wanted(tmp_path):
    save_model(tmp_path / "denoiser.safetensors", model())
    assert load_model(tmp_path).space.horizon == 8
    with pytest.raises(InputError, match=r"reward\.safetensors: there is no such file; a reward "):
        load_guide(tmp_path)


@pytest.fixture
def path(tmp_path):
    save_model(tmp_path / "m.safetensors", model())
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated(path, kept):
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(InputError, match="m.safetensors: corrupt, or no model of ours"):
        load_model(path)


def test_corrupt_and_foreign(path):
    data = path.read_bytes()
    path.write_bytes(b"\xff" * 64 + data[64:])
    with pytest.raises(InputError, match="m.safetensors: corrupt"):
        load_model(path)
    save_file({"layer.weight": np.ones((2, 2), np.float32)}, path, {"format": "pt"})
    with pytest.raises(InputError, match="no model of ours"):
        load_model(path)


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
        load_model(path)
    rewrite(path, header | {"network": "transformer"})
    with pytest.raises(InputError, match="none of this version's"):
        load_model(path)
    rewrite(path, header | {"fields": header["fields"] | {"heads": 3}})
    with pytest.raises(InputError, match="heads"):
        load_model(path)


@pytest.mark.parametrize("missing", ["schedule", "normaliser", "prediction", "fields"])
def test_a_header_that_lacks_something(path, missing):
    header = header_of(path)
    del header[missing]
    rewrite(path, header)
    with pytest.raises(InputError, match=rf"m\.safetensors: corrupt.*{missing}"):
        load_model(path)


def test_another_kind(path, tmp_path):
    with pytest.raises(InputError, match="holds a denoiser, where a reward or discriminator is"):
        load_guide(path)
    save_guide(tmp_path / "r.safetensors", reward())
    with pytest.raises(InputError, match="holds a reward, where a denoiser is wanted"):
        load_model(tmp_path / "r.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(path, value):
    params = load_file(path)
    name = sorted(params)[4]
    params[name].flat[1] = value
    rewrite(path, params=params)
    with pytest.raises(InputError, match=f"parameter {name} is not finite; train it again"):
        load_model(path)


def test_missing_or_not_writable(tmp_path):
    with pytest.raises(InputError, match="no.safetensors: there is no such file; a denoiser is"):
        load_model(tmp_path / "no.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: no folder that can be written to"):
        save_model(tmp_path / "file" / "m.safetensors", model())
    (tmp_path / "m.safetensors").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        save_model(tmp_path / "m.safetensors", model())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m.safetensors"]


def test_the_same_terms_take_the_expert_as_it_is():
    expert = model(1)
    score, notes = expert_in_base_terms(model(), expert)
    assert score is expert.denoiser and notes == []


WIDE = Normaliser(np.zeros(5, np.float32), np.ones(5, np.float32))
DIFFERENT = {
    "horizon": (dict(horizon=16), "horizon: 8 and 16"),
    "transition width": (dict(normaliser=WIDE), "transition width: 4 and 5"),
    "actions": (dict(actions=2), "actions: 0 and 2"),
    "stride": (dict(stride=5), "stride: 10 and 5"),
    "diffusion steps": (dict(steps=12), "diffusion steps: 8 and 12"),
    "schedule": (dict(schedule="linear"), "schedule: cosine and linear (abar by up to 0."),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_differences_are_named(case):
    changes, message = DIFFERENT[case]
    with pytest.raises(InputError) as error:
        expert_in_base_terms(model(), model(1, **changes))
    assert f"base and expert differ in {message}" in str(error.value)
    assert "alike" in str(error.value)


def shifted(offset: float, factor: float) -> Normaliser:
    n = space().normaliser
    return Normaliser(n.offset + np.float32(offset), n.scale * np.float32(factor), n.kind)


@struct.dataclass
class Gaussian:
    """The score of rows N(mean, deviation^2) in metres, in a normaliser's terms; exact."""

    mean: Any  # [D]
    deviation: Any  # [D]
    schedule: Schedule

    def log_density(self, x, t):
        keep = self.schedule.at(self.schedule.alphas_cumprod, t, x)
        away = x - jnp.sqrt(keep) * self.mean
        variance = keep * jnp.square(self.deviation) + 1 - keep
        return -0.5 * jnp.sum(jnp.square(away) / variance)

    def __call__(self, x, t, cond=None):
        return jax.grad(self.log_density)(x, t)


def gaussian(normaliser: Normaliser, mean: Any, deviation: Any, steps: int = 8) -> TrajectoryModel:
    n, schedule = normaliser, make_schedule("cosine", steps)
    score = Gaussian((mean - n.offset) / n.scale, deviation / n.scale, schedule)
    return TrajectoryModel(cast(Denoiser, score), space(normaliser=n))


@pytest.mark.parametrize("factor", [1.0, 1.2, 0.4])
def test_normalisers_that_differ_are_converted_and_it_is_said(factor):
    ours, theirs = space().normaliser, shifted(0.2, factor)
    mean, deviation = np.arange(4.0), np.full(4, 0.5)
    base, expert = gaussian(ours, mean, deviation), gaussian(theirs, mean, deviation)
    score, notes = expert_in_base_terms(base, expert, pin=False)
    assert isinstance(score, Converted) and len(notes) == 1
    assert f"(scales by a factor of up to {max(factor, 1 / factor):.3g})" in notes[0]
    assert notes[0].endswith("is converted to the base's terms")
    if factor == 1.0:  # one distribution, told in two terms
        np.testing.assert_allclose(score(X, T), base.denoiser(X, T), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "factor", "most"),
    [(20, 1.03, 0.01), (20, 1.1, 0.04), (50, 1.1, 0.01), (50, 1.5, 0.06), (50, 0.7, 0.05)],
)
def test_what_is_left_of_a_conversion_is_little_beside_the_target(steps, factor, most):
    """At the paper's numbers of steps, at every t: error against s_expert - s_base, in its unit.

    Two experts whose plans differ by .2 m from the base's, told in another scale and offset.
    """
    rng = np.random.default_rng(6)
    mean, deviation = rng.normal(size=4), rng.uniform(0.3, 1.5, 4)
    ours, theirs = space().normaliser, shifted(0.1, factor)
    base, exact = (gaussian(ours, mean + d, deviation, steps) for d in (0.0, 0.2))
    score, _ = expert_in_base_terms(
        base, gaussian(theirs, mean + 0.2, deviation, steps), pin=False
    )
    schedule, error, size = base.denoiser.schedule, 0.0, 0.0
    for level in range(steps):
        t, key = jnp.full(64, level), jax.random.key(level)
        rows = jax.random.normal(key, (64, 8, 4)) * deviation + mean
        noise = jax.random.normal(jax.random.fold_in(key, 1), rows.shape)
        x = q_sample(schedule, jnp.asarray(ours.normalise(rows)), t, noise)
        weight = float(1 - schedule.alphas_cumprod[level])
        error += weight * float(jnp.sum(jnp.square(score(x, t) - exact.denoiser(x, t))))
        size += weight * float(jnp.sum(jnp.square(exact.denoiser(x, t) - base.denoiser(x, t))))
    assert error / size < most, error / size


def test_a_pinned_first_state_is_told_clean():
    """The expert is asked from the start that was given, in its own terms, at every step."""
    seen = []

    def spied(x, t, cond=None):
        seen.append(x)
        return -x

    ours, theirs = space().normaliser, shifted(0.3, 1.25)
    base = gaussian(ours, np.zeros(4), np.ones(4), 50)
    expert = dataclasses.replace(base, space=space(normaliser=theirs))
    expert = dataclasses.replace(expert, denoiser=cast(Any, Spied(spied, base.denoiser.schedule)))
    score, _ = expert_in_base_terms(base, expert)
    start = jnp.array([1.0, -1.0, 0.5, 0.0])  # metres and metres a second
    for level in (0, 25, 40, 49):
        x = jax.random.normal(jax.random.key(level), (1, 8, 4))
        x = x.at[:, 0].set(jnp.asarray(ours.normalise(start)))
        seen.clear()
        score(x, jnp.array([level]))
        assert len(seen) == 2
        for own in seen:
            np.testing.assert_allclose(theirs.restore(own[0, 0]), start, atol=1e-5)
            assert float(jnp.abs(own[0, 1:] - theirs.normalise(ours.restore(x[0, 1:]))).max()) > 0


@struct.dataclass
class Spied:
    function: Any = struct.field(pytree_node=False)
    schedule: Schedule

    def __call__(self, x, t, cond=None):
        return self.function(x, t)


def test_scales_that_differ_by_dimension():
    n = space().normaliser

    def told(factors: list[float]):
        scale = n.scale * np.asarray(factors, np.float32)
        return expert_in_base_terms(
            model(), model(1, normaliser=Normaliser(n.offset, scale, n.kind))
        )

    ((note,),) = told([1.2, 1.2, 1.1, 1.1])[1:]
    assert "by a factor of up to 1.2)" in note and "(it is up to 1.04 from its mean)" in note
    with pytest.raises(InputError, match=r"differs by dimension \(up to 2\.28 .* \(--init\)"):
        told([3, 1, 1, 1])


@pytest.mark.parametrize("name", ["betas", "linear", "cosine"])
def test_a_schedule_of_one_s_own_comes_back(tmp_path, name):
    """By whatever name, table by table; a wrong one would be told of all that is sampled."""
    own = from_betas(np.random.default_rng(3).uniform(0.01, 0.4, 8), name)
    saved = model(3)
    saved = dataclasses.replace(saved, denoiser=cast(Any, saved.denoiser).replace(schedule=own))
    save_model(tmp_path / "m.safetensors", saved)
    found = load_model(tmp_path / "m.safetensors").denoiser.schedule
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
    told = {"name": "sigmoid", "steps": 8}
    if changes is not None:
        tables = {k: np.asarray(v).tolist() for k, v in vars(own).items() if k != "name"}
        told["tables"] = {k: v for k, v in (tables | changes).items() if v is not None}
    rewrite(path, header | {"schedule": told})
    with pytest.raises(InputError, match=rf"m\.safetensors: corrupt, .*{message}"):
        load_model(path)


def test_a_guide_steers_only_in_its_own_terms():
    check_same_terms("base and reward", model(), reward())
    for base, message in (
        (model(steps=12), "base and reward differ in diffusion steps: 12 and 8"),
        (model(schedule="linear"), "differ in schedule: linear and cosine"),
        (model(normaliser=shifted(0.1, 1.0)), "differ in their normalisers"),
        (model(horizon=16), "differ in horizon: 16 and 8"),
    ):
        with pytest.raises(InputError, match=message):
            check_same_terms("base and reward", base, reward())


def test_a_network_of_no_known_kind_is_not_written(tmp_path):
    class Other(nn.Module):
        width: int = 3

    saved = reward(0, None)
    other: Any = saved.guide
    other = dataclasses.replace(saved, guide=other.replace(reward=Other()))
    with pytest.raises(InputError, match="a model of Other cannot be written"):
        save_guide(tmp_path / "r.safetensors", other)
    assert not list(tmp_path.iterdir())
