"""What the command line shows of backends and pairs."""

import pytest
from polydraft._plugins import PluginHost
from polydraft._registry.describe import describe_backends, describe_pairs, plugins_without_backend
from polydraft.contract import hookimpl

pytestmark = pytest.mark.usefixtures("clean_environment")


class Plugin:
    @hookimpl
    def polydraft_backends(self):
        from polydraft.contract import BackendRecord

        yield BackendRecord(
            name="one",
            factory="no_such_module:X",
            summary="One.",
            formats={"safetensors"},
            drafter_kinds={"mtp", "ngram"},
            engine="transformers",
            install_hint="pip install one",
        )


class Broken:
    @hookimpl
    def polydraft_backends(self):
        raise ValueError("x")


@pytest.fixture
def host():
    return PluginHost({"one-plugin": Plugin, "broken": Broken})


def test_backends(host):
    (found,) = describe_backends(host, lookup={"transformers": "5.23.0"}.get)
    assert found.state.record.name == "one"
    assert not found.state.usable
    assert "no_such_module" in found.state.problem
    assert found.state.remedy == "Install it again: pip install one"
    assert found.plugin.name == "one-plugin"
    assert [(fault.id, version) for fault, version in found.state.faults] == [
        ("transformers-5-23-0-gemma4-assistant", "5.23.0")
    ]
    assert [status.name for status in plugins_without_backend(host)] == ["broken"]


def test_pairs(host):
    (first, *_) = describe_pairs(host, target="google/gemma-4-E2B-it", lookup={"transformers": "5.23.0"}.get)
    assert first.entry.pair.drafter == "google/gemma-4-E2B-it-assistant"
    assert first.backends == ("one",)
    assert first.num_speculative_tokens == {"*": 2, "one": 2}
    assert [fault.id for fault in first.faults] == ["transformers-5-23-0-gemma4-assistant"]
    everything = describe_pairs(host, lookup=lambda name: None)
    assert len(everything) > 70
    assert all(not description.faults for description in everything)


@pytest.mark.parametrize("module", ["polydraft", "polydraft._registry.pairs", "polydraft._registry.tables"])
def test_examples_in_docstrings(module):
    import doctest
    import importlib

    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


def test_installed_plugins():
    """Whatever is installed here: nothing raises."""
    assert isinstance(describe_backends(), list)
    assert describe_pairs()
    assert isinstance(plugins_without_backend(), list)
