"""Messages of every shape that OpenAI's API takes come to the same prompt; what is wrong is refused."""

import copy
import json
import re

import pytest
from polydraft.errors import InvalidRequestError, ModelFormatError, UnsupportedError
from polydraft.text import _templates
from polydraft.text._messages import normalised_messages, normalised_tools
from polydraft.text._prompts import encode_prompt

USER = {"role": "user", "content": "Weather?"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
CALLS = [
    {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 3}}},
    {"id": "b", "type": "function", "function": {"name": "clock", "arguments": {}}},
]
PLAIN = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "name": "weather", "tool_call_id": "a", "content": "rain"},
    {"role": "tool", "name": "clock", "tool_call_id": "b", "content": "12:00"},
]


def call(name, arguments, **more):
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(system=PLAIN[0], assistant=PLAIN[2], first=PLAIN[3], second=PLAIN[4]):
    return [system, USER, assistant, first, second]


SHAPES = [
    conversation(system={"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]}),
    conversation(system={"role": "system", "content": [{"type": "text", "text": t} for t in ("Be ", "brief", ".")]}),
    conversation(assistant={"role": "assistant", "content": None, "tool_calls": CALLS}),
    conversation(assistant={"role": "assistant", "tool_calls": tuple(CALLS)}),
    conversation(assistant={"role": "assistant", "content": [], "tool_calls": CALLS}),
    # What a client library's ``model_dump`` gives.
    conversation(
        assistant={
            **dict.fromkeys(("content", "refusal", "audio", "function_call")),
            "role": "assistant",
            "tool_calls": [
                call("weather", '{"city": "Oslo", "days": 3}', id="a"),
                call("clock", "", id="b", index=None),
            ],
        }
    ),
    conversation(
        assistant={
            "role": "assistant",
            "tool_calls": [
                {"id": "a", "name": "weather", "arguments": {"city": "Oslo", "days": 3}},
                {"id": "b", "function": {"name": "clock"}},
            ],
        }
    ),
    # A tool's name comes from the call: by the id, or by the place.
    conversation(first={"role": "tool", "tool_call_id": "a", "content": "rain"}),
    conversation(
        first={"role": "tool", "content": [{"type": "text", "text": "rain"}]},
        second={"role": "function", "name": "clock", "content": "12:00"},
    ),
    conversation(
        first={"role": "tool", "content": "rain"}, second={"role": "tool", "tool_call_id": "b", "content": "12:00"}
    ),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_comes_to_the_plain_one(shape, byte_tokenizer, hub_tokenizer):
    before = copy.deepcopy(shape)
    assert normalised_messages(shape) == PLAIN
    assert shape == before
    for tokenizer in (byte_tokenizer, hub_tokenizer):
        found = encode_prompt(shape, tokenizer, vocab_size=tokenizer.vocab_size)
        assert list(found.token_ids) == tokenizer.chat(PLAIN)


def test_answers_in_another_order_keep_their_names():
    first, second = ({"role": "tool", "tool_call_id": name, "content": "x"} for name in "ba")
    assert [m["name"] for m in normalised_messages(conversation(first=first, second=second))[3:]] == [
        "clock",
        "weather",
    ]
    # An id of an earlier turn may come again.
    again = [*PLAIN, {"role": "assistant", "content": "", "tool_calls": [call("later", {}, id="a")]}]
    assert normalised_messages([*again, {"role": "tool", "tool_call_id": "a", "content": "x"}])[-1]["name"] == "later"


def test_calls_without_ids_are_answered_in_their_order():
    calls = [call("f", {}), call("g", "{}")]
    answers = [{"role": "tool", "content": "1"}, {"role": "tool", "tool_call_id": "made up", "content": "2"}]
    found = normalised_messages([USER, {"role": "assistant", "tool_calls": calls}, *answers])
    assert [message["name"] for message in found[2:]] == ["f", "g"]
    # No call at all: the template decides.
    assert normalised_messages([{"role": "tool", "content": "1"}]) == [{"role": "tool", "content": "1"}]


def test_the_form_before_tools_and_refusals():
    messages = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": [1]}'}},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]
    found = normalised_messages(messages)
    assert found[0]["tool_calls"] == [call("f", {"x": [1]})]
    assert [message["content"] for message in found[1:]] == ["1", "No.", "No."]
    assert found[1]["role"] == "tool"


def test_other_keys_are_kept():
    given = {"role": "user", "content": "Hi", "name": "Ann", "custom": {"a": (1, None)}}
    assert normalised_messages([given]) == [{**given, "custom": {"a": [1, None]}}]


cyclic = {"role": "user", "content": "Hi"}
cyclic["self"] = cyclic
wide = ["x"] * 50
for _ in range(9):
    wide = [wide] * 50


class Dumped:
    def model_dump(self):
        return {}


@pytest.mark.parametrize(
    ("message", "says"),
    [
        *(
            ({"role": "assistant", "tool_calls": [call("f", wrong)]}, says)
            for wrong, says in (
                ("{", "not JSON"),
                ('{"x": NaN}', "not JSON"),
                ("[" * 100_000, "not JSON"),
                ('{"x": "\\ud800"}', "surrogate"),
                ("[1]", "type list"),
                ("3", "type int"),
                ('"text"', "type str"),
                ([1], "type list"),
                (3, "type int"),
                ({1: 2}, "key 1"),
                ({"x": {None: 1}}, "key None"),
                (Dumped(), "model_dump"),
            )
        ),
        ({"role": "assistant", "tool_calls": [{}]}, "no name"),
        ({"role": "assistant", "tool_calls": [call("", {})]}, "no name"),
        ({"role": "assistant", "tool_calls": [call(3, {})]}, "no name"),
        ({"role": "assistant", "tool_calls": ["f"]}, "no name"),
        ({"role": "assistant", "tool_calls": [call("f", {}, id=3)]}, "id of the call"),
        ({"role": "assistant", "tool_calls": call("f", {})}, "type dict"),
        ({"role": "assistant", "tool_calls": "f"}, "type str"),
        ({"role": "assistant", "tool_calls": [Dumped()]}, "model_dump"),
        ({"role": "assistant", "tool_calls": []}, "no content"),
        ({"role": "user", "content": "Hi", "tool_calls": [call("f", {})]}, "user message has tool calls"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "tool_call_id"),
        ({"role": "user", "content": "x", "name": ["Ann"]}, "name"),
        ({"role": "user", "content": "x", 3: 4}, "key 3"),
        ({"role": "user", "content": "x", "more": wide}, "too large"),
        (cyclic, "levels deep"),
        (Dumped(), "model_dump"),
    ],
)
def test_wrong_messages(byte_tokenizer, message, says):
    with pytest.raises(InvalidRequestError, match=re.escape(says)) as caught:
        encode_prompt([USER, message], byte_tokenizer, vocab_size=byte_tokenizer.vocab_size)
    assert caught.value.hint
    assert len(str(caught.value)) < 400


def test_an_answer_to_no_call(byte_tokenizer):
    wrong = conversation(first={"role": "tool", "tool_call_id": "c", "content": "rain"})
    with pytest.raises(InvalidRequestError, match="answers the call 'c'"):
        encode_prompt(wrong, byte_tokenizer, vocab_size=byte_tokenizer.vocab_size)


# Tools


def test_tools():
    bare = TOOL["function"]
    for given in (TOOL, bare, {"type": "function", **bare}, {"function": bare}):
        assert normalised_tools([given]) == [TOOL]
    assert normalised_tools(({**TOOL, "strict": True},)) == [{**TOOL, "strict": True}]
    assert normalised_tools([]) is normalised_tools(None) is None


@pytest.mark.parametrize(
    "tool", [{}, {"type": "function"}, {"type": "web_search"}, {"type": "function", "function": "f"}, {"name": 3}]
)
def test_wrong_tools(tool):
    with pytest.raises(InvalidRequestError, match="no name of a function") as caught:
        normalised_tools([tool])
    assert caught.value.argument == "tools"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ({"description": 5}, "the description of f is not text"),
        ({"parameters": 5}, "`parameters` of f is of type int"),
        ({"parameters": []}, "`parameters` of f is of type list"),
        ({"parameters": {"properties": ["a"]}}, "`properties` of f is of type list"),
        ({"parameters": {"properties": {"a": None}}}, "the schema of f.a is of type NoneType"),
        ({"parameters": {"properties": {"a": {"items": {"properties": {"b": "x"}}}}}}, r"f\.a\[\]\.b is of type str"),
    ],
)
def test_tools_whose_schema_is_none(function, says):
    with pytest.raises(InvalidRequestError, match=says) as caught:
        normalised_tools([{"type": "function", "function": {"name": "f", **function}}])
    assert caught.value.argument == "tools"


def test_schemas_that_are_booleans():
    """Templates go through the properties as through objects."""
    (found,) = normalised_tools([{"name": "f", "parameters": {"properties": {"a": True, "b": False}}}])
    assert found["function"]["parameters"]["properties"] == {"a": {}, "b": {"not": {}}}


# Templates that differ


class Templated:
    """A tokenizer of bytes whose template is the given function of messages and tools."""

    special_token_ids = frozenset()
    bos_token_id = None
    vocab_size = 256

    def __init__(self, template):
        self.template = template
        self.count = 0

    def token_bytes(self, token_id):
        return bytes([token_id])

    def chat(self, messages, *, tools=None, template_kwargs=None, continue_final_message=False):
        self.count += 1
        return list(self.template(messages, tools).encode())


def prompt_of(template, messages, **given):
    tokenizer = Templated(template)
    ids = encode_prompt(messages, tokenizer, vocab_size=256, **given).token_ids
    return bytes(ids).decode()


def test_a_template_that_knows_parts_only():
    def template(messages, tools):
        return "".join(f"{part['type']}={part['text']};" for m in messages for part in m["content"] if "type" in part)

    for content in ("Hi", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]):
        assert prompt_of(template, [{"role": "user", "content": content}]) == "text=Hi;"


