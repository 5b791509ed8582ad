"""The progress bar over the work of a compression."""

import pytest

from structmat.compress import tasks
from structmat.compress.tasks import KINDS, FitBar


class Clock:
    """Stands for the clock of the bar, which a test turns on."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(tasks, "time", found)
    return found


def share(bar: FitBar) -> float:
    return float(bar._bar.n / bar._bar.total)


def test_the_bar_learns_how_long_each_kind_of_work_takes(clock: Clock) -> None:
    with FitBar({"fits": 10.0, "passes": 100.0, "refinement": 0.0}, show=True) as bar:
        clock.now += 2.0
        bar.advance(50.0, "passes")
        fits = 10.0 * KINDS["fits"] / KINDS["passes"] * 2.0 / 50.0  # guessed from the passes
        assert share(bar) == pytest.approx(2.0 / (4.0 + fits))
        clock.now += 30.0
        bar.advance(5.0)
        assert share(bar) == pytest.approx(32.0 / (4.0 + 60.0))
        bar.advance_within(5.0, 0.5)
        assert share(bar) == pytest.approx(47.0 / 64.0)
        bar.advance_within(5.0, 0.5, "refinement")  # of which there is none
        assert share(bar) == pytest.approx(47.0 / 64.0)
        clock.now += 2.0
        bar.advance(50.0, "passes")
        clock.now += 30.0
        bar.advance(5.0)
        assert share(bar) == pytest.approx(1.0)


def test_what_an_earlier_run_did_tells_nothing_of_the_speed(clock: Clock) -> None:
    with FitBar({"fits": 10.0}, show=True) as bar:
        bar.skip(6.0)
        clock.now += 3.0
        bar.advance(1.0)
        assert share(bar) == pytest.approx(3.0 / 12.0)
