"""A plugin that hangs, ends the app or is malformed costs only itself, as does any package with broken metadata."""

import itertools
import os
import time
import tomllib
import types
from pathlib import Path

import polydraft._plugins as plugins_module
import pytest
from polydraft._containment import plugin_errors
from polydraft._plugins import PluginHost
from polydraft._registry import describe
from polydraft._registry.describe import describe_backends
from polydraft._registry.versions import installed_version
from polydraft.contract import BackendRecord, Diagnosis, hookimpl
from polydraft.errors import PluginError

pytestmark = pytest.mark.usefixtures("clean_environment")

HANGS = 20


class Odd(BaseException):
    pass


def record(name="good", **fields):
    values = {
        "name": name,
        "factory": "fault_test_module:Good",
        "summary": "",
        "formats": {"safetensors"},
        "drafter_kinds": {"ngram"},
        "engine": "numpy",
        "install_hint": "pip install good",
    }
    return BackendRecord(**{**values, **fields})


def plugin(backends):
    return types.SimpleNamespace(polydraft_backends=hookimpl(backends))


def good():
    return plugin(lambda: [record()])


def raises(error):
    def function():
        raise error

    return function


def yields_then(error):
    def function():
        yield record("half")
        raise error

    return function


def hangs_in_generator():
    yield record("half")
    time.sleep(HANGS)


def asks_for_plugins():
    return list(host.backends())


BAD = {
    "hangs": (lambda: time.sleep(HANGS), "did not end within"),
    "hangs later": (hangs_in_generator, "did not end within"),
    "endless records": (lambda: itertools.repeat(record("again")), "more than 100 records"),
    "endless numbers": (lambda: itertools.count(1), "gives a int, not a BackendRecord"),
    "one record": (lambda: record("one"), "gives one BackendRecord, not a list"),
    "text": (lambda: "transformers", "gives a str"),
    "None inside": (lambda: [None], "gives a NoneType"),
    "SystemExit": (raises(SystemExit()), "SystemExit"),
    "KeyboardInterrupt": (raises(KeyboardInterrupt()), "KeyboardInterrupt"),
    "BaseException": (raises(Odd()), "Odd"),
    "BaseException later": (yields_then(Odd()), "Odd"),
    "constructed": (lambda: [BackendRecord.model_construct(name="x")], "invalid record"),
    "changed": (lambda: [record().model_copy(update={"requires": 5})], "invalid record"),
    "asks": (asks_for_plugins, "while they are being looked for"),
    "changes folder and fails": (lambda: [os.chdir("/"), 1], "gives a NoneType"),
}
host = None


@pytest.mark.parametrize("bad", BAD)
def test_a_faulty_hook_costs_only_its_plugin(bad, monkeypatch):
    global host  # noqa: PLW0603 - one of the hooks asks it
    monkeypatch.setattr(plugins_module, "_HOOKS_LIMIT", 2)
    monkeypatch.setattr("polydraft._discovery.hooks._MOST_RECORDS", 100)
    hook, said = BAD[bad]
    folder = Path.cwd()
    host = PluginHost({"bad": plugin(hook), "other": good()})
    assert list(host.backends()) == ["good"]
    status = {status.name: status for status in host.statuses()}
    assert (status["bad"].state, status["other"].state) == ("broken", "loaded")
    assert said in status["bad"].reason
    assert Path.cwd() == folder


@pytest.mark.parametrize(
    ("diagnose", "said"),
    [
        (lambda self: time.sleep(HANGS), "did not end within"),
        (lambda self: raises(SystemExit())(), "SystemExit"),
        (lambda self: raises(Odd())(), "Odd"),
        (lambda self: Diagnosis.model_construct(usable="perhaps"), "ValidationError"),
        (lambda self: None, "returned a NoneType"),
    ],
)
def test_a_faulty_diagnosis_costs_only_its_backend(diagnose, said, monkeypatch):
    import sys

    from polydraft.contract import Backend, Capabilities

    class Made(Backend):
        def capabilities(self):
            return Capabilities(drafter_kinds={"ngram"})

        def diagnose(self):
            return Diagnosis(usable=True)

        def load_engine(self, request):
            raise NotImplementedError

    module = types.ModuleType("fault_test_module")
    module.Good, module.Bad = Made, type("Bad", (Made,), {"diagnose": diagnose})
    monkeypatch.setitem(sys.modules, "fault_test_module", module)
    monkeypatch.setattr(describe, "SURVEY_LIMIT", 2)
    bad = plugin(lambda: [record("bad", factory="fault_test_module:Bad")])
    found = {one.state.record.name: one.state for one in describe_backends(PluginHost({"bad": bad, "good": good()}))}
    assert found["good"].usable
    assert not found["bad"].usable
    assert said in found["bad"].problem


# --- packages on disk ------------------------------------------------------------------------------------------------
CODE = """
from polydraft.contract import BackendRecord, LocalModelRecord, hookimpl

@hookimpl
def polydraft_backends():
    return [BackendRecord(name="{backend}", factory="a:B", summary="{module}", formats=["x"], drafter_kinds=["ngram"],
                          engine="numpy", install_hint="")]
"""


