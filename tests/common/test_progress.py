"""The bar is for terminals; speed is that of the units after the first update."""

import io

import pytest

from common_jax import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("terminal", "show", "drawn"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_it_shows_on_a_terminal_alone(monkeypatch, terminal, show, drawn):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    with progress.bar("scoring", 4000, unit="tokens", start=1000, show=show) as bar:
        bar.update(2000)
        bar.update(4000, "loss 0.25")
    text = stream.getvalue()
    assert bool(text) == drawn
    if drawn:
        assert "scoring" in text and "4,000/4,000 tokens" in text and "loss 0.25" in text
        assert "tokens/s" in text


def test_speed_is_counted_from_the_first_update(clock):
    with progress.bar("training", 100, start=20) as bar:
        clock[0] += 50  # compiles
        bar.update(30)
        assert bar.speed is None
        clock[0] += 2
        bar.update(50)
        assert bar.speed == 10
        clock[0] += 8
        bar.update(60)
        assert bar.speed == 3


def test_a_bar_shows_the_first_update_s_speed_until_there_is_another(clock):
    shown = []
    bar = progress.Bar(lambda done, speed, note: shown.append((done, speed, note)), "rows", 20)
    clock[0] += 2
    bar.update(60, "half")
    clock[0] += 1
    bar.update(100)
    assert shown == [(60, "20 rows/s", "half"), (100, "40 rows/s", "")]


@pytest.mark.parametrize(
    ("speed", "text"), [(1234.5, "1,234 steps/s"), (12.3, "12 steps/s"), (0.123, "0.12 steps/s")]
)
def test_speeds_read_well(speed, text):
    assert progress._per_second(speed, "steps") == text
