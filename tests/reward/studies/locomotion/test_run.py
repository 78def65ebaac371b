"""The locomotion study at its smallest: one robot, policies of random weights."""

import dataclasses
import json
import re

import numpy as np
import pytest

from common_jax import resume
from common_jax.errors import InputError, Taken
from reward_jax.data.checkpoint import load_guide, load_model
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.models.reward_nets import HalfUnet
from reward_jax.planning.extract import Matching, RewardOptions
from reward_jax.planning.fit import Training
from reward_jax.studies.locomotion import models, run, work
from reward_jax.studies.locomotion.report import write_report
from reward_jax.studies.locomotion.run import STUDY, Config
from reward_jax.studies.locomotion.settings import Ablation, Rounds
from reward_jax.studies.locomotion.summary import EXPLAINED, MAIN
from reward_jax.tasks.base import Rollout
from reward_jax.tasks.locomotion import policies
from reward_jax.tasks.locomotion.task import LocomotionTask
from tests.reward.studies.locomotion.small import OWN, shipped


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    with shipped(tmp_path_factory.mktemp("policies")):
        config = Config(
            out=tmp_path_factory.mktemp("study"),
            robots={"hopper": OWN},
            base_episodes=12,
            expert_episodes=8,
            environments=3,
            validation=2,
            scales=(3.0, 4.0),
            temperatures=(0.5,),
            rollout=Rollout(steps=8, execute=2),
            ablations={
                "slower": Ablation(robot="hopper", learning_rate=1e-4, weight_decay=0.1),
                "narrow": Ablation(robot="hopper", rounds=1, path_draws=0, widths=(5,)),
                "one step": Ablation(robot="hopper", execute=1),
                "warm": Ablation(robot="hopper", sampling_steps=4, skip=2),
                "less data": Ablation(robot="hopper", base_episodes=6),
                "the authors": Ablation(
                    robot="hopper",
                    target="posterior_mean",
                    gradient_at="posterior_mean",
                    x_t="expert",
                    pin=False,
                    path_draws=0,
                    rounds=1,
                    scales=(0.5,),
                ),
                "met": Ablation(robot="hopper", met=True),
                "half u-net": Ablation(robot="hopper", kind="half_unet", rounds=1),
                "low t": Ablation(robot="hopper", t_weights=(2.0, 1.0, 0.5, 0.1, 0.0, 0.0)),
            },
        )
        found = STUDY.run(config)
    return config, found


@pytest.mark.slow
def test_results(done):
    config, found = done
    assert json.loads((config.out / "results.json").read_text()) == found
    for base in ("environments", "unseen"):
        one = found[base]["Hopper-v5"]
        assert set(one) == {*MAIN, "temperature 0.5", "ensemble", "distilled"}
        for name in MAIN:
            arm = one[name]
            episodes = 6 if name == "reward" else 3
            assert arm["episodes"] == episodes and len(arm["returns"]) == 3
            assert arm["mean"] == pytest.approx(np.mean(arm["seed_returns"]), abs=1e-2)
            robot = LocomotionTask("hopper").robot
            assert arm["normalized"] == pytest.approx(robot.normalized(np.array(arm["mean"])))
        assert one["unsteered"]["over"]["unsteered"] == {
            "mean": 0.0, "standard_error": 0.0, "seed_standard_error": None,
        }  # fmt: skip
        over = one["reward"]["over"]
        assert set(over) == {"unsteered", "discriminator", "temperature 0.5"}
        assert over["unsteered"]["seed_standard_error"] == one["reward"]["seed_standard_error"]
        for name in ("discriminator", "raw_difference", "reward"):
            rows = one[name]["validation"]
            assert [row["scale"] for row in rows][:2] == [3.0, 4.0]
            lived = [row for row in rows if row["return"] is not None]
            best = max(lived, key=lambda row: row["return"])["scale"]
            assert one[name]["settings"]["scale"] == best
        assert len(one["reward"]["seed_returns"]) == 2
        assert one["reward"]["seed_standard_error"] is not None
        assert one["expert"]["mean"] != one["unsteered"]["mean"]
    own = found["robots"]["hopper"]
    for key in ("explained", "explained_on_raw_paths", "explained_on_own_paths"):
        assert len(own["diagnostics"][key]) == 6
    errors = {"standard_error", "seed_standard_error"}
    assert set(own["gap"]) == {"mean", "expert_beats_base", *errors}
    assert found["settings"]["robots"]["hopper"]["rounds"] == 2


