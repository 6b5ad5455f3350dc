"""GGUF headers: read without their weights, damaged ones refused; which file of a repository is meant."""

import struct
import sys
import tracemalloc

import pytest
from polydraft.checkpoints._names import KnownNames, parse
from polydraft.checkpoints._resolve import resolve
from polydraft.checkpoints.compatibility import check_pair
from polydraft.checkpoints.gguf import read_header
from polydraft.checkpoints.gguf_config import config_of, different_tokens
from polydraft.checkpoints.gguf_files import choose_files, fetch_gguf
from polydraft.contract.requests import HubOptions
from polydraft.errors import ModelFormatError, ModelNotFoundError, PairMismatchError

TARGET = {
    "general.architecture": "gemma4",
    "gemma4.embedding_length": 160,
    "gemma4.block_count": 2,
    "gemma4.attention.head_count_kv": [2, 1],
    "gemma4.attention.key_length": 64,
    "gemma4.attention.key_length_swa": 32,
    "gemma4.attention.sliding_window": 64,
    "gemma4.attention.sliding_window_pattern": [True, False],
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "é", "c"],
}
DRAFTER = {
    **{key.replace("gemma4.", "gemma4-assistant."): value for key, value in TARGET.items()},
    "general.architecture": "gemma4-assistant",
    "gemma4-assistant.embedding_length": 96,
    "gemma4-assistant.embedding_length_out": 160,
}


@pytest.fixture
def write(tmp_path, gguf_bytes):
    def make(name, metadata):
        path = tmp_path / name
        path.write_bytes(gguf_bytes(metadata))
        return path

    return make


def test_header(write):
    header = read_header(write("m.gguf", TARGET))
    assert header.architecture == "gemma4"
    assert header.of_architecture("attention.head_count_kv") == (2, 1)
    assert header.metadata["tokenizer.ggml.tokens"].strings() == ["a", "é", "c"]
    assert header.tensors == {"x.weight": (4,)}
    config = config_of(header)
    assert (config["model_type"], config["hidden_size"], config["vocab_size"]) == ("gemma4", 160, 3)
    assert config["per_layer_config"]["1"] == {"num_key_value_heads": 1, "head_dim": 64}


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.8, 0.95])
def test_cut_short(write, share):
    path = write("m.gguf", TARGET)
    data = path.read_bytes()
    path.write_bytes(data[: int((len(data) - 64) * share) + 4])
    with pytest.raises(ModelFormatError, match="cut short"):
        read_header(path)


@pytest.mark.parametrize("data", [b"", b"GG", b"version https://git-lfs", b"\x89PNG\r\n"])
def test_no_gguf(tmp_path, data):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match="not a GGUF file"):
        read_header(path)


def test_random_damage_is_typed(write):
    path = write("m.gguf", TARGET)
    data = path.read_bytes()
    for at in range(4, len(data) - 48, 3):
        path.write_bytes(data[:at] + b"\xff" * 8 + data[at + 8 :])
        try:
            config_of(read_header(path))
        except ModelFormatError:
            continue


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gemma4.block_count", "many"),
        ("gemma4.block_count", 2**31),
        ("gemma4.block_count", True),
        ("gemma4.embedding_length", 1.5),
        ("gemma4.embedding_length", -1),
        ("gemma4.context_length", [1, 2]),
        ("gemma4.attention.head_count_kv", [2]),
        ("gemma4.attention.head_count_kv", ["a", "b"]),
        ("gemma4.attention.sliding_window_pattern", ["a", "b"]),
        ("gemma4.attention.shared_kv_layers", 3),
        ("general.architecture", 7),
        ("general.file_type", "f32"),
        ("tokenizer.ggml.tokens", 5),
        ("tokenizer.ggml.tokens", [1, 2]),
    ],
)
def test_values_that_cannot_be(write, key, value):
    changed = {**TARGET, key: value}
    with pytest.raises(ModelFormatError, match=r"m\.gguf is damaged: its GGUF header says"):
        config_of(read_header(write("m.gguf", changed)))


