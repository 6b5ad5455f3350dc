"""Plugins are found, checked one by one, and a broken one hurts nothing."""

import subprocess
import sys
import textwrap
import types
import warnings

import pytest
from polydraft._plugins import PluginHost
from polydraft.contract import (
    Backend,
    BackendRecord,
    Capabilities,
    Diagnosis,
    FaultRecord,
    LocalModelRecord,
    PairRecord,
    hookimpl,
)
from polydraft.errors import BackendNotFoundError, PluginError

pytestmark = pytest.mark.usefixtures("clean_environment")


class GoodBackend(Backend):
    def capabilities(self):
        return Capabilities(drafter_kinds={"ngram"})

    def diagnose(self):
        return Diagnosis(usable=True)

    def load_engine(self, request):
        raise NotImplementedError


class NotABackend:
    pass


class FailingBackend(GoodBackend):
    def __init__(self):
        raise OSError("libfoo.so is missing")


def record(name="good", factory="plugin_test_module:GoodBackend", **fields):
    return BackendRecord(
        **{
            "name": name,
            "factory": factory,
            "summary": "",
            "formats": {"safetensors"},
            "drafter_kinds": {"ngram"},
            "engine": "numpy",
            "install_hint": f"pip install {name}",
            **fields,
        }
    )


@pytest.fixture(autouse=True)
def factory_module(monkeypatch):
    module = types.ModuleType("plugin_test_module")
    module.GoodBackend, module.NotABackend, module.FailingBackend = GoodBackend, NotABackend, FailingBackend
    monkeypatch.setitem(sys.modules, "plugin_test_module", module)


def plugin(*, backends=None, pairs=None, faults=None, local_models=None):
    """A plugin object whose hooks call the given functions."""
    functions = {
        "polydraft_backends": backends,
        "polydraft_pairs": pairs,
        "polydraft_faults": faults,
        "polydraft_local_models": local_models,
    }
    made = types.SimpleNamespace()
    for name, function in functions.items():
        if function is not None:
            setattr(made, name, hookimpl(function))
    return made


def good(name="good"):
    return plugin(backends=lambda: [record(name)])


def broken(host, name):
    status = {status.name: status for status in host.statuses()}[name]
    assert status.state == "broken", status
    assert status.reason
    return status.reason


# --- good plugins ----------------------------------------------------------------------------------------------------
def test_records_of_all_hooks():
    everything = plugin(
        backends=lambda: [record()],
        pairs=lambda: iter([PairRecord(target="a/b", drafter="a/c", kind="draft-model")]),
        faults=lambda: [
            FaultRecord(
                id="x", distribution="d", versions="==1", affects="all", severity="warn", summary="s", remedy="r"
            )
        ],
        local_models=lambda: (LocalModelRecord(name="m", path="/m"),),
    )
    host = PluginHost({"everything": everything})
    assert list(host.backends()) == ["good"]
    assert [(name, pair.target) for name, pair in host.pairs()] == [("everything", "a/b")]
    assert [fault.id for fault in host.faults()] == ["x"]
    assert host.local_models()["m"].path == "/m"
    assert [(s.name, s.state, s.backends) for s in host.statuses()] == [("everything", "loaded", ("good",))]
    assert isinstance(host.backend("good"), GoodBackend)
    assert host.backend("good") is host.backend("good")


def test_a_plugin_may_be_a_class():
    class Plugin:
        @hookimpl
        def polydraft_backends(self):
            yield record()

    assert list(PluginHost({"p": Plugin}).backends()) == ["good"]


def test_a_plugin_without_hooks_is_no_fault():
    assert PluginHost({"p": types.ModuleType("empty")}).statuses()[0].state == "loaded"


def test_backends_are_not_imported_before_they_are_used():
    host = PluginHost({"p": plugin(backends=lambda: [record(factory="no_such_module:Backend")])})
    assert list(host.backends()) == ["good"]
    with pytest.raises(PluginError, match="no_such_module") as error:
        host.backend("good")
    assert error.value.hint == "Install it again: pip install good"


