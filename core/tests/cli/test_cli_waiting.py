"""What is waited for: a line that changes on a terminal, lines now and then elsewhere, steps from the log."""

import io
import logging
import os
import pty
import time
from types import SimpleNamespace

import pytest
from polydraft._cli import waiting
from polydraft._cli.waiting import waiting_for, waiting_for_answer
from polydraft.contract import Chunk
from polydraft.text.text_only import TextOnlyTokenizer

progress = logging.getLogger("polydraft.progress")


@pytest.fixture
def terminal(monkeypatch):
    """Gives a function that makes standard error a terminal, and another that reads what was shown."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream, os.fdopen(leader, "rb", buffering=0) as reader:

        def shown():
            print("end", file=stream, flush=True)
            found = b""
            while not found.endswith(b"end\r\n"):
                found += reader.read(1000)
            return found.decode()

        yield lambda: monkeypatch.setattr("sys.stderr", stream), shown


def test_steps_and_seconds_on_a_terminal(terminal):
    begin, shown = terminal
    begin()
    with waiting_for("Loading it"):
        progress.info("Converting %s", "it")
        time.sleep(1.7)
        progress.info("Downloading it", extra={"shows_itself": True})
    text = shown()
    assert "Loading it ..." in text
    assert "Converting it ... 0:01" in text
    assert "Downloading" not in text
    assert text.endswith("\r\x1b[2Kend\r\n")
    assert progress.level == logging.NOTSET
    assert not progress.handlers


def test_the_line_fits_the_terminal(terminal):
    begin, shown = terminal
    begin()
    with waiting_for("x" * 200):
        pass
    assert "x" * 59 in (text := shown())
    assert "x" * 60 not in text


def test_a_line_now_and_then_elsewhere(monkeypatch):
    monkeypatch.setattr(waiting, "_LINE_EVERY", 0.2)
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    with waiting_for("Loading it") as shown:
        shown.step("Checking", lambda: 12.3)
        time.sleep(0.5)
    lines = stream.getvalue().splitlines()
    assert lines
    assert set(lines) == {"Checking ..., at most 12 s left"}


def test_what_a_pair_needs_stays(monkeypatch):
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    with waiting_for("Loading it"):
        logging.getLogger("polydraft.progress.memory").info("It needs %s", "2 GiB")
        progress.info("Converting it")
    assert stream.getvalue() == "It needs 2 GiB.\n"


def test_it_is_said_before_ten_seconds():
    assert waiting._LINE_EVERY < 10
    assert waiting._TICK < 2


def test_an_answer_ends_the_waiting(terminal):
    begin, shown = terminal
    begin()

    class View:
        on_terminal = True
        given = ()

        def chunk(self, chunk):
            self.given += (chunk.text,)

    view = View()
    with waiting_for_answer(view, SimpleNamespace(tokenizer=None)) as show:
        show(Chunk(token_ids=(1,), text="a", num_accepted_tokens=None))
        show(Chunk(token_ids=(1,), text="b", num_accepted_tokens=None))
    assert view.given == ("a", "b")
    assert shown().count("Reading the prompt") == 1


def test_no_line_comes_within_an_answer(monkeypatch):
    """Standard output and standard error may be one pipe, ``2>&1``."""
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    monkeypatch.setattr(waiting, "_LINE_EVERY", 0.01)
    view = SimpleNamespace(on_terminal=False, chunk=lambda chunk: said.write(chunk.text))

    def lines(count):
        while said.getvalue().count("\n") < count:
            time.sleep(0.01)

    with waiting_for_answer(view, SimpleNamespace(tokenizer=None)) as show:
        show(Chunk(token_ids=(1,), text="", thinking="hmm", num_accepted_tokens=None))
        lines(2)  # it still thinks
        for text in ("a", "", "b"):
            show(Chunk(token_ids=(1,), text=text, num_accepted_tokens=None))
            time.sleep(0.1)
    assert said.getvalue().endswith("\nab")


@pytest.mark.parametrize(("tokenizer", "step"), [(None, "3 tokens"), (TextOnlyTokenizer(), "3 characters")])
def test_what_is_counted_while_an_answer_is_waited_for(monkeypatch, tokenizer, step):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    steps = []
    monkeypatch.setattr(waiting.Waiting, "step", lambda self, what: steps.append(what))
    with waiting_for_answer(None, SimpleNamespace(tokenizer=tokenizer)) as show:
        show(Chunk(token_ids=(1, 2, 3), text="abc", num_accepted_tokens=None))
    assert steps == [step]