def package(folder, distribution, entry_points, metadata=None, **modules):
    """A package: its entry points as text or bytes; modules by name, each with the backend that it provides."""
    info = folder / f"{distribution.replace('-', '_')}-1.5.dist-info"
    info.mkdir()
    if metadata is None:
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n"
    if metadata:
        (info / "METADATA").write_bytes(metadata if isinstance(metadata, bytes) else metadata.encode())
    data = entry_points if isinstance(entry_points, bytes) else entry_points.encode()
    (info / "entry_points.txt").write_bytes(data)
    for name, backend in modules.items():
        (folder / f"{name}.py").write_text(CODE.format(backend=backend, module=name))


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    package(folder, "sound-plugin", "[polydraft]\nsound = sound_plugin_module\n", sound_plugin_module="sound")
    return folder


MALFORMED = {
    "garbage": b"\x00\xff\xfe\x80polydraft\n",
    "not UTF-8": "[polydraft]\nz\u00e4hler = x\n".encode("latin-1"),
    "no section": b"polydraft = x\n",
    "no value": b"[polydraft]\nlonely\n",
    "unclosed section": b"[polydraft\na = b\n",
    "two signs": b"[polydraft]\na = b = c\n",
    "empty name": b"[polydraft]\n = json\n",
    "another group is broken": b"[polydraft]\na = sound_plugin_module\n[console_scripts]\nbroken\n",
    "duplicated keys": b"[polydraft]\na = json\na = json\n",
    "a module that is not there": b"[polydraft]\na = no_such_module_at_all\n",
    "an attribute that is not there": b"[polydraft]\na = json:nothing\n",
    "empty": b"",
    "huge": b"[polydraft]\n" + b"x" * 100_000,
}


@pytest.mark.parametrize("metadata", [None, "", "Name\n\n", b"\xff\xfe\x00"], ids=["sound", "none", "bad", "binary"])
@pytest.mark.parametrize("malformed", MALFORMED)
def test_malformed_entry_points_hurt_nothing(site, malformed, metadata):
    package(site, "a-broken-one", MALFORMED[malformed], metadata)
    found = PluginHost()
    assert "sound" in found.backends()
    assert {status.name: status.state for status in found.statuses()}["sound"] == "loaded"
    for status in found.statuses():
        assert status.state == "loaded" or status.reason
    if malformed in ("no value", "another group is broken") and metadata is None:
        broken = {status.name: status for status in found.statuses()}["a-broken-one"]
        assert "entry_points.txt cannot be read" in broken.reason
    if malformed == "garbage" and metadata is None:
        assert any("a-broken-one 1.5 cannot be read" in note for note in found.notes())
    installed_version("a-broken-one")


@pytest.mark.parametrize("foreign", ["aaa-foreign", "polydraft-aaa"])
def test_a_foreign_package_does_not_take_our_names(site, foreign):
    """By the plugin's name and by the backend's; it is listed with the reason."""
    package(site, foreign, "[polydraft]\nvllm = foreign_one\naaa = foreign_two\n", foreign_one="x", foreign_two="vllm")
    package(site, "polydraft-vllm", "[polydraft]\nvllm = our_vllm_stand_in\n", our_vllm_stand_in="vllm")
    found = PluginHost()
    assert found.backends()["vllm"].summary == "our_vllm_stand_in"
    statuses = {(status.name, status.distribution): status for status in found.statuses()}
    assert statuses["vllm", "polydraft-vllm"].state == "loaded"
    assert "that of polydraft-vllm" in statuses["vllm", foreign].reason
    assert "already provided by the plugin 'vllm'" in statuses["aaa", foreign].reason


def test_of_two_copies_of_a_package_the_first_on_the_path_counts(site, tmp_path, monkeypatch):
    newer = tmp_path / "newer"
    newer.mkdir()
    package(newer, "sound-plugin", "[other]\na = b\n")
    assert "sound" in PluginHost().backends()
    monkeypatch.syspath_prepend(str(newer))
    assert "sound" not in PluginHost().backends()


@pytest.mark.parametrize(
    "code", ["import sys; sys.exit(3)", "raise KeyboardInterrupt", "import os; os.chdir('/'); print('hello')"]
)
def test_imports_that_do_harm(site, code):
    package(site, "harmful", "[polydraft]\nharmful = harmful_module\n")
    (site / "harmful_module.py").write_text(code)
    folder = Path.cwd()
    found = PluginHost()
    assert "sound" in found.backends()
    assert Path.cwd() == folder


def test_an_import_that_hangs(site, monkeypatch):
    monkeypatch.setattr(plugins_module, "_IMPORT_LIMIT", 2)
    package(site, "slow", "[polydraft]\nslow = slow_module\n")
    (site / "slow_module.py").write_text(f"import time; time.sleep({HANGS})")
    found = PluginHost()
    assert "sound" in found.backends()
    reasons = {status.name: status.reason for status in found.statuses()}
    assert "Its import did not end within 2 seconds" in reasons["slow"]


def test_our_distributions_are_known():
    root = Path(__file__).parents[3]
    files = [*root.glob("plugins/*/pyproject.toml"), root / "builtin_pairs/pyproject.toml"]
    declared = {tomllib.loads(file.read_text("utf-8"))["project"]["name"] for file in files}
    assert {table["distribution"] for table in plugins_module.core_table("plugin")} == declared


def test_a_backend_whose_capabilities_fail_is_passed_over():
    with pytest.raises(PluginError, match="'x' fails: SystemExit"), plugin_errors("x"):
        raise SystemExit