# --- broken plugins --------------------------------------------------------------------------------------------------
def nothing():
    return []


def with_argument(extra):
    return [extra]


def raises(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (plugin(backends=raises(RuntimeError("boom\nsecond line"))), "polydraft_backends fails: RuntimeError: boom."),
        (plugin(pairs=raises(SystemExit(3))), "polydraft_pairs fails: SystemExit"),
        (plugin(backends=lambda: [record("Not A Name")]), "BackendRecord.name"),
        (plugin(backends=lambda: [record(surprise=1)]), "surprise: Extra inputs"),
        (plugin(backends=lambda: [{"name": "good"}]), "gives a dict, not a BackendRecord"),
        (plugin(backends=lambda: [PairRecord(target="a", drafter=None, kind="ngram")]), "gives a PairRecord"),
        (plugin(backends=lambda: 3), "not iterable"),
        (plugin(backends=lambda: [record(requires={"numpy": "2.0"})]), "Invalid specifier"),
        (plugin(pairs=lambda: [PairRecord(target="{a,b}{c,d}", drafter=None, kind="ngram")]), r"one \{A,B\} group"),
        (
            plugin(
                pairs=lambda: [PairRecord(target="a", drafter=None, kind="ngram", num_speculative_tokens={"*": -1})]
            ),
            "recommends -1 tokens",
        ),
        (plugin(backends=lambda: [record(contract_version=2)]), "update polydraft"),
        (plugin(backends=lambda: [record(contract_version=0)]), "update the plugin"),
        (plugin(backends=lambda: [record(), record()]), "provides the backend 'good' twice"),
        (types.SimpleNamespace(polydraft_backend=hookimpl(nothing)), "unknown hook, 'polydraft_backend'"),
        (types.SimpleNamespace(polydraft_backends=hookimpl(with_argument)), "cannot be registered"),
    ],
)
def test_broken_plugins_are_listed_and_hurt_nothing(bad, said):
    import re

    host = PluginHost({"bad": bad, "other": good("other")})
    assert re.search(said, broken(host, "bad"))
    assert list(host.backends()) == ["other"]
    assert host.pairs() == []
    assert host.backend("other")


def test_an_optional_hook_of_another_version_is_no_fault():
    later = types.SimpleNamespace(polydraft_of_tomorrow=hookimpl(optionalhook=True)(nothing))
    assert PluginHost({"p": later}).statuses()[0].state == "loaded"


def test_a_plugin_class_that_cannot_be_made():
    class Plugin:
        def __init__(self):
            raise ValueError("no")

    assert "ValueError: no" in broken(PluginHost({"p": Plugin}), "p")


def test_duplicate_backend_name():
    host = PluginHost({"first": good(), "second": good()})
    assert "already provided by the plugin 'first'" in broken(host, "second")
    assert list(host.backends()) == ["good"]


def test_duplicate_local_model():
    def models():
        return [LocalModelRecord(name="m", path="/1")]

    host = PluginHost({"first": plugin(local_models=models), "second": plugin(local_models=models)})
    assert "local model 'm'" in broken(host, "second")
    assert len(host.local_models()) == 1


def test_nothing_of_a_broken_plugin_is_used():
    half = plugin(backends=lambda: [record()], pairs=raises(ValueError("x")))
    host = PluginHost({"half": half})
    assert host.backends() == {}
    with pytest.raises(BackendNotFoundError, match="no backend 'good'") as error:
        host.backend("good")
    assert "half (polydraft_pairs fails" in error.value.hint


def test_a_backend_that_is_known_is_not_installed_and_another_one_is_unknown():
    for name, said in (("vllm", "The backend vllm is not installed."), ("vlm", "There is no backend 'vlm'.")):
        with pytest.raises(BackendNotFoundError) as error:
            PluginHost({}).backend(name)
        assert error.value.message == said


