"""What a run of an extraction is made of: its network, and diagnostics of its own matching."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.episodes import Episodes
from reward_jax.diffusion.sources import Rows
from reward_jax.models.energy import energy_of
from reward_jax.models.reward_nets import HalfUnet, WindowMLP
from reward_jax.planning import extract
from reward_jax.reward.diagnostics import explained_fraction
from reward_jax.reward.gradients import ScoreDifference
from reward_jax.reward.relative import RelativeReward
from tests.reward.cli_runs import model, reward, space


@pytest.mark.parametrize("gradient_at", ["x_t", "posterior_mean"])
@pytest.mark.parametrize("pin", [True, False])
def test_a_run_s_diagnostics_are_of_its_own_matching(monkeypatch, gradient_at, pin):
    asked = {}
    for name in ("explained_fraction", "antisymmetric_part", "seed_agreement"):
        monkeypatch.setattr(
            extract, name, lambda *_, name=name, **o: asked.update({name: o}) or np.zeros(8)
        )
    guide, base, expert = reward(), model(0).denoiser, model(1).denoiser
    matching = extract.Matching(gradient_at=gradient_at, pin=pin)
    extract.diagnose(guide, base, expert, jnp.zeros((2, 8, 4)), matching=matching)
    assert all(o["pin"] == (guide.space.pin if pin else None) for o in asked.values())
    assert asked["explained_fraction"]["gradient_at"] == gradient_at
    at_mean = asked["seed_agreement"]["base_score"]
    assert at_mean is (base if gradient_at == "posterior_mean" else None)


def test_options_make_their_network():
    own = space(horizon=8)
    assert extract.RewardOptions().make(own) == WindowMLP(8)
    made = extract.RewardOptions(window=2, widths=(4,), act="silu", head="activated").make(own)
    assert made == WindowMLP(2, (4,), act="silu", head="activated")
    half = extract.RewardOptions("half_unet", dim=8, multipliers=(1, 4), groups=0).make(own)
    assert half == HalfUnet(8, (1, 4), act=WindowMLP.act, groups=None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 3}, "reward.window 3 does not divide the horizon 8: choose one that does"),
        ({"kind": "half_unet", "dim": 6}, "reward.dim must be a multiple of 4"),
        ({"kind": "half_unet", "dim": 8, "multipliers": ()}, "reward.dim must be a multiple of 4"),
        ({"kind": "half_unet", "dim": 8, "groups": 3}, "multiples of 3, the last of 12"),
    ],
)
def test_options_that_do_not_fit_the_space(options, said):
    with pytest.raises(InputError, match=said):
        extract.RewardOptions(**options).make(space(horizon=8))


ROWS = Rows(jax.random.normal(jax.random.key(5), (50, 8, 4)))
MATCHING = extract.Matching(
    steps=60, steps_per_call=30, batch_size=16, draws=160, seeds=2, learning_rate=3e-3, decay=False
)


def pair():
    """A base and an expert with one action."""
    return model(0, actions=1), model(1, actions=1).denoiser


def found_of(options, matching, **given) -> RelativeReward:
    base, expert = pair()
    found = extract.fit_reward(
        base, expert, ROWS, base.space, options, matching, seed=0, **given
    ).guide
    assert isinstance(found, RelativeReward)
    return found


@pytest.mark.slow
def test_an_energy_begins_as_the_denoisers_are_and_is_tuned():
    base, expert = pair()
    options = extract.RewardOptions("energy")
    raw = energy_of(base.denoiser, expert, actions=1)
    before = RelativeReward(raw[1], base.denoiser.schedule, raw[0], "score")
    slow = dataclasses.replace(MATCHING, learning_rate=6e-4, draws=800)
    found = found_of(options, slow)
    assert found.target == "score" and found.seeds == 2 and found.reward == raw[0]
    where = explained_fraction, (base.denoiser, expert, ROWS.rows, base.denoiser.schedule)
    shares = [
        np.asarray(where[0](one, *where[1], key=jax.random.key(1), pin=base.space.pin))
        for one in (before, found)
    ]
    assert shares[0].mean() > 0.3
    # Where errors are largest in the unit of epsilon, in which they count.
    assert (shares[1][:4] > shares[0][:4] + 0.02).all()
    # Seeds begin alike, and are set apart by the rows that they see.
    kernels = [jax.tree.leaves(found.seed(i).params)[-1] for i in range(2)]
    assert not np.array_equal(*kernels)


def test_errors_count_in_the_target_s_unit_whatever_the_network_s_own():
    """With r of a score's unit, the loss of epsilon is that of score with sigma^2 for weights."""
    schedule = pair()[0].denoiser.schedule
    weights = extract._weighting(MATCHING, "score", schedule)
    np.testing.assert_allclose(weights, 1 - schedule.alphas_cumprod, rtol=1e-5)
    assert extract._weighting(MATCHING, "epsilon", schedule) is None
    by_t = dataclasses.replace(MATCHING, t_weights=tuple(np.linspace(0, 2, schedule.steps)))
    np.testing.assert_allclose(extract._weighting(by_t, "epsilon", schedule), by_t.t_weights)
    np.testing.assert_allclose(
        extract._weighting(by_t, "score", schedule), weights * np.array(by_t.t_weights), rtol=1e-5
    )
    by_t.check(schedule.steps)
    for wrong, said in (
        (dataclasses.replace(by_t, weighting="standardise"), "give one of them"),
        (dataclasses.replace(by_t, t_weights=(1.0,)), "are 1: give one for each"),
        (dataclasses.replace(by_t, t_weights=(0.0,) * schedule.steps), "some above 0"),
    ):
        with pytest.raises(InputError, match=said):
            wrong.check(schedule.steps)


