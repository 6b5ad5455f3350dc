"""Log records that cross the pipe: what a library keeps silent without handlers stays so in the app."""

import logging

import pytest
from polydraft._workers.logs import forward_logs, replay_log


@pytest.fixture
def forwarded():
    """The lines of records that reach the root logger."""
    root, lines = logging.getLogger(), []
    before = list(root.handlers)
    forward_logs(lines.append)
    yield lines
    root.handlers[:] = before


@pytest.fixture
def no_handlers(monkeypatch):
    """An app that has set up no logging; pytest has."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


@pytest.mark.parametrize(
    ("name", "printed"), [("quiet_engine.part", False), ("plain_engine", True)], ids=["NullHandler", "none"]
)
def test_a_library_that_keeps_silent_does_so_in_the_app(name, printed, forwarded, monkeypatch, no_handlers, capsys):
    forward_logs(forwarded.append)
    logging.getLogger("quiet_engine").addHandler(logging.NullHandler())
    logging.getLogger(name).warning("the cache is padded")
    (line,) = forwarded
    # The app has the same loggers, without the engine's handlers.
    monkeypatch.setattr(logging.getLogger("quiet_engine"), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    replay_log(line)
    assert ("the cache is padded" in capsys.readouterr().err) == printed


def test_an_app_with_a_handler_gets_all(forwarded, caplog):
    logging.getLogger("quiet_engine").addHandler(logging.NullHandler())
    logging.getLogger("quiet_engine").warning("the cache is padded")
    caplog.clear()
    replay_log(forwarded[-1])
    assert [record.message for record in caplog.records] == ["the cache is padded"]
