"""Tables where there is little room, much room, and no terminal at all."""

import io
import os
import pty

import pytest
from polydraft._cli.render.tables import FittingTable
from polydraft._cli.streams import console_for
from polydraft._cli.waiting import waiting_for

NAME = "an-organization/a-model-with-a-long-name"


@pytest.fixture(autouse=True)
def no_width_of_a_terminal(monkeypatch):
    """Of the terminal that runs the tests."""
    monkeypatch.delenv("COLUMNS", raising=False)


def shown(width):
    stream = io.StringIO()
    console = console_for(stream)
    if width:
        console.width = width
    table = FittingTable("target", "drafter", "note")
    table.add_row(NAME, f"{NAME}-assistant", "several words that may be folded")
    table.add_row("short", "", "x")
    console.print(table)
    return stream.getvalue()


@pytest.mark.parametrize("width", [30, 60, 100, 120, 200, None])
def test_names_stay_whole_wherever_they_fit(width):
    text = shown(width)
    lines = [line.rstrip() for line in text.splitlines()]
    if width:
        assert max(map(len, lines)) <= width
    if not width or width >= 60:
        assert any(f"{NAME}-assistant" in line for line in lines)
    assert ("target" in lines[0]) == (not width or width >= 120), "a table where it fits, blocks elsewhere"


def test_without_a_terminal_no_line_is_folded():
    assert "several words that may be folded" in shown(None)


def test_a_block_has_a_line_for_each_cell_that_is_not_empty():
    assert shown(60).splitlines()[-2:] == ["short", "  note: x"]


def test_a_block_puts_as_many_cells_on_a_line_as_fit():
    table = FittingTable("target", "k", "kind", "note")
    table.add_row(NAME, "4", "mtp", "several words that may be folded")
    stream = io.StringIO()
    console = console_for(stream)
    console.width = 42
    console.print(table)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert lines == [NAME, "  k: 4   kind: mtp", "  note: several words that may be folded"]


@pytest.mark.parametrize("width", [40, 55, 62, 70, 100])
def test_a_table_is_as_wide_as_the_terminal_and_folds_no_command(width):
    table = FittingTable("engine", "state", "fix")
    table.add_row("transformers", "usable, with known faults", "`polydraft engines install it`")
    stream = io.StringIO()
    console = console_for(stream)
    console.width = width
    console.print(table)
    assert "`polydraft engines install it`" in stream.getvalue()
    assert max(map(len, stream.getvalue().splitlines())) <= width


@pytest.mark.parametrize("dumb", [False, True])
def test_what_is_waited_for_is_said_on_terminals_only(monkeypatch, dumb, capsys):
    with waiting_for("Loading it"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TERM", "dumb" if dumb else "xterm")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal, os.fdopen(leader, "rb", buffering=0) as reader:
        monkeypatch.setattr("sys.stderr", terminal)
        with waiting_for("Loading it"):
            pass
        print("end", file=terminal, flush=True)
        shown = b""
        while not shown.endswith(b"end\r\n"):  # a terminal gives what there is, piece by piece
            shown += reader.read(200)
    assert shown == (b"" if dumb else b"\r\x1b[2KLoading it ...\r\r\x1b[2K") + b"end\r\n"
