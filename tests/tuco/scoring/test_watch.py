"""What a run tells of itself: compiling, and how far it is."""

import pytest

from common_jax.progress import Bar
from tuco_jax.prompts.packing import Packed
from tuco_jax.scoring.watch import Watch


def watched(done=()):
    shown = []
    return Watch([5, 7, 3], done, Bar(lambda reached, *_: shown.append(reached), "tokens")), shown


def test_a_programs_first_call_is_compiling():
    watch, _ = watched()
    for program, seconds in (("a", 2.0), ("a", 1.0), ("b", 0.5)):
        watch.called(program, seconds)
    assert watch.compiling == 2.5


def test_shares_of_batches_add_up_to_what_is_not_done_before():
    watch, shown = watched(done=[1])
    for batch in (Packed(((0, 1),), 1, 16, 2), Packed(((2,),), 1, 16, 1)):
        for _ in range(4):
            watch.advance(batch, 0.25)
    assert shown[0] == 7 + 5 / 4 and shown[-1] == pytest.approx(15)
