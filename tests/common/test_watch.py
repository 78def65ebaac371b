"""The watch over other processes: what it says of them, after how many looks."""

from typing import Any

import pytest

from common_jax.watch import FAREWELL, PACE, SILENCE, Watch

LOOKS = round(SILENCE / PACE)


class Store:
    """What all processes share; it answers no more once it is gone."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.gone, self.asked = False, 0

    def key_value_set(self, key: str, text: str, overwrite: bool) -> None:
        self.asked += 1
        assert overwrite and not self.gone
        self.held[key] = text

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        self.asked += 1
        assert not self.gone
        return [(k, v) for k, v in self.held.items() if k.startswith(prefix)]


class Ended(Exception):
    """Raised in place of the end of a process."""


def group(count: int, patience: float = 0) -> tuple[Store, list[Watch]]:
    """Watches of several processes over one store, which have all been heard."""

    def end(what: str, code: int) -> None:
        raise Ended(f"{code}: {what}")

    store = Store()
    watches = [Watch(store, i, count, patience, end) for i in range(count)]
    go_on(watches, 3)
    return store, watches


def go_on(watches: list[Watch], looks: int, steps: Any = None) -> None:
    """As many rounds of all that are there; steps: each one's, otherwise a step each round."""
    for number in range(looks):
        for i, watch in enumerate(watches):
            watch.speak(number if steps is None else steps(i, number))
        for watch in watches:
            watch.look()


def test_a_lost_process_ends_the_others_within_a_minute():
    """That is, so many looks later, of which one may have been late, and after a farewell."""
    _, watches = group(3)
    left = [watches[0], watches[2]]
    go_on(left, LOOKS - 1)
    said = rf"^1: process 1 was lost: not a sign of life for {SILENCE:g} s \(killed, or stopped\)"
    with pytest.raises(Ended, match=said):
        go_on(left, 1)
    assert (LOOKS + 2) * PACE + FAREWELL < 60


def test_the_loss_of_process_0_is_a_store_that_does_not_answer():
    store, watches = group(2)
    store.gone = True
    go_on(watches[1:], LOOKS - 1)
    with pytest.raises(Ended, match="process 0 was lost"):
        go_on(watches[1:], 1)
    asked = store.asked
    watches[1].tell(None, 1)  # of one that is stopped it would wait for an answer
    assert store.asked == asked


def test_several_lost_are_all_named():
    _, watches = group(4)
    with pytest.raises(Ended, match="processes 2, 3 were lost"):
        go_on(watches[:2], LOOKS + 1)


def test_one_that_lives_and_makes_no_step_is_told_from_those_that_wait_for_it():
    """They stand still, too, a step further on."""
    patience = 4 * PACE
    _, watches = group(2, patience)
    go_on(watches, 4, lambda i, _: 9 - i)
    with pytest.raises(Ended, match=r"process 1 made no step for 8 s \(--patience\), and the oth"):
        go_on(watches, 2, lambda i, _: 9 - i)
    _, watches = group(2, patience)
    with pytest.raises(Ended, match="the processes made no step for 8 s"):
        go_on(watches, 6, lambda *_: 9)
    _, watches = group(2)
    go_on(watches, 50, lambda *_: 9)  # for ever


def test_why_one_ended_is_told_and_read():
    _, watches = group(2)
    watches[1].tell("InputError: no\nsuch file", 2)
    with pytest.raises(Ended, match=r"2: process 1 ended \(InputError: no such file\)"):
        go_on(watches[:1], 1)
    watches[0].tell(None, 2)  # and it does not wait for one that has ended
    go_on(watches[1:], 1)  # whose reason is the first's own
