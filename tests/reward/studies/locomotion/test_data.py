"""Data of others in the locomotion study: read, parted, refused; a whole study of them."""

import dataclasses
import json

import h5py
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data import minari
from reward_jax.data.checkpoint import load_model
from reward_jax.data.files import write_episodes
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.planning.extract import Matching, RewardOptions
from reward_jax.planning.fit import NetworkOptions, Training
from reward_jax.studies.locomotion import data, work
from reward_jax.studies.locomotion.run import STUDY, Config
from reward_jax.studies.locomotion.settings import Ablation, DataOptions, RobotSettings, sources
from reward_jax.tasks import find
from reward_jax.tasks.base import Rollout
from reward_jax.tasks.locomotion import policies
from reward_jax.tasks.locomotion.task import LocomotionTask
from tests.reward.tasks.locomotion.conftest import random_policy

TRAINING = Training(steps=10, batch_size=8, steps_per_call=10)
OWN = RobotSettings(
    horizon=4,
    diffusion_steps=4,
    network=NetworkOptions(kind="mlp", width=16, blocks=1),
    base_training=TRAINING,
    expert_training=TRAINING,
    reward=RewardOptions(widths=(8,)),
    matching=Matching(steps=10, batch_size=8, draws=32, seeds=2, steps_per_call=10),
)


def as_d4rl(path, seed, lengths=(9, 12, 3, 20, 15), widths=(11, 3), falls=(2,)):
    """A file as D4RL publishes them: flat arrays and flags, no word of what it is of."""
    rng, total = np.random.default_rng(seed), sum(lengths)
    ends = np.cumsum(lengths) - 1
    fell, timed = np.zeros(total, bool), np.zeros(total, bool)
    fell[ends[list(falls)]] = True
    timed[ends] = ~fell[ends]
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(total, widths[0])).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (total, widths[1])).astype(np.float32)
        file["rewards"] = rng.normal(size=total).astype(np.float32)
        file["terminals"], file["timeouts"] = fell, timed
    return str(path)


def config_of(tmp_path, files, **changes):
    own = dataclasses.replace(OWN, data=files)
    return Config(out=tmp_path / "study", robots={"hopper": own}, **changes)


def test_a_part_is_held_out_in_which_windows_begin(tmp_path):
    lengths = [2, *[5] * 23, 3]  # the first is too short, the last ends in a fall
    path = as_d4rl(tmp_path / "a.hdf5", 0, lengths, falls=(24,))
    config = config_of(tmp_path, DataOptions(base=path, unseen=path))
    trained, held = data.read_data(config, "hopper", "base")
    assert (held.lengths.tolist(), len(trained.lengths)) == ([5, 5], 22)
    assert trained.lengths[-1] == 3
    every = find.read(path, env="hopper")
    second = every.observations[every.starts[10] : every.starts[10] + 5]
    np.testing.assert_array_equal(held.observations[:5], second)  # the tenth that is long enough
    rows = {row.tobytes() for row in trained.observations}
    assert not rows & {row.tobytes() for row in held.observations}
    few, _ = data.read_data(config, "hopper", "base", 3)
    assert few.lengths.tolist() == [5, 5, 3] and {r.tobytes() for r in few.observations} < rows
    unseen, none = data.read_data(config, "hopper", "unseen")
    assert (len(unseen.lengths), len(none.lengths)) == (24, 0)
    # Fewer than ten: the last is held out.
    few_path = as_d4rl(tmp_path / "b.hdf5", 1)
    trained, held = data.read_data(
        config_of(tmp_path, DataOptions(expert=few_path)), "hopper", "expert"
    )
    assert (trained.lengths.tolist(), held.lengths.tolist()) == ([9, 12, 3, 20], [15])


def test_sources():
    files = DataOptions(base="a.hdf5", unseen="minari:mujoco/hopper/medium-v0")
    config = Config(robots={"hopper": dataclasses.replace(OWN, data=files), "walker2d": OWN})
    assert sources(config, "hopper") == {
        "base": "a.hdf5", "expert": "expert", "unseen": "minari:mujoco/hopper/medium-v0",
    }  # fmt: skip
    config = dataclasses.replace(config, unseen_data=None)
    assert sources(config, "walker2d") == {"base": "medium-replay", "expert": "expert"}
    assert set(sources(config, "hopper")) == {"base", "expert", "unseen"}


