"""``tool_choice``: calls that are forced, in the model's own format."""

import pytest
from polydraft.contract import Guided
from polydraft.errors import InvalidRequestError, UnsupportedError
from polydraft.sampling.structured import check_guided
from polydraft.text._tool_grammar import tool_grammar

pytest.importorskip("llguidance", reason="polydraft[structured]")
pytest.importorskip("polydraft_reference", reason="the reference engine's tokenizer has Gemma 4's tokens")

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Oslo", 'São "P"']},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "exact": {"type": "boolean"},
                "places": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
                "note": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
            },
            "required": ["city", "days"],
            "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number", "enum": [1, 2.5]}}}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def session():
    from polydraft._session.session import Session
    from polydraft_reference.backend import ReferenceBackend
    from polydraft_reference.toys import toy_request

    backend = ReferenceBackend()
    engine = backend.load_engine(toy_request("mtp", 4, agreement=0.5))
    with Session(engine, engine.running, backend.capabilities()) as opened:
        yield opened


@pytest.mark.parametrize("seed", range(2))
def test_a_forced_call_is_a_call(session, seed):
    settings = {"tools": [WEATHER, CLOCK], "temperature": 1.5, "seed": seed, "max_new_tokens": 300}
    plain = session.generate(MESSAGES, tool_choice={"name": "weather"}, speculate="off", **settings)
    assert plain.matches
    (call,) = plain.tool_calls
    assert (call.name, plain.text) == ("weather", "")
    assert call.arguments["city"] in ("Oslo", 'São "P"')
    assert 1 <= call.arguments["days"] <= 9
    assert isinstance(call.arguments.get("exact", True), bool)
    assert all(place.get("x", 1) in (1, 2.5) for place in call.arguments.get("places", []))
    named = {"type": "function", "function": {"name": "weather"}}
    assert session.generate(MESSAGES, tool_choice=named, **settings).token_ids == plain.token_ids
    some = session.generate(MESSAGES, tool_choice="required", **{**settings, "max_new_tokens": 60})
    assert not some.matches or {one.name for one in some.tool_calls} <= {"weather", "clock"}
    assert some.tool_calls or not some.matches


def test_none_hides_the_tools(session):
    hidden = session.generate(MESSAGES, tools=[WEATHER], tool_choice="none", max_new_tokens=2)
    assert hidden.prompt_token_ids == session.generate(MESSAGES, max_new_tokens=2).prompt_token_ids
    shown = session.generate(MESSAGES, tools=[WEATHER], tool_choice="auto", max_new_tokens=2)
    assert shown.prompt_token_ids == session.generate(MESSAGES, tools=[WEATHER], max_new_tokens=2).prompt_token_ids


@pytest.mark.parametrize(
    ("choice", "tools"),
    [
        ("required", None),
        ({"name": "weather"}, None),
        ("always", [WEATHER]),
        ({"name": "no"}, [WEATHER]),
        (5, [WEATHER]),
    ],
)
def test_wrong_choices_are_refused(session, choice, tools):
    with pytest.raises(InvalidRequestError, match="tool_choice"):
        session.stream(MESSAGES, tools=tools, tool_choice=choice)


def test_it_excludes_another_form(session):
    with pytest.raises(InvalidRequestError, match="must match something else"):
        session.stream(MESSAGES, tools=[WEATHER], tool_choice="required", guided={"regex": "a"})


def test_what_cannot_be_written_in_the_format_is_refused(session):
    odd = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string", "pattern": "x"}}}},
    }
    with pytest.raises(UnsupportedError, match=r"f\.a has the keyword pattern"):
        session.stream(MESSAGES, tools=[odd], tool_choice="required")


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": None},
        {"enum": []},
        {"enum": "ab"},
        {"anyOf": 5},
        {"oneOf": []},
        {"allOf": {}},
        {"type": []},
        {"$ref": 5},
        {"type": "object", "required": 5},
        {"type": "object", "required": [["a"]]},
        {"type": "string", "minLength": "1}})/ /(x{1"},
        {"type": "string", "maxLength": -1},
        {"type": "array", "minItems": None},
        {"type": "array", "maxItems": True},
    ],
)
def test_what_is_no_schema_is_refused(session, schema):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}}}}
    with pytest.raises(InvalidRequestError, match=r"argument f\.a has `\S+: .* which no schema has") as caught:
        session.stream(MESSAGES, tools=[tool], tool_choice="required")
    assert caught.value.argument == "tools"


@pytest.mark.parametrize("required", [[], ["p0", "p3"], ["p2"], ["p4"]])
def test_properties_may_be_left_out(session, required):
    """Each one that is not required; those that are there come in order, with commas between them."""
    properties = {f"p{at}": {"enum": [at]} for at in range(5)}
    parameters = {"type": "object", "properties": properties, "required": required}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    found = set()
    for seed in range(12):
        settings = {"temperature": 5.0, "seed": seed, "max_new_tokens": 200}
        result = session.generate(MESSAGES, tools=[tool], tool_choice={"name": "f"}, **settings)
        (call,) = result.tool_calls
        assert set(required) <= call.arguments.keys()
        assert call.arguments == {name: int(name[1]) for name in sorted(call.arguments)}
        found.add(tuple(call.arguments))
    assert len(found) > 3


def test_tools_with_very_many_properties(session):
    """Their grammar does not grow with the square, and is refused before it ends the process."""
    tools = {}
    for count in (300, 3000):
        parameters = {"type": "object", "properties": {f"p{at}": {"type": "integer"} for at in range(count)}}
        tools[count] = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    grammar = tool_grammar(session.tokenizer, tools[300])
    assert len(grammar) < 200 * 300
    check_guided(Guided(kind="grammar", text=grammar))
    with pytest.raises(InvalidRequestError, match=r"calls that `tool_choice` asks for .* are the most") as caught:
        session.stream(MESSAGES, tools=tools[3000], tool_choice="required")
    assert caught.value.argument == "tools"


class Tokens:
    """A tokenizer with some named tokens."""

    def __init__(self, *names):
        self.names = names

    def token_id(self, name):
        return self.names.index(name) if name in self.names else None


def test_formats_by_their_tokens():
    hermes = tool_grammar(Tokens("<tool_call>", "</tool_call>"), [WEATHER, CLOCK])
    assert "<[0]>" in hermes
    assert '"#/$defs/tool0/$defs/place"' in hermes
    with pytest.raises(UnsupportedError, match="does not know how this model writes calls"):
        tool_grammar(Tokens(), [WEATHER])