def test_a_model_without_attention(write):
    mamba = {
        "general.architecture": "mamba",
        "mamba.block_count": 2,
        "mamba.embedding_length": 32,
        "mamba.attention.head_count": 0,
    }
    assert config_of(read_header(write("m.gguf", mamba))) == {
        "model_type": "mamba",
        "hidden_size": 32,
        "num_hidden_layers": 2,
    }


def pair(write, target=TARGET, drafter=DRAFTER):
    known = KnownNames()
    return (
        resolve(write("target.gguf", target), known=known),
        resolve(write("mtp-drafter.gguf", drafter), role="drafter", known=known),
    )


def test_a_pair_that_fits(write):
    check_pair(*pair(write), "mtp")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gemma4-assistant.embedding_length_out": 128}, "hidden size 128"),
        ({"gemma4-assistant.attention.key_length": 32}, "full-attention layers it reads 1 KV head of 32"),
        ({"gemma4-assistant.attention.key_length_swa": 64}, "sliding-attention layers it reads 2 KV heads of 64"),
        ({"gemma4-assistant.attention.head_count_kv": [1, 1]}, "sliding-attention layers it reads 1 KV head of 32"),
        ({"gemma4-assistant.attention.sliding_window": 128}, "sliding window is 128"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "do not have the same tokens: token 1 is"),
        ({"general.architecture": "gemma4"}, "is a target"),
    ],
)
def test_a_drafter_of_another_target(write, changes, said):
    with pytest.raises(PairMismatchError, match=said):
        check_pair(*pair(write, drafter={**DRAFTER, **changes}), "mtp")


def tokens(*names, **kinds):
    """Metadata of a vocabulary; ``kinds`` are the types of tokens that are not ordinary ones, by name."""
    types = [{"control": 3, "user": 4, "unused": 5}.get(kinds.get(name, ""), 1) for name in names]
    return {"tokenizer.ggml.tokens": list(names), "tokenizer.ggml.token_type": types}


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (tokens("a", "b", "c"), tokens("a", "b", "c"), ""),
        (tokens("a", "b", "c", "call", call="control"), tokens("a", "b", "c"), ""),
        (tokens("a", "b"), tokens("a", "b", "call", "pad", call="user", pad="unused"), ""),
        (tokens("a", "b", "call", call="control"), tokens("a", "b", "pad", pad="unused"), ""),
        (tokens("a", "b", "c"), tokens("a", "b"), "token 'c' (id 2) of T is unknown to D"),
        (tokens("a", "b"), tokens("a", "b", "c"), "token 'c' (id 2) of D is unknown to T"),
        (tokens("a", "b", "call", call="control"), tokens("a", "b", "tool", tool="control"), "token 2 is 'call' in T"),
        (tokens("a", "b"), tokens("b", "a"), "token 0 is 'a' in T and 'b' in D"),
        ({"tokenizer.ggml.model": "llama"}, {}, "their tokenizers differ"),
    ],
)
def test_different_tokens(write, ours, theirs, said):
    headers = [read_header(write(name, {**TARGET, **changes})) for name, changes in (("t", ours), ("d", theirs))]
    found = different_tokens(*headers, ("T", "D"))
    assert said in found if said else not found


def test_a_target_with_more_tokens_than_its_assistant(write):
    more = tokens("a", "é", "c", "<tool>", **{"<tool>": "control"})
    check_pair(*pair(write, target={**TARGET, **more}), "mtp")
    with pytest.raises(PairMismatchError, match="vocabulary size is 4, the target's 3"):
        check_pair(*pair(write, drafter={**DRAFTER, **more}), "mtp")


def test_swapped(write):
    with pytest.raises(PairMismatchError, match="swapped"):
        check_pair(*reversed(pair(write)), "mtp")


