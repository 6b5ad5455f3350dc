"""``polydraft pairs MODEL``: its packings, their sizes, and what fits here; and pairs that nothing here can run."""

import json
import shutil

import pytest
from polydraft.contract import BackendRecord, LocalModelRecord, hookimpl
from test_cli_tables import GoodPlugin, make_record, use  # noqa: F401 - a fixture

MLX = "mlx-community/gemma-4-e4b-it"
TARGET = "google/gemma-4-E4B-it"
GGUF = "unsloth/gemma-4-E4B-it-GGUF"


class LlamaPlugin:
    @hookimpl
    def polydraft_backends(self):
        own = {"formats": frozenset({"gguf", "safetensors"}), "converts": {"safetensors": ("none", "q8_0")}}
        yield BackendRecord(**{**make_record("llama").model_dump(), **own, "factory": "test_cli_tables:OnCpu"})


@pytest.fixture
def hub(fake_hub, builtin_data, monkeypatch):
    import test_cli_tables
    from polydraft.contract import Diagnosis

    class OnCpu(test_cli_tables.GoodBackend):
        diagnosis = Diagnosis(usable=True)

    monkeypatch.setattr(test_cli_tables, "OnCpu", OnCpu, raising=False)
    monkeypatch.setattr("polydraft.hardware.free_memory", lambda: 150_000)
    config = (builtin_data / "tiny-e2b/config.json").read_bytes()
    fake_hub.add(TARGET, {"config.json": config, "model.safetensors": bytes(160_000)})
    fake_hub.add(f"{MLX}-8bit", {"config.json": config, "model.safetensors": bytes(86_000)})
    fake_hub.add(GGUF, {"m-Q8_0.gguf": bytes(86_000), "m-BF16.gguf": bytes(160_000), "mmproj-F16.gguf": bytes(9)})
    return fake_hub


def test_a_folder_is_listed_with_the_drafter_that_load_finds_beside_it(use, command, builtin_data, tmp_path):  # noqa: F811
    for name in ("", "-assistant"):
        shutil.copytree(builtin_data / f"tiny-e2b{name}", tmp_path / f"mine{name}")
    use(GoodPlugin())
    (pair,) = json.loads(command("pairs", str(tmp_path / "mine"), "--json").out)
    assert (pair["drafter"], pair["kind"]) == (str(tmp_path / "mine-assistant"), "mtp")


def packings(command, *words):
    found = json.loads(command("pairs", *words, "--json").out)
    return {one["source"]: one for pair in found for one in pair["packings"]}


def test_sizes_backends_and_what_fits(use, command, hub):  # noqa: F811
    use(GoodPlugin(), LlamaPlugin())
    found = packings(command, TARGET, "--context-length", "16")
    assert {source: one["bytes"] for source, one in found.items() if one["bytes"]} == {
        TARGET: 160_000,
        f"{MLX}-8bit": 86_000,
        f"{GGUF}/m-Q8_0.gguf": 86_000,
        f"{GGUF}/m-BF16.gguf": 160_000,
    }
    q8, bf16 = found[f"{GGUF}/m-Q8_0.gguf"]["backends"]["llama"], found[f"{GGUF}/m-BF16.gguf"]["backends"]["llama"]
    assert (q8["fits"], q8["is_default"], bf16["fits"], bf16["is_default"]) == (True, True, False, False)
    assert "needs 181.9 KiB with a context of 16 tokens, and this machine has 146.5 KiB free" in bf16["why"]
    assert found[TARGET]["backends"]["good"]["fits"] is True  # its card has 6 GiB
    assert found[TARGET]["backends"]["llama"]["why"].startswith("llama converts safetensors weights of this machine")
    assert found[f"{MLX}-8bit"]["needs"] == ["mlx"]
    assert found[f"{MLX}-8bit"]["backends"] == {}
    assert "There is no model" in found[f"{MLX}-4bit"]["problem"]
    ran = command("pairs", TARGET, "--context-length", "16")
    for what in ("Packings of", "84.0 KiB", "needs mlx", "llama (auto)", "no: it needs 181.9 KiB", "yes: it needs"):
        assert what in ran.out, what
    # A packing's repository stands for its model; a context for which nothing is left changes the answer.
    found = packings(command, GGUF, "--context-length", "8000")
    assert found[f"{GGUF}/m-Q8_0.gguf"]["backends"]["llama"]["fits"] is False
    assert not any(path.endswith((".safetensors", ".gguf")) for _, path in hub.requests)


def test_without_the_hub(use, command, clean_environment):  # noqa: F811
    use(LlamaPlugin())
    found = packings(command, TARGET, "--offline")
    assert {one["name"] for one in found.values()} >= {"none", "bf16", "4bit", "q4_0"}
    assert all(one["bytes"] is None and one["problem"] for source, one in found.items() if source != TARGET)
    assert found[TARGET]["backends"]["llama"]["fits"] is None
    assert "Not known: The model" in command("pairs", TARGET).out


def test_models_of_this_machine(use, command, clean_environment, builtin_data, tmp_path, monkeypatch):  # noqa: F811
    class Builtin(LlamaPlugin):
        @hookimpl
        def polydraft_local_models(self):
            yield LocalModelRecord(name="tiny-e2b", path=str(builtin_data / "tiny-e2b"))

    use(Builtin())
    size = (builtin_data / "tiny-e2b/model.safetensors").stat().st_size
    for name in ("builtin:tiny-e2b", str(builtin_data / "tiny-e2b")):
        (pair, *_) = json.loads(command("pairs", name, "--json").out)
        assert [(one["name"], one["bytes"], one["made_here"]) for one in pair["packings"]] == [
            ("none", size, False),
            ("q8_0", None, True),
        ]
    assert (pair["kind"], pair["drafter"]) == ("ngram", None)
    ran = command("pairs", str(tmp_path))
    assert ran.code == 1
    assert "no config.json" in ran.err
    assert "No known pair matches" in command("pairs", str(tmp_path / "none")).out
    (tmp_path / "gemma-4").mkdir()
    monkeypatch.chdir(tmp_path)  # a word that happens to be a folder's name
    assert TARGET in command("pairs", "gemma-4").out


def test_only_kinds_that_a_backend_here_runs(use, command, clean_environment):  # noqa: F811
    use(GoodPlugin())
    found = json.loads(command("pairs", "--json").out)
    assert {pair["kind"] for pair in found} == {"mtp"}
    assert {pair["format"] for pair in found} == {"safetensors"}
    every = json.loads(command("pairs", "--json", "--all").out)
    assert {pair["kind"] for pair in every} == {"mtp", "eagle3", "dflash", "draft-model"}
    assert f"{len(every) - len(found)} more pairs are not for the backends that are installed" in command("pairs").out
    assert "eagle3" not in command("pairs", "gemma-4-31B").out
