"""Chat brackets found by token id, and tool calls parsed from text."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polydraft.text._chat_parser import ChatParser, parse_tool_call


def parts(tokenizer, prompt, answer):
    """The part that each token of the answer belongs to; brackets are None."""
    parser = ChatParser(tokenizer, tokenizer.encode(prompt))
    return [None if parser.step(token_id) else parser.part for token_id in tokenizer.encode(answer)]


def test_thinking_and_calls(byte_tokenizer):
    found = parts(byte_tokenizer, "", "a<|channel>b<channel|>c<|tool_call>d<tool_call|>e")
    assert found == ["answer", None, "thinking", None, "answer", None, "tool_call", None, "answer"]


def test_brackets_do_not_nest(byte_tokenizer):
    found = parts(byte_tokenizer, "", "<|tool_call><|channel>a<channel|><tool_call|>b<tool_call|>")
    assert found == [None, "tool_call", "tool_call", "tool_call", None, "answer", "answer"]


def test_a_prompt_that_ends_in_open_thinking(byte_tokenizer):
    prompt = "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n"
    assert parts(byte_tokenizer, prompt, "a<channel|>b") == ["thinking", None, "answer"]


def test_a_message_that_mentions_an_opening_token(byte_tokenizer):
    prompt = "<bos><|turn>user\nWhat does <|channel> mean?<turn|>\n<|turn>model\n"
    assert parts(byte_tokenizer, prompt, "ab") == ["answer", "answer"]


def test_a_call_left_open_in_the_prompt_is_not_the_answers(byte_tokenizer):
    assert parts(byte_tokenizer, "<|tool_call>call:f{", "a<tool_call|>") == ["answer", "answer"]


def test_families_without_the_tokens():
    class Bare:
        special_token_ids = frozenset()

        def token_id(self, token):
            return None

    parser = ChatParser(Bare(), [1, 2, 3])
    assert [parser.step(token_id) for token_id in range(9)] == [False] * 9
    assert parser.part == "answer"


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
    call = parse_tool_call(raw)
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
    call = parse_tool_call(raw)
    assert (call.name, call.arguments) == (name, arguments)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(raw=st.text(max_size=20) | st.text(alphabet='call:f{}[],x1.e-<|">tn ', max_size=30).map("call:f{".__add__))
def test_anything_else_is_none_or_a_call_that_json_can_hold(raw):
    call = parse_tool_call(raw)
    if call is not None:
        json.dumps(call.arguments, allow_nan=False)
        assert call.raw == raw


@pytest.mark.parametrize(
    "raw",
    [
        *("", "f{}", "call:{}", "call:f", "call:f{", "call:f{x}", "call:f{x:}", "call:f{x:1", "call:f{x:1} more"),
        *("call:f{x:word}", "call:f{x:nan}", "call:f{x:1_0}", "call:f{x:1e999}", 'call:f{x:<|"|>open}', "call:f[1]"),
        "call:f{x:" + "[" * 100_000,
    ],
)
def test_malformed_calls(raw):
    assert parse_tool_call(raw) is None


def test_numbers():
    found = parse_tool_call("call:f{a:1,b:-2.50,c:3e2,d:+4}").arguments
    assert found == {"a": 1, "b": -2.5, "c": 300.0, "d": 4}
    assert [type(found[key]) for key in "abcd"] == [int, float, float, int]
    assert math.isfinite(found["c"])
