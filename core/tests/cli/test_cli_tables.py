"""``polydraft backends``, ``pairs`` and ``doctor``, over hosts made for the test."""

import json

import polydraft._plugins
import polydraft._registry.describe
import pytest
from polydraft._plugins import PluginHost
from polydraft.contract import (
    Backend,
    BackendRecord,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    FaultRecord,
    PairRecord,
    hookimpl,
)


class GoodBackend(Backend):
    diagnosis = Diagnosis(
        usable=True,
        engine_version="2.0",
        devices=(
            DeviceRecord(
                name="cuda:0", description="A card", total_memory_bytes=8 * 2**30, free_memory_bytes=6 * 2**30
            ),
        ),
        notes=("A note.",),
    )

    def capabilities(self):
        return Capabilities(drafter_kinds=frozenset({"ngram"}))

    def diagnose(self):
        return self.diagnosis

    def load_engine(self, request):
        raise NotImplementedError


class BadBackend(GoodBackend):
    diagnosis = Diagnosis(usable=False, reason="The driver is too old.", remedy="update-the-driver --now")


def make_record(name, factory="GoodBackend", **more):
    return BackendRecord(
        name=name,
        factory=f"{__name__}:{factory}",
        summary=f"Summary of {name}",
        formats=frozenset({"safetensors"}),
        drafter_kinds=frozenset({"ngram", "mtp"}),
        engine="an-engine",
        install_hint=f"pip install {name}",
        **more,
    )


class AskedBackend(GoodBackend):
    diagnosis = Diagnosis(usable=True, engine_version="2.0", rank=0)


class GoodPlugin:
    @hookimpl
    def polydraft_backends(self):
        yield make_record("good")

    @hookimpl
    def polydraft_pairs(self):
        yield PairRecord(
            target="my-org/big", drafter="my-org/small", kind="mtp", num_speculative_tokens={"*": 3, "good": 7}
        )


class BadPlugin:
    @hookimpl
    def polydraft_backends(self):
        yield make_record("bad", "BadBackend")


class FaultyPlugin:
    @hookimpl
    def polydraft_faults(self):
        yield FaultRecord(
            id="an-engine-2-0",
            distribution="an-engine",
            versions="==2.0",
            affects="mtp",
            severity="refuse",
            summary="It cannot draft.",
            remedy="pip install 'an-engine!=2.0'",
        )


@pytest.fixture
def use(monkeypatch):
    """Let the commands see these plugins, and these installed versions."""
    monkeypatch.delenv("POLYDRAFT_PAIRS", raising=False)

    def go(*plugins, disabled=(), versions=()):
        installed = {"an-engine": "2.0", **dict(versions)}
        host = PluginHost({type(plugin).__name__: plugin for plugin in plugins}, disabled=disabled)
        for module in (polydraft._plugins, polydraft._registry.describe):
            monkeypatch.setattr(module, "default_host", lambda: host)
        for function in (polydraft._registry.describe.describe_backends, polydraft._registry.describe.describe_pairs):
            monkeypatch.setitem(function.__kwdefaults__, "lookup", installed.get)

    return go


class BrokenPlugin:
    @hookimpl
    def polydraft_backends(self):
        raise ImportError("no such library")


def test_backends(use, command):
    use(GoodPlugin(), BadPlugin(), BrokenPlugin())
    ran = command("backends")
    assert ran.code == 0
    for what in ("good", "an-engine 2.0", "usable", "mtp, ngram", "The driver is too old."):
        assert what in ran.out, what
    assert "BrokenPlugin" in ran.out
    assert "no such library" in ran.out


def test_a_backend_that_auto_never_chooses_says_so_and_an_engine_of_several_is_the_installed_one(use, command):
    class Plugin:
        @hookimpl
        def polydraft_backends(self):
            yield make_record("asked", "AskedBackend")
            yield make_record("either", requires={"an-engine|pluggy": ">=0"})

    use(Plugin(), versions={"pluggy": "1.0"})
    rows = {line.split()[0]: line for line in command("backends").out.splitlines() if line.strip()}
    assert "usable if named" in rows["asked"]
    assert "pluggy 2.0" in rows["either"], "the name of what is installed"
    assert "asked: usable if named" in command("doctor").out


def test_backends_json(use, command):
    use(GoodPlugin(), BadPlugin(), BrokenPlugin(), disabled=["GoodPlugin"])
    data = json.loads(command("backends", "--json").out)
    assert [backend["name"] for backend in data["backends"]] == ["bad"]
    assert data["backends"][0]["usable"] is False
    assert {plugin["name"]: plugin["state"] for plugin in data["plugins"]} == {
        "BrokenPlugin": "broken",
        "GoodPlugin": "disabled",
    }


def test_no_backends(use, command):
    use()
    assert "polydraft engines install transformers" in command("backends").out


def test_pairs(use, command):
    use(GoodPlugin(), FaultyPlugin())
    ran = command("pairs")
    assert ran.code == 0
    for what in ("my-org/big", "my-org/small", "google/gemma-4-E4B-it", "It cannot draft."):
        assert what in ran.out, what
    (pair,) = json.loads(command("pairs", "MY-ORG", "--json").out)
    assert pair["drafter"] == "my-org/small"
    assert pair["num_speculative_tokens"] == {"*": 3, "good": 7}
    assert pair["backends"] == ["good"]
    assert [fault["id"] for fault in pair["faults"]] == ["an-engine-2-0"]


