"""Writing GGUF: the command, the cache, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import polydraft
import polydraft_gguf.plugin
import pytest
from polydraft.caches import entries_of
from polydraft.checkpoints.gguf import read_header
from polydraft.errors import ModelFormatError, UnsupportedError
from polydraft_gguf.conversion.cache import converted
from polydraft_gguf.conversion.command import main
from polydraft_gguf.conversion.write import convert


@pytest.mark.parametrize("weights", ["f32", "f16", "bf16", "q8_0"])
def test_command(data, tmp_path, weights):
    file = tmp_path / "m.gguf"
    assert main(["convert", str(data / "tiny-26b"), str(file), "--type", weights]) == 0
    header = read_header(file)
    assert header.architecture == "gemma4"
    assert header.of_architecture("expert_count") == 8
    with polydraft.load(file, backend="llama_cpp", drafter="ngram") as session:
        assert session.running.dtype == {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(weights, weights)
        assert session.generate([2, 300, 301], max_new_tokens=4).token_ids


def test_a_missing_softcap_is_written_as_none(gguf):
    assert read_header(gguf("tiny-e2b")).of_architecture("final_logit_softcapping") == 30.0
    assert read_header(gguf("tiny-e2b-assistant")).of_architecture("final_logit_softcapping") == 0.0


def test_command_says_what_is_wrong(tmp_path, capsys, data):
    assert main(["convert", str(tmp_path), str(tmp_path / "m.gguf")]) == 1
    assert "config.json" in capsys.readouterr().err
    assert main(["convert", str(data / "tiny-llama"), str(tmp_path / "no/such/m.gguf")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_an_old_layout_is_read_alike(gguf, changed):
    """``global_head_dim`` and ``num_global_key_value_heads``, before configs had numbers by layer."""

    def older(config):
        del config["per_layer_config"]
        config.update(global_head_dim=64, num_global_key_value_heads=1)

    new, old = (read_header(file).metadata for file in (gguf("tiny-31b"), changed("tiny-31b", older)))
    assert {**new, "general.name": ""} == {**old, "general.name": ""}


def test_numbers_of_layers_may_be_padded_with_zeros(gguf, changed):
    def pad(config):
        config["per_layer_config"] = {f"{key:0>2}": own for key, own in config["per_layer_config"].items()}

    found, padded = (read_header(file).metadata for file in (gguf("tiny-31b"), changed("tiny-31b", pad)))
    assert {**found, "general.name": ""} == {**padded, "general.name": ""}


def copy(data, tmp_path, name="tiny-llama"):
    return shutil.copytree(data / name, tmp_path / "copy")


def edit(file, **changes):
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("config.json", {"architectures": ["BertModel"]}, "BertModel"),
        ("config.json", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "scales its rotary"),
        ("config.json", {"hidden_act": "gelu"}, "activation is gelu"),
        ("tokenizer.json", {"normalizer": {"type": "NFC"}}, "normalizes"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Split"}}, "does not split text"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
    ],
)
def test_what_is_not_written(data, tmp_path, file, changes, said):
    folder = copy(data, tmp_path)
    edit(folder / file, **changes)
    with pytest.raises(UnsupportedError, match=said):
        convert(folder, tmp_path / "m.gguf")
    with pytest.raises(UnsupportedError, match=said):
        polydraft.load(folder, backend="llama_cpp", drafter="ngram")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_activation": "silu"}, "activation is silu"),
        ({"use_bidirectional_attention": "all"}, "later tokens"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}},
            "full layers is of type yarn",
        ),
        ({"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}}, "sliding layers"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(data, tmp_path, changes, said):
    folder = copy(data, tmp_path, "tiny-e2b")
    edit(folder / "config.json", **changes)
    with pytest.raises(UnsupportedError, match=said):
        convert(folder, tmp_path / "m.gguf")


def test_added_tokens_with_options(data, tmp_path):
    folder = copy(data, tmp_path)
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    edit(folder / "tokenizer.json", added_tokens=[{**tokens[0], "lstrip": True}, *tokens[1:]])
    with pytest.raises(UnsupportedError, match="added tokens"):
        convert(folder, tmp_path / "m.gguf")


def test_a_damaged_checkpoint(data, tmp_path):
    folder = copy(data, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelFormatError, match="cut short"):
        convert(folder, tmp_path / "m.gguf")


def test_converted_once_by_content(data, tmp_path):
    folder = copy(data, tmp_path)
    first = converted(folder, "f32")
    made = first.stat().st_mtime_ns
    assert converted(shutil.copytree(folder, tmp_path / "renamed"), "f32") == first
    assert first.stat().st_mtime_ns == made
    assert converted(folder, "f16") != first
    weights = folder / "model.safetensors"
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = converted(folder, "f32")
    edit(folder / "config.json", bos_token_id=3)
    assert len({first, second, converted(folder, "f32")}) == 3


@pytest.mark.parametrize(("name", "drafter"), [("tiny-31b", "tiny-31b-assistant"), ("tiny-llama", "tiny-llama-draft")])
def test_a_target_with_further_tokens(name, drafter, data, tmp_path):
    """Its drafter has no rows for them: they are run and chosen, and never drafted."""
    from polydraft_conformance.changed_checkpoints import NEW_TOKENS, more_tokens

    prompt, folder = [2, *range(300, 330)], more_tokens(data / name, tmp_path / "target")
    given = {"backend": "llama_cpp", "device": "cpu", "context_length": 256}
    with polydraft.load(folder, drafter=f"builtin:{drafter}", **given) as session:
        new = session.tokenizer.token_id(NEW_TOKENS[1])
        for settings in ({}, {"temperature": 1.0, "seed": 3, "logit_bias": {new: 5.0}}):
            settings.update(max_new_tokens=32, ignore_eos=True, forced_token_ids={3: new})
            speculative = session.generate([*prompt, new], **settings)
            assert speculative.token_ids == session.generate([*prompt, new], speculate="off", **settings).token_ids
            assert speculative.stats.num_accepted_tokens > 0


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """The same weights may have been converted for another test, from a folder of another name, which files keep."""
    monkeypatch.setenv("POLYDRAFT_LLAMA_CPP_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("empty_cache")
def test_other_files_are_not_converted(data, tmp_path):
    folder = copy(data, tmp_path)
    wanted = tmp_path / "wanted.gguf"
    convert(folder, wanted)
    for name in ("consolidated.safetensors", "model-00002-of-00002.safetensors", "._model.safetensors", "._x.json"):
        (folder / name).write_bytes(b"x")
    (folder / "x.json").symlink_to("gone")
    first = converted(folder, "f32")
    assert (first.read_bytes() == wanted.read_bytes()) is True  # no diff of megabytes


@pytest.mark.usefixtures("empty_cache")
def test_a_truncated_conversion_is_made_again(data, tmp_path):
    folder = copy(data, tmp_path)
    file = converted(folder, "f32")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert converted(folder, "f32") == file
    assert (file.read_bytes() == content) is True  # no diff of megabytes


def test_the_cache_is_listed(data, tmp_path):
    file = converted(copy(data, tmp_path), "f32")
    (cache,) = polydraft.PluginHost({"gguf": polydraft_gguf.plugin}).caches()
    assert file in {entry.file for entry in entries_of(Path(cache.path))}


def chosen(folder):
    """Greedy tokens, and the notes of the session."""
    with polydraft.load(folder, drafter=None, backend="llama_cpp", device="cpu", context_length=128) as session:
        result = session.generate([2, *range(300, 330)], max_new_tokens=8, ignore_eos=True)
        return result.token_ids, session.running.notes


@pytest.mark.parametrize("name", ["tiny-31b", "tiny-llama"])
def test_the_weights_decide_whether_the_head_is_the_embedding(name, data, tmp_path):
    """Whatever ``tie_word_embeddings`` says, and a note tells it."""
    from polydraft_conformance.changed_checkpoints import change_config, own_head

    found, notes = {}, {}
    for case, equal, tied in (("untied", False, False), ("hidden", False, True), ("equal", True, True)):
        folder = own_head(data / name, tmp_path / case, equal=equal, tied=tied)
        found[case], notes[case] = chosen(folder)
    folder = tmp_path / "none"
    shutil.copytree(data / name, folder)
    change_config(folder, tie_word_embeddings=False)
    found["none"], notes["none"] = chosen(folder)
    assert found["untied"] == found["hidden"] != found["equal"] == found["none"]
    said = {case: [note for note in notes[case] if "output head" in note] for case in notes}
    assert [len(said[case]) for case in ("untied", "hidden", "equal", "none")] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("native", "free", "dtype", "said"),
    [(True, 2**40, "bfloat16", ""), (False, 2**40, "float32", "has no"), (False, 1000, "bfloat16", "emulates")],
)
def test_auto_follows_the_rule_of_all_engines(data, monkeypatch, native, free, dtype, said):
    """A checkpoint's bfloat16 becomes float32 on a CPU that would emulate it, where that fits."""
    monkeypatch.setattr("polydraft.hardware.multiplies_natively", lambda name: native or name == "float32")
    monkeypatch.setattr("polydraft.hardware.cpu_features", lambda: frozenset({"avx2"}))
    monkeypatch.setattr("polydraft_gguf.files.free_memory", lambda: free)
    pair = {"drafter": data / "tiny-llama-draft", "device": "cpu"}
    with polydraft.load(data / "tiny-llama", backend="llama_cpp", **pair) as session:
        assert session.running.dtype == dtype
        notes = [note for note in session.running.notes if note.startswith("The dtype is")]
        assert (said in notes[0]) if said else not notes
