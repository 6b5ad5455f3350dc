"""``polydraft engines``, with a stand-in for uv and nothing started in its environments."""

import json
import os
import sys
from pathlib import Path

import pytest
from polydraft._environments import listing, plan, sources
from polydraft._plugins import PluginHost

sys.path.insert(0, str(Path(__file__).parents[1] / "environments"))  # for ``stand_ins``

from stand_ins import FakeUv, be_quick

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a first line")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder, and a machine with the stand-in."""
    FakeUv(tmp_path)
    be_quick(monkeypatch.setattr)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("UV_INDEX", "none")
    monkeypatch.setenv("POLYDRAFT_DATA_DIR", str(tmp_path / "data"))
    source = sources.Source(kind="clone", folder=Path(__file__).parents[3], editable=True)
    monkeypatch.setattr(plan, "own_source", lambda engine: source)
    monkeypatch.setattr(listing, "default_host", lambda: PluginHost({}, environments=True))
    return tmp_path / "data"


def test_one_engine_through_all_commands(data, command):
    ran = command("engines", "list", "--json")
    listed = {one["name"]: one for one in json.loads(ran.out)["engines"]}
    assert listed["reference"]["state"] == "not installed"
    assert "polydraft engines install reference" in command("engines").out
    ran = command("engines", "install", "vlm")
    assert (ran.code, ran.out) == (2, "")
    assert "Did you mean 'vllm'?" in ran.err
    assert command("engines", "install", "reference", "--accelerator", "gpu").code == 2
    ran = command("engines", "install", "reference")
    assert ran.code == 0, ran.err
    assert "decoded builtin:toy on cpu with speculation and plainly to the same 2 tokens" in ran.out
    assert "up to date" in command("engines", "update").out
    ran = command("engines", "path", "reference", "--json")
    assert json.loads(ran.out)["folder"] == str(data / "engines/reference/builds/1")
    assert json.loads(command("engines", "remove", "reference", "--json").out) == {"name": "reference", "removed": True}
    assert "not installed" in command("engines", "remove", "reference").out
    assert command("engines", "update", "reference").code == 1


def test_an_update_that_fails_keeps_no_other_from_being_made(data, command):
    assert command("engines", "install", "reference").code == 0
    for name in ("another", "broken"):
        folder = data / "engines" / name
        folder.mkdir()
        (folder / "state.json").write_text("{")
    ran = command("engines", "update", "--json")
    assert [one["name"] for one in json.loads(ran.out)["engines"]] == ["reference"]
    assert ran.code == 2
    assert "'another'" in ran.err
    assert "'broken'" in ran.err
