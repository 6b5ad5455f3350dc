"""Backends are asked in processes of their own: whatever one does to its process costs only its own answer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from polydraft._probes.asking import ask
from polydraft._probes.interpreter import own_python
from worker_helpers import alive, wait_until

PLUGIN = """
from polydraft.contract import BackendRecord, PairRecord, hookimpl

@hookimpl
def polydraft_backends():
    for name in {names!r}:
        yield BackendRecord(
            name=name, factory=f"probed_{{name}}:Probed", summary="", formats={{"safetensors"}},
            drafter_kinds={{"ngram"}}, engine="numpy", requires={{"numpy": ">=1"}}, install_hint="pip install probed",
        )

@hookimpl
def polydraft_pairs():
    yield PairRecord(target="org/big", drafter="org/small", kind="draft-model")
"""
BACKEND = """
import ctypes, os, signal, subprocess, sys, time
from polydraft.contract import Backend, Capabilities, DeviceRecord, Diagnosis, EngineOptions
{at_import}

class Options(EngineOptions):
    layers: int = 1

class Probed(Backend):
    options = Options

    def capabilities(self):
        return Capabilities(drafter_kinds=frozenset({{"ngram"}}), max_speculative_tokens=7)

    def diagnose(self):
        {in_diagnosis}
        return Diagnosis(
            usable=True, engine_version="1.0", devices=(DeviceRecord(name="cpu", total_memory_bytes=5),), rank=33,
            notes=("fine",),
        )

    def load_engine(self, request):
        raise NotImplementedError
"""
ABORT = "os.write(2, b'some line\\nfree(): invalid pointer\\n'); os.abort()"
GRANDCHILD = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
NOISE = "; ".join(
    (
        "os.write(1, b'x' * 100000 + b'\\n{\"problem\": \"\"}\\n'); print('{}')",
        "[os.write(2, b'y' * 65536) for _ in range(300)]",
        "assert sys.stdin.read() == '' and os.read(0, 10) == b''",
        GRANDCHILD,
    )
)
DIAGNOSES = {
    "good": ("", ""),
    "noisy": ("print('{}'); import atexit; atexit.register(os.abort)", NOISE),
    "aborts": (ABORT, ""),
    "segfaults": ("", "ctypes.string_at(0)"),
    "exits": ("os._exit(3)", ""),
    "hangs": ("", "ctypes.PyDLL(None).sleep(600)  # with the interpreter's lock"),
    "spins": ("while True: pass", ""),
}
SAID = {
    "aborts": "Its diagnosis was killed by SIGABRT: free(): invalid pointer.",
    "segfaults": "Its diagnosis was killed by SIGSEGV.",
    "exits": "Its diagnosis ended with exit code 3 and no answer.",
    "hangs": "Its diagnosis did not end within 2 seconds.",
    "spins": "Its diagnosis did not end within 2 seconds.",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder on the path with a plugin of all these backends, as an installer would have left it."""
    folder = tmp_path_factory.mktemp("probed")
    (folder / "probed_plugin.py").write_text(PLUGIN.format(names=list(DIAGNOSES)))
    for name, (at_import, in_diagnosis) in DIAGNOSES.items():
        source = BACKEND.format(at_import=at_import, in_diagnosis=in_diagnosis or "pass")
        (folder / f"probed_{name}.py").write_text(source)
    about = folder / "probed-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: probed\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[polydraft]\nprobed = probed_plugin\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONFAULTHANDLER", "")
        yield folder


@pytest.fixture(scope="module")
def answers(installed):
    found = ask(own_python(), list(DIAGNOSES), seconds=2, want="state")
    assert [answer.backend for answer in found] == list(DIAGNOSES)
    return {answer.backend: answer for answer in found}


@pytest.mark.parametrize("name", ["good", "noisy"])
def test_what_an_engine_prints_reads_or_leaves_does_not_harm_its_answer(name, answers):
    state = answers[name].state
    assert state.usable
    assert state.diagnosis.model_dump(exclude_defaults=True) == {
        "usable": True,
        "engine_version": "1.0",
        "devices": ({"name": "cpu", "total_memory_bytes": 5},),
        "notes": ("fine",),
        "rank": 33,
    }
    assert answers[name].capabilities.max_speculative_tokens == 7
    assert answers[name].options_schema["properties"]["layers"]["default"] == 1


@pytest.mark.parametrize("name", SAID)
def test_a_diagnosis_that_ends_or_hangs_is_that_backends_state(name, answers):
    record = answers["good"].state.record.model_copy(update={"name": name})
    state = answers[name].state_of(record)
    assert not state.usable
    assert state.problem == SAID[name]
    assert state.remedy == "Install it again: pip install probed"


def test_nothing_that_a_probe_started_is_left(answers):
    assert answers
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"time.sleep(600)" in _bytes(path)]
    assert not left


def _bytes(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_probe_ends_with_the_program_that_asks(installed, tmp_path):
    # The program is killed while the engine hangs, so it cannot end its child itself.
    program = f"""if True:
        import sys
        from polydraft._probes.asking import ask
        from polydraft._probes.interpreter import own_python
        sys.path.insert(0, {str(installed)!r})
        ask(own_python(), ['hangs'], seconds=60, want='state')
    """
    asking = subprocess.Popen([sys.executable, "-c", program])
    children = Path(f"/proc/{asking.pid}/task/{asking.pid}/children")
    deadline = time.monotonic() + 20
    while not (found := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(asking.pid, signal.SIGKILL)
    asking.wait()
    assert found
    assert wait_until(lambda: not alive(int(found[0])))


def test_the_catalogue_has_what_every_hook_gives_and_what_each_backend_says(installed, monkeypatch):
    (answer,) = ask(own_python(), ["good", "exits"], seconds=8, want="catalogue")
    catalogue = answer.catalogue
    assert ("probed", "org/big") in [(plugin, pair.target) for plugin, pair in catalogue.pairs]
    good, bad = sorted(catalogue.backends, key=lambda one: one.record.name != "good")
    assert (good.plugin, good.distribution, good.version) == ("probed", "probed", "1.0")
    assert good.versions.keys() == {"numpy"}
    assert good.state.usable
    assert good.capabilities.max_speculative_tokens == 7
    assert good.options_schema["properties"]["layers"]["type"] == "integer"
    assert not bad.state.usable
    assert bad.capabilities is None


def test_an_interpreter_that_cannot_be_asked_is_an_answer():
    (answer,) = ask(Path("/nowhere/python"), None, seconds=3, want="catalogue")
    assert "could not be started: /nowhere/python" in answer.problem
    (answer,) = ask(Path("/bin/false"), ["one"], seconds=3, want="state")
    assert answer.problem == "ended with exit code 1 and no answer."


def test_doctor_survives_a_plugin_whose_own_module_ends_the_process(tmp_path):
    about = tmp_path / "deadly-1.0.dist-info"
    about.mkdir()
    (tmp_path / "deadly_plugin.py").write_text("import os; os.abort()")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: deadly\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[polydraft]\ndeadly = deadly_plugin\n")
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "POLYDRAFT_DISABLE_PLUGINS": "transformers",  # spares this test its import
    }
    command = [sys.executable, "-m", "polydraft", "doctor", "--json"]
    found = json.loads(subprocess.run(command, env=variables, capture_output=True, check=False).stdout)
    states = {plugin["name"]: plugin for plugin in found["plugins"]}
    assert states["deadly"]["state"] == "broken"
    assert states["deadly"]["reason"] == "Its import was killed by SIGABRT."
    assert [backend["usable"] for backend in found["backends"] if backend["name"] == "reference"] == [True]
