"""Regular expressions as grammars of llama.cpp; the engine's tests run them."""

import datetime
import json
import re

import pytest
from polydraft.contract import Guided
from polydraft.errors import InvalidRequestError, UnsupportedError
from polydraft_gguf.serving.guided import check_guided, gbnf_of
from polydraft_gguf.serving.patterns import FORMATS, pattern_of


def schema(**keywords):
    return Guided(kind="json", text=json.dumps({"type": "string", **keywords}))


@pytest.mark.parametrize(
    ("expression", "quoted", "written"),
    [
        ("ab?|c{2,}", False, "([a] [b]{0,1} | [c]{2,})"),
        ("^a$", True, r'"\"" ([a]) "\""'),
        ("^a|b", True, r'"\"" ([a] char* | char* [b] char*) "\""'),
        (r"^[\n\"x]$", True, r'"\"" (("\\n" | "\\\"" | [x])) "\""'),
        (r"[\n\"x]", False, r"([\x0A\x22x])"),
        ("(?<year>[é🚀-🚂]){0}", False, '("")'),
        (r"(?:|\u0041\/)", False, r'(("" | [A] [\x2F]))'),
        # No digit, no letter anywhere: of other alphabets neither.
        (r"[^\W_]", False, "([0-9A-Za-z])"),
    ],
)
def test_an_expression(expression, quoted, written):
    assert pattern_of(expression, quoted=quoted).text == written


@pytest.mark.parametrize("character", ["é", "٣", "_", "5", "\x85", "\ufeff"])
def test_a_negated_class_has_no_character_that_a_dialect_has_in_the_class(character):
    letter = "s" if character in "\x85\ufeff" else "d" if character == "٣" else "w"
    ranges = re.findall(r"\\x(..)|\\u(....)|\\U(.{8})|(.)", pattern_of(rf"[^\{letter}]", quoted=False).text[2:-2])
    codes = [int("".join(one[:3]), 16) if not one[3] else None if one[3] == "-" else ord(one[3]) for one in ranges]
    bounds = [(first, codes[at + 2] if codes[at + 1 : at + 2] == [None] else first) for at, first in enumerate(codes)]
    held = [(first, last) for first, last in bounds if first is not None and last is not None]
    assert not any(first <= ord(character) <= last for first, last in held)


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("(?=a)", "lookahead"),
        (r"(a)\1", r"`\\1`"),
        (r"\bx", r"`\\b`"),
        ("a^b", "inside"),
        ("a$b", "before its end"),
        ("(a*)*", "may be empty"),
        ("(a?){9}", "may be empty"),
        ("(a{0,100}){100}", "more than 1999"),
        ("a{2000}", "more than 1999"),
        ("(?i)a", "flags"),
        ("a++", "possessive"),
        ("[[:alpha:]]", "named class"),
        ("[]a]", "in a class"),
        (r"\p{L}", r"`\\p`"),
        (r"\ud800", "surrogate"),
    ],
)
def test_what_a_grammar_cannot_say(expression, says):
    with pytest.raises(UnsupportedError, match=says) as raised:
        check_guided(Guided(kind="regex", text=expression))
    assert raised.value.hint == "Write it without, or use the backend llama_cpp."


@pytest.mark.parametrize(
    "expression", ["(", ")", "*", "[a", "a{3,2}", "[z-a]", "a\\", r"[^\s\S]", r"[\d-x]", "(" * 5000]
)
def test_what_is_no_expression(expression):
    with pytest.raises(InvalidRequestError):
        check_guided(Guided(kind="regex", text=expression))


def test_lengths_that_a_pattern_keeps_by_itself():
    check_guided(schema(pattern="^[a-z]{2,6}$", minLength=2, maxLength=6))
    check_guided(schema(format="date", maxLength=10))
    check_guided(schema(pattern="^(?:[^a]{100}b?){1,9}$", minLength=100))  # 34 escapes, in one rule
    for keywords in (
        {"pattern": "^[a-z]{2,6}$", "maxLength": 5},
        {"pattern": "a", "maxLength": 5},
        {"pattern": "^a*$", "minLength": 1},
        {"pattern": "a", "format": "date"},
        {"format": "email"},
    ):
        with pytest.raises(UnsupportedError):
            check_guided(schema(**keywords))
    for keywords in ({"pattern": 3}, {"format": []}, {"pattern": "("}):
        with pytest.raises(InvalidRequestError):
            check_guided(schema(**keywords))


