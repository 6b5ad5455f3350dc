"""Prompts of every kind, valid and invalid; models without a tokenizer."""

import re

import pytest
from polydraft.errors import InvalidRequestError, UnsupportedError
from polydraft.text._prompts import encode_prompt
from polydraft.text.ids_only import IdsOnlyTokenizer

USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def encode(byte_tokenizer):
    return lambda prompt, **given: encode_prompt(prompt, byte_tokenizer, vocab_size=byte_tokenizer.vocab_size, **given)


def test_kinds(encode, byte_tokenizer):
    bos = byte_tokenizer.bos_token_id
    assert encode("Hi").token_ids == (bos, 72, 105)
    assert not encode("Hi").is_chat
    chat = encode([USER])
    assert chat.is_chat
    assert list(chat.token_ids) == byte_tokenizer.chat([USER])
    ids = encode((72, 105))
    assert (ids.token_ids, ids.is_chat) == ((72, 105), False)
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    assert encode(parts).token_ids == chat.token_ids


def test_ids_of_arrays(encode):
    numpy = pytest.importorskip("numpy")
    assert encode(numpy.array([72, 105])).token_ids == (72, 105)
    assert encode(numpy.array([72, 105], dtype=numpy.uint8)).token_ids == (72, 105)
    for wrong in (numpy.array([[72, 105]]), numpy.array([1.0, 2.0]), numpy.array([])):
        with pytest.raises(InvalidRequestError):
            encode(wrong)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "is empty"),
        ([], "is empty"),
        (iter(()), "is empty"),
        (None, "type NoneType"),
        (5, "type int"),
        (5.5, "type float"),
        (b"Hi", "type bytes"),
        (bytearray(b"Hi"), "type bytearray"),
        (USER, "type dict"),
        (object(), "type object"),
        (["Hi"], "'Hi'"),
        ([72, "Hi"], "'Hi'"),
        ([72, USER], "neither"),
        ([USER, 72], "neither"),
        ([True], "True"),
        ([1.0], "1.0"),
        ([None], "None"),
        ([-1], "-1"),
        ([10**9], "1000000000"),
        ([[1, 2]], "neither"),
        ("a\ud800b", "surrogate"),
        ([{"role": "user", "content": "a\udfffb"}], "surrogate"),
        ([{"role": "us\ud800er", "content": "Hi"}], "surrogate"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], "surrogate"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "\ud800"}}]}], "surrogate"),
        ([{"role": "user", "content": ""}], "is empty"),
        ([{"role": "system", "content": ""}, {"role": "user", "content": []}], "is empty"),
        ([{"role": "user", "content": [{"type": "text", "text": ""}]}], "is empty"),
        ([{}], "no role"),
        ([{"role": ""}], "no role"),
        ([{"role": 3, "content": "Hi"}], "no role"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": 3}], "type int"),
        ([{"role": "user", "content": {"type": "text"}}], "type dict"),
        ([{"role": "user", "content": ["Hi"]}], "not text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "not text"),
        ([{"role": "user", "content": [{"type": "hologram"}]}], "not text"),
    ],
)
def test_wrong_prompts(encode, prompt, says):
    with pytest.raises(InvalidRequestError, match=re.escape(says)) as caught:
        encode(prompt)
    assert caught.value.hint
    assert len(str(caught.value)) < 300


def test_a_long_wrong_item_is_told_shortly(encode):
    with pytest.raises(InvalidRequestError) as caught:
        encode([[1] * 10_000])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["image", "image_url", "audio", "input_audio", "video", "video_url"])
def test_images_and_audio_are_refused(encode, kind):
    with pytest.raises(UnsupportedError, match=kind) as caught:
        encode([{"role": "user", "content": [{"type": "text", "text": "See"}, {"type": kind, kind: "x"}]}])
    assert caught.value.hint


@pytest.mark.parametrize("name", ["tools", "chat_template_kwargs"])
def test_chat_arguments_are_for_messages(encode, name):
    given = {name: [{"name": "f"}] if name == "tools" else {"enable_thinking": True}}
    assert encode([USER], **given).is_chat
    for prompt in ("Hi", [72]):
        with pytest.raises(InvalidRequestError, match=name):
            encode(prompt, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"tools": "lookup"},
        {"tools": {"name": "lookup"}},
        {"tools": ["lookup"]},
        {"tools": 3},
        {"chat_template_kwargs": "enable_thinking"},
        {"chat_template_kwargs": [("enable_thinking", True)]},
        {"chat_template_kwargs": {3: True}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"chat_template_kwargs": {"add_generation_prompt": False}},
    ],
)
def test_wrong_chat_arguments(encode, given):
    (name,) = given
    with pytest.raises(InvalidRequestError, match=name) as caught:
        encode([USER], **given)
    assert caught.value.hint


def test_text_whose_tokens_the_model_lacks(byte_tokenizer):
    with pytest.raises(InvalidRequestError, match="not a token of this model"):
        encode_prompt("Hi<bos>", byte_tokenizer, vocab_size=100)


def test_surrogates_in_tools(encode):
    tool = {"type": "function", "function": {"name": "look\ud800up"}}
    for given in ({"tools": [tool]}, {"chat_template_kwargs": {"name": "\udc00"}}):
        with pytest.raises(InvalidRequestError, match="surrogate"):
            encode([USER], **given)


def test_empty_content_is_an_empty_turn(encode):
    """The chat template gets it; and a complete surrogate pair is a character."""
    full = encode([USER]).token_ids
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    for empty in (
        {"role": "system", "content": ""},
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": ""},
    ):
        assert len(encode([empty, USER]).token_ids) > len(full)
    assert encode("\U0001f642").token_ids


def test_text_that_comes_to_no_token(hub_tokenizer):
    class Dropping(type(hub_tokenizer)):
        bos_token_id = None

        def __init__(self):
            pass

        def encode(self, text):
            return []

        def chat(self, messages, **given):
            return []

    for prompt in ("\0", [USER]):
        with pytest.raises(InvalidRequestError, match="no tokens"):
            encode_prompt(prompt, Dropping(), vocab_size=10)


def test_without_a_tokenizer():
    tokenizer = IdsOnlyTokenizer(50, eos_token_ids=[1], bos_token_id=2)
    assert encode_prompt([7, 8], tokenizer, vocab_size=tokenizer.vocab_size).token_ids == (7, 8)
    assert (tokenizer.eos_token_ids, tokenizer.token_bytes(7), tokenizer.token_id("<s>")) == ({1}, b"", None)
    for prompt in ("Hi", [USER]):
        with pytest.raises(UnsupportedError, match="no tokenizer"):
            encode_prompt(prompt, tokenizer, vocab_size=50)
    with pytest.raises(InvalidRequestError):
        encode_prompt([50], tokenizer, vocab_size=50)
