"""What a folder and a GGUF header say about BOS, ends and chat templates: ``checkpoints.special_tokens``."""

import json
import struct

import pytest
from polydraft.checkpoints.gguf import GgufHeader, StringArray
from polydraft.checkpoints.special_tokens import (
    GGUF_KEY,
    SpecialTokens,
    gguf_special_tokens,
    read_special_tokens,
    turn_ends,
)
from polydraft.errors import InvalidRequestError, ModelFormatError, UnsupportedError
from polydraft.text.prompt_format import PromptFormat

DEFAULT_A = {"default": "a"}
HI = [{"role": "user", "content": "Hi"}]
TOKENS = ("<pad>", "<eos>", "<bos>", "<turn|>", "a")


def folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name).write_text(text, encoding="utf-8")
    return read_special_tokens(path, files.get("config.json", {}))


def gguf(tokens=TOKENS, architecture="llama", **metadata):
    raw = b"".join(struct.pack("<Q", len(token.encode())) + token.encode() for token in tokens)
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    values = {"general.architecture": architecture, "tokenizer.ggml.tokens": StringArray(raw, len(tokens)), **keys}
    return GgufHeader(values, {}, {})


def prompt_format(special, *, adds_bos=False, tokens=TOKENS):
    ids = {token: index for index, token in enumerate(tokens)}
    return PromptFormat(special, ids.get, lambda text: [ids.get(text, 4)], adds_bos=adds_bos)


# Folders


@pytest.mark.parametrize(
    ("files", "templates"),
    [
        ({}, {}),
        ({"tokenizer_config.json": {"chat_template": "a"}}, {"default": "a"}),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b"}, {"default": "b"}),
        ({"chat_template.json": {"chat_template": "c"}}, {"default": "c"}),
        ({"chat_template.json": {"chat_template": "c"}, "tokenizer_config.json": {"chat_template": "a"}}, DEFAULT_A),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "r"}]}}, {"rag": "r"}),
        ({"tokenizer_config.json": {"chat_template": {"default": "a", "rag": "r"}}}, {"default": "a", "rag": "r"}),
        ({"chat_template.jinja": "b", "additional_chat_templates/rag.jinja": "r"}, {"default": "b", "rag": "r"}),
        ({"tokenizer_config.json": {"chat_template": "a"}, "additional_chat_templates/rag.jinja": "r"}, {"rag": "r"}),
    ],
)  # fmt: skip
def test_the_order_of_chat_templates(tmp_path, files, templates):
    assert folder(tmp_path, files).chat_templates == templates


@pytest.mark.parametrize("value", [3, [1], [{"name": "a"}], [{"name": "a", "template": 3}], {"a": 3}])
def test_templates_of_a_wrong_type(tmp_path, value):
    with pytest.raises(ModelFormatError, match="chat_template of"):
        folder(tmp_path, {"tokenizer_config.json": {"chat_template": value}})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFormatError, match="cannot be read"):
        read_special_tokens(tmp_path, {})


@pytest.mark.parametrize(
    ("tokenizer", "in_map", "names"),
    [
        ({"add_bos_token": False, "bos_token": "<s>"}, {"x_token": {"content": "<x>"}}, {"bos_token": "<s>", "x_token": "<x>"}),  # noqa: E501
        ({"bos_token": "<s>"}, {"bos_token": {"content": "<b>"}}, {"bos_token": "<b>"}),
        ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "<b>"}, {"bos_token": "<s>"}),
        ({"bos_token": None, "extra_special_tokens": {"x_token": "<x>"}}, {}, {"x_token": "<x>"}),
    ],
)  # fmt: skip
def test_the_order_of_names(tmp_path, tokenizer, in_map, names):
    files = {"tokenizer_config.json": tokenizer, "special_tokens_map.json": in_map}
    assert folder(tmp_path, files).names == names


@pytest.mark.parametrize("kind", ["gemma4", "gemma4_text", "llama"])
def test_gemma_4_needs_bos(tmp_path, kind):
    files = {"config.json": {"model_type": kind}, "tokenizer_config.json": {"bos_token": "<bos>"}}
    special = folder(tmp_path, files)
    assert prompt_format(special).bos_token_id == (2 if kind.startswith("gemma4") else None)


# GGUF