@pytest.mark.parametrize(
    "keywords",
    [
        *({name: value} for name in ("enum", "anyOf") for value in (None, 5, "ab", {}, [])),
        *({"type": kind} for kind in ({}, [[]], 5, None)),
        *({"type": "object", "properties": value} for value in ([1], 5, "ab")),
        *({"type": "object", "required": value} for value in (5, [["a"]], "ab")),
        *({"type": "array", name: value} for name in ("minItems", "maxItems") for value in ("1", -1, [], 2.5)),
        {"type": "string", "maxLength": "1"},
        {"$ref": 5},
    ],
)
def test_what_is_no_schema(keywords):
    with pytest.raises(InvalidRequestError):
        check_guided(Guided(kind="json", text=json.dumps(keywords)))


@pytest.mark.parametrize(
    "rule", ['r{} ::= ("," "x")? r{}', "r{} ::= [/] r{}  # '\"[", 'r{} ::= "\\"[" (r{} | "/#")', "r{} ::= [^\\]/] r{}"]
)
def test_long_chains_of_rules(rule):
    """llama.cpp would need minutes to read them."""
    for count, allowed in ((200, True), (3000, False)):
        chain = "\n".join(rule.format(at, at + 1) for at in range(count))
        found = Guided(kind="grammar", text=f'root ::= r0\n{chain}\nr{count} ::= "a"\n')
        if allowed:
            check_guided(found)
        else:
            with pytest.raises(InvalidRequestError, match="500 are the most"):
                check_guided(found)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "\x00"),
        ("regex", r"a\x00"),
        ("choice", '["a\\u0000"]'),
        ("grammar", 'root ::= "a\x00"\n'),
        ("grammar", 'root ::= "\\u0000"\n'),
        ("regex", ".*" * 201),
        ("regex", "(?:a?b){0,2}" * 101),
        ("grammar", f'root ::= {"[*] b? " * 201}\nb ::= "b"\n'),
    ],
)
def test_what_llama_cpps_grammars_cannot_have(kind, text):
    """U+0000 ends their texts, and very many optional parts take minutes."""
    with pytest.raises((InvalidRequestError, UnsupportedError)):
        check_guided(Guided(kind=kind, text=text))


def test_what_they_can_have():
    assert pattern_of(r"[\x00-\x09]", quoted=False).text == r"([\x01-\x09])"
    assert r"\u0000" in pattern_of(r"\x00", quoted=True).text
    check_guided(Guided(kind="grammar", text="root ::= " + '"a*" ' * 300 + "#" + "?" * 300))


def test_objects_with_very_many_properties():
    """Their rules do not grow with the square."""
    for count, allowed in ((300, True), (301, False)):
        found = schema(type="object", properties={f"p{at}": {"type": "integer"} for at in range(count)})
        if allowed:
            assert len(gbnf_of(found)) < 100 * 300
        else:
            with pytest.raises(UnsupportedError, match="more than 300 properties"):
                check_guided(found)


def test_dates_are_those_of_the_calendar():
    days = [datetime.date.fromordinal(number) for number in range(1, 3652059, 997)]
    days += [datetime.date(year, 2, 29) for year in range(4, 9999, 52) if year % 100 or year % 400 == 0]
    assert all(re.search(FORMATS["date"], day.isoformat()) for day in days)
    for wrong in ("2023-02-29", "1900-02-29", "0000-01-01", "2024-04-31", "2024-13-01", "2024-00-10", "2024-01-00"):
        assert not re.search(FORMATS["date"], wrong)
    assert '"Z"' not in gbnf_of(schema(format="date"))