def test_a_template_that_takes_both_gets_text():
    def template(messages, tools):
        content = messages[0]["content"]
        return content if isinstance(content, str) else " | ".join(part["text"] for part in content)

    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert prompt_of(template, [{"role": "user", "content": parts}]) == "Hi"


@pytest.mark.parametrize("expected", ["", None])
def test_calls_next_to_the_empty_content_that_the_template_expects(expected):
    def template(messages, tools):
        calls = json.dumps(messages[-1].get("tool_calls")) if messages[-1]["content"] == expected else ""
        return f"{messages[0]['content']}{calls}"

    for content in ("", None, []):
        messages = [USER, {"role": "assistant", "content": content, "tool_calls": CALLS}]
        assert prompt_of(template, messages) == f"Weather?{json.dumps(CALLS)}"


def test_templates_that_leave_out_calls_or_tools():
    def template(messages, tools):
        return str(messages[0]["content"])

    with pytest.raises(UnsupportedError, match="does not render tool calls"):
        prompt_of(template, [USER, {"role": "assistant", "tool_calls": CALLS}])
    with pytest.raises(UnsupportedError, match="leaves them out"):
        prompt_of(template, [USER], tools=[TOOL])
    assert prompt_of(template, [USER], tools=[]) == "Weather?"


def test_habits_are_found_once():
    tokenizer = Templated(lambda messages, tools: f"{messages}{tools}")
    known = {"vocab_size": 256, "habits": {}}
    for _ in range(3):
        tokenizer.count = 0
        encode_prompt([USER, {"role": "assistant", "tool_calls": CALLS}], tokenizer, **known)
    assert tokenizer.count == 1
    encode_prompt([USER], tokenizer, tools=[TOOL], **known)
    tokenizer.count = 0
    encode_prompt([USER], tokenizer, tools=[TOOL], **known)
    assert tokenizer.count == 1