def test_keys_of_a_gguf_header():
    special = gguf_special_tokens(
        gguf(
            tokenizer__ggml__bos_token_id=2,
            tokenizer__ggml__eos_token_id=1,
            tokenizer__ggml__eot_token_id=4,
            tokenizer__ggml__eom_token_id=99,
            tokenizer__ggml__padding_token_id=0,
            tokenizer__ggml__add_bos_token=True,
            tokenizer__chat_template="a",
            tokenizer__chat_template__rag="r",
        )
    )
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    assert special == SpecialTokens(names, frozenset({1, 4}), {"default": "a", "rag": "r"}, adds_bos=True)
    # The turn's end has no key: it is known by name.
    assert prompt_format(special).eos_token_ids == {1, 3, 4}


@pytest.mark.parametrize(
    ("metadata", "adds"),
    [
        ({}, False),
        ({"tokenizer__ggml__model": "llama"}, True),
        ({"tokenizer__ggml__model": "llama", "tokenizer__ggml__add_bos_token": False}, False),
        ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "llama-bpe"}, True),
    ],
)
@pytest.mark.parametrize("template", ["{{ bos_token }}", "a"])
@pytest.mark.parametrize("architecture", ["gemma4", "llama"])
def test_texts_begin_with_bos_if_something_uses_it(metadata, adds, template, architecture):
    header = gguf(
        architecture=architecture, tokenizer__chat_template=template, tokenizer__ggml__bos_token_id=2, **metadata
    )
    special = gguf_special_tokens(header)
    assert special.adds_bos is adds
    uses = adds or architecture == "gemma4" or "bos_token" in template
    assert prompt_format(special, adds_bos=adds).bos_token_id == (2 if uses else None)


def test_a_gguf_file_without_ids():
    assert gguf_special_tokens(gguf()).names == {}
    assert gguf_special_tokens(gguf(tokenizer__ggml__model="llama")).eos_token_ids == {2}  # SentencePiece's own


def test_what_polydraft_wrote():
    written = json.dumps({"names": {"image_token": "a"}, "eos_token_ids": [3, 4]})
    special = gguf_special_tokens(gguf(tokenizer__ggml__eos_token_id=1, **{GGUF_KEY.replace(".", "__"): written}))
    assert (special.names, special.eos_token_ids) == ({"image_token": "a"}, {1, 3, 4})


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokenizer__ggml__bos_token_id": "2"},
        {"tokenizer__chat_template": 3},
        {"polydraft__special_tokens": "{"},
        {"polydraft__special_tokens": '{"names": {"bos_token": 3}, "eos_token_ids": []}'},
    ],
)
def test_values_of_a_wrong_type(metadata):
    with pytest.raises(ModelFormatError, match="of the wrong type"):
        gguf_special_tokens(gguf(**metadata))


# Both


def test_ends_of_a_turn():
    assert turn_ends({"<|end|>": 7, "<|im_end|>": 8, "b": 9}.get) == {7, 8}
    # gpt-oss: it separates the parts of an answer there.
    assert turn_ends({"<|end|>": 7, "<|return|>": 8, "<|call|>": 9}.get) == {8, 9}


def test_the_choice_of_a_template():
    templates = {"default": "<bos>", "tool_use": "<eos>", "rag": "<pad>"}
    chosen = prompt_format(SpecialTokens({}, frozenset(), templates))

    def chat(tools=None, **kwargs):
        return chosen.chat(HI, tools, kwargs, continue_final_message=False)

    assert (chat(), chat([{}]), chat([]), chat(chat_template="rag"), chat(chat_template="<turn|>")) == (
        [2],
        [1],
        [2],
        [0],
        [3],
    )
    with pytest.raises(InvalidRequestError, match="`chat_template` is of type int"):
        chat(chat_template=3)
    with pytest.raises(InvalidRequestError, match="that was given is not valid Jinja"):
        chat(chat_template="{% if %}")
    del templates["default"]
    assert chat([{}]) == [1]
    with pytest.raises(InvalidRequestError, match="no default: rag, tool_use") as caught:
        chat()
    assert "{'chat_template': 'rag'}" in caught.value.hint
    templates.clear()
    with pytest.raises(UnsupportedError, match="no chat template"):
        chat()
