"""Bad input is a typed error, and the process survives it: each case runs in a child process, whose exit is checked."""

import json
import subprocess
import sys

import pytest

CHILD = """
import json, sys
import polydraft
from polydraft.errors import PolydraftError
target, arguments = json.loads(sys.argv[1])
try:
    with polydraft.load(target, backend="llama_cpp", device="cpu", **arguments) as session:
        result = session.generate("def main():", max_new_tokens=8)
    print(json.dumps(["loaded", len(result.token_ids)]))
except PolydraftError as error:
    print(json.dumps([type(error).__name__, str(error), bool(error.hint)]))
"""


def outcome(target, **arguments):
    """What a child process reports about a load; fails if it was killed."""
    given = json.dumps([str(target), {name: str(v) if name == "drafter" else v for name, v in arguments.items()}])
    run = subprocess.run([sys.executable, "-c", CHILD, given], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, f"the process ended with {run.returncode}: {run.stderr[-2000:]}"
    found = json.loads(run.stdout.splitlines()[-1])
    if found[0] != "loaded":
        assert found[2], f"no hint: {found[1]}"
    return found[:2]


def expect(found, error, said):
    assert found[0] == error, found
    assert said in found[1], found


def test_a_good_file(gguf):
    assert outcome(gguf("tiny-e2b"), drafter=gguf("tiny-e2b-assistant"))[0] == "loaded"


def test_not_a_gguf(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"<!DOCTYPE html>" * 100)
    expect(outcome(file, drafter="ngram"), "ModelFormatError", "not a GGUF file")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.99])
def test_cut_short(gguf, tmp_path, share):
    data = gguf("tiny-e2b").read_bytes()
    file = tmp_path / "m.gguf"
    file.write_bytes(data[: int(len(data) * share)])
    assert outcome(file, drafter="ngram")[0] == "ModelFormatError"


def test_drafter_cut_short(gguf, tmp_path):
    data = gguf("tiny-e2b-assistant").read_bytes()
    file = tmp_path / "mtp-m.gguf"
    file.write_bytes(data[: int(len(data) * 0.9)])
    assert outcome(gguf("tiny-e2b"), drafter=file)[0] == "ModelFormatError"


@pytest.mark.parametrize("name", ["bertx", "clip"])
def test_another_architecture(gguf, tmp_path, name):
    data = gguf("tiny-llama").read_bytes()
    architecture = name.encode().ljust(5, b"x")
    file = tmp_path / "m.gguf"
    file.write_bytes(data.replace(b"llama", architecture))
    expect(outcome(file, drafter="ngram"), "ModelFormatError", "architecture")


def test_fewer_tensors_than_the_header_says(changed):
    def deeper(config):
        config["num_hidden_layers"] += 1

    expect(outcome(changed("tiny-llama", deeper), drafter="ngram"), "ModelFormatError", "llama.cpp cannot load")


def test_target_and_drafter_swapped(gguf):
    found = outcome(gguf("tiny-e2b-assistant"), drafter=gguf("tiny-e2b"))
    expect(found, "PairMismatchError", "swapped")


def test_a_drafter_as_the_target(gguf):
    expect(outcome(gguf("tiny-e2b-assistant"), drafter="ngram"), "PairMismatchError", "is a drafter")


def test_two_targets(gguf, tmp_path):
    file = tmp_path / "mtp-tiny.gguf"
    file.write_bytes(gguf("tiny-31b").read_bytes())
    expect(outcome(gguf("tiny-e2b"), drafter=file), "PairMismatchError", "is a target")


@pytest.mark.parametrize("other", ["tiny-31b", "tiny-26b"])
def test_a_drafter_of_another_target(gguf, other):
    expect(outcome(gguf("tiny-e2b"), drafter=gguf(f"{other}-assistant")), "PairMismatchError", "is not a drafter for")


def test_an_assistant_for_a_target_of_another_family(gguf):
    found = outcome(gguf("tiny-llama"), drafter=gguf("tiny-e2b-assistant"))
    expect(found, "PairMismatchError", "is a drafter for gemma4 targets")


@pytest.mark.parametrize("drafter", ["tiny-e2b-assistant", "tiny-llama-draft"])
def test_other_tokens(gguf, changed, drafter):
    def swap(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        first, second = [text for text, index in vocab.items() if index in (1000, 1001)]
        vocab[first], vocab[second] = vocab[second], vocab[first]

    target = "tiny-e2b" if "assistant" in drafter else "tiny-llama"
    found = outcome(gguf(target), drafter=changed(drafter, tokens=swap))
    expect(found, "PairMismatchError", "do not have the same tokens")


def test_a_context_larger_than_memory(changed):
    def longer(config):
        config["max_position_embeddings"] = 2**31 - 1

    file = changed("tiny-e2b", longer)
    expect(outcome(file, drafter="ngram", context_length=2**31 - 1), "OutOfMemoryError", "GiB")
    # Without context_length it becomes as long as memory allows, with a note.
    assert outcome(file, drafter="ngram", engine_options={"flash_attn": "off"})[0] == "loaded"


def test_a_context_longer_than_the_model(gguf):
    expect(outcome(gguf("tiny-e2b"), drafter="ngram", context_length=10**6), "ContextLengthError", "8192")


def test_a_batch_smaller_than_a_step(gguf):
    found = outcome(
        gguf("tiny-e2b"),
        drafter=gguf("tiny-e2b-assistant"),
        num_speculative_tokens=8,
        engine_options={"n_batch": 8},
    )
    expect(found, "InvalidRequestError", "n_batch")


@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_a_small_batch(gguf, flash_attn):
    options = {"n_batch": 5, "flash_attn": flash_attn}
    assert outcome(gguf("tiny-e2b"), drafter=gguf("tiny-e2b-assistant"), engine_options=options)[0] == "loaded"


def test_another_dtype_than_the_file_has(gguf):
    expect(outcome(gguf("tiny-e2b"), drafter="ngram", dtype="bfloat16"), "InvalidRequestError", "float32")