REPO = [
    "README.md",
    "gemma-Q4_K_M.gguf",
    "gemma-Q8_0.gguf",
    "gemma-UD-Q4_K_XL.gguf",
    "BF16/gemma-BF16-00001-of-00002.gguf",
    "BF16/gemma-BF16-00002-of-00002.gguf",
    "mmproj-BF16.gguf",
    "MTP/mtp-gemma-BF16.gguf",
    "MTP/mtp-gemma-Q8_0.gguf",
]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (None, ["gemma-Q4_K_M.gguf"]),
        ("*Q8_0*.gguf", ["gemma-Q8_0.gguf"]),
        ("*q8_0*.gguf", ["gemma-Q8_0.gguf"]),
        ("*BF16*.gguf", REPO[4:6]),
        ("gemma-BF16-00001-of-00002.gguf", REPO[4:6]),
        ("BF16/gemma-BF16-00002-of-00002.gguf", REPO[4:6]),
        ("MTP/mtp-gemma-BF16.gguf", ["MTP/mtp-gemma-BF16.gguf"]),
        ("mtp-gemma-Q8_0.gguf", ["MTP/mtp-gemma-Q8_0.gguf"]),
        ("MTP/mtp-*Q8*.gguf", ["MTP/mtp-gemma-Q8_0.gguf"]),
    ],
)
def test_choice_of_files(wanted, chosen):
    assert choose_files(REPO, wanted, "m") == chosen


@pytest.mark.parametrize(
    ("names", "wanted", "said"),
    [
        (REPO, "*Q5*.gguf", "no GGUF file"),
        (REPO, "*Q*.gguf", "3 models that fit"),
        (["a-Q8_0.gguf", "a-F16.gguf"], None, "2 models that fit"),
        (REPO[:5], "*BF16*.gguf", "2 files, of which 1"),
        (["mtp-a.gguf"], None, "no GGUF file of a target"),
    ],
)
def test_no_choice_of_files(names, wanted, said):
    with pytest.raises(ModelFormatError, match=said):
        choose_files(names, wanted, "m")


@pytest.mark.parametrize(
    ("quantization", "chosen"),
    [
        ("F16", "a-F16.gguf"),
        ("bf16", "BF16/a-BF16-00001-of-00001.gguf"),
        ("Q2_K", "a-Q2_K.gguf"),
        ("Q2_K_L", "a-Q2_K_L.gguf"),
        ("UD-Q2_K_XL", "a-UD-Q2_K_XL.gguf"),
        ("q4_0", "a_q4_0-it.gguf"),
        ("Q6_K", "Q6_K.gguf"),
        ("Q8_0", None),
    ],
)
def test_a_quantization_is_a_whole_word(quantization, chosen):
    names = [
        *("a-F16.gguf", "BF16/a-BF16-00001-of-00001.gguf", "a-Q2_K.gguf", "a-Q2_K_L.gguf", "a-UD-Q2_K_XL.gguf"),
        *("a_q4_0-it.gguf", "Q6_K.gguf", "MTP/mtp-a-Q8_0.gguf", "MTP/mtp-a-F16.gguf", "mmproj-F16.gguf"),
    ]
    pattern = parse(f"org/a-GGUF:{quantization}").file
    if chosen is None:
        with pytest.raises(ModelFormatError, match="no GGUF file"):
            choose_files(names, pattern, "m")
    else:
        assert choose_files(names, pattern, "m") == [chosen]


