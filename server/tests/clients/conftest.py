"""Clients that people use, against a real server. `nox -s clients` installs them all."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from asked import CHAT, SHAPE, WAIT
from scripted import Script


@pytest.fixture
def caller(scripted):
    """A server whose model says a word, then calls a tool."""
    with scripted(Script(text=WAIT)) as server:
        yield server


@pytest.fixture(scope="module")
def story(toy):
    """What the Python API answers to ``CHAT``, with at most 30 tokens."""
    return toy[1].generate(CHAT, max_new_tokens=30)


@pytest.fixture(scope="module")
def shaping(toy):
    """A server that forces answers into a JSON schema."""
    server, _ = toy
    schema = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": SHAPE}}
    answer = server.chat(response_format=schema, max_tokens=60)
    if answer.status == 400 and answer.error["code"] == "unsupported":
        pytest.skip(f"the server has no structured output: {answer.error['message']}")
    return server
