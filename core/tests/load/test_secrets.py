"""Secrets: whatever shows or stores a request, an option or an error does not show them."""

import copy
import logging
import pickle
import sys
import traceback

import pytest
from polydraft import load
from polydraft._cli.app import run
from polydraft._cli.commands.serve import shown
from polydraft._load import prepare
from polydraft._plugins import default_host
from polydraft._presentable import presentable
from polydraft.contract import HubOptions, ServerCommand
from polydraft.engine_parts.server_options import ServerOptions
from polydraft.errors import InvalidRequestError, NotVerifiedError, PolydraftError
from polydraft.secrets import Secret, names_a_secret, revealed
from polydraft.verification._subject import subject_of
from pydantic import BaseModel, ValidationError

CANARY = "canary-8f31"
BAD = {
    "empty": "",
    "a line end": f"a\n{CANARY}",
    "a carriage return": f"a\r{CANARY}",
    "a space": f"a {CANARY}",
    "NUL": f"a\0{CANARY}",
    "an umlaut": f"ä{CANARY}",
    "a surrogate": f"\udc80{CANARY}",
    "ESC": f"\x1b{CANARY}",
    "long": CANARY * 1000,
}


def everything_of(error):
    """All that an error may show: its chain's texts, reprs and tracebacks."""
    shown = "".join(traceback.format_exception(error))
    while error is not None:
        shown += f"{error!r}{error}{error.args}{vars(error)}"
        error = error.__cause__ or error.__context__
    return shown


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_text_that_no_header_can_hold(text, tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_bytes(text.encode(errors="surrogateescape"))
    makers = [lambda: Secret(text), lambda: Secret.from_file(file), lambda: ServerOptions(api_key=text)]
    makers += [lambda: ServerOptions(api_key_file=file).key(), lambda: HubOptions(token=text)]
    if text and "\0" not in text:
        monkeypatch.setenv("THE_KEY", text)
        makers.append(lambda: Secret.from_environment("THE_KEY"))
    for make in makers:
        with pytest.raises((InvalidRequestError, ValidationError)) as caught:
            make()
        assert CANARY not in everything_of(caught.value)


@pytest.mark.parametrize(
    "given",
    [[CANARY], {"a": CANARY}, CANARY.encode(), 5, object()],
    ids=lambda given: type(given).__name__,
)
def test_a_secret_is_a_text(given):
    with pytest.raises(ValidationError) as caught:
        ServerOptions(api_key=given)
    assert CANARY not in f"{caught.value}{caught.value!r}"


def test_where_a_secret_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRST", "\n")
    monkeypatch.setenv("SECOND", f"{CANARY}\r\n")
    found = Secret.from_environment("NONE", "FIRST", "SECOND")
    assert (found.reveal(), found.shell) == (CANARY, "$SECOND")
    assert Secret.from_environment("NONE", "FIRST") is None
    file = tmp_path / "the key"
    file.write_text(f"{CANARY}\n")
    assert Secret.from_file(file) == found
    assert Secret.from_file(file).shell == f"$(cat '{file}')"
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        Secret.from_file(tmp_path / "none")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        Secret.from_file(tmp_path)
    with pytest.raises(ValidationError, match="exclude one another"):
        ServerOptions(api_key=CANARY, api_key_file=file)


def test_nothing_shows_it():
    secret = Secret(CANARY)

    class Holder(BaseModel):
        key: Secret

    holder = Holder(key=CANARY)
    assert holder.key == secret
    options, hub = ServerOptions(api_key=CANARY), HubOptions(token=CANARY)
    command = ServerCommand(arguments=("server",), environment={"A": "b", "KEY": secret})
    shown = f"{secret}{secret!r}{secret:>20}%s" % secret
    for model in (holder, options, hub, command):
        shown += f"{model}{model!r}{model.model_dump()}{model.model_dump_json()}{model.model_json_schema()}"
        assert copy.deepcopy(model) == model
    assert CANARY not in shown
    assert "api_key" not in options.model_dump()
    assert (hub.arguments()["token"], hub.token) == (CANARY, secret)
    assert revealed(command.environment) == {"A": "b", "KEY": CANARY}
    assert secret != Secret("other")
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(options)


def test_names_of_secrets():
    secrets = ["api_key", "API-KEY", "--api-key", "hf_token", "--hf-token", "token", "key", "aws_secret_access_key"]
    others = ["api_key_file", "max_num_batched_tokens", "type_k", "key_cache", "tokenizer", "monkey"]
    assert [name for name in secrets + others if names_a_secret(name)] == secrets


@pytest.fixture
def served(monkeypatch, tmp_path):
    """The reference backend, with the options of a server and a server command."""
    reference = pytest.importorskip("polydraft_reference.backend", reason="needs an engine: polydraft-reference")
    backend = reference.ReferenceBackend
    fields = {"key_variables": ("THE_KEY",), "__module__": __name__}
    monkeypatch.setattr(backend, "options", type("ServedOptions", (ServerOptions, backend.options), fields))

    def server_command(self, request, *, host, port):
        key = request.engine_options.key()
        return ServerCommand(arguments=(sys.executable, "-c", ""), environment={"SERVER_KEY": key} if key else {})

    monkeypatch.setattr(backend, "server_command", server_command)
    monkeypatch.setattr("polydraft.verification._store.folder", lambda: tmp_path / "verified")
    return {"target": "builtin:toy", "backend": "reference"}


def test_python_doors(served, caplog):
    caplog.set_level(logging.DEBUG)
    given = {**served, "drafter": "ngram", "token": CANARY, "engine_options": {"api_key": CANARY}}
    prepared = prepare(**given)
    request = prepared.request
    assert request.engine_options.key() == Secret(CANARY)
    shown = f"{prepared}{request!r}{request.model_dump()}{request.model_dump_json()}"
    with pytest.raises(NotVerifiedError) as caught:
        load(**given, verified="require")
    assert "polydraft verify" in caught.value.hint
    assert "(with the API key in the environment variable THE_KEY)" in caught.value.hint
    shown += everything_of(caught.value)
    with load(**given) as session:
        shown += f"{session!r}{session.running!r}{session.generate([2, 3], max_new_tokens=2)!r}"
    # What is stored of a verification, and what it is found by: the key is no part of it.
    subject = subject_of(prepared, default_host())
    shown += f"{subject!r}{subject.model_dump_json()}{caplog.text}"
    assert CANARY not in shown
    assert subject == subject_of(prepare(**{**given, "engine_options": {"api_key": "another"}}), default_host())


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine_options": {"api_key": f"a {CANARY}"}},
        {"engine_options": {"api_key": [CANARY]}},
        {"engine_options": {"hf_token": CANARY}},
        {"engine_options": {"nonsense": CANARY}},
        {"engine_options": [("api_key", CANARY)]},
        {"engine_options": f"api_key={CANARY}"},
        {"engine_options": {"url": f"http://user:{CANARY}@host"}},
        {"engine_options": {"url": f"http://host/?api_key={CANARY}"}},
        {"engine_options": {"url": f"http://user:{CANARY}/@host"}},
        {"engine_options": {"read_timeout": CANARY}},
        {"token": f"hf\n{CANARY}"},
        {"token": [CANARY]},
        {"target": f"https://user:{CANARY}@host/org/model"},
        {"drafter": f"https://user:{CANARY}@host/org/model"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_errors_of_python_doors(served, wrong, caplog):
    caplog.set_level(logging.DEBUG)
    for door in (load, prepare):
        with pytest.raises(PolydraftError) as caught:
            door(**{**served, **wrong})
        assert CANARY not in everything_of(caught.value) + caplog.text


@pytest.mark.parametrize("option", ["api_key={}", "api-key={}", "API_KEY={}", "hf_token={}", "api_key {}", "token:{}"])
def test_the_command_line_does_not_take_secrets(served, option, capfd):
    for command in (["generate", "-p", "x"], ["verify"], ["serve", "--own-server", "--print"]):
        line = [*command, "-m", "builtin:toy", "-b", "reference", "--engine-option", option.format(CANARY)]
        assert run([*line, "--debug"]) == 2
        out, err = capfd.readouterr()
        assert CANARY not in out + err
        assert "other users can read command lines" in err
        assert "Set the environment variable THE_KEY, or give api_key_file=FILE." in err


def test_serve_prints_where_the_key_is(served, tmp_path, monkeypatch):
    def line(**options):
        prepared = prepare(**served, engine_options=options)
        return shown(prepared.backend.server_command(prepared.request, host="127.0.0.1", port=1))

    assert line().startswith(sys.executable)
    monkeypatch.setenv("THE_KEY", CANARY)
    assert line().startswith('SERVER_KEY="$THE_KEY" ')
    file = tmp_path / "key"
    file.write_text(f"{CANARY}\n")
    assert line(api_key_file=file).startswith(f'SERVER_KEY="$(cat {file})" ')
    monkeypatch.setenv("SERVER_KEY", CANARY)
    monkeypatch.setattr(type(prepare(**served).request.engine_options), "key_variables", ("SERVER_KEY",))
    assert line().startswith(sys.executable)  # which inherits it


def test_a_token_for_the_hub_that_no_header_can_hold(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: f"hf ä{CANARY}")
    with pytest.raises(InvalidRequestError, match="HF_TOKEN") as caught:
        load("org/model", cache_dir=tmp_path)
    assert CANARY not in everything_of(caught.value)


def test_names_do_not_control_a_terminal():
    name = "a\x1b[31m\x1b]52;c;eA==\x07\r\b\x9b2J\u202e\u2066\0z"
    error = PolydraftError(f"There is no {name}.", f"See {name}.")
    for text in (presentable(name), str(error), repr(error), error.message, error.hint):
        assert text.isprintable()
        assert "\\x1b[31m" in text
    assert presentable("a\tb\nc äß 日本 e\u0301") == "a\tb\nc äß 日本 e\u0301"