EVERY = {*MAIN, "temperature 0.5"}


@pytest.mark.slow
def test_ablations(done):
    """What a change does not touch is the study's own; the rest is made anew."""
    config, found = done
    whole = found["environments"]["Hopper-v5"]
    changed: dict[str, set[str]] = dict.fromkeys(("one step", "less data"), EVERY)
    changed |= {"warm": {*MAIN}}  # without noise there is no temperature
    changed |= dict.fromkeys(("slower", "narrow", "met", "half u-net", "low t"), {"reward"})
    guided = {"discriminator", "raw_difference", "reward"}
    changed["the authors"] = guided  # of other scales, which the two may have had before
    for name, wanted in changed.items():
        one = found["ablations"][name]
        own = {*MAIN} if name == "warm" else EVERY
        assert set(one) == {*own, "change", "diagnostics"}
        differs = {arm for arm in own if one[arm]["returns"] != whole[arm]["returns"]}
        assert {"reward"} <= differs <= wanted if wanted == guided else differs == wanted, name
    made = {
        p.parent.name: {f.stem for f in p.parent.glob("*.safetensors")}
        for p in (config.out / "ablations").glob("*/result.json")
    }
    rewards = {"reward_0", "reward_1"}
    assert made == {
        "slower": rewards,
        "narrow": {"reward_0"},
        "the-authors": {"reward_0"},
        "low-t": rewards,
        "met": rewards,
        "half-u-net": {"reward_0"},
        "one-step": set(),
        "warm": set(),
        "less-data": {"base", "expert", "discriminator", *rewards},
    }
    assert found["ablations"]["less data"]["change"] == {"base_episodes": 6}
    guide = load_guide(config.out / "ablations/half-u-net/reward_0.safetensors", TrajectorySpace)
    assert guide.guide.reward == HalfUnet(4, (8,))  # pyright: ignore[reportAttributeAccessIssue]
    with np.load(config.out / "ablations" / "met" / "reward_1.met.npz") as stored:
        met = stored["observations"]
    assert (
        met.shape[1] == 11 and 2 < len(met) <= 2 * 4
    )  # of two robots, asked every two of 8 steps
    assert not (config.out / "ablations" / "met" / "reward_0.met.npz").exists()


@pytest.mark.slow
def test_what_an_ablation_s_reward_explains(done):
    """Of the same held-out data as the study's own where the data are the same, by every t."""
    _, found = done
    own = found["robots"]["hopper"]["diagnostics"]
    for name, one in found["ablations"].items():
        diagnostics = one["diagnostics"]
        assert set(diagnostics) == set(own)
        for key in EXPLAINED:
            by_t = np.array(diagnostics[key], np.float64)
            missing = [0, 4] if name == "warm" and key != "explained" else []  # DDIM of 4 of 6
            assert np.flatnonzero(np.isnan(by_t)).tolist() == missing, (name, key)
    of = {name: one["diagnostics"] for name, one in found["ablations"].items()}
    assert of["one step"]["explained"] == of["warm"]["explained"] == own["explained"]
    assert (
        of["slower"]["antisymmetric"] == own["antisymmetric"] != of["less data"]["antisymmetric"]
    )
    assert of["slower"]["explained"] != own["explained"]
    assert of["warm"]["explained_on_own_paths"] != own["explained_on_own_paths"]


@pytest.mark.slow
def test_models(done):
    config, _ = done
    folder = config.out / "hopper"
    base, unseen = (
        load_model(folder / f"{n}.safetensors", TrajectorySpace) for n in ("base", "unseen")
    )
    assert base.space.about["goal"] == "medium-replay" and unseen.space.about["goal"] == "medium"
    assert base.space.normaliser.same_as(unseen.space.normaliser)
    assert (
        load_guide(folder / "reward_1.safetensors", TrajectorySpace).space.about["goal"]
        == "expert"
    )
    assert not list(folder.glob("*/checkpoints"))


