"""Tables: aligned text for files and pipes, fitted to a terminal."""

import pytest
from rich import console

from structmat import _tables
from structmat._tables import print_table, share, table_text

HEAD, ROWS = ("layer", "size"), [("first", "1"), ("", ""), ("[all]", "9" * 150)]


def test_every_row_is_one_line_however_long() -> None:
    lines = table_text(HEAD, ROWS, right=[1]).splitlines()
    assert lines[0] == "layer" + " " * 149 + "size"
    assert lines[1] == "-" * 158
    assert lines[2:] == ["first" + " " * 152 + "1", "", "[all]   " + "9" * 150]


def test_a_table_without_rows_is_its_head() -> None:
    assert table_text(("a", "bc"), []) == "a   bc\n------"


def test_a_pipe_gets_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(HEAD, ROWS, right=[1])
    assert capsys.readouterr().out == table_text(HEAD, ROWS, right=[1]) + "\n"


def test_a_terminal_gets_what_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def terminal(**options: bool) -> console.Console:
        return console.Console(force_terminal=True, width=60, color_system=None, **options)

    monkeypatch.setattr(_tables, "Console", terminal)
    print_table(HEAD, ROWS, right=[1])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert sum(line.count("9") for line in lines) == 150


def test_shares() -> None:
    assert (share(1, 4), share(0, 3), share(1, 0)) == ("0.250", "0.000", "")
