"""``guided``: every output matches, with and without speculation the same tokens."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polydraft.contract import GenerationSettings, Guided
from polydraft.contract.requests import Thought
from polydraft.errors import InvalidRequestError, StructuredOutputError, UnsupportedError
from polydraft.sampling._grammar_depth import depth_of
from polydraft.sampling.structured import check_guided

pytest.importorskip("llguidance", reason="polydraft[structured]")
pytest.importorskip("polydraft_reference", reason="settings are tested on the reference engine: polydraft-reference")

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "n": {"type": "integer", "minimum": -20, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["red", "groß"]}, "maxItems": 3},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}
EXPRESSION = r"(ab|a[0-9]{1,3}|é+x){1,4}\."
LARK = 'start: item ("," item){0,3}\nitem: "x" | "(" item ")" | "yy"\n'
GBNF = 'root ::= item ("," item)?\nitem ::= "yes" | "no" [0-9]\n'


def follows_record(text):
    found = json.loads(text)
    assert list(found)[:2] == ["name", "n"]
    assert len(found["name"]) <= 6
    assert -20 <= found["n"] <= 999
    assert set(found.get("tags", [])) <= {"red", "groß"}
    assert len(found.get("tags", [])) <= 3


TASKS = [
    ({"json": RECORD}, follows_record),
    ({"regex": EXPRESSION.replace("é+", "é{1,2}")}, lambda text: re.fullmatch(EXPRESSION, text)),
    (
        {"choice": ["yes", "no", "yesterday", 'a "quote"\n']},
        lambda text: text in ("yes", "no", "yesterday", 'a "quote"\n'),
    ),
    ({"grammar": GBNF}, lambda text: re.fullmatch(r"(yes|no\d)(,(yes|no\d))?", text)),
]
samplings = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.5, 1.0, 5.0]), "seed": st.integers(0, 2**32)},
        optional={"top_k": st.sampled_from([1, 40]), "top_p": st.sampled_from([0.3, 0.9]), "min_p": st.just(0.05)},
    ),
)
further = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.7, 1.3]),
        "frequency_penalty": st.just(1.0),
        "logit_bias": st.dictionaries(st.integers(0, 278), st.floats(-100, 100, width=32), max_size=20),
        "logits_processor": st.just(
            lambda prefix, logits: np.roll(np.arange(len(logits), dtype=np.float32), len(prefix))
        ),
    },
)
drafters = st.sampled_from([("mtp", 0.3), ("mtp", 0.9), ("draft-model", None), ("ngram", None)])


@given(
    st.sampled_from(TASKS), drafters, st.integers(1, 8), st.lists(st.integers(0, 278), min_size=1), samplings, further
)
def test_outputs_match_and_speculation_changes_nothing(toys, task, drafter, k, prompt, sampling, more):
    guided, follows = task
    session = toys.session(drafter[0], k, drafter[1])
    settings = {"max_new_tokens": 120, "guided": guided, **sampling, **more}
    plain = session.generate(prompt, speculate="off", **settings)
    assert plain.finish_reason == "eos"
    assert plain.matches
    assert follows(plain.text) is not False
    assert session.generate(prompt, speculate="on", **settings).token_ids == plain.token_ids


@pytest.mark.parametrize(("k", "seed"), [(2, 1), (5, 2)])
def test_rejection_sampling_matches_too(toys, k, seed):
    session = toys.session("mtp", k, 0.5)
    for guided, follows in TASKS:
        settings = {"acceptance": "rejection", "temperature": 1.5, "seed": seed}
        result = session.generate([5, 6], guided=guided, max_new_tokens=120, **settings)
        assert result.matches
        assert follows(result.text) is not False


def test_what_is_forced_is_drafted_without_the_drafter(toys):
    session = toys.session("mtp", 3, 0.0)  # a drafter that is never right
    constant = "the only text that there is."  # the first token, and rounds of four
    result = session.generate([5, 6], guided={"choice": [constant]}, max_new_tokens=60)
    assert result.text == constant
    assert result.stats.num_accepted_tokens >= 18
    plain = session.generate([5, 6], guided={"choice": [constant]}, max_new_tokens=60, speculate="off")
    assert plain.token_ids == result.token_ids
    assert plain.stats.num_draft_tokens == 0


def test_what_is_cut_says_so(toys):
    session = toys.session("mtp", 3, 0.5)
    cut = session.generate([5], guided={"regex": "a{20}"}, max_new_tokens=7)
    assert (cut.text, cut.finish_reason, cut.matches) == ("a" * 7, "length", False)
    stopped = session.generate([5], guided={"regex": "a{5}b{5}"}, stop="bb", max_new_tokens=30)
    assert (stopped.text, stopped.finish_reason, stopped.matches) == ("aaaaa", "stop", False)
    assert session.generate([5], max_new_tokens=3).matches is None


def test_settings_that_leave_no_token(toys):
    session = toys.session("mtp", 3, 0.5)
    for speculate in ("off", "on"):
        with pytest.raises(StructuredOutputError, match="No token is left for position 3") as caught:
            session.generate([5], guided={"regex": "abc"}, banned_token_ids=[ord("c")], speculate=speculate)
        assert caught.value.partial_text == "ab"
        with pytest.raises(StructuredOutputError, match="No token is left"):
            session.generate([5], guided={"choice": ["ab"]}, min_new_tokens=5, speculate=speculate)


@pytest.mark.parametrize(
    "settings",
    [
        {"guided": {"regex": "a"}, "ignore_eos": True},
        {"guided": {"regex": "a"}, "forced_token_ids": {0: 5}},
        {"guided": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"guided": {"json": {"type": "nonsense"}}},
        {"guided": {"json": False}},
        {"guided": {"json": "{"}},
        {"guided": {"json": {"x-guidance": 5}}},
        {"guided": {"json": {"type": "string", "pattern": "("}}},
        {"guided": {"regex": "(a"}},
        {"guided": {"regex": "\ud800"}},
        {"guided": {"json": {"const": ["\ud800"]}}},
        {"guided": {"json": '{"properties": {"\\ud800": {}}}'}},
        {"guided": {"regex": "(" * 100_000}},
        {"guided": {"grammar": "start: nothing"}},
        {"guided": {"regex": r"[^\x00-\x{10FFFF}]"}},
        {"guided": {"regex": "a{1000000}"}},
        {"guided": {"regex": "(a{1000}){1000}"}},
        {"guided": {"json": {"type": "string", "pattern": "^a{1000000}$"}}},
        {"guided": {"grammar": "root ::= ("}},
        {"guided": {"grammar": "no grammar at all"}},
        {"guided": {"choice": ["a", ""]}},
        {"guided": {"choice": "abc"}},
        {"guided": {}},
        {"guided": "abc"},
        {"response_format": {"type": "json_schema"}},
        {"response_format": "json"},
    ],
)
def test_what_cannot_be_matched_is_refused(toys, settings):
    with pytest.raises(InvalidRequestError) as caught:
        toys.session("mtp", 3, 0.5).stream([5], **settings)
    assert caught.value.hint
    assert len(str(caught.value)) < 800


def test_a_number_of_thousands_of_digits_in_a_schemas_text(toys):
    with pytest.raises(InvalidRequestError, match="no JSON schema: a number in it has too many digits"):
        toys.session("mtp", 3, 0.5).stream([5], guided={"json": f'{{"const": {"9" * 5000}}}'})


def test_an_engine_that_matches_by_itself_is_not_asked_for_what_is_too_large():
    thought = Thought(open=1, close=2, begun=False)
    for guided in (Guided(kind="regex", text="a{1000000}"), Guided(kind="regex", text="a{1000000}", thought=thought)):
        with pytest.raises(InvalidRequestError, match="too many expressions"):
            check_guided(guided)
    check_guided(Guided(kind="regex", text="a{1000}", thought=thought))


def test_a_call_that_leads_too_far_does_not_spoil_the_next(toys):
    session, guided = toys.session("mtp", 3, 0.5), {"regex": "(x|ya{1000000})"}
    with pytest.raises(StructuredOutputError, match="too many expressions") as caught:
        session.generate([5], guided=guided, logit_bias={ord("y"): 100})
    assert caught.value.partial_text.startswith("y")
    assert session.generate([5], guided=guided, logit_bias={ord("x"): 100}).text == "x"


def test_keywords_that_would_be_ignored_are_refused(toys):
    for schema in ({"type": "array", "uniqueItems": True}, {"not": {"type": "null"}}):
        with pytest.raises(UnsupportedError, match="does not have"):
            toys.session("mtp", 3, 0.5).stream([5], guided={"json": schema})


def test_an_end_is_no_part_of_a_grammar(toys):
    end = min(toys.engine.tokenizer.eos_token_ids)
    session = toys.session("mtp", 3, 0.5)
    result = session.generate([5], guided={"grammar": f'start: ("a" | <[{end}]>) "bc"'}, logit_bias={end: 100.0})
    assert (result.text, result.matches) == ("abc", True)


def test_rules_that_cannot_be_taken_back(toys):
    for attribute in ('stop="q"', "max_tokens=3"):
        with pytest.raises(UnsupportedError, match="taken back"):
            toys.session("mtp", 3, 0.5).stream([5], guided={"grammar": f'start: t "x"\nt[{attribute}]: /.*/'})


def test_many_choices(toys):
    choices = [f"option {number}" for number in range(3000)]
    assert toys.session("mtp", 3, 0.5).generate([5], guided={"choice": choices}).text in choices


def test_a_schema_that_contains_itself(toys):
    tree = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}}}
    result = toys.session("mtp", 3, 0.5).generate([5], guided={"json": tree}, max_new_tokens=40)
    assert result.finish_reason in ("eos", "length")
    if result.matches:
        json.loads(result.text)
    endless = []
    endless.append(endless)
    with pytest.raises(InvalidRequestError, match="Circular reference"):
        toys.session("mtp", 3, 0.5).stream([5], guided={"json": {"enum": endless}})


def chained(rule, count):
    return "".join(rule.format(at, at + 1) for at in range(count))


DEFINITIONS = {
    "array": {"type": "array", "items": {"$ref": "#/$defs/d{}"}},
    "union": {"anyOf": [{"$ref": "#/$defs/d{}"}, {"const": 1}]},
    "whole": {"allOf": [{"$ref": "#/%24defs/d{}"}]},
    "anchor": {"items": {"$ref": "#a{}"}},
}


def chained_schema(kind, count):
    """Definitions of which each refers to the next one."""
    written = json.dumps(DEFINITIONS[kind])
    found = {f"d{at}": json.loads(written.replace("{}", str(at + 1))) for at in range(count)}
    if kind == "anchor":
        found = {name: {**one, "$anchor": f"a{name[1:]}"} for name, one in found.items()}
    last = {f"d{count}": {"type": "null", "$anchor": f"a{count}"}}
    return {"$defs": {**found, **last}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    "guided",
    [
        *({"json": chained_schema(kind, 900)} for kind in DEFINITIONS),
        {"json": chained_schema("array", 5000)},
        {"grammar": "start: r0\n" + chained("r{}: r{}\n", 3000) + 'r3000: "a"'},
        {"grammar": "start: R0\n" + chained('R{}: "a" R{}\n', 3000) + 'R3000: "a"'},
        {"grammar": "start: r0\n" + chained('r{}: /x\ny: z/ ("," r{})?\n', 3000) + 'r3000: "a"'},
        {"grammar": "root ::= r0\n" + chained('r{} ::= "a" r{}\n', 3000) + 'r3000 ::= "a"'},
        {"grammar": f'start: "x" %json {json.dumps(chained_schema("union", 900))}'},
    ],
)
def test_long_chains_of_rules_are_refused(toys, guided):
    """They end the process in llguidance's recursion."""
    with pytest.raises(InvalidRequestError, match="are the most"):
        toys.session("mtp", 3, 0.5).stream([5], guided=guided)