def test_backend_of_a_broken_plugin():
    host = PluginHost({"p": plugin(backends=lambda: [record("x", contract_version=9)])})
    for name in ("x", "p"):
        with pytest.raises(PluginError, match="update polydraft") as error:
            host.backend(name)
        assert "Update or uninstall" in error.value.hint


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("plugin_test_module:Missing", "has no attribute"),
        ("plugin_test_module:NotABackend", "is not a Backend"),
        ("plugin_test_module:FailingBackend", r"libfoo\.so is missing"),
    ],
)
def test_factories_that_do_not_work(factory, said):
    host = PluginHost({"p": plugin(backends=lambda: [record(factory=factory)])})
    with pytest.raises(PluginError, match=said):
        host.backend("good")


# --- names that are not there ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("goood", "Did you mean 'good'?"),
        ("transformers", "polydraft engines install transformers"),
        ("hf", "polydraft engines install transformers"),
        ("transformer", "Did you mean 'transformers'?"),
        ("llama.cpp", "polydraft engines install llama_cpp"),
        ("ollama", "polydraft engines install ollama"),
        ("litert", "polydraft engines install litert_lm"),
        ("zzzz", "Installed are: good."),
    ],
)
def test_unknown_backend(name, hint):
    with pytest.raises(BackendNotFoundError) as error:
        PluginHost({"p": good()}).backend(name)
    assert hint in error.value.hint


def test_no_plugins_at_all():
    host = PluginHost({})
    assert host.backends() == {}
    with pytest.raises(BackendNotFoundError) as error:
        host.backend("zzzz")
    assert "polydraft engines install transformers" in error.value.hint


# --- switches --------------------------------------------------------------------------------------------------------
def test_disabled_by_variable_and_by_argument():
    plugins = {"one": good("a"), "two": good("b"), "three_x": good("c")}
    host = PluginHost(plugins, environ={"POLYDRAFT_DISABLE_PLUGINS": " one , Three-X,, "}, disabled=["two"])
    assert host.backends() == {}
    assert {status.state for status in host.statuses()} == {"disabled"}
    assert host.notes() == []
    with pytest.raises(BackendNotFoundError, match="disabled") as error:
        host.backend("one")
    assert "POLYDRAFT_DISABLE_PLUGINS" in error.value.hint