@pytest.mark.slow
def test_the_report(done):
    config, found = done
    page = write_report(config, found)
    text = (page.parent / "report.md").read_text()
    assert "| Hopper-v5 | reward | " in text
    assert "24.67 +- " not in text and "normalized |" not in text  # of 1,000 steps, these of 8
    assert re.search(r"reward \| -?\d+ \+- \d+ \(seeds \+- \d+\)", text)
    assert "27.75 to 32.36" in text or "24.67 to 27.04" in text  # the paper's claim, whatever ours
    assert "| Hopper-v5 | less data (base_episodes 6) | " in text
    assert "| environment | base | arm | scale " in text and "| unseen | raw difference | " in text
    assert "| Hopper-v5 | narrow (path_draws 0, rounds 1, widths 5) | " in text
    warm = next(x for x in text.splitlines() if x.startswith("| Hopper-v5 | warm "))
    assert "| none: no noise is drawn |" in warm
    for name in ("strips_hopper", "explained"):
        assert f"]({name}.svg)" in text and (page.parent / f"{name}.svg").exists()
    shares = [
        [
            f"{np.nanmean(np.array(one['diagnostics'][key], np.float64)):.2f}"
            for key in ("explained", "explained_on_own_paths")
        ]
        for one in (found["robots"]["hopper"], found["ablations"]["warm"])
    ]
    above = next(x for x in text.splitlines() if x.startswith("| Hopper-v5 | as above |"))
    assert above.endswith(f" | {' | '.join(shares[0])} |")
    assert warm.endswith(f" | {' | '.join(shares[1])} |")