@pytest.mark.parametrize("length", [1 << 17])
@pytest.mark.parametrize("piece", ["\n", '\\"', "\\/", " ", "a[", "a::", "%json ", "a:b\n"])
def test_the_depth_of_odd_grammars(piece, length):
    """It is found in a time that grows with their length."""
    for before in ("", '"', "/", "a"):
        assert depth_of(before + piece * (length // len(piece))) > 0


def test_rules_in_a_circle_all_count():
    circle = 'start: a\na: "x" (b | "y")\nb: [a] c // d\nc: "d" "z"\nd: start\n'
    assert depth_of(circle) == 1 + (2 + 2) + 1 + 1
    tree = {"$defs": {"t": {"items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}
    assert depth_of(f"start: %json {json.dumps(tree)}") < 10
    wide = chained('r{}: "a" | "b"\n', 3000)
    assert depth_of(f"start: {' '.join(f'r{at}' for at in range(3000))}\n{wide}") == 2


def test_openais_words(toys):
    session = toys.session("mtp", 3, 0.5)

    class Model:
        @classmethod
        def model_json_schema(cls):
            return RECORD

    wanted = session.generate([5], guided={"json": RECORD}, max_new_tokens=120).token_ids
    for given_format in (
        {"type": "json_schema", "json_schema": {"name": "record", "strict": True, "schema": RECORD}},
        {"type": "json_schema", "name": "record", "schema": RECORD},
        Model,
    ):
        assert session.generate([5], response_format=given_format, max_new_tokens=120).token_ids == wanted
    free = session.generate([5], max_new_tokens=9).token_ids
    assert session.generate([5], response_format={"type": "text"}, max_new_tokens=9).token_ids == free
    with pytest.raises(UnsupportedError, match="structural_tag"):
        session.stream([5], response_format={"type": "structural_tag"})


def test_special_tokens_are_no_text(toys):
    result = toys.session("mtp", 3, 0.5).generate([5], guided={"regex": r"[\s\S]{30}"}, temperature=8.0, seed=4)
    specials = toys.engine.tokenizer.special_token_ids
    assert specials.isdisjoint(result.token_ids[:-1])
    assert len(result.text) == 30


def test_a_thought_comes_before_the_answer(toys):
    session = toys.session("mtp", 3, 0.5)
    messages = [{"role": "user", "content": "hi"}]
    bias = {
        "logit_bias": {session.tokenizer.token_id("<channel|>"): 100.0, session.tokenizer.token_id("<|channel>"): 100.0}
    }
    thinking = {"chat_template_kwargs": {"enable_thinking": True}, **bias}
    result = session.generate(messages, guided={"choice": ["yes", "no"]}, max_new_tokens=60, **thinking)
    assert "<|channel>" in result.raw_text
    assert result.text in ("yes", "no")
    assert result.matches
    result = session.generate(messages, guided={"choice": ["yes", "no"]}, max_new_tokens=60, **bias)
    assert "<|channel>" not in result.raw_text
    assert result.text in ("yes", "no")


def test_the_record_is_data():
    settings = GenerationSettings(guided=Guided(kind="json", text="{}"))
    assert GenerationSettings.model_validate_json(settings.model_dump_json()) == settings