def test_guided_paths_and_the_first_action(monkeypatch):
    """Paths of the raw difference, or of the reward to begin with, are matched, too."""
    options, guides, given = extract.RewardOptions(widths=(8,)), [], []
    draw, match = extract.draw_path_targets, extract.extract_reward
    monkeypatch.setattr(
        extract, "draw_path_targets", lambda *a, **k: guides.append(k["guide"]) or draw(*a, **k)
    )
    monkeypatch.setattr(
        extract, "extract_reward", lambda *a, **k: given.append((a[4], k)) or match(*a, **k)
    )
    matching = dataclasses.replace(MATCHING, path_draws=128, action_weight=10.0)
    first = found_of(options, matching)
    second = found_of(options, matching, begin=first)
    assert isinstance(guides[0], ScoreDifference) and guides[1] is first
    for targets, more in given:
        assert len(targets.t) == 160 + 128
        assert more["entries"][0, 0] == 10 and more["entries"].sum() == 8 * 4 + 9
    assert second.reward == first.reward and second.seeds == first.seeds
    with pytest.raises(InputError, match="path_draws needs matching.draws"):
        found_of(options, dataclasses.replace(matching, draws=0))
    base = model(0)
    with pytest.raises(InputError, match="action_weight is of trajectories with actions"):
        extract.fit_reward(base, model(1).denoiser, ROWS, base.space, options, matching, seed=0)


def test_what_is_held_out_has_windows():
    """With windows beyond falls alone: an episode that is cut short of one has none."""
    lengths = np.array([2, 9, 2, 9, 2, 9, 2, 3])
    fell = np.zeros(lengths.sum(), bool)
    fell[-1] = True
    rows = np.zeros((len(fell), 4), np.float32)
    episodes = Episodes(rows, rows[:, :2], lengths, terminations=fell)
    of = space(horizon=4, stride=1)
    trained, apart = extract.hold_out(episodes, 1 / 2, of, "terminal")
    assert (trained.lengths.tolist(), apart.lengths.tolist()) == ([2, 9, 2, 2, 9, 2], [9, 3])
