"""``backend="auto"`` with several engines: each is asked once, in a process of its own, until something changes."""

import os
import sys
from pathlib import Path

import pytest
from polydraft._load import prepare
from polydraft._plugins import PluginHost
from polydraft._probes import kept
from polydraft._registry.describe import describe_backends
from polydraft.errors import BackendUnavailableError, InvalidRequestError

pytestmark = pytest.mark.usefixtures("clean_environment")

PLUGIN = """
from polydraft.contract import BackendRecord, hookimpl

@hookimpl
def polydraft_backends():
    yield BackendRecord(
        name="{name}", factory="{name}_backend:Made", summary="", formats={{"safetensors"}}, drafter_kinds={{"ngram"}},
        engine="numpy", install_hint="pip install {name}",
    )
"""
BACKEND = """
import os
from polydraft.contract import Backend, Capabilities, DeviceRecord, Diagnosis

class Made(Backend):
    def capabilities(self):
        with open(os.environ["DIARY"], "a") as diary:
            diary.write(f"capabilities {name} {{os.getpid()}}\\n")
        return Capabilities(drafter_kinds=frozenset({{"ngram"}}), max_speculative_tokens={k})

    def diagnose(self):
        with open(os.environ["DIARY"], "a") as diary:
            diary.write(f"diagnose {name} {{os.getpid()}}\\n")
        return Diagnosis(
            usable=not os.path.exists(os.environ["BROKEN"]), rank={rank}, depends_on={depends_on}, engine_version="1",
            devices=(DeviceRecord(name="cpu", free_memory_bytes=7),), reason="It is broken.", remedy="Mend it.",
        )

    def load_engine(self, request):
        raise NotImplementedError
"""
CONFIG = {"model_type": "llama", "vocab_size": 100, "max_position_embeddings": 64, "num_hidden_layers": 1}


class Machine:
    """Two plugins on the path, and what their backends did in which process."""

    def __init__(self, folder):
        self.folder, self.diary = folder, folder.parent / "diary"
        self.library = folder.parent / "library"
        self.library.write_text("1")
        self.install("first", rank=80, k=5, depends_on=(str(self.library),))
        self.install("second", rank=40, k=6, depends_on=())

    def install(self, name, **values):
        (self.folder / f"{name}_plugin.py").write_text(PLUGIN.format(name=name))
        (self.folder / f"{name}_backend.py").write_text(BACKEND.format(name=name, **values))
        about = self.folder / f"{name}-1.0.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[polydraft]\n{name} = {name}_plugin\n")

    def asked(self):
        """``(what, backend, whether in this process)`` since the last call, sorted."""
        lines = self.diary.read_text().splitlines() if self.diary.exists() else []
        self.diary.unlink(missing_ok=True)
        return sorted((what, name, int(pid) == os.getpid()) for what, name, pid in map(str.split, lines))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    real = [status.name for status in PluginHost().statuses()]
    monkeypatch.setenv("POLYDRAFT_DISABLE_PLUGINS", ",".join(real))
    folder = tmp_path / "site"
    (folder / "__pycache__").mkdir(parents=True)
    monkeypatch.setenv("DIARY", str(tmp_path / "diary"))
    monkeypatch.setenv("BROKEN", str(tmp_path / "broken"))
    monkeypatch.syspath_prepend(str(folder))
    yield Machine(folder)
    for name in ("first", "second"):
        for module in (f"{name}_plugin", f"{name}_backend"):
            sys.modules.pop(module, None)


@pytest.fixture
def chosen(machine, make_model):
    def choose(**arguments):
        prepared = prepare(make_model("target", CONFIG), drafter="ngram", host=PluginHost(), **arguments)
        return prepared.request.backend, prepared.request.plan.num_speculative_tokens

    return choose


IN_CHILDREN = [(what, name, False) for what in ("capabilities", "diagnose") for name in ("first", "second")]


