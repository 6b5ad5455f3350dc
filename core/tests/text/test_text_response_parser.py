"""Answers parsed by the checkpoint's response template: as Transformers does it, for every way to cut the stream."""

import json
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.errors import ModelFormatError
from polydraft.text._response_template import ResponseTemplate
from polydraft.text._tracker import OutputTracker

GEMMA = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>[\w.:]+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": ["<turn|>", "<|tool_response>", "<eos>"], "content": "text"},
    },
}
QWEN = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)"},
    },
}
OPEN_ENDED = {
    "start_anchor_pattern": r"\[/INST\]",
    "fields": {
        "tool_calls": {"open": "[TOOL_CALLS]", "content": "json", "transform_each": True, "repeats": True,
                       "transform": {"function": {"name": "{name}", "arguments": "{arguments}"}}},
        "content": {"close": "</s>", "repeats": True, "join": "\n"},
    },
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "properties": {
                    "n": {"type": "integer"},
                    "x": {"type": ["number", "null"]},
                    "b": {"anyOf": [{"type": "boolean"}, {"type": "object"}]},
                    "s": {"type": "string"},
                }
            },
        },
    }
]
RELAXED = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Named:
    """Bytes, and tokens with names, some of them special."""

    special = ("<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[/INST]", "</s>")
    names = (*special, "<think>", "</think>", "<tool_call>", "</tool_call>")
    special_token_ids = frozenset(range(300, 300 + len(special)))
    vocab_size = 300 + len(names)

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


NAMED = Named()


def track(tokenizer, spec, ids, *, prompt="", takes=(), tools=(), drafts=(), eos=frozenset(), **given_settings):
    request = TokenRequest(
        prompt_token_ids=tuple(tokenizer.encode(prompt or "\n")),
        settings=GenerationSettings(**{"max_new_tokens": 10**6, **given_settings}),
        seed=0,
        speculate=False,
        num_speculative_tokens=0,
        eos_token_ids=eos,
        max_total_tokens=10**7,
    )
    template = ResponseTemplate(spec, tokenizer)
    tracker = OutputTracker(tokenizer, request, parse_chat=True, response_template=template, tools=tools)
    deltas = []
    for index, token_id in enumerate(ids):
        if tracker.push(token_id, is_draft=index in drafts) is not None:
            break
        if index in takes:
            deltas.append(tracker.take())
    deltas.append(tracker.finish("cancelled"))
    return tracker, deltas


def outcome(tokenizer, spec, text, **more):
    ids = tokenizer.encode(text)
    tracker, deltas = track(tokenizer, spec, ids, takes=range(len(ids)), **more)
    assert "".join(delta.text for delta in deltas) == tracker.text
    return tracker.text, tracker.thinking, [(call.name, call.arguments) for call in tracker.tool_calls]


CALL = '<|tool_call>call:f{x:<|"|>y<|"|>}<tool_call|>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel>thought\n why \n<channel|>\n\nHi there \n<turn|>", ("Hi there", "why", [])),
        (f"{CALL}{CALL}<|tool_response>", ("", "", [("f", {"x": "y"})] * 2)),
        (f"<|channel>thought\nhm{CALL}done", ("done", "hm", [("f", {"x": "y"})])),
        ('<|tool_call>call:a:b{n:None,x:[1e5,{y:<|"|>"<|"|>}]}<tool_call|>',
         ("", "", [("a:b", {"n": None, "x": [1e5, {"y": '"'}]})])),
        ('<|tool_call>call:f{x:<|"|>a<tool_call|>b<|"|>}<tool_call|>c', ("c", "", [("f", {"x": "a<tool_call|>b"})])),
        ('<|tool_call>call:f{x:<|"|>a}<tool_call|>b' + CALL + "c",
         ('call:f{x:<|"|>a}bc', "", [("f", {"x": "y"})])),
        # Cut, malformed, of another field.
        ("a<|tool_call>call:f{x:1", ("acall:f{x:1", "", [])),
        ("a <|tool_call>call:f{x:1}", ("a call:f{x:1}", "", [])),
        ("<|tool_call>call:f{x:word}<tool_call|>b", ("call:f{x:word}b", "", [])),
        ("<|tool_call>nothing<tool_call|>", ("nothing", "", [])),
        # Not what opens a field: text, without the special tokens.
        ("<|channel>other\na<channel|>", ("other\na", "", [])),
    ],
)  # fmt: skip
def test_gemma(byte_tokenizer, text, expected):
    assert outcome(byte_tokenizer, GEMMA, text) == expected


