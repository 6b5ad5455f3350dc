"""Headers on which llama.cpp ends the process, and models that cannot be targets: typed errors instead."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import polydraft
import pytest
from polydraft.errors import ModelFormatError, NonFiniteLogitsError, SpeculationUnavailableError, UnsupportedError

CHILD = """
import json, sys
import polydraft
from polydraft.errors import ModelFormatError
target, drafters, targets = json.loads(sys.argv[1])
for file in [*targets, *drafters]:
    print(file, flush=True)
    pair = {"drafter": "ngram"} if file in targets else {"drafter": file}
    try:
        with polydraft.load(file if file in targets else target, backend="llama_cpp", device="cpu", **pair) as session:
            session.generate([2, 300, 301], max_new_tokens=4)
        print("loaded")
    except ModelFormatError as error:
        print("refused")
"""
NAN, MINUS_ONE = 0x7FC00000, 0xBF800000  # the bits of float32
TARGET = [
    ("block_count", 0),
    ("block_count", 513),
    *(("attention.shared_kv_layers", count) for count in (1, 2, 5, 7)),
    ("attention.value_length", 3),
    ("attention.value_length_swa", 64),
    ("attention.sliding_window", 0),
    ("attention.sliding_window", 2**32 - 1),
    ("attention.layer_norm_rms_epsilon", NAN),
    ("attention.layer_norm_rms_epsilon", MINUS_ONE),
    ("rope.dimension_count", 0),
    ("rope.dimension_count", 2),
    ("rope.dimension_count", 63),
    ("rope.dimension_count_swa", 512),
    ("expert_count", 0),
    ("expert_count", 1025),
    ("expert_used_count", 0),
    ("expert_used_count", 9),
]
DRAFTER = [("nextn_predict_layers", 99), ("attention.value_length", 3), ("block_count", 0)]


def damaged(file, folder, key, value):
    """A copy of a file in which the four bytes of a metadata value are replaced."""
    data = bytearray(file.read_bytes())
    name = f".{key}".encode()
    at = data.index(name + b"\x04\0\0\0" if name + b"\x04\0\0\0" in data else name + b"\x06\0\0\0") + len(name) + 4
    data[at : at + 4] = value.to_bytes(4, "little")
    path = folder / f"{key}-{value}-{file.name}"
    path.write_bytes(data)
    return path


def test_what_llama_cpp_asserts(gguf, tmp_path):
    harmless = {("rope.dimension_count", 2)}  # llama.cpp uses the tensor of wavelengths instead
    target, drafter = gguf("tiny-26b"), gguf("tiny-26b-assistant")
    targets = [damaged(target, tmp_path, *case) for case in TARGET]
    twins = tmp_path / "twins.gguf"
    twins.write_bytes(target.read_bytes().replace(b"\x01\0\0\0\0\0\0\0a\x01", b"\x01\0\0\0\0\0\0\0b\x01", 1))
    whole = tmp_path / "whole-numbers.gguf"
    before, after = target.read_bytes().split(b"token_embd.weight", 1)
    whole.write_bytes(before + b"token_embd.weight" + after[:20] + b"\x1a\0\0\0" + after[24:])  # its type: I32
    targets += [twins, whole]
    drafters = [damaged(drafter, tmp_path, *case) for case in DRAFTER]
    given = json.dumps([str(target), [str(file) for file in drafters], [str(file) for file in targets]])
    run = subprocess.run([sys.executable, "-c", CHILD, given], capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, f"{run.stdout[-200:]} ended it with {run.returncode}: {run.stderr[-1000:]}"
    lines = run.stdout.splitlines()
    found = dict(zip(lines[::2], lines[1::2], strict=True))
    loaded = {Path(file).name for file, outcome in found.items() if outcome == "loaded"}
    assert loaded <= {f"{key}-{value}-{target.name}" for key, value in harmless}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A function: a small model of another architecture."""
    path = Path(__file__).parent / "data/other_models.py"
    spec = importlib.util.spec_from_file_location("other_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("other")
    return lambda name: module.write(folder / f"{name}.gguf", name)


def load(target, drafter, **arguments):
    return polydraft.load(target, backend="llama_cpp", device="cpu", drafter=drafter, **arguments)


@pytest.mark.parametrize("drafter", [None, "ngram"])
def test_a_model_for_embeddings(other, drafter):
    with pytest.raises(UnsupportedError, match="does not generate text"):
        load(other("bert"), drafter)


def test_a_recurrent_model_is_decoded_plainly_only(other):
    file = other("mamba")
    with load(file, None) as session:
        assert len(session.generate([2, 7, 9], max_new_tokens=5, ignore_eos=True).token_ids) == 5
    for drafter in ("ngram", file):
        with pytest.raises(SpeculationUnavailableError, match="recurrent layers"):
            load(file, drafter)


def test_a_header_is_checked_before_a_drafter_is_searched(gguf, tmp_path):
    with pytest.raises(ModelFormatError, match=r"says gemma4\.block_count = 4294967295"):
        load(damaged(gguf("tiny-e2b"), tmp_path, "block_count", 2**32 - 1), "auto")


def test_a_token_whose_embedding_is_nan(data, tmp_path):
    """Logits are NaN after it: the error comes there, and the NaN in llama.cpp's cache does not reach the next call."""
    folder = shutil.copytree(data / "tiny-e2b", tmp_path / "tiny-e2b")
    file = folder / "model.safetensors"
    weights = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(weights[:8], "little")
    tensor = json.loads(weights[8:start])["model.embed_tokens_per_layer.weight"]
    at = start + tensor["data_offsets"][0] + 2 * (1999 * tensor["shape"][1] + 5)
    weights[at : at + 2] = (NAN >> 16).to_bytes(2, "little")  # bfloat16
    file.write_bytes(weights)
    given = {"max_new_tokens": 12, "ignore_eos": True}
    pair = {"drafter": "builtin:tiny-e2b-assistant", "backend": "llama_cpp", "device": "cpu"}
    with polydraft.load(str(folder), **pair) as session:
        wanted = session.generate([2, 301, 302], **given).token_ids
        for speculate in ("off", "on"):
            stream = session.stream([2, 301, 302], forced_token_ids={4: 1999}, speculate=speculate, **given)
            with pytest.raises(NonFiniteLogitsError, match="target's logits for position 8 hold NaN"):
                list(stream)
            assert stream.result.token_ids == (*wanted[:4], 1999)
            assert session.generate([2, 301, 302], **given).token_ids == wanted
