"""Records, configs, refusals, tokenizer."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polydraft.contract import Tokenizer
from polydraft.errors import (
    ContextLengthError,
    DeviceError,
    InvalidRequestError,
    ModelFormatError,
    PairMismatchError,
    UnsupportedError,
)
from polydraft_reference import plugin
from polydraft_reference.backend import ReferenceBackend
from polydraft_reference.options import ReferenceOptions
from polydraft_reference.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, ByteTokenizer
from polydraft_reference.toys import toy_request, toy_source
from pydantic import ValidationError

TOKENIZER = ByteTokenizer()


# Records


def test_the_plugin_is_cheap_to_import():
    code = "import sys, polydraft_reference.plugin as p; list(p.polydraft_backends()); print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_records_agree_with_the_backend():
    (record,) = plugin.polydraft_backends()
    backend = ReferenceBackend()
    assert record.factory == f"{ReferenceBackend.__module__}:{ReferenceBackend.__name__}"
    assert record.drafter_kinds == backend.capabilities().drafter_kinds
    assert backend.diagnose().usable
    assert backend.diagnose().rank == 1


def test_shipped_models_load():
    models = {model.name: model for model in plugin.polydraft_local_models()}
    assert set(models) == {"toy", "toy-assistant", "toy-draft"}
    for pair in plugin.polydraft_pairs():
        assert pair.target == "builtin:toy"
        assert pair.drafter.removeprefix("builtin:") in models
        engine = ReferenceBackend().load_engine(toy_request(pair.kind))
        assert engine.max_draft_tokens == 4
        engine.close()
        engine.close()


# Loading


def test_running_says_what_was_asked_for():
    request = toy_request("draft-model", 3, dtype="float64", context_length=99, exactness="bitwise", device="cpu")
    running = ReferenceBackend().load_engine(request).running
    assert (running.backend, running.method, running.num_speculative_tokens) == ("reference", "draft-model", 3)
    assert (running.dtype, running.device, running.context_length) == ("float64", "cpu", 99)
    assert (running.exactness, running.concurrency, running.drafter) == ("bitwise", "concurrent", "builtin:toy-draft")


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"dtype": "bfloat16"}, UnsupportedError, "bfloat16"),
        ({"device": "cuda"}, DeviceError, "cuda"),
        ({"context_length": 1025}, ContextLengthError, "1024"),
        ({"k": 17}, UnsupportedError, "17"),
        ({"target": toy_source("toy", model_type="gemma4")}, UnsupportedError, "gemma4"),
        ({"target": toy_source("toy-assistant")}, UnsupportedError, "toy models"),
        ({"target": toy_source("toy", hidden_size=48)}, PairMismatchError, "48"),
        ({"target": toy_source("toy", seed=-1)}, ModelFormatError, "seed"),
        ({"target": toy_source("toy", seed="1")}, ModelFormatError, "seed"),
        ({"target": toy_source("toy", hidden_size=33)}, ModelFormatError, "multiple"),
        ({"target": toy_source("toy", layer_types=[])}, ModelFormatError, "layer_types"),
        ({"target": toy_source("toy", layer_types=["linear_attention"])}, ModelFormatError, "layer_types"),
        ({"target": toy_source("toy", vocab_size=280)}, ModelFormatError, "vocab_size"),
        ({"target": toy_source("toy", surprise=1)}, ModelFormatError, "surprise"),
        ({"target": toy_source("toy", max_position_embeddings=0)}, ModelFormatError, "max_position_embeddings"),
    ],
)
def test_bad_requests(fields, error, text):
    with pytest.raises(error, match=text):
        ReferenceBackend().load_engine(toy_request(**fields))


@pytest.mark.parametrize("agreement", [-0.1, 1.1, "much"])
def test_bad_assistant(agreement):
    request = toy_request()
    drafter = toy_source("toy-assistant", agreement=agreement)
    request = request.model_copy(update={"plan": request.plan.model_copy(update={"drafter": drafter})})
    with pytest.raises(ModelFormatError, match="agreement"):
        ReferenceBackend().load_engine(request)


@pytest.mark.parametrize("kind", ["mtp", "draft-model"])
def test_a_drafter_of_the_other_kind_is_refused(kind):
    other = {"mtp": "draft-model", "draft-model": "mtp"}[kind]
    request = toy_request(kind)
    request = request.model_copy(update={"plan": request.plan.model_copy(update={"kind": other})})
    assert "of type" in ReferenceBackend().refuse(request.target, request.plan)
    with pytest.raises(UnsupportedError, match="of type"):
        ReferenceBackend().load_engine(request)


def test_good_pairs_are_not_refused():
    for kind in ("mtp", "draft-model", "ngram", None):
        request = toy_request(kind)
        assert ReferenceBackend().refuse(request.target, request.plan) is None


@pytest.mark.parametrize("options", [{"agreement": 2}, {"agreement": -1}, {"agree": 1}])
def test_bad_options(options):
    with pytest.raises(ValidationError):
        ReferenceOptions(**options)


# Tokenizer


def decode(token_ids):
    return b"".join(map(TOKENIZER.token_bytes, token_ids))


@given(st.text())
def test_encoding_comes_back(text):
    assert decode(TOKENIZER.encode(text)) == text.encode()


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", "<", "|", "é", "\n"])))
def test_special_tokens_are_recognised_in_text(parts):
    token_ids = TOKENIZER.encode("".join(parts))
    assert decode(token_ids).decode() == "".join(parts)
    assert [i for i in token_ids if i >= 256] == [TOKENIZER.token_id(p) for p in parts if p in SPECIAL_TOKENS]


def test_ids_of_tokens():
    assert TOKENIZER.token_id("A") == 65
    assert TOKENIZER.token_id("é") is None
    assert TOKENIZER.token_id("<end_of_turn>") is None
    assert TOKENIZER.token_id("") is None
    assert TOKENIZER.token_id("<eos>") in TOKENIZER.eos_token_ids
    assert TOKENIZER.token_id("<turn|>") in TOKENIZER.eos_token_ids
    assert {TOKENIZER.token_id(token) for token in SPECIAL_TOKENS} == TOKENIZER.special_token_ids
    assert TOKENIZER.bos_token_id == TOKENIZER.token_id("<bos>")
    assert TOKENIZER.vocab_size == VOCAB_SIZE
    for bad in (-1, VOCAB_SIZE):
        with pytest.raises(InvalidRequestError, match=str(bad)):
            TOKENIZER.token_bytes(bad)


def test_it_has_all_that_the_protocol_asks_for():
    assert {name for name in vars(Tokenizer) if not name.startswith("_")} <= set(dir(TOKENIZER))


def test_chat():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}]},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    assert decode(TOKENIZER.chat(messages)).decode() == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi you<turn|>\n<|turn>model\nYes?<turn|>\n"
        "<|turn>user\nGo<turn|>\n<|turn>model\n"
    )
    assert TOKENIZER.chat(messages).count(TOKENIZER.bos_token_id) == 1
    opened = TOKENIZER.chat(messages[:3], continue_final_message=True)
    assert decode(opened).decode().endswith("<turn|>\n<|turn>model\nYes?")


def test_chat_with_tools_and_thinking():
    tool = {"type": "function", "function": {"name": "clock"}}
    text = decode(
        TOKENIZER.chat([{"role": "user", "content": "Hi"}], tools=[tool], template_kwargs={"enable_thinking": True})
    ).decode()
    assert text.startswith("<bos><|turn>system\n<|think|>\n<|tool>{")
    assert json.loads(text.partition("<|tool>")[2].partition("<tool|>")[0]) == tool
    calls = [{"function": {"name": "clock", "arguments": {}}}]
    text = decode(
        TOKENIZER.chat(
            [
                {"role": "user", "content": "Time?"},
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "content": "noon"},
            ]
        )
    ).decode()
    assert json.loads(text.partition("<|tool_call>")[2].partition("<tool_call|>")[0]) == calls[0]
    assert "<|tool_response>noon<tool_response|>" in text


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "wizard", "content": "x"}],
        [{"content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ],
)
def test_bad_messages(messages):
    with pytest.raises(InvalidRequestError):
        TOKENIZER.chat(messages)