@pytest.mark.parametrize(
    ("spec", "text", "prompt", "expected"),
    [
        (QWEN, "why\n</think>\n\nHi<|im_end|>", "<|im_start|>assistant\n<think>\n", ("Hi", "why", [])),
        (QWEN, "Hi</think>", "<|im_start|>assistant\n<think>\n\n</think>\n\n", ("Hi</think>", "", [])),
        (QWEN, " there \n", "<|im_start|>assistant\nHi", (" there", "", [])),
        (QWEN, "there", "<|im_start|>assistant\nHi ", ("there", "", [])),
        (QWEN, "there", "no anchor", ("there", "", [])),
        (
            QWEN,
            "a\n<tool_call>\n<function=f>\n<parameter=n>\n3.0\n</parameter><parameter=x>null</parameter>"
            "<parameter=b>True</parameter><parameter=s>7</parameter><parameter=other>7</parameter>"
            "</function>\n</tool_call>\n<tool_call><function=g></function></tool_call>",
            "",
            ("a", "", [("f", {"n": 3, "x": None, "b": True, "s": "7", "other": "7"}), ("g", {})]),
        ),
        (QWEN, "<tool_call>?</tool_call>", "", ("<tool_call>?</tool_call>", "", [])),
        (QWEN, "a<tool_call><function=f><par", "", ("a<tool_call><function=f><par", "", [])),
        # No close: the call ends with the output.
        (OPEN_ENDED, '[TOOL_CALLS][{"name": "f", "arguments": {"n": "1"}}]', "[/INST]", ("", "", [("f", {"n": 1})])),
        (OPEN_ENDED, '[TOOL_CALLS][{"name": "f", "arg', "[/INST]", ('[{"name": "f", "arg', "", [])),
        (OPEN_ENDED, "a </s> b", "[/INST]", ("a\nb", "", [])),
        (OPEN_ENDED, 'f", "arguments": {}}]', '[/INST][TOOL_CALLS][{"name": "', ("", "", [("f", {})])),
    ],
)
def test_other_templates(spec, text, prompt, expected):
    assert outcome(NAMED, spec, text, prompt=prompt, tools=TOOLS) == expected


def test_text_that_spells_a_token_is_text():
    ids = [*b"<think>a</think>", NAMED.token_id("<think>"), *b"b</think>", NAMED.token_id("</think>"), *b"c"]
    tracker, _ = track(NAMED, QWEN, ids)
    assert (tracker.text, tracker.thinking) == ("<think>a</think>c", "b</think>")


def test_the_end_token_closes_a_call(byte_tokenizer):
    spec = {
        "start_anchor": "x",
        "fields": {"tool_calls": {"open": "<|tool_call>", "close": "<turn|>", "content": "json"}},
    }
    text = '<|tool_call>{"name": "f"}<turn|>'
    assert outcome(byte_tokenizer, spec, text, eos=byte_tokenizer.eos_token_ids) == ("", "", [("f", {})])


pieces = st.lists(
    st.sampled_from(
        [
            *(
                "a",
                " ",
                "\n",
                "é",
                "<",
                '"',
                "\\",
                "{",
                "}",
                "[",
                "]",
                ":",
                ",",
                "x:1",
                "call:f",
                "thought\n",
                "call:f{}",
            ),
            *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<turn|>", "<|think|>", "<eos>"),
            *("<|channel>thought\n", CALL, '<|"|>b<|"|>'),
        ]
    ),
    max_size=12,
)


@RELAXED
@given(
    pieces=pieces,
    takes=st.sets(st.integers(0, 60)),
    stop=st.lists(st.sampled_from(["a", "<turn", "}<tool_call|>", "\n", "b"]), max_size=2, unique=True),
    drafts=st.sets(st.integers(0, 60)),
)
@example(pieces=["<|channel>", "thought", "\n", "a", CALL], takes=set(range(60)), stop=[], drafts=set())
def test_every_cut_gives_the_same(byte_tokenizer, pieces, takes, stop, drafts):
    ids = byte_tokenizer.encode("".join(pieces))
    whole, _ = track(byte_tokenizer, GEMMA, ids, stop=tuple(stop))
    tracker, deltas = track(byte_tokenizer, GEMMA, ids, takes=takes, stop=tuple(stop), drafts=drafts)
    for name in ("text", "thinking", "tool_calls", "raw_text", "stop_match"):
        assert getattr(tracker, name) == getattr(whole, name), name
    assert "".join(delta.text for delta in deltas) == tracker.text
    assert "".join(delta.thinking for delta in deltas) == tracker.thinking
    assert tuple(call for delta in deltas for call in delta.tool_calls) == tracker.tool_calls
    for delta in deltas:
        assert "".join(segment.text for segment in delta.segments) == delta.text