def test_several_threads_discover_once():
    import threading
    import time

    calls = []

    def slow():
        calls.append(1)
        time.sleep(0.05)
        return [record()]

    host = PluginHost({"p": plugin(backends=slow)})
    threads = [threading.Thread(target=host.backend, args=("good",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == len(host.statuses()) == 1


def test_disabled_plugins_are_not_touched():
    class Untouchable:
        def __init__(self):
            raise AssertionError

    assert PluginHost({"p": Untouchable}, disabled=["p"]).statuses()[0].state == "disabled"


def test_disabling_what_is_not_there_is_told():
    host = PluginHost({"p": good()}, environ={"POLYDRAFT_DISABLE_PLUGINS": "pp"})
    assert host.notes() == ["POLYDRAFT_DISABLE_PLUGINS names 'pp', but no plugin has that name."]
    assert list(host.backends()) == ["good"]


def test_a_misspelt_name_of_a_plugin_is_a_warning():
    with pytest.warns(UserWarning, match="names 'transfomers', but no plugin has that name"):
        PluginHost(environ={"POLYDRAFT_DISABLE_PLUGINS": "transfomers"}).backends()
    with warnings.catch_warnings(action="error"):  # polydraft's own, whether they are installed or not
        PluginHost(environ={"POLYDRAFT_DISABLE_PLUGINS": "vllm, polydraft_mlx, litert-lm"}).backends()


# --- installed ones --------------------------------------------------------------------------------------------------
def install(folder, distribution, entry_points, **modules):
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(code))
    info = folder / f"{distribution.replace('-', '_')}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
    lines = "\n".join(f"{name} = {value}" for name, value in entry_points.items())
    (info / "entry_points.txt").write_text(f"[polydraft]\n{lines}\n")


PLUGIN = """
    from polydraft.contract import BackendRecord, hookimpl

    @hookimpl
    def polydraft_backends():
        yield BackendRecord(name="{name}", factory="x:Y", summary="", formats=set(), drafter_kinds=set(),
                            engine="x", install_hint="pip install x")
"""


def test_entry_points(tmp_path, monkeypatch):
    install(
        tmp_path,
        "my-plugins",
        {"installed-one": "installed_one", "zz-broken": "zz_broken", "zz-missing": "zz_no_such_module"},
        installed_one=PLUGIN.format(name="installed-backend"),
        zz_broken="import no_such_engine",
    )
    install(tmp_path, "rival", {"installed-one": "rival_one"}, rival_one=PLUGIN.format(name="rival-backend"))
    monkeypatch.syspath_prepend(str(tmp_path))
    host = PluginHost()
    found = {(s.distribution, s.name): s for s in host.statuses()}
    mine = found["my-plugins", "installed-one"]
    assert (mine.state, mine.version, mine.backends) == ("loaded", "1.5", ("installed-backend",))
    assert "ModuleNotFoundError: No module named 'no_such_engine'" in found["my-plugins", "zz-broken"].reason
    assert "zz_no_such_module" in found["my-plugins", "zz-missing"].reason
    assert "already named" in found["rival", "installed-one"].reason
    assert "installed-backend" in host.backends()
    assert "rival-backend" not in host.backends()
    # A whole distribution can be disabled by its name.
    host = PluginHost(environ={"POLYDRAFT_DISABLE_PLUGINS": "my_plugins"})
    assert {s.state for s in host.statuses() if s.distribution == "my-plugins"} == {"disabled"}
    assert "rival-backend" in host.backends()


def test_default_host_is_made_once(monkeypatch):
    from polydraft import _plugins as plugins

    plugins.default_host.cache_clear()
    monkeypatch.setenv("POLYDRAFT_DISABLE_PLUGINS", "reference")
    try:
        assert plugins.default_host() is plugins.default_host()
    finally:
        plugins.default_host.cache_clear()


# --- the package itself ----------------------------------------------------------------------------------------------
def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light_and_fast():
    out = run_python(
        # Of the processor: what else runs on the machine does not count.
        "import time; t = time.process_time(); import polydraft; d = time.process_time() - t\n"
        "import sys; heavy = {'numpy', 'torch', 'transformers', 'huggingface_hub', 'rich', 'typer', 'pydantic'}\n"
        "print(d, sorted(heavy & set(sys.modules)))"
    )
    seconds, _, loaded = out.partition(" ")
    assert loaded == "[]"
    assert float(seconds) < 0.3


def test_the_contract_is_light():
    out = run_python(
        "import sys, polydraft, polydraft.contract, polydraft._plugins; polydraft.default_host().statuses()\n"
        "print(sorted({'numpy', 'torch', 'transformers', 'huggingface_hub', 'rich', 'typer'} & set(sys.modules)))"
    )
    assert out == "[]"


def test_public_names():
    import polydraft

    missing = [name for name in polydraft.__all__ if name != "Session" and not hasattr(polydraft, name)]
    assert missing == []
    assert callable(polydraft.load)
    assert polydraft.__version__
    assert set(polydraft.__all__) - {"__version__"} <= set(dir(polydraft))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = polydraft.no_such_name


def test_every_hook_has_an_example_that_runs():
    import doctest

    from polydraft.contract import hookspecs

    results = doctest.testmod(hookspecs)
    assert results.failed == 0
    hooks = [name for name in vars(hookspecs.PolydraftSpec) if name.startswith("polydraft_")]
    assert len(hooks) == 5
    for name in hooks:
        assert ">>>" in getattr(hookspecs.PolydraftSpec, name).__doc__
    assert results.attempted >= 3 * len(hooks)