@pytest.mark.parametrize(
    ("names", "wanted", "chosen"),
    [
        (["gemma[1].gguf", "gemma1.gguf"], "gemma[1].gguf", "gemma[1].gguf"),
        (["gemma1.gguf"], "gemma[1].gguf", "gemma1.gguf"),  # then it is a pattern
        (["M.GGUF", "m.gguf"], "M.GGUF", "M.GGUF"),
        (["M.GGUF", "backup/m.gguf"], "m.gguf", "M.GGUF"),
        (["m.gguf", "backup/m.gguf", "m.gguf/m.gguf"], "m.gguf", "m.gguf"),
        (["a.gguf", "backup/m.gguf"], "m.gguf", "backup/m.gguf"),
        (["king-of-hearts.gguf", "mmproj-F16.gguf", "x.imatrix.gguf", "gemma-mmproj-F16.gguf"], None, None),
        (["._king-of-hearts.gguf", ".cache/a.gguf", "king-of-hearts.gguf"], None, "king-of-hearts.gguf"),
        (["a-imatrix-Q4_K_M.gguf", "a-mmprojector.gguf"], "*Q4*", "a-imatrix-Q4_K_M.gguf"),
    ],
)
def test_a_name_is_a_file_before_it_is_a_pattern(names, wanted, chosen):
    assert choose_files(names, wanted, "m") == [chosen or names[0]]


def test_parts_of_two_split_models_are_told_apart():
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m-00001-of-00003.gguf"]
    assert choose_files(names, names[1], "m") == names[:2]
    with pytest.raises(ModelFormatError, match="2 models that fit"):
        choose_files(names, None, "m")
    with pytest.raises(ModelFormatError, match=r"3 files, of which 1 are there: m-00002-of-00003\.gguf is missing"):
        choose_files(names, names[2], "m")


@pytest.mark.parametrize(
    "name",
    [
        *("gemma[1].gguf", "MODEL.GGUF", "king-of-hearts.gguf", "mtp-x.gguf", "mmproj-x.gguf", "a*.gguf"),
        *("sha256-01ab", "m-00000-of-00000.gguf", "m-00003-of-00002.gguf"),
    ],
)
def test_an_exact_path_is_that_file(write, tmp_path, name):
    """Whatever its letters, and whatever lies below it or next to it; Ollama's blobs have no suffix."""
    path = write(name, TARGET)
    for other in (f"backup/{name}", "gemma1.gguf"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        write(other, {"general.architecture": "llama"})
    for written in (path, str(path)):
        source = resolve(written, known=KnownNames())
        assert (source.format, source.model_type, source.path) == ("gguf", "gemma4", path)
        assert fetch_gguf(source) == path


def test_any_part_stands_for_a_split_model(write, tmp_path):
    first = write("m-00001-of-00002.gguf", TARGET)
    second = write("m-00002-of-00002.gguf", {"split.no": 1})
    for path in (first, second, tmp_path):
        source = resolve(path, known=KnownNames())
        assert (source.path, source.config["hidden_size"]) == (path, 160)
        assert fetch_gguf(source) == first
    first.unlink()
    for path in (second, tmp_path):
        with pytest.raises(ModelFormatError, match=r"m-00001-of-00002\.gguf is missing"):
            resolve(path, known=KnownNames())


OTHERS = {
    "a.gguf": {"general.type": "imatrix"},
    "b.gguf": {"general.architecture": "clip"},
    "c.gguf": {"general.type": "adapter", "general.architecture": "llama"},
    "d.gguf": {"general.architecture": "controlvector"},
}


def test_what_is_no_model(write, tmp_path):
    for name, metadata in OTHERS.items():
        path = write(name, metadata)
        with pytest.raises(ModelFormatError, match="not a language model"):
            resolve(path, known=KnownNames())
    with pytest.raises(ModelFormatError, match=r"a\.gguf is an importance matrix"):
        resolve(tmp_path, known=KnownNames())
    write("._m.gguf", TARGET)
    drafter = write("drafter.gguf", DRAFTER)
    assert resolve(tmp_path, known=KnownNames()).file == drafter.name
    model = write("mmproj-is-only-its-name.gguf", TARGET)
    (tmp_path / "gone.gguf").symlink_to("nowhere")
    assert resolve(tmp_path, known=KnownNames()).file == model.name
    with pytest.raises(ModelNotFoundError, match="a link to nowhere, which is not there"):
        resolve(tmp_path / "gone.gguf", known=KnownNames())


def test_a_folder_whose_model_is_elsewhere(write, tmp_path):
    path = write("m.gguf", TARGET)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "m.gguf").symlink_to(path)
    assert resolve(folder / "m.gguf", known=KnownNames()).format == "gguf", "named by the user"
    with pytest.raises(ModelFormatError, match="outside the model's folder"):
        resolve(folder, known=KnownNames())


