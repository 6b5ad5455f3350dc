"""Structured output over HTTP: what Python's arguments give, in OpenAI's and in vLLM's words."""

import json

import pytest

pytest.importorskip("llguidance", reason="needs llguidance: polydraft[structured]")

CHAT = [{"role": "user", "content": "Describe a lamp."}]
SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "watts": {"type": "integer", "minimum": 1, "maximum": 60}},
    "required": ["on", "watts"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": SCHEMA}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("look", "wait")
]


def answer(server, **fields):
    done = server.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 60, **fields})
    assert done.status == 200, done.body
    return done.json["choices"][0]


@pytest.mark.parametrize("speculate", ["on", "off"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 4}])
def test_json_that_a_schema_allows(toy, speculate, sampling):
    server, session = toy
    expected = session.generate(CHAT, max_new_tokens=60, response_format=FORMAT, **sampling)
    choice = answer(server, response_format=FORMAT, speculate=speculate, **sampling)
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == "stop"
    found = json.loads(choice["message"]["content"])
    assert isinstance(found["on"], bool)
    assert 1 <= found["watts"] <= 60


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"structured_outputs": {"choice": ["red", "green"]}}, {"red", "green"}),
        ({"guided_regex": "a{3}"}, {"aaa"}),
        ({"guided_grammar": 'root ::= "x" | "y"'}, {"x", "y"}),
        ({"guided_json": {"const": 7}}, {"7"}),
    ],
)
def test_in_vllms_words(toy, fields, allowed):
    server, _ = toy
    assert answer(server, **fields)["message"]["content"] in allowed


def test_completions_have_it_too(toy):
    server, _ = toy
    done = server.post("/v1/completions", {"prompt": "A lamp: ", "max_tokens": 60, "response_format": FORMAT})
    assert json.loads(done.json["choices"][0]["text"]).keys() == {"on", "watts"}


CHAIN = {
    "$defs": {f"d{at}": {"items": {"$ref": f"#/$defs/d{at + 1}"}} for at in range(3000)},
    "$ref": "#/$defs/d0",
}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": CHAIN}, "guided_json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": CHAIN}}},
            "response_format",
        ),
        (
            {"guided_grammar": "start: r0\n" + "".join(f'r{at}: "a" r{at + 1}\n' for at in range(9000)) + 'r9000: "b"'},
            "guided_grammar",
        ),
        *(
            ({"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}, "tools")
            for parameters in (
                {"properties": [1]},
                {"type": "object", "required": 5},
                {"enum": None},
                {"properties": {f"p{at}": {"type": "null"} for at in range(2000)}},
            )
        ),
    ],
)
def test_hostile_schemas(toy, fields, param):
    """They ended the server, or were told as its failures."""
    server, _ = toy
    more = {"tool_choice": "required"} if "tools" in fields else {}
    done = server.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, **fields, **more})
    assert (done.status, done.error["param"]) == (400, param)
    assert server.get("/health").status == 200


def test_a_function_that_is_called(toy):
    server, _ = toy
    forced = {"type": "function", "function": {"name": "wait"}}
    done = server.post(
        "/v1/chat/completions", {"messages": CHAT, "max_tokens": 60, "tools": TOOLS, "tool_choice": forced}
    )
    if done.status == 400:
        # The toy's checkpoint has no format for calls, and the server says so.
        assert "tool" in done.json["error"]["message"]
        return
    assert done.json["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "wait"


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}},
            "response_format",
            "no text matches it",
        ),
        ({"structured_outputs": {"json": {"type": "bogus"}}}, "structured_outputs", "Invalid type: bogus. Correct"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        (
            {"guided_json": {"type": "array", "uniqueItems": True}},
            "guided_json",
            'Unimplemented keys: ["uniqueItems"].',
        ),
        (
            {"guided_json": {"type": "array", "items": {"type": "null"}, "minItems": 10**5}},
            "guided_json",
            "Too many items",
        ),
    ],
)
def test_errors_name_the_field(toy, fields, field, says):
    """The field of the request, not Python's argument; and no dump of llguidance's state."""
    server, _ = toy
    done = server.complete(max_tokens=5, **fields)
    assert (done.status, done.error["param"]) == (400, field)
    assert says in done.error["message"]
    assert "`guided`" not in done.error["message"]
    assert "start:" not in done.error["message"]
    assert "<state>" not in done.error["message"]
