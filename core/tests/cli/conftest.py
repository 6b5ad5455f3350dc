"""A fake session in place of ``polydraft.load``, and a way to run command lines in this process and in another."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polydraft
import pytest
from polydraft._cli import comparison, streams
from polydraft._cli.app import run
from polydraft.contract import Capabilities

sys.path.insert(0, str(Path(__file__).parent))

from fake_session import FakeSession


@dataclass
class Fake:
    """What ``load`` gives, and what it was asked for."""

    session: FakeSession = field(default_factory=FakeSession)
    calls: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    error: Exception | None = None
    capabilities: Capabilities = field(
        default_factory=lambda: Capabilities(drafter_kinds=frozenset({"mtp"}), seed_identical=True)
    )

    def load(self, target: Any, **options: Any) -> FakeSession:
        self.calls.append((target, options))
        if self.error is not None:
            raise self.error
        return self.session


@pytest.fixture
def fake(monkeypatch):
    made = Fake()
    monkeypatch.setattr(polydraft, "load", made.load)
    monkeypatch.setattr(comparison, "capabilities_of", lambda session: made.capabilities)
    return made


@dataclass
class Ran:
    """A finished command line."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capfd, monkeypatch):
    """Runs a command line here. The command keeps descriptor 1 to itself, so it is put back afterwards."""
    monkeypatch.setenv("COLUMNS", "200")
    for variable in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(variable, raising=False)

    def go(*arguments: str) -> Ran:
        saved, stdout = os.dup(1), sys.stdout
        streams.claim_output.cache_clear()
        try:
            code = run(arguments)
            if streams.claim_output.cache_info().currsize:
                streams.claim_output().close()
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            sys.stdout = stdout
            streams.claim_output.cache_clear()
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return go


@pytest.fixture
def process():
    """Runs a command line in another process, over the fake session, with ``setup`` executed before."""

    def go(*arguments: str, setup: str = "", stdin: str | None = None, **options: Any) -> subprocess.CompletedProcess:
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            # Where the tests run in the background, they were started with Ctrl-C ignored.
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "import os, polydraft\nfrom fake_session import *\n"
            "session = FakeSession()\n"
            "polydraft.load = lambda target, **options: session\n"
            f"{setup}\n"
            f"sys.argv = ['polydraft', *{list(arguments)!r}]\n"
            "from polydraft._cli.app import main\nmain()\n"
        )
        given = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **given,
            **options,
        )

    return go
