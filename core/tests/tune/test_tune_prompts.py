"""The prompts that are measured: the built-in set, and the user's in every form."""

import json

import pytest
from polydraft._measuring.prompts import CLASSES, MeasuredPrompt, built_in_prompts, given_prompts, read_prompts
from polydraft.errors import InvalidRequestError

CHAT = [{"role": "user", "content": "Hello"}]


def test_the_built_in_set_has_every_class_in_each_batch():
    found = built_in_prompts()
    assert [one.kind for one in found] == [*CLASSES, *CLASSES]
    assert len({str(one.prompt) for one in found}) == len(found)
    assert all(one.raw == one.prompt[0]["content"] for one in found if one.kind == "chat")
    assert all(len(str(one.prompt)) > 100 and not str(one.prompt).endswith("\n") for one in found)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.txt", "one prompt\nof two lines\n", [("yours", "one prompt\nof two lines")]),
        ("a.txt", "first\n---\nsecond\n\n---\n\n", [("yours", "first"), ("yours", "second\n")]),
        ("a", "\ufeffno suffix", [("yours", "no suffix")]),
        ("a.json", json.dumps(["x", CHAT, [1, 2]]), [("yours", "x"), ("yours", tuple(CHAT)), ("yours", (1, 2))]),
        ("a.json", json.dumps({"law": ["x"], "code": ["y", "z"]}), [("law", "x"), ("code", "y"), ("code", "z")]),
        ("a.jsonl", '"x"\n\n{"prompt": "y", "class": "law"}\n', [("yours", "x"), ("law", "y")]),
        ("a.jsonl", '"x\u2028y"\r\n"z"', [("yours", "x\u2028y"), ("yours", "z")]),
    ],
)
def test_files(tmp_path, name, text, found):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert [(one.kind, one.prompt) for one in read_prompts(path)] == found


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", b" \n---\n"),
        ("a.txt", b"\xff\xfe"),
        ("a.json", b"{"),
        ("a.json", b"3"),
        ("a.json", b"[]"),
        ("a.json", b'[""]'),
        ("a.json", b"[[true]]"),
        ("a.json", b'[{"text": "x"}]'),
        ("a.json", b'{"law": "x"}'),
        ("a.jsonl", b'"x"\n{'),
        ("a.json", b"[" * 100_000),
    ],
)
def test_a_file_that_holds_no_prompts_is_an_error_that_says_what_to_give(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InvalidRequestError, match=r"(?i)prompt") as raised:
        read_prompts(path)
    assert raised.value.argument == "prompts"
    assert raised.value.hint


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", b"caf\xe9", "not UTF-8: .* at byte 3"),
        ("a.jsonl", b'"x"\n\n{"prompt"', "line 3 is no JSON: Expecting ':' delimiter at column 10."),
        ("a.jsonl", b'"x"\n{"prompt": ""}', "Prompt 2 is an empty text."),
        ("a.jsonl", b'"x"\n' + b"9" * 5000, "line 2 is no JSON: a number in it has too many digits"),
        ("a.json", b"9" * 5000, "a number in it has too many digits"),
        ("a.jsonl", b'"x"\n"\\ud800"', "Prompt 2 cannot be written as JSON: .*surrogates"),
        ("a.jsonl", b'[{"role": "user", "content": "\\ud800"}]', "Prompt 1 cannot be written as JSON: .*surrogates"),
    ],
)
def test_an_error_says_where(tmp_path, name, data, says):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InvalidRequestError, match=says):
        read_prompts(path)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InvalidRequestError, match=str(path)):
            read_prompts(path)


def test_prompts_from_python():
    assert given_prompts(["x"]) == (MeasuredPrompt(kind="yours", prompt="x"),)
    for wrong in ("x", 3, [], [None], [[]], [[-1]], {"a": "x"}):
        with pytest.raises(InvalidRequestError):
            given_prompts(wrong)
