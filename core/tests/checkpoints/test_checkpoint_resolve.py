"""From a name to a ModelSource; each way to be wrong is a typed error that says what to do."""

import json

import pytest
from litertlm_writer import litertlm
from polydraft.checkpoints._names import KnownNames
from polydraft.checkpoints._resolve import resolve
from polydraft.contract.records import LocalModelRecord
from polydraft.contract.requests import HubOptions
from polydraft.errors import InvalidRequestError, ModelFormatError, ModelNotFoundError

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of every repository of the tests' Hub
pytestmark = pytest.mark.usefixtures("clean_environment")
KNOWN = KnownNames(formats={"unsloth/gemma-gguf": "gguf", "google/gemma-4-E4B-it": "safetensors"})


def local(name, **options):
    return resolve(name, known=KNOWN, **options)


# --- on disk ---------------------------------------------------------------------------------------------------------
def test_folder(make_model):
    folder = make_model("m", {"model_type": "llama"})
    source = local(folder)
    assert (source.kind, source.path, source.format, source.model_type) == ("local", folder, "safetensors", "llama")
    assert local(str(folder)) == source
    assert source.id == str(folder)


@pytest.mark.parametrize(
    ("config", "metadata", "form"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, None, "mlx"),
        ({}, {"format": "mlx"}, "mlx"),
        ({}, {"format": "pt"}, "safetensors"),
        ({"quantization_config": {"quant_method": "awq"}}, None, "safetensors"),
    ],
)
def test_mlx_is_told_apart(make_model, config, metadata, form):
    assert local(make_model("m", config, metadata=metadata)).format == form


def test_gguf_file_and_folder(tmp_path, gguf_bytes):
    file = tmp_path / "model-Q4_K_M.gguf"
    file.write_bytes(gguf_bytes())
    for extra in ("mmproj-model.gguf", "mtp-model.gguf"):
        (tmp_path / extra).write_bytes(b"GGUF")
    assert local(file).format == "gguf"
    source = local(tmp_path)
    assert (source.format, source.file, source.path) == ("gguf", "model-Q4_K_M.gguf", tmp_path)
    (tmp_path / "model-Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFormatError, match="holds 2 models") as error:
        local(tmp_path)
    assert "model-Q4_K_M.gguf" in error.value.hint


def test_gguf_shards_are_one_model(tmp_path, gguf_bytes):
    for i in (1, 2):
        (tmp_path / f"m-0000{i}-of-00002.gguf").write_bytes(gguf_bytes())
    assert local(tmp_path).file == "m-00001-of-00002.gguf"


def test_gguf_that_is_none(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"version https://git-lfs")
    with pytest.raises(ModelFormatError, match="not a GGUF file"):
        local(tmp_path / "x.gguf")


def test_litertlm(tmp_path):
    (tmp_path / "m.litertlm").write_bytes(litertlm())
    assert local(tmp_path / "m.litertlm").format == "litertlm"
    assert local(tmp_path).file == "m.litertlm"


def test_folder_without_config(tmp_path, make_model):
    make_model("inner", {"model_type": "llama"})
    with pytest.raises(ModelFormatError, match=r"no config\.json") as error:
        local(tmp_path)
    assert str(tmp_path / "inner") in error.value.hint


def test_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFormatError, match="adapter") as error:
        local(tmp_path)
    assert "Merge" in error.value.hint


def test_config_without_weights(make_model):
    with pytest.raises(ModelFormatError, match="no weights"):
        local(make_model("m", {}, weights=False))


def test_weights_of_something_else(make_model):
    folder = make_model("m", {}, weights=False)
    (folder / "consolidated.safetensors").write_bytes(b"")
    (folder / "._model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFormatError, match=r"no weights: consolidated\.safetensors is none of a whole model"):
        local(folder)


def test_pickle_only(make_model):
    folder = make_model("m", {}, weights=False)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelFormatError, match="pickle") as error:
        local(folder)
    assert "save_pretrained" in error.value.hint


def test_other_file(tmp_path):
    (tmp_path / "m.txt").write_text("")
    with pytest.raises(ModelFormatError, match="unknown kind"):
        local(tmp_path / "m.txt")


def test_truncated_weights_show_at_once(make_model):
    folder = make_model("m", {})
    (folder / "model.safetensors").write_bytes(b"\x00")
    with pytest.raises(ModelFormatError, match="cut short"):
        local(folder)


def test_no_such_folder_suggests_its_siblings(make_model, tmp_path):
    make_model("my-target", {})
    with pytest.raises(ModelNotFoundError, match="no such folder") as error:
        local(tmp_path / "my-tarjet")
    assert str(tmp_path / "my-target") in error.value.hint
    with pytest.raises(ModelNotFoundError, match="There is no drafter"):
        local(tmp_path / "zzz" / "zzz", role="drafter")


