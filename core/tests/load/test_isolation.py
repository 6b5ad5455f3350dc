"""``load(..., isolation=...)``: where an engine runs, and why."""

import sys
from pathlib import Path

import pytest
from polydraft import _isolation, load
from polydraft._isolation import Clash, Isolator, clash_with
from polydraft._plugins import PluginHost
from polydraft._registry.backends import KnownBackend
from polydraft._workers.backend import WorkerBackend, _plain, options_from_schema
from polydraft.contract import Backend, Capabilities, EngineOptions, hookimpl
from polydraft.errors import InvalidRequestError, UnsupportedError
from pydantic import ConfigDict, ValidationError
from worker_helpers import RECORD

pytestmark = pytest.mark.usefixtures("clean_environment")


class Options(EngineOptions):
    threads: int = 1


class Light(Backend):
    """It is not asked what would import its engine."""

    options = Options

    def capabilities(self):
        raise AssertionError("asked in this process")

    def diagnose(self):
        raise AssertionError("asked in this process")

    def load_engine(self, request):
        raise AssertionError("asked in this process")


@pytest.fixture
def host():
    class Plugin:
        @hookimpl
        def polydraft_backends(self):
            yield RECORD.model_copy(update={"factory": f"{__name__}:Light"})

    host = PluginHost({"scripted": Plugin()})
    host._instances["scripted"] = Light()
    return host


@pytest.fixture
def rule(monkeypatch, tmp_path):
    """A rule about the scripted backend's module ``first_engine`` and ``second_engine``."""

    def make(build=""):
        folder = tmp_path / "first_engine"
        (folder / "lib").mkdir(parents=True)
        (folder / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        found = Clash(modules=("first_engine", "second_engine"), build=build, reason="both abort", source="measured")
        known = KnownBackend(name="scripted", formats=frozenset(), modules=("first_engine",))
        other = KnownBackend(name="other", formats=frozenset(), modules=("second_engine",))
        monkeypatch.setattr(_isolation, "_clashes", lambda: (found,))
        monkeypatch.setattr(_isolation, "known_backends", lambda: (known, other))
        return folder

    return make


def test_auto_stays_in_this_process_where_nothing_clashes(host):
    isolator = Isolator(host, "auto")
    assert type(isolator.backend("scripted")) is Light
    assert "nothing that is loaded clashes" in isolator.reason("scripted")


def test_auto_takes_a_worker_where_a_loaded_module_clashes(host, rule, monkeypatch):
    rule()
    monkeypatch.setitem(sys.modules, "second_engine", None)
    isolator = Isolator(host, "auto")
    backend = isolator.backend("scripted")
    assert isinstance(backend, WorkerBackend)
    assert isolator.reason("scripted") == "second_engine is loaded here, and both abort."
    assert backend.options is Options
    assert isolator.backend("scripted") is backend, "decided once"
    assert type(Isolator(host, "none").backend("scripted")) is Light


def test_a_rule_holds_both_ways_and_for_its_builds_only(rule):
    folder = rule(build="lib/*cuda*")
    assert clash_with("scripted", ["second_engine"]) is None
    assert clash_with("other", ["first_engine"]) is None
    (folder / "lib" / "libggml-cuda.so").touch()
    assert clash_with("scripted", ["second_engine", "json"])[1] == "second_engine"
    assert clash_with("other", ["first_engine"])[1] == "first_engine"
    assert clash_with("scripted", ["json"]) is None


def test_the_registry_s_own_rules_name_modules_of_known_backends():
    known = {module for backend in _isolation.known_backends() for module in backend.modules}
    for rule in _isolation._clashes():
        assert known.issuperset(rule.modules)


def test_process_asks_nothing_of_an_engine_in_this_process(host):
    isolator = Isolator(host, "process")
    backend = isolator.backend("scripted")
    assert isinstance(backend, WorkerBackend)
    assert backend.python == Path(sys.executable)
    assert isolator.reason("scripted") == "`isolation='process'` was given."


def test_an_engine_of_another_environment_cannot_be_in_this_process(monkeypatch, host):
    there = WorkerBackend(RECORD, reason="The engine is installed in an environment of its own.")
    monkeypatch.setattr(host, "backend", lambda name: there)
    assert Isolator(host, "auto").backend("scripted") is there
    assert Isolator(host, "process").reason("scripted") == there.reason
    with pytest.raises(UnsupportedError, match="an environment of its own") as caught:
        Isolator(host, "none").backend("scripted")
    assert "`isolation='auto'`" in caught.value.hint
    assert RECORD.install_hint in caught.value.hint


def test_another_value_is_refused_before_anything_is_looked_for():
    with pytest.raises(InvalidRequestError, match="`isolation='thread'` is unknown") as caught:
        load("nowhere", isolation="thread")
    assert caught.value.argument == "isolation"


def test_options_of_a_schema_are_known_by_name():
    model = options_from_schema(Options.model_json_schema())
    assert model.model_validate({"threads": "many"}).threads == "many", "its value is checked in the worker"
    with pytest.raises(ValidationError, match="thread"):
        model.model_validate({"thread": 4})


def test_options_that_a_schema_does_not_name_are_given_to_a_worker_whose_backend_takes_them():
    """vLLM's engine arguments, by their own names; they were refused where vLLM is in another process."""

    class Open(Options):
        model_config = ConfigDict(extra="allow", frozen=True)

    given = {"threads": 4, "swap": "all", "copy": 3}  # a model has a method of the last one's name
    assert _plain(options_from_schema(Open.model_json_schema()).model_validate(given)) == given
    assert _plain(Open.model_validate(given)) == given


def test_a_worker_s_capabilities_lack_what_needs_logits_here():
    claims = Capabilities(drafter_kinds={"ngram"}, exposes_logits=True)
    found = WorkerBackend(RECORD, capabilities=claims).capabilities()
    assert not found.exposes_logits
    assert claims.sampling - found.sampling == {"logits_processor"}