def test_a_template_that_exceeds_its_limits_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(_templates, "_SECONDS", 0.3)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = Templated(lambda messages, tools: _templates.render(loops, messages, {}, open_end=False, own=True))
    with pytest.raises(ModelFormatError, match=r"more than 0\.3 seconds"):
        encode_prompt([USER, {"role": "assistant", "tool_calls": CALLS}], tokenizer, vocab_size=256)
    assert tokenizer.count == 1


# Continuing an answer


def test_continue_final_message(byte_tokenizer, hub_tokenizer):
    messages = [
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "Sure, "}, {"type": "text", "text": "it"}]},
    ]
    for tokenizer in (byte_tokenizer, hub_tokenizer):
        given = {"vocab_size": tokenizer.vocab_size, "continue_final_message": True}
        ids = encode_prompt(messages, tokenizer, **given).token_ids
        text = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert text.endswith("<|turn>model\nSure, it")
        # Without it, an answer of its own follows.
        ids = encode_prompt(messages, tokenizer, vocab_size=tokenizer.vocab_size).token_ids
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().endswith("Sure, it<turn|>\n<|turn>model\n")


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (USER, "the user's"),
        ({"role": "assistant", "tool_calls": CALLS}, "a tool call"),
        ({"role": "assistant", "content": " \n"}, "is empty"),
    ],
)
def test_what_cannot_be_continued(byte_tokenizer, last, says):
    with pytest.raises(InvalidRequestError, match=says) as caught:
        encode_prompt([USER, last], byte_tokenizer, vocab_size=999, continue_final_message=True)
    assert caught.value.argument == "continue_final_message"


@pytest.mark.parametrize(("prompt", "given"), [("Hi", True), ([72], True), ([USER], "yes"), ([USER], 1), ("Hi", 0)])
def test_continuing_is_for_messages(byte_tokenizer, prompt, given):
    with pytest.raises(InvalidRequestError, match="continue_final_message"):
        encode_prompt(prompt, byte_tokenizer, vocab_size=999, continue_final_message=given)
