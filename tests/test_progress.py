"""Progress without a terminal: plain lines, not too many of them; with one, a bar."""

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest

from structmat import _progress
from structmat._progress import progress_bar


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(_progress.time, "monotonic", found)
    return found


Started = Callable[..., tuple[Any, io.StringIO]]


@pytest.fixture
def started(clock: Clock) -> Started:
    """A bar that writes to a file, and takes the time from the clock."""

    def start(**options: Any) -> tuple[Any, io.StringIO]:
        file = io.StringIO()
        bar = progress_bar(file=file, **options)
        bar._time = clock
        bar.start_t = bar.last_print_t = clock()
        return bar, file

    return start


def test_lines_come_ten_seconds_apart_at_the_earliest(started: Started, clock: Clock) -> None:
    bar, file = started(total=100, desc="train")
    for second in range(35):
        clock.now = 100.0 + second
        bar.update()
        bar.set_description("train")  # refreshes
    assert file.getvalue().splitlines() == [
        "train: 11% (11 of 100), 00:10 so far, about 01:20 to go",
        "train: 21% (21 of 100), 00:20 so far, about 01:15 to go",
        "train: 31% (31 of 100), 00:30 so far, about 01:06 to go",
    ]


def test_a_hundred_percent_are_the_end(started: Started, clock: Clock) -> None:
    bar, file = started(total=390)
    clock.now += 10
    bar.update(389)
    assert file.getvalue().startswith("99% (389 of 390)")


def test_the_end_is_told_once(started: Started, clock: Clock) -> None:
    bar, file = started(total=2, desc="train")
    bar.update(2)
    clock.now += 3
    assert file.getvalue() == ""
    bar.close()
    bar.close()
    assert file.getvalue() == "train: 100% (2 of 2), 00:03 so far\n"


def test_an_end_that_was_told_is_not_told_again(started: Started, clock: Clock) -> None:
    bar, file = started(total=2, desc="train")
    clock.now += 10
    bar.update(2)
    bar.close()
    assert file.getvalue() == "train: 100% (2 of 2), 00:10 so far\n"


def test_a_bar_that_vanishes_says_nothing_at_its_end(started: Started) -> None:
    bar, file = started(total=2, leave=False)
    bar.update(2)
    bar.close()
    assert file.getvalue() == ""


def test_without_a_total_the_line_says_how_much_is_done(started: Started, clock: Clock) -> None:
    bar, file = started(desc="calibrate", unit="batch")
    clock.now += 10
    bar.set_postfix_str("3 MiB", refresh=False)
    bar.update(4)
    bar.close()
    assert file.getvalue().splitlines()[0] == "calibrate: 4 done, 00:10 so far, 3 MiB"


def test_what_was_done_before_takes_no_time_and_a_message_is_a_line(started: Started, clock: Clock) -> None:
    bar, file = started(total=2000, initial=1000, desc="training")
    clock.now += 100
    bar.update(10)
    bar.write("after 1010 of 2000 steps, held out: loss 2", file)
    assert file.getvalue().splitlines() == [
        "training: 50% (1010 of 2000), 01:40 so far, about 2:45:00 to go",
        "after 1010 of 2000 steps, held out: loss 2",
    ]


def test_numbers_that_mean_nothing_to_a_reader_are_left_out(started: Started, clock: Clock) -> None:
    bar, file = started(total=10**9, desc="compress", bar_format="{percentage:3.0f}%|{bar}|")
    clock.now += 10
    bar.update(5 * 10**8)
    assert file.getvalue() == "compress: 50%, 00:10 so far, about 00:10 to go\n"


@pytest.mark.parametrize("total", [0, 3])
def test_lines_draw_nothing(started: Started, total: int) -> None:
    bar, file = started(total=total)
    bar.close()
    assert file.getvalue() == ("100%, 00:00 so far\n" if total == 0 else "0% (0 of 3), 00:00 so far\n")


def test_a_hidden_bar_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=1, show=False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    file = io.StringIO()
    with progress_bar(total=2, file=file, desc="train", ascii=True) as bar:
        assert isinstance(bar, _progress.drawn)
        bar.update(2)
    assert "100%|###" in file.getvalue()