words = st.text(alphabet='ab é日\n "{}:,', min_size=0, max_size=8)
names = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)


def written(value):
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(inner) for inner in value) + "]"
    return json.dumps(value)


@RELAXED
@given(
    thinking=st.none() | words,
    calls=st.lists(st.tuples(names, st.dictionaries(names, values, max_size=2)), max_size=2),
    content=words,
    end=st.sampled_from(["", "<turn|>"]),
)
def test_transformers_agrees(byte_tokenizer, thinking, calls, content, end):
    """On answers that are well formed."""
    chat_parsing = pytest.importorskip("transformers.utils.chat_parsing", reason="needs Transformers' parser")
    text = "" if thinking is None else f"<|channel>thought\n{thinking}<channel|>"
    text += "".join(f"<|tool_call>call:{name}{written(arguments)}<tool_call|>" for name, arguments in calls)
    text += content + end
    expected = chat_parsing.parse_response(text, GEMMA, prefix="<|turn>model\n")
    found = outcome(byte_tokenizer, GEMMA, text, prompt="<|turn>model\n")
    functions = [call["function"] for call in expected.get("tool_calls", [])]
    assert found == (
        expected.get("content", ""),
        expected.get("reasoning_content", ""),
        [(function["name"], function["arguments"]) for function in functions],
    )


# Malformed and hostile templates


def with_field(**field):
    return {"start_anchor": "x", "fields": {"content": {}, "tool_calls": {"open": "<|tool_call>", **field}}}


nested = []
for _ in range(100):
    nested = [nested]


@pytest.mark.parametrize(
    "spec",
    [
        *("text", [], {}, {"fields": {"content": {}}}, {"start_anchor": "x"}, {"start_anchor": "x", "fields": []}),
        {"start_anchor": "x", "fields": {"content": {}, "thinking": {}}},
        {"start_anchor": "x", "start_anchor_pattern": "x", "fields": {"content": {}}},
        {"start_anchor": "x", "fields": {"content": {}}, "version": 2},
        {"start_anchor": "x", "fields": {"content": {}}, "more": 1},
        {"start_anchor": "x", "fields": {"content": "text"}},
        {"start_anchor": "x", "fields": {"content": {"content": "json"}}},
        with_field(close=""),
        with_field(close=[]),
        with_field(close=3),
        with_field(close_pattern="("),
        with_field(close_pattern="(" * 990),
        with_field(close_pattern="a" * 2000),
        with_field(close_pattern="(a?){65535}" * 10),
        with_field(close_pattern=None),
        with_field(content="yaml"),
        with_field(content="xml-inline"),
        with_field(content="xml-inline", content_args={"tag_pattern": "a"}),
        with_field(content="kv-lines", content_args={"kv_sep": ""}),
        with_field(content_args=3),
        with_field(content_args={"string_delims": [["a"]]}),
        with_field(join=3),
        with_field(transform="{content} more"),
        with_field(transform=nested),
        with_field(unknown=1),
    ],
)
def test_malformed_templates(byte_tokenizer, spec):
    with pytest.raises(ModelFormatError, match="response_template is malformed") as caught:
        ResponseTemplate(spec, byte_tokenizer)
    assert caught.value.hint


@pytest.mark.parametrize("place", ["open_pattern", "close_pattern", "start_anchor_pattern"])
def test_a_pattern_that_takes_for_ever(byte_tokenizer, place):
    slow = r"(a|aa)+(b|c)\Z"
    spec = with_field()
    if place == "start_anchor_pattern":
        spec = {"start_anchor_pattern": slow, "fields": spec["fields"]}
    else:
        spec["fields"]["thinking"] = {"open": "<", "close": ">", place: slow}
        del spec["fields"]["thinking"][place.removesuffix("_pattern")]
    started = time.monotonic()
    with pytest.raises(ModelFormatError, match="takes more than"):
        track(
            byte_tokenizer, spec, byte_tokenizer.encode("<" + "a" * 2000 + "d"), prompt="a" * 2000 + "d", takes=range(3)
        )
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("opening", "closing"), [("", ""), ("(?=a)", "(?=a)"), ("b*", "b*"), ("(?=a)", r"\Z")])
def test_patterns_that_match_nothing(byte_tokenizer, opening, closing):
    spec = with_field()
    spec["fields"]["thinking"] = {"open_pattern": opening, "close_pattern": closing}
    tracker, _ = track(byte_tokenizer, spec, byte_tokenizer.encode("aabab"), takes=range(5))
    assert tracker.raw_text == "aabab"