def test_bare_word():
    with pytest.raises(ModelNotFoundError) as error:
        local("gemma-4-E4B-it")
    assert "google/gemma-4-E4B-it" in error.value.hint
    with pytest.raises(ModelNotFoundError) as error:
        local("zzzzzzz")
    assert error.value.hint == "A Hub id is org/name."


# --- built-in --------------------------------------------------------------------------------------------------------
def test_builtin(make_model):
    folder = make_model("tiny", {"model_type": "llama"})
    known = KnownNames(local_models={"tiny": LocalModelRecord(name="tiny", path=str(folder), format="safetensors")})
    source = resolve("builtin:tiny", known=known)
    assert (source.kind, source.id, source.path) == ("builtin", "builtin:tiny", folder)
    with pytest.raises(ModelNotFoundError) as error:
        resolve("builtin:tini", known=known)
    assert error.value.hint == "Did you mean 'builtin:tiny'?"
    with pytest.raises(ModelNotFoundError, match="built-in drafter") as error:
        resolve("builtin:xxxxxxx", known=known, role="drafter")
    assert error.value.hint == "There are: tiny."
    (folder / "config.json").unlink()
    with pytest.raises(ModelFormatError, match="damaged"):
        resolve("builtin:tiny", known=known)


def test_builtin_without_any_installed():
    with pytest.raises(ModelNotFoundError) as error:
        resolve("builtin:tiny-e2b", known=KnownNames())
    assert "polydraft[builtin]" in error.value.hint


def test_format_of_a_plugins_own_models(tmp_path):
    """A plugin's format needs no weight files; it is known by name and by path."""
    (tmp_path / "config.json").write_text("{}")
    known = KnownNames(local_models={"toy": LocalModelRecord(name="toy", path=str(tmp_path), format="reference")})
    assert resolve("builtin:toy", known=known).format == resolve(tmp_path, known=known).format == "reference"


# --- on the Hub ------------------------------------------------------------------------------------------------------
def test_only_the_config_is_downloaded(fake_hub):
    fake_hub.add("org/m", {"config.json": {"model_type": "llama"}, "model.safetensors": b"x"})
    source = local("org/m")
    assert (source.kind, source.format, source.model_type, source.path) == ("hub", "safetensors", "llama", None)
    assert {path for _, path in fake_hub.requests} == {"org/m/resolve/main/config.json"}


def test_a_revision_in_the_id(fake_hub):
    fake_hub.add("org/m", {"config.json": {"model_type": "llama"}, "model.safetensors": b"x"})
    source = resolve(f"org/m@{COMMIT}", known=KnownNames())
    assert (source.id, source.revision) == (f"org/m@{COMMIT}", COMMIT)
    assert {path for _, path in fake_hub.requests} == {f"org/m/resolve/{COMMIT}/config.json"}
    assert resolve(f"org/m@{COMMIT}", hub=HubOptions(revision=COMMIT), known=KnownNames()).revision == COMMIT
    with pytest.raises(InvalidRequestError, match="revision"):
        resolve(f"org/m@{COMMIT}", hub=HubOptions(revision="main"), known=KnownNames())
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'"):
        resolve("org/m@v9", known=KnownNames())


def test_a_copy_of_a_built_in_model_without_weights(tmp_path, make_model):
    """An engine whose models need no file of weights: the config says which engine's they are."""
    own = make_model("own/toy", {"model_type": "toy_engine", "seed": 1}, weights=False)
    trained = make_model("own/trained", {"model_type": "llama"})
    known = KnownNames(
        local_models={
            "toy": LocalModelRecord(name="toy", path=str(own), format="toy-format"),
            "trained": LocalModelRecord(name="trained", path=str(trained), format="safetensors"),
        }
    )
    copy = make_model("mine", {"model_type": "toy_engine", "seed": 2}, weights=False)
    source = resolve(copy, known=known)
    assert (source.format, source.kind, source.config["seed"]) == ("toy-format", "local", 2)
    other = make_model("other", {"model_type": "llama"}, weights=False)
    with pytest.raises(ModelFormatError, match="no weights"):
        resolve(other, known=known)


def test_from_the_cache_when_offline(fake_hub, monkeypatch):
    fake_hub.add("org/m", {"config.json": {"model_type": "llama"}})
    local("org/m")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert local("org/m").model_type == "llama"
    assert local("org/m", hub=HubOptions(local_files_only=True)).model_type == "llama"


def test_gguf_repository_without_config(fake_hub):
    fake_hub.add("org/some-GGUF", {"some-Q4_K_M.gguf": b"GGUF"})
    assert local("org/some-GGUF").format == "gguf"
    fake_hub.add("org/lora-GGUF", {"some.gguf": b"GGUF", "adapter_model.safetensors": b"", "old/m.safetensors": b""})
    assert local("org/lora-GGUF").format == "gguf"
    source = local("org/some-GGUF:Q4_K_M")
    assert (source.format, source.file) == ("gguf", "*[!a-zA-Z0-9]Q4_K_M[.-]*gguf")
    assert source.id == "org/some-GGUF:Q4_K_M"


