"""``HubTokenizer`` against the tokenizers that it wraps: the built-in pairs', and one like SentencePiece's."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polydraft.errors import InvalidRequestError, ModelFormatError, UnsupportedError
from polydraft.text._prompts import encode_prompt
from polydraft.text.hub_tokenizer import HubTokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers")
tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")

HI = [{"role": "user", "content": "Hi"}]
RELAXED = settings(max_examples=150, deadline=None, derandomize=True)


def text_of(tokenizer, ids):
    return b"".join(tokenizer.token_bytes(token_id) for token_id in ids).decode("utf-8", "replace")


def sentencepiece(tokens, *, prepend=False, bos_first=False):
    """A byte-fallback BPE as Gemma's and Llama's tokenizer.json has it, wrapped as Transformers does."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *tokens]
    model = tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    replace = tokenizers.normalizers.Replace(" ", "\u2581")
    backend.normalizer = (
        tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("\u2581"), replace]) if prepend else replace
    )
    steps = [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    backend.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Strip(" ", 1, 0)] if prepend else steps)
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names[:3]])
    if bos_first:
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


# Text of tokens


@RELAXED
@given(text=st.text(max_size=30))
def test_byte_level_text_comes_back(hub_tokenizer, transformers_tokenizer, text):
    ids = hub_tokenizer.encode(text)
    assert ids == transformers_tokenizer(text, add_special_tokens=False).input_ids
    assert text_of(hub_tokenizer, ids) == text


@RELAXED
@given(data=st.data())
def test_byte_level_ids_decode_as_transformers_does(hub_tokenizer, transformers_tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, hub_tokenizer.vocab_size - 1), max_size=12))
    special = hub_tokenizer.special_token_ids
    ids = [token_id for token_id in ids if token_id not in special]
    assert text_of(hub_tokenizer, ids) == transformers_tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_every_token_has_its_bytes(hub_tokenizer, transformers_tokenizer):
    for token, token_id in transformers_tokenizer.get_vocab().items():
        assert hub_tokenizer.token_id(token) == token_id
        if token_id in hub_tokenizer.special_token_ids:
            assert hub_tokenizer.token_bytes(token_id) == token.encode()
        else:
            assert hub_tokenizer.token_bytes(token_id)
    singles = {hub_tokenizer.token_bytes(token_id) for token_id in range(hub_tokenizer.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= singles


@RELAXED
@given(text=st.text(max_size=20))
@pytest.mark.parametrize("prepend", [False, True])
def test_byte_fallback_text_comes_back(prepend, text):
    tokenizer = HubTokenizer(_sentencepieces[prepend])
    text = text.replace("\u2581", "").replace("<s>", "").replace("</s>", "").replace("<unk>", "")
    ids = tokenizer.encode(text)
    # Not the first token: its leading space is kept, which Transformers strips from a whole text only.
    assert text_of(tokenizer, ids) == (f" {text}" if prepend and text else text)
    assert all(tokenizer.token_bytes(token_id) for token_id in ids)


_sentencepieces = {prepend: sentencepiece(["\u2581", "a", "b", "é"], prepend=prepend) for prepend in (False, True)}


def test_byte_tokens_are_bytes():
    tokenizer = HubTokenizer(_sentencepieces[False])
    assert tokenizer.token_bytes(tokenizer.token_id("<0xF0>")) == b"\xf0"
    assert tokenizer.token_bytes(tokenizer.token_id("\u2581")) == b" "
    assert tokenizer.token_bytes(tokenizer.token_id("<s>")) == b"<s>"


# Ids


def test_special_tokens_and_ends(hub_tokenizer):
    assert hub_tokenizer.bos_token_id == 2
    assert hub_tokenizer.eos_token_ids == {1, 5, 13}
    named = {hub_tokenizer.token_id(name) for name in ("<pad>", "<turn|>", "<|channel>", '<|"|>')}
    assert named <= hub_tokenizer.special_token_ids
    assert hub_tokenizer.encode("<turn|>") == [hub_tokenizer.token_id("<turn|>")]
    assert hub_tokenizer.token_id("no such token") is None


def test_size_of_the_vocabulary():
    gaps = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 9}, []))
    gaps.decoder = tokenizers.decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=gaps)
    assert HubTokenizer(wrapped).vocab_size == 10
    model = HubTokenizer(wrapped, vocab_size=12)
    assert model.vocab_size == 12
    assert (model.token_bytes(5), model.token_bytes(11)) == (b"", b"")
    assert encode_prompt([11], model, vocab_size=model.vocab_size).token_ids == (11,)


def test_a_tokenizer_of_unknown_kind_is_refused():
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ModelFormatError, match="decoder"):
        HubTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=words))
    with pytest.raises(ModelFormatError, match="fast"):
        HubTokenizer(object())


# BOS once


@pytest.mark.parametrize("text", ["Hi", "<bos>Hi", " <bos>"])
def test_text_begins_with_bos_once(hub_tokenizer, text):
    ids = encode_prompt(text, hub_tokenizer, vocab_size=hub_tokenizer.vocab_size).token_ids
    assert ids[0] == 2
    assert ids[1:2] != (2,)


@pytest.mark.parametrize("bos_first", [False, True])
@pytest.mark.parametrize("template", ["<s>{{ messages[0].content }}", "{{ messages[0].content }}"])
def test_chat_has_bos_once(bos_first, template):
    wrapped = sentencepiece(["a"], bos_first=bos_first)
    wrapped.chat_template = template
    ids = HubTokenizer(wrapped).chat([{"role": "user", "content": "a"}])
    assert ids.count(1) == (1 if bos_first or template.startswith("<s>") else 0)


# Chat


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": True}])
def test_chat_is_the_templates(hub_tokenizer, transformers_tokenizer, arguments):
    ids = hub_tokenizer.chat(HI, template_kwargs=arguments)
    wanted = transformers_tokenizer.apply_chat_template(
        HI, add_generation_prompt=True, tokenize=True, return_dict=False, **arguments
    )
    assert ids == wanted
    think = hub_tokenizer.token_id("<|think|>")
    assert (think in ids) == bool(arguments)


def test_tools_are_declared(hub_tokenizer):
    tool = {"type": "function", "function": {"name": "lookup", "description": "Look up.", "parameters": {}}}
    ids = hub_tokenizer.chat(HI, tools=[tool])
    assert hub_tokenizer.token_id("<|tool>") in ids
    assert "lookup" in text_of(hub_tokenizer, ids)


def test_messages_that_the_template_refuses(hub_tokenizer):
    wrapped = sentencepiece(["a"])
    with pytest.raises(UnsupportedError, match="no chat template"):
        HubTokenizer(wrapped).chat(HI)
    wrapped.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        HubTokenizer(wrapped).chat(HI)
