"""The vocabulary in a file's header as llama.cpp reads it, and texts by the server."""

from array import array

import polydraft
import pytest
from polydraft.checkpoints.gguf import GgufHeader, StringArray, read_header
from polydraft.errors import InvalidRequestError, ModelFormatError
from polydraft_xllamacpp.tokenizer import ServerTokenizer


def strings(*texts):
    raw = b"".join(len(text).to_bytes(8, "little") + text for text in texts)
    return StringArray(raw, len(texts))


def tokenizer(model, tokens, kinds=None, **metadata):
    kinds = {} if kinds is None else {"tokenizer.ggml.token_type": array("i", kinds)}
    named = {"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": strings(*tokens), **kinds, **metadata}
    return ServerTokenizer(GgufHeader(named, {}, {}), None, "m")


@pytest.mark.parametrize("name", ["tiny-e2b", "tiny-llama"])
def test_texts_come_back(gguf, name):
    with polydraft.load(gguf(name), backend="xllamacpp", drafter=None, device="cpu", context_length=256) as session:
        found = session.tokenizer
        for text in ("def main():\n\treturn 'naïve', 12345 # ☃", "👩‍👩‍👧 \r\n  ½", "<bos>x<eos>"):
            assert b"".join(map(found.token_bytes, found.encode(text))) == text.encode()
        with pytest.raises(InvalidRequestError, match="lone surrogate at character 1"):
            found.encode("a\ud800")


def test_byte_level_tokens():
    found = tokenizer("gpt2", ["Ġa".encode(), "Ċ".encode(), "Ã©".encode(), "<Ġ>".encode()], [1, 1, 1, 4])
    assert [found.token_bytes(index) for index in range(4)] == [b" a", b"\n", "é".encode(), "<Ġ>".encode()]


@pytest.mark.parametrize("model", ["llama", "gemma4"])
def test_sentencepiece_tokens(model):
    tokens = [b"<unk>", b"<s>", b"</s>", b"<0x0A>", "▁a".encode(), "é".encode(), "a▁b".encode()]
    found = tokenizer(model, tokens, [2, 3, 3, 6, 1, 1, 4])
    assert [found.token_bytes(index) for index in range(7)] == [*tokens[:3], b"\n", b" a", "é".encode(), tokens[6]]
    assert found.token_id("</s>") == 2
    assert found.token_id("none") is None
    assert {1, 2} <= found.special_token_ids


def test_a_damaged_vocabulary():
    with pytest.raises(ModelFormatError, match="vocabulary of m is damaged"):
        tokenizer("gpt2", [b"a", b"b"], [1])


def test_special_tokens_are_those_of_the_checkpoint(gguf):
    header = read_header(gguf("tiny-e2b"))
    found = ServerTokenizer(header, None, "m")
    names = {name for name in ("<bos>", "<eos>", "<pad>", "<|turn>", "<turn|>") if found.token_id(name) is not None}
    assert {found.token_id(name) for name in names} <= found.special_token_ids
    assert found.vocab_size == len(header.metadata["tokenizer.ggml.tokens"])