@pytest.mark.parametrize(
    ("which", "changes", "said"),
    [
        ("base", None, "robots.hopper.data.base: .*base.hdf5: no such file"),
        ("expert", {"widths": (17, 6)}, "expert.hdf5: has 17 observations and 6 actions, but"),
        ("unseen", "flags", "unseen.hdf5: has no flags of terminal states, which Hopper-v5 has"),
        (
            "base",
            {"lengths": (3, 2, 9), "falls": ()},
            "base.hdf5: 1 of 3 episodes have a window of 4 steps .the horizon.: give 2 or more",
        ),
        ("base", {"lengths": (8, 8, 8)}, "3 episodes are asked for .base_episodes., but 2 are"),
    ],
    ids=["missing", "widths", "flags", "short", "too few"],
)
def test_data_that_cannot_be_learned_from_are_refused_at_once(tmp_path, which, changes, said):
    paths = {n: as_d4rl(tmp_path / f"{n}.hdf5", i) for i, n in enumerate(("base", "expert"))}
    paths["unseen"] = as_d4rl(tmp_path / "unseen.hdf5", 3)
    if changes is None:
        (tmp_path / f"{which}.hdf5").unlink()
    elif changes == "flags":
        with h5py.File(paths[which], "r+") as file:
            del file["terminals"]
    else:
        as_d4rl(paths[which], 4, **changes)
    ablations = {"less data": Ablation(robot="hopper", base_episodes=3)}
    config = config_of(tmp_path, DataOptions(**paths), ablations=ablations)
    with pytest.raises(InputError, match=said):
        STUDY.run(config)
    assert not config.out.exists()


@pytest.mark.slow
def test_a_study_of_data_of_others(tmp_path, monkeypatch):
    """D4RL's files and a Minari data set; nothing is recorded, and no policy is asked for."""
    own = {s: random_policy("hopper", 40 + i) for i, s in enumerate(("medium", "expert"))}
    recorded = LocomotionTask("hopper", own).record(episodes=12, span=4, seed=0, goal="medium")
    write_episodes(tmp_path / "expert-v0", recorded)
    files = DataOptions(
        base=as_d4rl(tmp_path / "base.hdf5", 5, [*[9, 6] * 12, 30]),
        expert=str(tmp_path / "expert-v0"),
        unseen=as_d4rl(tmp_path / "unseen.hdf5", 6),
    )
    monkeypatch.setattr(policies, "POLICIES", tmp_path / "none")
    policies.policies.cache_clear()
    monkeypatch.setattr(LocomotionTask, "record", None)
    config = config_of(
        tmp_path,
        files,
        environments=2,
        validation=2,
        scales=(1.0,),
        temperatures=(),
        rollout=Rollout(steps=3),
        ablations={"less data": Ablation(robot="hopper", base_episodes=9)},
    )
    with monkeypatch.context() as patch:  # stopped once the base is trained
        patch.setattr(work.Work, "_gap", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            STUDY.run(config)
    before = (tmp_path / "base.hdf5").read_bytes()
    as_d4rl(tmp_path / "base.hdf5", 7, [*[9, 6] * 12, 30])
    with pytest.raises(InputError, match=r"data.base: .*: holds other rows than those that"):
        STUDY.run(config)
    (tmp_path / "base.hdf5").write_bytes(before)
    robots = {"hopper": dataclasses.replace(config.robots["hopper"], data=DataOptions())}
    with pytest.raises(InputError, match=r"has robots.hopper.data.base .*base.hdf5', not None"):
        STUDY.run(dataclasses.replace(config, robots=robots))
    found = STUDY.run(config)
    policies.policies.cache_clear()
    of = found["robots"]["hopper"]["data"]
    assert {which: one["source"] for which, one in of.items()} == dataclasses.asdict(files)
    assert (of["base"]["episodes"], of["base"]["held_out"]) == (23, 2)
    assert of["expert"]["environment"] == "Hopper-v5" and of["unseen"]["held_out"] == 0
    assert of["expert"]["episodes"] + of["expert"]["held_out"] == len(
        minari.read(files.expert or "").lengths
    )
    base = load_model(config.out / "hopper" / "base.safetensors", TrajectorySpace)
    less = config.out / "ablations" / "less-data" / "base.safetensors"
    other = load_model(less, TrajectorySpace)
    assert base.space.about["task"] == "hopper"
    assert not base.space.normaliser.same_as(other.space.normaliser)
    text = (config.out / "report" / "report.md").read_text()
    assert "data of hopper: base: " in text and "23 episodes, 2 more held out" in text
    assert "Data are our own" not in text
    # Once all is done, the data may go.
    for path in (files.base, files.unseen):
        (tmp_path / str(path)).unlink()
    assert STUDY.run(config) == json.loads(json.dumps(found))
