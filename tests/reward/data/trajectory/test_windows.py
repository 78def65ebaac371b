"""Windows against a loop over episodes."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.episodes import Episodes, transitions
from reward_jax.data.trajectory.normalisers import gaussian
from reward_jax.data.trajectory.windows import begins, windows


def random_episodes(lengths, arrivals=None):
    rng = np.random.default_rng(0)
    return Episodes(
        rng.normal(size=(sum(lengths), 4)).astype(np.float32),
        rng.normal(size=(sum(lengths), 2)).astype(np.float32),
        np.array(lengths),
        arrivals=None if arrivals is None else np.array(arrivals),
    )


def brute(episodes, horizon, stride, until, padding="none"):
    """Every window, one after another: slices of one episode each, normalised."""
    rows = np.concatenate([episodes.actions, episodes.observations], axis=1)
    mean, deviation = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
    found, start = [], 0
    for index, length in enumerate(episodes.lengths):
        episode = rows[start : start + length]
        start += length
        if padding != "none":
            beyond = np.zeros_like(episode[0]) if padding == "zeros" else episode[-1]
            episode = np.concatenate([episode, np.tile(beyond, (horizon * stride, 1))])
        episode = (episode - mean) / deviation
        for offset in range(length):
            window = episode[offset::stride][:horizon]
            if until is not None and offset > until * episodes.arrivals[index]:
                break
            if len(window) == horizon:
                found.append(window)
    return np.stack(found)


@pytest.mark.parametrize(
    ("lengths", "arrivals", "horizon", "stride", "until"),
    [
        ([9, 3, 30, 7, 8], None, 4, 2, None),  # two are too short for one window
        ([20, 25, 20], [3, 7, 0], 4, 4, 1.0),
        ([20, 25, 20], [3, 7, 0], 4, 4, 0.5),
        ([20, 25, 20], [3, 7, 0], 4, 4, None),
        ([5], None, 5, 1, None),
    ],
)
def test_windows_are_every_start_that_leaves_room(lengths, arrivals, horizon, stride, until):
    episodes = random_episodes(lengths, arrivals)
    got = windows(
        episodes,
        gaussian(transitions(episodes)),
        horizon=horizon,
        stride=stride,
        until=1.0 if arrivals is None else until,  # without arrivals it says nothing
    )
    expected = brute(episodes, horizon, stride, until)
    assert len(got) == len(expected) and got.starts.dtype == np.int32
    assert got.flat.dtype == np.float32
    np.testing.assert_allclose(got.take(np.arange(len(got))), expected, atol=1e-5)
    np.testing.assert_allclose(got.take([len(got) - 1, 0]), expected[[-1, 0]], atol=1e-5)


@pytest.mark.parametrize("padding", ["repeat", "zeros"])
@pytest.mark.parametrize(
    ("lengths", "arrivals", "horizon", "stride", "until"),
    [
        ([9, 3, 30, 7, 1], None, 4, 2, None),  # three are too short for one window
        ([20, 25, 20], [3, 20, 0], 4, 4, 1.0),  # the second arrives where no window fits
        ([20, 25, 20], [3, 25, 0], 4, 4, 1.0),  # and here it never does
        ([3, 2], None, 5, 1, None),
    ],
)
def test_padding_lets_every_row_begin_a_window(lengths, arrivals, horizon, stride, until, padding):
    episodes = random_episodes(lengths, arrivals)
    options: dict[str, Any] = dict(horizon=horizon, stride=stride, until=until)
    fitted = gaussian(transitions(episodes))
    got = windows(episodes, fitted, padding=padding, **options)
    expected = brute(episodes, horizon, stride, until, padding)
    if arrivals is None:
        assert len(got) == sum(lengths)
    assert len(got) == len(expected) and got.flat.dtype == np.float32
    np.testing.assert_allclose(got.take(np.arange(len(got))), expected, atol=1e-5)


def test_windows_go_on_beyond_terminal_states_alone():
    """Episodes of 6, 9 and 2 rows: the first falls, the others are cut; the last is too short."""
    episodes = random_episodes([6, 9, 2])
    ends = np.zeros(17, bool)
    ends[5] = True
    fallen = dataclasses.replace(episodes, terminations=ends)
    fitted = gaussian(transitions(episodes))
    options: dict[str, Any] = dict(horizon=4, stride=1, until=None)
    got = windows(fallen, fitted, padding="terminal", **options)
    first = windows(episodes, fitted, padding="repeat", **options).take(np.arange(6))
    rest = windows(episodes, fitted, **options).take(np.arange(3, 9))
    np.testing.assert_array_equal(got.take(np.arange(len(got))), np.concatenate([first, rest]))
    cut = dataclasses.replace(episodes, terminations=np.zeros(17, bool))
    with pytest.raises(InputError, match="but no episode has as many: lower horizon or stride"):
        windows(cut, fitted, padding="terminal", horizon=12, stride=1, until=None)


def test_where_terminal_states_are_is_not_guessed():
    """Of data that do not say: a fall would be taken for an end by time."""
    episodes = random_episodes([6, 9])
    fitted = gaussian(transitions(episodes))
    said = "data have no flags of terminal states: give .*`terminals`, name .* --env .* or give an"
    with pytest.raises(InputError, match=said):
        windows(episodes, fitted, padding="terminal", horizon=4)
    with pytest.raises(InputError, match=said):
        begins(episodes, 4, "terminal")


@pytest.mark.parametrize("padding", ["none", "repeat", "zeros", "terminal"])
def test_where_windows_begin(padding):
    """Of episodes that fall or do not, long enough or not."""
    episodes = random_episodes([6, 9, 2, 3])
    ends = np.zeros(20, bool)
    ends[[5, 16]] = True
    fallen = dataclasses.replace(episodes, terminations=ends)
    for span in (3, 4):
        alone = []
        for one in np.eye(4, dtype=bool):
            of_one = fallen.choose(one)
            fitted = gaussian(transitions(of_one))
            try:
                alone.append(len(windows(of_one, fitted, horizon=span, padding=padding)) > 0)
            except InputError:
                alone.append(False)
        assert begins(fallen, span, padding).tolist() == alone


def test_observations_alone():
    episodes = random_episodes([12])
    got = windows(episodes, gaussian(episodes.observations), horizon=4, actions=False)
    assert got.take([0]).shape == (1, 4, 4)
    both = windows(episodes, gaussian(transitions(episodes)), horizon=4)
    np.testing.assert_allclose(got.take([3]), both.take([3])[..., 2:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"horizon": 8, "stride": 4, "until": None},
            "stride 4, take 29 steps, but the episodes have 20 to 25",
        ),
        (
            {"horizon": 6, "stride": 4},
            "take 21 steps, but episode 0 has 20 and arrives after 3: record 24 steps or more",
        ),
        ({"horizon": 0}, "horizon and stride must be 1 or more, not 0 and 1"),
        (
            {"horizon": 4, "actions": False},
            "the normaliser has 6 dimensions, the data 4: fit it to `transitions`",
        ),
    ],
)
def test_too_short_and_ill_matched(settings, message):
    episodes = random_episodes([20, 25, 20], [3, 4, 0])
    with pytest.raises(InputError) as error:
        windows(episodes, gaussian(transitions(episodes)), **settings)
    assert message in str(error.value) and "\n" not in str(error.value)