def test_of_several_engines_none_is_asked_in_this_process_and_each_once(machine, chosen, make_model):
    arguments = {"drafter": "ngram", "host": PluginHost()}
    first, again = (prepare(make_model("target", CONFIG), **arguments) for _ in range(2))
    assert first.request.backend == again.request.backend == "first"
    # Free memory is another one each time.
    assert [one.state.diagnosis.devices[0].free_memory_bytes for one in (first, again)] == [7, None]
    assert machine.asked() == IN_CHILDREN
    assert chosen(num_speculative_tokens=5) == ("first", 5)
    with pytest.raises(InvalidRequestError, match="first drafts at most 5"):  # what it can do was kept, too
        chosen(num_speculative_tokens=6)
    assert machine.asked() == []
    for path in kept.diagnosis_folder().glob("*.json"):  # an edited one does not count
        path.write_text(path.read_text().replace('"rank": 40', '"rank": 99'))
    assert chosen() == ("first", 4)
    assert {name for _, name, _ in machine.asked()} == {"second"}


def test_a_named_engine_is_asked_in_this_process(machine, chosen):
    assert chosen(backend="second") == ("second", 4)
    assert machine.asked() == [("capabilities", "second", True), ("diagnose", "second", True)]


def test_a_single_engine_is_asked_in_this_process(machine, chosen, monkeypatch):
    monkeypatch.setenv("POLYDRAFT_DISABLE_PLUGINS", os.environ["POLYDRAFT_DISABLE_PLUGINS"] + ",second")
    assert chosen() == ("first", 4)
    assert machine.asked() == [("capabilities", "first", True), ("diagnose", "first", True)]


CHANGES = {
    "a variable": lambda machine, patch: patch.setenv("CUDA_VISIBLE_DEVICES", "1"),
    "a package": lambda machine, patch: (machine.folder / "torch-9.9.dist-info").mkdir(),
    "a module": lambda machine, patch: (machine.folder / "torch.py").touch(),
    "the path": lambda machine, patch: (
        (machine.folder.parent / "torch.py").touch(),
        patch.syspath_prepend(str(machine.folder.parent)),
    ),
    "a driver": lambda machine, patch: patch.setattr(kept, "hardware", lambda: ["another GPU"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_machine_makes_all_be_asked_again(change, machine, monkeypatch):
    records = list(PluginHost().backends().values())
    homes = dict.fromkeys(("first", "second"))
    before = kept._keys(records, homes)
    assert kept._keys(records, homes) == before
    CHANGES[change](machine, monkeypatch)
    after = kept._keys(records, homes)
    assert not set(before.values()) & set(after.values())


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "NO_COLOR", "COLUMNS"])
def test_threads_and_output_change_nothing(name, machine, monkeypatch):
    records = list(PluginHost().backends().values())
    homes = dict.fromkeys(("first", "second"))
    monkeypatch.delenv(name, raising=False)
    before = kept._keys(records, homes)
    monkeypatch.setenv(name, "3")
    assert kept._keys(records, homes) == before


def test_a_folder_of_the_path_without_modules_changes_nothing(machine, chosen, tmp_path, monkeypatch):
    """``python -m`` puts the current folder there."""
    chosen()
    machine.asked()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    chosen()
    assert machine.asked() == []


def test_a_change_of_one_plugin_or_of_its_files_makes_that_one_be_asked_again(machine, chosen):
    chosen()
    machine.asked()
    machine.library.write_text("22")
    chosen()
    assert machine.asked() == [("capabilities", "first", False), ("diagnose", "first", False)]
    # Its depends_on becomes None: never kept from now on.
    machine.install("second", rank=90, k=6, depends_on=None)
    for _ in range(2):
        assert chosen() == ("second", 4)
        assert machine.asked() == [("capabilities", "second", False), ("diagnose", "second", False)]


def test_doctor_asks_anew_and_a_failed_diagnosis_is_never_kept(machine, chosen):
    chosen()
    machine.asked()
    broken = Path(os.environ["BROKEN"])
    broken.touch()  # nothing that is looked at
    assert [found.state.usable for found in describe_backends(PluginHost())] == [False, False]
    assert machine.asked() == IN_CHILDREN
    with pytest.raises(BackendUnavailableError, match=r"first: .*It is broken\. Mend it"):
        chosen()
    assert machine.asked() == IN_CHILDREN
    broken.unlink()
    assert chosen() == ("first", 4)