def test_upper_case_on_the_hub():
    assert parse("org/a-GGUF/MODEL.GGUF").file == "MODEL.GGUF"


def test_fetched_from_the_hub(fake_hub, gguf_bytes):
    data = gguf_bytes(TARGET)
    fake_hub.add("org/some-GGUF", {name: data for name in REPO if name.endswith("gguf")})
    known = KnownNames()
    assert fetch_gguf(resolve("org/some-GGUF:Q8_0", known=known)).name == "gemma-Q8_0.gguf"
    first = fetch_gguf(resolve("org/some-GGUF:BF16", known=known))
    assert first.name == "gemma-BF16-00001-of-00002.gguf"
    assert first.with_name("gemma-BF16-00002-of-00002.gguf").is_file()
    assert not any("Q4_K_M" in path for _, path in fake_hub.requests if "resolve" in path)


@pytest.mark.parametrize("how", ["offline", "unreachable", "local_files_only"])
def test_what_is_in_the_cache_needs_no_hub(fake_hub, gguf_bytes, monkeypatch, how):
    import huggingface_hub.hf_api

    files = {"a-Q8_0.gguf": gguf_bytes(TARGET), "a-F16.gguf": gguf_bytes(TARGET)}
    fake_hub.add("org/a-GGUF", files)
    source = resolve("org/a-GGUF:Q8_0", known=KnownNames())
    fetched = fetch_gguf(source)
    if how == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif how == "unreachable":
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits between its retries
    hub = HubOptions(local_files_only=how == "local_files_only")
    assert fetch_gguf(source, hub) == fetched
    other = resolve("org/a-GGUF:F16", hub=HubOptions(local_files_only=True), known=KnownNames())
    with pytest.raises((ModelFormatError, ModelNotFoundError)):
        fetch_gguf(other, hub)


@pytest.mark.parametrize(
    ("counts", "pair", "said"),
    [
        ((1 << 40, 1), b"", "1099511627776 tensors"),
        ((0, 1 << 40), b"", "1099511627776 pairs"),
        # Types: 9 is an array, 0 a u8, 8 a text.
        ((0, 1), struct.pack("<IIQ", 9, 0, 50_000_000) + bytes(50_000_000), "an array of 50000000 items"),
        ((0, 1), struct.pack("<IQ", 8, 70_000_000) + bytes(70_000_000), "a text of 70000000 bytes"),
        ((0, 1), struct.pack("<IIQ", 9, 9, 1 << 20) + struct.pack("<IQ", 0, 0) * (1 << 20), "1048576 arrays in one"),
    ],
)
def test_a_header_of_absurd_size(tmp_path, counts, pair, said):
    """Refused before memory is taken for it."""
    path = tmp_path / "m.gguf"
    key = b"general.architecture"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, *counts, len(key)) + key + pair)
    tracemalloc.start()
    with pytest.raises(ModelFormatError, match=f"holds .*{said}"):
        read_header(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


def test_many_numbers_stay_as_they_are_stored(write):
    kinds = read_header(write("m.gguf", {**TARGET, "tokenizer.ggml.token_type": [1] * 9000})).metadata
    assert list(kinds["tokenizer.ggml.token_type"]) == [1] * 9000
    assert sys.getsizeof(kinds["tokenizer.ggml.token_type"]) < 9000 * 5
