"""Chat brackets found by token id, and tool calls parsed from text."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polydraft.text._chat_parser import ChatParser, Piece, parse_tool_calls


def sorted_parts(tokenizer, prompt, answer):
    """(answer, thinking, [(name, arguments) of each call]); pieces are fed as the tracker does."""
    parser = ChatParser(tokenizer, tokenizer.encode(prompt))
    for token_id in tokenizer.encode(answer):
        text = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        parser.feed(Piece(text, token_id, is_draft=False, whole=True))
    parser.finish()
    sink = parser.sink
    calls = [(call.name, call.arguments) for call in sink.calls]
    return "".join(text for text, _ in sink.answer), "".join(sink.thinking), calls


def parsed(raw):
    calls = parse_tool_calls(raw)
    return calls[0] if calls else None


def test_thinking_and_calls(byte_tokenizer):
    answer = "a<|channel>thought\nb<channel|>c<|tool_call>call:f{}<tool_call|>e"
    assert sorted_parts(byte_tokenizer, "", answer) == ("ace", "b", [("f", {})])


CALL = '<|tool_call>call:f{x:<|"|>y<|"|>}<tool_call|>'


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # A call ends a thought, and is a call.
        (f"<|channel>thought\nhm{CALL}", ("", "hm", [("f", {"x": "y"})])),
        (f"<|channel>thought{CALL}done", ("done", "", [("f", {"x": "y"})])),
        (f"<|channel>thought\nhm{CALL}{CALL}<channel|>a", ("a", "hm", [("f", {"x": "y"})] * 2)),
        ("<|channel>thought\nhm<|tool_call>call:f{x", ("call:f{x", "hm", [])),
        # A name on the first line is the channel's, anything else is thinking.
        ("<|channel>thought<channel|>a", ("a", "", [])),
        ("<|channel>Let me see.<channel|>a", ("a", "Let me see.", [])),
        ("<|channel>Let me\nsee.<channel|>a", ("a", "Let me\nsee.", [])),
        # Several calls; the end of the first may be missing.
        (f"{CALL}{CALL}", ("", "", [("f", {"x": "y"})] * 2)),
        (f"<|tool_call>call:g{{}}{CALL}", ("", "", [("g", {}), ("f", {"x": "y"})])),
        (f"<|tool_call>call:g{{{CALL}", ("call:g{", "", [("f", {"x": "y"})])),
        # Brackets in strings are text.
        ('<|tool_call>call:f{x:<|"|>a<tool_call|>b<|tool_call>c<|"|>}<tool_call|>d',
         ("d", "", [("f", {"x": "a<tool_call|>b<|tool_call>c"})])),
        ('<|tool_call>call:f{"x":"a<tool_call|>\\"b"}<tool_call|>d', ("d", "", [("f", {"x": 'a<tool_call|>"b'})])),
        ('<|tool_call>call:f{x:<|"|>"<|"|>}<tool_call|>d', ("d", "", [("f", {"x": '"'})])),
        # A string that is never closed does not swallow what follows.
        (f'<|tool_call>call:f{{x:<|"|>a}}<tool_call|>b{CALL}c',
         ('call:f{x:<|"|>a}bc', "", [("f", {"x": "y"})])),
        # Other brackets in a call are a part of it.
        ("<|tool_call><|channel>a<channel|><tool_call|>b", ("<|channel>a<channel|>b", "", [])),
    ],
)  # fmt: skip
def test_brackets(byte_tokenizer, answer, expected):
    assert sorted_parts(byte_tokenizer, "", answer) == expected


def test_text_that_spells_a_bracket_is_text(byte_tokenizer):
    """Only the tokens themselves are brackets and quotation marks."""
    parser = ChatParser(byte_tokenizer, [])
    spelled = "<|tool_call>call:f{}<tool_call|>"
    parser.feed(Piece(spelled, 65, is_draft=False, whole=True))
    for name in ("<|tool_call>", 'call:f{x:<|"|>', '"<|"|><tool_call|>"', '<|"|>', "}", "<tool_call|>"):
        for token_id in byte_tokenizer.encode(name) if name[0] != '"' else [66]:
            text = name if token_id == 66 else byte_tokenizer.token_bytes(token_id).decode()
            parser.feed(Piece(text, token_id, is_draft=False, whole=True))
    parser.finish()
    assert parser.sink.answer == [(spelled, False)]
    assert [call.arguments for call in parser.sink.calls] == [{"x": '"<|"|><tool_call|>"'}]


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n", "a<channel|>b", ("b", "a", [])),
        ("<|turn>model\n<|channel>", "thought\na<channel|>b", ("b", "a", [])),
        ("<|turn>model\n<|channel>tho", "ught\na<channel|>b", ("b", "a", [])),
        ("<bos><|turn>user\nWhat does <|channel> mean?<turn|>\n<|turn>model\n", "ab", ("ab", "", [])),
        ("<|channel>thought\na<channel|>", "b", ("b", "", [])),
        ("<|tool_call>call:f{", "a<tool_call|>", ("a", "", [])),
    ],
)
def test_the_prompt_decides_where_the_answer_starts(byte_tokenizer, prompt, answer, expected):
    assert sorted_parts(byte_tokenizer, prompt, answer) == expected


class Named:
    """Bytes, and brackets that are tokens but not special, as Qwen's."""

    special_token_ids = frozenset()
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>")

    def token_id(self, token):
        return 300 + self.names.index(token) if token in self.names else None

    def token_bytes(self, token_id):
        return self.names[token_id - 300].encode() if token_id >= 300 else bytes([token_id])

    def encode(self, text):
        found = []
        while text:
            name = next((name for name in self.names if text.startswith(name)), None)
            found += [self.token_id(name)] if name else list(text[0].encode())
            text = text[len(name or text[0]) :]
        return found


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('<think>why<tool_call>\n{"name": "f", "arguments": {"x": "</tool_call>{"}}\n</tool_call>',
         ("", "why", [("f", {"x": "</tool_call>{"})])),
        ('<tool_call>{"name": "a:b", "arguments": "{\\"x\\": 1e5}"}</tool_call>b', ("b", "", [("a:b", {"x": 1e5})])),
        ('<tool_call>[{"name": "f"}, {"name": "g", "parameters": {}}]</tool_call>', ("", "", [("f", {}), ("g", {})])),
        # Malformed: the text, with brackets that are not special tokens.
        *((f"a<tool_call>{raw}</tool_call>b", (f"a<tool_call>{raw}</tool_call>b", "", []))
          for raw in ("<function=f></function>", "{}", '{"name": "f", "arguments": [1]}', '{"name": 1}', "NaN", "[[[",
                      '{"name": "f", "arguments": {"x": 1e999}}', '{"name": "f", "arguments": "x"}')),
        ('<tool_call>{"name": "f"', ('<tool_call>{"name": "f"', "", [])),
    ],
)  # fmt: skip
def test_calls_in_json(answer, expected):
    assert sorted_parts(Named(), "", answer) == expected


