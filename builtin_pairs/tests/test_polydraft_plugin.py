"""The entry point: every folder is a local model, every pair is in the registry. Needs polydraft."""

from __future__ import annotations

from pathlib import Path

import polydraft_builtin_pairs as builtin
import pytest

pytest.importorskip("polydraft", reason="the plugin is tested with polydraft")

from polydraft._plugins import PluginHost
from polydraft_builtin_pairs import plugin


def test_the_plugin_loads_and_names_everything() -> None:
    host = PluginHost({"builtin-pairs": plugin})
    assert [status.state for status in host.statuses()] == ["loaded"]
    models = host.local_models()
    assert set(models) == set(builtin.names())
    assert all((Path(model.path) / "config.json").is_file() for model in models.values())


def test_pairs_are_of_the_kind_that_their_drafter_is() -> None:
    found = {record.target: record for _, record in PluginHost({"builtin-pairs": plugin}).pairs()}
    assert set(found) == {f"builtin:{name}" for name in builtin.pairs()}
    for target, record in found.items():
        assert record.drafter == f"builtin:{builtin.pairs()[target.removeprefix('builtin:')]}"
        assert (record.kind == "mtp") == record.drafter.endswith("-assistant")