def test_pairs_of_a_variant(use, command):
    use(GoodPlugin())
    found = json.loads(command("pairs", "someone/gemma-4-E4B-it-AWQ", "--json").out)
    assert found
    assert all(pair["variant"] for pair in found)
    said = command("pairs", "someone/gemma-4-E4B-it-AWQ").out
    assert "someone/gemma-4-E4B-it-AWQ is not listed. It is taken for another packing of google/gemma-4-E4B-it" in said


@pytest.mark.parametrize("text", ["me/gemma-4-E4B-it-mine", "./gemma-4-e4b-it-mine-v2"])
def test_pairs_of_what_was_made_from_a_known_model(use, command, text):
    use()
    said = command("pairs", text).out
    assert "If it was made from google/gemma-4-E4B-it," in said
    assert "`--drafter google/gemma-4-E4B-it-assistant`" in said


def test_pairs_of_nothing(use, command):
    use()
    ran = command("pairs", "no-such-model")
    assert ran.code == 0
    assert "No known pair matches 'no-such-model'. Any target" in ran.out
    assert json.loads(command("pairs", "no-such-model", "--json").out) == []


@pytest.mark.parametrize("text", ["google/gemma4-E4B-it", "gemma-4-E4B-itt", "gemma-4-E4-it"])
def test_pairs_of_a_misspelt_model(use, command, text):
    use()
    assert "Did you mean 'google/gemma-4-E4B-it'" in command("pairs", text).out.replace("\n", " ")


def test_pairs_with_a_broken_file(use, command, tmp_path, monkeypatch):
    use()
    file = tmp_path / "pairs.toml"
    file.write_text("[[pair]]\ntarget = 1\n")
    monkeypatch.setenv("POLYDRAFT_PAIRS", str(file))
    ran = command("pairs")
    assert ran.code == 2
    assert str(file) in ran.err


def test_doctor(use, command):
    use(GoodPlugin(), BadPlugin(), BrokenPlugin(), FaultyPlugin())
    ran = command("doctor")
    assert ran.code == 0
    for what in (
        "good: usable, with known faults",
        "an-engine 2.0, mtp (refused): It cannot draft.",
        "pip install 'an-engine!=2.0'",
        "cuda:0: A card, 8.0 GiB, 6.0 GiB free",
        "A note.",
        "bad: not usable",
        "The driver is too old.",
        "update-the-driver --now",
        "transformers: not installed",
        "polydraft engines install transformers",
        "BrokenPlugin",
        "no such library",
    ):
        assert what in ran.out, what


def test_doctor_json(use, command):
    use(GoodPlugin(), BadPlugin(), FaultyPlugin())
    ran = command("doctor", "--json")
    data = json.loads(ran.out)
    found = {backend["name"]: backend for backend in data["backends"]}
    assert data["usable"] is True
    assert found["good"]["installed"] is True
    assert found["good"]["devices"][0]["free_memory_bytes"] == 6 * 2**30
    assert found["good"]["faults"][0]["installed_version"] == "2.0"
    assert found["bad"]["remedy"] == "update-the-driver --now"
    assert found["transformers"]["installed"] is False
    assert data["machine"]["cpus"] >= 1
    assert data["machine"]["contract_version"] == 1


def test_doctor_says_which_environment_cannot_be_used(use, command, monkeypatch, tmp_path):
    monkeypatch.setenv("POLYDRAFT_DATA_DIR", str(tmp_path))
    (tmp_path / "engines" / "mlx").mkdir(parents=True)
    (tmp_path / "engines" / "mlx" / "state.json").write_text("{}")
    use(GoodPlugin())
    ran = command("doctor")
    assert "environment of mlx: broken" in ran.out
    assert "polydraft engines" in ran.out
    (broken,) = json.loads(command("doctor", "--json").out)["environments"]
    assert broken["name"] == "mlx"
    assert broken["reason"]


@pytest.mark.parametrize("plugins", [[], [BadPlugin()]])
def test_doctor_where_nothing_is_usable(use, command, plugins):
    use(*plugins)
    ran = command("doctor")
    assert ran.code == 1
    assert "No backend is usable here." in ran.out
    assert ("Install one: `polydraft engines install" in " ".join(ran.out.split())) == (not plugins)
    assert ran.err == ""
    ran = command("doctor", "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["usable"] is False


def test_doctor_knows_the_faulty_transformers(use, command):
    class Plugin:
        @hookimpl
        def polydraft_backends(self):
            yield make_record("good").model_copy(update={"engine": "transformers"})

    use(Plugin(), versions={"transformers": "5.23.0"})
    ran = command("doctor")
    assert "cannot build any Gemma 4 assistant" in ran.out
    assert "pip install 'transformers>=5.17,!=5.23.0'" in ran.out
    use(Plugin(), versions={"transformers": "5.22.2"})
    assert "Gemma 4 assistant" not in command("doctor").out


def test_doctor_says_what_disables(use, command, monkeypatch):
    monkeypatch.setenv("POLYDRAFT_DISABLE_PLUGINS", "no-such-plugin,GoodPlugin")
    use(GoodPlugin())
    ran = command("doctor")
    assert ran.code == 1
    assert "disabled" in ran.out
    assert "'no-such-plugin'" in ran.out


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], [], ["generate", "-h"], ["doctor", "--help"]])
def test_help_and_version(command, arguments):
    ran = command(*arguments)
    assert ran.code == 0
    assert "polydraft" in ran.out
    assert ran.err == ""


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["pairs", "a", "b"], ["doctor", "x"]])
def test_wrong_usage_of_the_whole(command, arguments):
    ran = command(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert len(ran.err.splitlines()) == 2