def test_gguf_repository_with_config(fake_hub):
    fake_hub.add("org/other-GGUF", {"config.json": {"model_type": "gemma4"}, "m.gguf": b"GGUF"})
    source = local("org/other-GGUF")
    assert (source.format, source.model_type) == ("gguf", "gemma4")


def test_format_from_the_registry(fake_hub):
    fake_hub.add("unsloth/gemma-GGUF", {"m.gguf": b"GGUF"})
    assert local("unsloth/gemma-GGUF").format == "gguf"
    assert not any("api" in path for _, path in fake_hub.requests), "no listing is needed"


def test_mlx_on_the_hub(fake_hub):
    fake_hub.add("mlx-community/m-bf16", {"config.json": {"model_type": "llama"}})
    fake_hub.add("me/m-4bit", {"config.json": {"quantization": {"group_size": 64, "bits": 4}}})
    assert local("mlx-community/m-bf16").format == local("me/m-4bit").format == "mlx"


def test_repository_that_is_no_model(fake_hub):
    fake_hub.add("org/data", {"data.csv": b"1"})
    with pytest.raises(ModelFormatError, match="not a model that can be loaded"):
        local("org/data")


def test_broken_config_on_the_hub(fake_hub):
    fake_hub.add("org/m", {"config.json": b"{"})
    with pytest.raises(ModelFormatError, match="not valid JSON"):
        local("org/m")


@pytest.mark.parametrize(
    ("failure", "said", "hint"),
    [
        ((401, "GatedRepo"), "is gated", "huggingface.co/org/m"),
        ((403, "GatedRepo"), "is gated", "hf auth login"),
        ((404, "RepoNotFound"), "There is no target org/m", "hf auth login"),
        ((401, "RepoNotFound"), "or it is private", "hf auth login"),
        ((404, "RevisionNotFound"), "no revision 'main'", "tree/main"),
        ((401, "", "Invalid credentials in Authorization header"), "refused access", "token"),
        ((403, ""), "refused access", "HF_TOKEN"),
        ((500, ""), "HTTP 500", "Try again later"),
        ((429, ""), "HTTP 429", "local_files_only"),
    ],
)
def test_errors_of_the_hub(fake_hub, monkeypatch, failure, said, hint):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # retries of huggingface_hub
    fake_hub.fail("org/m", *failure)
    with pytest.raises(ModelNotFoundError, match=said) as error:
        local("org/m")
    assert hint in error.value.hint


def test_misspelt_id_is_suggested(fake_hub):
    with pytest.raises(ModelNotFoundError) as error:
        local("google/gemma-4-E4B-itt")
    assert error.value.hint == "Did you mean 'google/gemma-4-E4B-it'?"


def test_revision(fake_hub):
    fake_hub.add("org/m", {"config.json": {}})
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'"):
        local("org/m", hub=HubOptions(revision="v9"))
    assert local("org/m", hub=HubOptions(revision="main")).revision == "main"


def test_offline_says_which_of_three_causes(fake_hub, monkeypatch):
    import huggingface_hub.constants

    with pytest.raises(ModelNotFoundError, match="`local_files_only=True` was given") as error:
        local("org/m", hub=HubOptions(local_files_only=True))
    assert "without `local_files_only`" in error.value.hint
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
            local("org/m")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/{revision}/{filename}"
    )
    with pytest.raises(ModelNotFoundError, match="the Hub cannot be reached") as error:
        local("org/m")
    assert "HTTPS_PROXY" in error.value.hint


def test_gguf_offline(fake_hub):
    fake_hub.add("org/some-GGUF", {"some.gguf": b"GGUF"})
    offline = HubOptions(local_files_only=True)
    with pytest.raises(ModelNotFoundError, match="not completely in"):
        local("org/some-GGUF/some.gguf", hub=offline)
    from huggingface_hub import hf_hub_download

    hf_hub_download("org/some-GGUF", "some.gguf")
    assert local("org/some-GGUF/some.gguf", hub=offline).format == "gguf"


def test_token_true_without_one(fake_hub, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InvalidRequestError, match="no token is stored"):
        local("org/m", hub=HubOptions(token=True))


def test_cache_folder_that_cannot_be_written(fake_hub, tmp_path):
    fake_hub.add("org/m", {"config.json": {}})
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match="cache folder") as error:
        local("org/m", hub=HubOptions(cache_dir=tmp_path / "file" / "cache"))
    assert "cache_dir" in error.value.hint
    assert error.value.argument == "cache_dir"


def test_errors_that_are_not_the_hubs_are_not_hidden(fake_hub, monkeypatch):
    fake_hub.add("org/m", {"config.json": {}})
    monkeypatch.setattr("polydraft.checkpoints._resolve.read_config", lambda *a: json.loads(3))
    with pytest.raises(TypeError):
        local("org/m")