def test_families_without_the_tokens():
    class Bare:
        special_token_ids = frozenset()

        def token_id(self, token):
            return None

        def token_bytes(self, token_id):
            return b"a"

    parser = ChatParser(Bare(), [1, 2, 3])
    parser.feed(Piece("<|channel>", 7, is_draft=True, whole=True))
    assert parser.sink.answer == [("<|channel>", True)]


# Tool calls

names = st.from_regex(r"[A-Za-z_]\w{0,9}", fullmatch=True)
texts = st.text(max_size=12).filter(lambda text: '<|"|>' not in text)
scalars = st.none() | st.booleans() | st.integers(-(10**15), 10**15) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)


def written(value):
    """A value as Gemma 4's chat template writes it."""
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(inner) for inner in value) + "]"
    return json.dumps(value)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(name=names, arguments=st.dictionaries(names, values, max_size=4))
def test_calls_come_back(name, arguments):
    raw = f"call:{name}{written(arguments)}"
    call = parsed(raw)
    assert (call.name, call.arguments, call.raw) == (name, arguments, raw)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(name=names, arguments=st.dictionaries(names, scalars | st.lists(scalars, max_size=3), max_size=3))
def test_calls_that_the_real_template_wrote(hub_tokenizer, name, arguments):
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
        {"role": "user", "content": "on"},
    ]
    ids = hub_tokenizer.chat(messages)
    begin, end = ids.index(hub_tokenizer.token_id("<|tool_call>")), ids.index(hub_tokenizer.token_id("<tool_call|>"))
    raw = b"".join(hub_tokenizer.token_bytes(token_id) for token_id in ids[begin + 1 : end]).decode()
    call = parsed(raw)
    assert (call.name, call.arguments) == (name, arguments)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(raw=st.text(max_size=20) | st.text(alphabet='call:f{}[],x1.e-<|">tn ', max_size=30).map("call:f{".__add__))
def test_anything_else_is_none_or_a_call_that_json_can_hold(raw):
    call = parsed(raw)
    if call is not None:
        json.dumps(call.arguments, allow_nan=False)
        assert call.raw == raw


@pytest.mark.parametrize(
    "raw",
    [
        *("", "f{}", "call:{}", "call:f", "call:f{", "call:f{x}", "call:f{x:}", "call:f{x:1", "call:f{x:1} more"),
        *("call:f{x:word}", "call:f{x:nan}", "call:f{x:1_0}", "call:f{x:1e999}", 'call:f{x:<|"|>open}', "call:f[1]"),
        *("call:f{x:" + "[" * 100_000, "[" * 100_000, "call:f{x:" + "9" * 5000 + "}", 'call:a"b{}', "call: {}"),
    ],
)
def test_malformed_calls(raw):
    assert parsed(raw) is None


def test_numbers():
    found = parsed("call:f{a:1,b:-2.50,c:3e2,d:+4,e:-0,f:1.0,g:1e5}").arguments
    assert found == {"a": 1, "b": -2.5, "c": 300.0, "d": 4, "e": 0, "f": 1.0, "g": 100_000.0}
    assert [type(found[key]) for key in "abcdefg"] == [int, float, float, int, int, float, float]
    assert math.isfinite(found["c"])


@pytest.mark.parametrize(
    ("raw", "name", "arguments"),
    [
        ("call:server:tool.sub-name/v2{}", "server:tool.sub-name/v2", {}),
        ("call:wetter_für{x:None,y:True,z:False}", "wetter_für", {"x": None, "y": True, "z": False}),
        ('call:f{x:"a\\"b\nc",\'y\':[{z:<|"|>{"q":[1]}<|"|>}]}', "f", {"x": 'a"b\nc', "'y'": [{"z": '{"q":[1]}'}]}),
        ('call:f{<|"|>a b<|"|>:1,"c:d":2,e:f:3,:4}', "f", {"a b": 1, "c:d": 2, "e:f": 3, "": 4}),
        ("call:f{x:1,x:2}", "f", {"x": 2}),
        ('call:f { x : <|"|><|"|> , }', "f", {"x": ""}),
        ('{"name": "f", "arguments": {"x": [null, {"y": {}}]}}', "f", {"x": [None, {"y": {}}]}),
    ],
)
def test_names_and_values(raw, name, arguments):
    call = parsed(raw)
    assert (call.name, call.arguments, call.raw) == (name, arguments, raw)