@pytest.mark.slow
def test_a_report_of_two_robots_of_which_one_has_a_cheap_network(done, tmp_path, capsys):
    """And frames that are gone, or cut short, cost their picture alone."""
    config, found = done
    other = dataclasses.replace(OWN, distilled=None)
    config = dataclasses.replace(
        config, out=tmp_path, robots=config.robots | {"walker2d": other}, ablations={}
    )
    both = json.loads(json.dumps(found)) | {"ablations": {}}
    both["robots"]["hopper"]["gap"]["expert_beats_base"] = True
    both["robots"]["walker2d"] = both["robots"]["hopper"]
    for base in ("environments", "unseen"):
        arms_of = dict(both[base]["Hopper-v5"])
        for name in ("ensemble", "distilled"):
            del arms_of[name]
        both[base]["Walker2d-v5"] = arms_of
    (tmp_path / "hopper" / "arms").mkdir(parents=True)
    (tmp_path / "hopper" / "arms" / "unsteered.npz").write_bytes(b"PK cut short")
    text = (write_report(config, both).parent / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| Walker2d-v5 |")]
    assert any("| reward |" in row for row in rows)
    assert not any("| distilled |" in row for row in rows)
    assert "(Hopper-v5), " in text and "(Walker2d-v5)" in text
    said = capsys.readouterr().out
    for name in ("hopper", "walker2d"):
        assert f"{name}/arms/unsteered.npz: cannot be read; the report has no strips" in said


@pytest.mark.slow
def test_a_second_start_makes_nothing_anew(done, monkeypatch):
    config, found = done
    for module, name in ((models, "fit"), (models, "fit_reward"), (work, "returns")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(LocomotionTask, "record", None)
    monkeypatch.setattr(run, "policies", lambda name: None)
    assert STUDY.run(config) == found


def test_an_ablation_waits_for_its_robot(tmp_path, monkeypatch):
    """It begins with the robot's models: where another process makes those, it is `Taken`, too."""
    ablations = {"slower": Ablation(robot="hopper", learning_rate=1e-4)}
    config = Config(out=tmp_path / "study", robots={"hopper": OWN}, ablations=ablations)
    monkeypatch.setattr(work.Work, "run", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        STUDY.run(config)  # it has begun
    ablation = list(STUDY.parts(config))[-1]
    with resume.alone(config.out / "hopper"), pytest.raises(Taken):
        ablation.run()


def test_an_ablation_that_is_added_goes_on_and_is_then_held_to(tmp_path, monkeypatch):
    """In the same folder, beside what is there; no result stands under another change."""
    done = []
    monkeypatch.setattr(work.Work, "run", lambda self: None)
    monkeypatch.setattr(work.Work, "run_ablation", lambda self: done.append(self.models.part))
    study = dataclasses.replace(STUDY, summarise=lambda config: {})
    slower = {"slower": Ablation(robot="hopper", learning_rate=1e-4)}
    config = Config(out=tmp_path / "study", robots={"hopper": OWN}, ablations=slower)
    study.run(config)
    both = slower | {"wider": Ablation(robot="hopper", widths=(9,))}
    study.run(dataclasses.replace(config, ablations=both))
    # Each of them looks for its result.
    assert done == [f"ablations/{name}" for name in ("slower", "slower", "wider")]
    for name, other in (
        ("slower.learning_rate 0.0001, not 0.01", Ablation(robot="hopper", learning_rate=1e-2)),
        (r"wider.widths \[9\], not \[8\]", Ablation(robot="hopper", widths=(8,))),
    ):
        changed = both | {name.partition(".")[0]: other}
        with pytest.raises(InputError, match=f"the run there has ablations.{name}; give the same"):
            study.run(dataclasses.replace(config, ablations=changed))


def test_robots_without_policies_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "POLICIES", tmp_path)
    policies.policies.cache_clear()
    config = Config(out=tmp_path / "study", robots={"hopper": OWN})
    with pytest.raises(
        InputError, match=r"no policies of hopper are shipped \(.*hopper.safetensors\): learn"
    ):
        STUDY.run(config)
    policies.policies.cache_clear()
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"robots": {}}, "robots is empty: give one of halfcheetah"),
        ({"scales": (0.5, float("nan"))}, "scales are 0.5, nan: give numbers above 0"),
        ({"environments": 1}, "environments and validation must be 2 or more"),
        ({"base_episodes": 2}, "base_episodes is 2: the set medium-replay has 4 parts"),
        (
            {"ablations": {"x": Ablation(robot="hopper", sampling_steps=9)}},
            "ablations.x.sampling_steps is 9: there are 6",
        ),
        (
            {"ablations": {"x": Ablation(robot="hopper", skip=3)}},
            "ablations.x.skip is 3: give sampling_steps, too, and more",
        ),
        (
            {"robots": {"hopper": dataclasses.replace(OWN, reward=RewardOptions(window=3))}},
            "robots.hopper.reward: reward.window 3 does not divide the horizon 4: choose",
        ),
        (
            {"robots": {"hopper": dataclasses.replace(OWN, matching=Matching(batch_size=9))}},
            "robots.hopper.matching.batch_size is 9: give an even number",
        ),
        (
            {
                "robots": {
                    "hopper": dataclasses.replace(
                        OWN, distilled=Rounds(reward=RewardOptions("energy"))
                    )
                }
            },
            "robots.hopper.distilled.reward.kind is energy, the dear one: give window",
        ),
        (
            {"ablations": {"../x": Ablation(seed=1)}},
            "ablations: '../x' names a folder: give small",
        ),
        (
            {"ablations": {"x": Ablation(seed=1)}},
            "ablations.x.robot is 'halfcheetah': give one of",
        ),
        (
            {"rollout": Rollout(execute=5)},
            "rollout.execute is 5, but a plan of hopper has 4 steps",
        ),
        (
            {"ablations": {"x": Ablation(robot="hopper", kind="half_unet", widths=(3,))}}
            | {"robots": {"hopper": dataclasses.replace(OWN, reward=RewardOptions(dim=3))}},
            "ablations.x: robots.hopper.reward: reward.dim must be a multiple of 4",
        ),
        (
            {"ablations": {"x": Ablation(robot="hopper", batch_size=9)}},
            "ablations.x: robots.hopper.matching.batch_size is 9: give an even number",
        ),
        (
            {"ablations": {"x": Ablation(robot="hopper", t_weights=(1.0, 0.0))}},
            "ablations.x: matching.t_weights are 2: give one for each of the 6 steps",
        ),
        (
            {"ablations": {"x": Ablation(robot="hopper", met=True, path_draws=0)}},
            "ablations.x: robots.hopper.met is of paths of a second round that begin at a state",
        ),
        (
            {"robots": {"hopper": dataclasses.replace(OWN, met=True, rounds=1)}},
            "robots.hopper.met is of paths .*: give rounds 2 or more, matching.path_draws, and",
        ),
        (
            {"ablations": {"x": Ablation(robot="hopper")}},
            "ablations.x changes nothing: give one of",
        ),
        ({"robots": {"ant": OWN}}, "robots: 'ant' is none; there are halfcheetah, hopper"),
        ({"base_data": "good"}, "base_data is 'good': give one of expert, medium"),
        ({"t_stopgrads": (0, 6)}, "t_stopgrads are 0, 6, but t of hopper goes from 0 to 5"),
        ({"scales": ()}, "scales and t_stopgrads need a number each"),
        (
            {
                "robots": {
                    "hopper": dataclasses.replace(
                        OWN, expert_training=Training(prediction="epsilon")
                    )
                }
            },
            "expert_training.prediction must be base_training.prediction",
        ),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(given),
)
def test_what_could_not_be_studied_is_refused_at_once(tmp_path, changes, said):
    config = dataclasses.replace(Config(out=tmp_path / "study", robots={"hopper": OWN}), **changes)
    with pytest.raises(InputError, match=said):
        STUDY.run(config)
    assert not (tmp_path / "study").exists()
