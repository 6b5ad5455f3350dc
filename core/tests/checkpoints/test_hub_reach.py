"""A Hub that cannot be reached is told at once, and once; what is in the cache loads."""

import logging
import socket
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from polydraft.checkpoints import _reach
from polydraft.checkpoints._hub import hub_errors
from polydraft.checkpoints._names import KnownNames
from polydraft.checkpoints._resolve import resolve
from polydraft.checkpoints.fetch import fetch
from polydraft.contract.requests import HubOptions
from polydraft.errors import ModelNotFoundError


@pytest.fixture
def endpoint(fake_hub, monkeypatch):
    """Sends all requests of ``huggingface_hub`` elsewhere."""
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    def become(url):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)

    return become


@pytest.fixture
def silent_port():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def told(work):
    """The error and the seconds until it was raised."""
    began = time.monotonic()
    with pytest.raises(ModelNotFoundError, match="the Hub cannot be reached") as error:
        work()
    assert "HF_ENDPOINT" in error.value.hint
    return time.monotonic() - began


def test_a_closed_port_is_told_at_once(endpoint, caplog):
    endpoint("http://127.0.0.1:9")
    assert told(lambda: resolve("org/m", known=KnownNames())) < 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_silence_is_told_in_time_and_once(endpoint, silent_port, monkeypatch):
    monkeypatch.setattr(_reach, "_LIMIT", 0.5)
    endpoint(f"http://127.0.0.1:{silent_port}")
    assert told(lambda: resolve("org/m", known=KnownNames())) < 3
    monkeypatch.setattr(_reach, "_LIMIT", 60)  # the second request does not ask again
    assert told(lambda: resolve("org/other", known=KnownNames())) < 3


def test_a_silent_name_server_is_told_in_time(endpoint, monkeypatch):
    monkeypatch.setattr(_reach, "_LIMIT", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(20))
    endpoint("http://hub.example")
    assert told(lambda: resolve("org/m", known=KnownNames())) < 3


def test_a_proxy_that_cannot_reach_it_is_told_at_once(endpoint):
    class Proxy(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(503)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        endpoint(f"http://127.0.0.1:{server.server_port}")
        assert told(lambda: resolve("org/m", known=KnownNames())) < 3
        server.shutdown()


def test_what_is_in_the_cache_loads(fake_hub, endpoint, make_model):
    weights = (make_model("m", {}) / "model.safetensors").read_bytes()
    fake_hub.add("org/m", {"config.json": {"model_type": "llama"}, "model.safetensors": weights})
    fetch(resolve("org/m", known=KnownNames()))
    endpoint("http://127.0.0.1:9")
    began = time.monotonic()
    assert (fetch(resolve("org/m", known=KnownNames())) / "model.safetensors").is_file()
    assert time.monotonic() - began < 3


def test_a_connection_that_is_lost_later_counts(fake_hub, endpoint):
    fake_hub.add("org/m", {"config.json": {}})
    with pytest.raises(ModelNotFoundError, match="cannot be reached"), hub_errors("org/m", HubOptions()):
        raise ConnectionResetError
    assert told(lambda: resolve("org/m", known=KnownNames())) < 3


def test_retries_are_told_to_the_log_only(fake_hub, caplog):
    logger = logging.getLogger("huggingface_hub.utils._http")
    with caplog.at_level(logging.INFO, logger="polydraft.load"), hub_errors("org/m", HubOptions()):
        logger.warning("'timed out' thrown while requesting HEAD https://huggingface.co/x")
        logger.warning("Retrying in 1s [Retry 1/5].")
        logger.warning("Something else.")
    assert [(record.name, record.levelno) for record in caplog.records if "Hub: " in record.message] == [
        ("polydraft.load", logging.INFO)
    ] * 2
    assert "Something else." in caplog.text


def test_an_id_in_the_wrong_case(endpoint):
    endpoint("http://127.0.0.1:9")
    known = KnownNames(formats={"google/gemma-4-E4B-it": "safetensors"})
    with pytest.raises(ModelNotFoundError, match=r"Did you mean 'google/gemma-4-E4B-it'\?"):
        resolve("Google/gemma-4-e4b-it", known=known)
