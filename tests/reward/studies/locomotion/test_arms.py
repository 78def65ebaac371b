"""How an arm's guidance is chosen, and what returns come to beside others'."""

from typing import Any

import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.studies.locomotion import arms
from reward_jax.tasks.base import Outcome


def test_paired_differences_and_errors():
    one = {"returns": [3.0, 5.0, 4.0], "seed_standard_error": 0.3}
    other = {"returns": [1.0, 2.0, 3.0], "seed_standard_error": None}
    found = arms.compared(one, other)
    assert found["mean"] == 2.0
    assert found["standard_error"] == pytest.approx(1 / np.sqrt(3))
    assert found["seed_standard_error"] == pytest.approx(0.3)
    assert arms.compared(other, other)["seed_standard_error"] is None
    # 2 is above twice either error, and above twice both, which is 1.3; not above an error of .9.
    assert arms.exceeds(found) and not arms.exceeds(found | {"seed_standard_error": 0.9})
    assert not arms.exceeds(arms.compared(other, one))


def sweep(monkeypatch, tmp_path, returned):
    """`choose`, where an episode returns what `returned` says of (scale, t_stopgrad)."""

    def returns(arm, world, count, options):
        tried.append((options.scale, options.t_stopgrad))
        return Outcome({"return": np.full(count, returned(*tried[-1]))}, np.zeros(0))

    monkeypatch.setattr(arms, "returns", returns)
    nothing: Any = None
    options, tried, path = GuidanceOptions(), [], tmp_path / "sweep.json"

    def choose(scales, stops, done=None):
        return arms.choose(nothing, nothing, 3, options, scales, stops, path, done)

    return choose, tried


def test_a_scale_that_fails_is_not_chosen(monkeypatch, tmp_path):
    def returned(scale, stop):
        if scale > 1:
            raise InputError("actions are not finite: lower the guidance scale")
        return 10.0 * scale + {0: 0.0, 3: 3.0, 5: -5.0}[stop]

    choose, _ = sweep(monkeypatch, tmp_path, returned)
    lines = []
    best, rows = choose((0.5, 1.0, 4.0), (0, 3, 5), lines.append)
    assert (best.scale, best.t_stopgrad) == (1.0, 3)  # 4 fails, so that 1 is no edge
    assert [row["return"] for row in rows] == [5.0, 10.0, None, 13.0, 5.0]
    assert [row["scale"] for row in rows[3:]] == [1.0, 1.0]
    assert lines[2] == "scale 4, t_stopgrad 0: actions are not finite: lower the guidance scale"
    with pytest.raises(InputError, match="plans of every scale fail: actions are not finite"):
        choose((4.0,), (0,))


@pytest.mark.parametrize(
    ("peak", "beyond"),
    [(1.0, []), (0.5, [0.25]), (0.2, [0.25, 0.125]), (7.0, [4.0, 8.0, 16.0])],
    ids=["inside", "the smallest", "below", "above"],
)
def test_a_sweep_goes_beyond_an_edge_that_is_best(monkeypatch, tmp_path, peak, beyond):
    choose, tried = sweep(monkeypatch, tmp_path, lambda s, _: -abs(np.log2(s / peak)))
    best, rows = choose((0.5, 1.0, 2.0), (0, 3))
    scales = [0.5, 1.0, 2.0, *beyond]
    assert tried == [(scale, 0) for scale in scales] + [(best.scale, 3)]
    assert [row["scale"] for row in rows] == [*scales, best.scale]
    assert min(scales) < best.scale < max(scales)


def test_a_sweep_that_only_rises_has_an_end_and_one_scale_has_no_edge(monkeypatch, tmp_path):
    choose, tried = sweep(monkeypatch, tmp_path, lambda scale, _: scale)
    assert choose((3.0,), (0,))[0].scale == 3.0 and tried == [(3.0, 0)]
    best, _ = choose((1.0, 2.0), (0,))
    assert [scale for scale, _ in tried[1:]] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert best.scale == 32.0


def test_a_sweep_that_was_cut_short_goes_on(monkeypatch, tmp_path):
    """What was tried is not tried again, and the choice is the same."""

    def cut(scale, _):
        if len(tried) > 2:
            raise KeyboardInterrupt
        return -abs(scale - 1)

    choose, tried = sweep(monkeypatch, tmp_path, cut)
    with pytest.raises(KeyboardInterrupt):
        choose((0.5, 1.0, 2.0), (0, 3))
    choose, tried = sweep(monkeypatch, tmp_path, lambda scale, _: -abs(scale - 1))
    best, rows = choose((0.5, 1.0, 2.0), (0, 3))
    assert tried == [(2.0, 0), (1.0, 3)] and (best.scale, best.t_stopgrad) == (1.0, 0)
    assert [row["return"] for row in rows] == [-0.5, 0.0, -1.0, 0.0]
    (tmp_path / "sweep.json").write_text("[{}]")
    with pytest.raises(InputError, match=r"sweep.json: is damaged, .*; delete it"):
        choose((0.5, 1.0, 2.0), (0, 3))
