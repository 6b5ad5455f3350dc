"""What a user may write for a model."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polydraft.checkpoints._names import did_you_mean, parse, repository
from polydraft.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("written", "kind", "value", "file"),
    [
        ("builtin:tiny-e2b", "builtin", "tiny-e2b", None),
        ("google/gemma-4-E4B-it", "hub", "google/gemma-4-E4B-it", None),
        ("  google/gemma-4-E4B-it ", "hub", "google/gemma-4-E4B-it", None),
        ("unsloth/x-GGUF:Q4_K_M", "hub", "unsloth/x-GGUF", "*[!a-zA-Z0-9]Q4_K_M[.-]*gguf"),
        ("unsloth/x-GGUF/MTP/a-BF16.gguf", "hub", "unsloth/x-GGUF", "MTP/a-BF16.gguf"),
        ("org/x/model.litertlm", "hub", "org/x", "model.litertlm"),
        ("./folder", "local", "folder", None),
        ("/a/b", "local", "/a/b", None),
        ("folder/", "local", "folder", None),
        ("gpt2", "local", "gpt2", None),
    ],
)
def test_parse(written, kind, value, file):
    name = parse(written)
    assert (name.kind, name.value, name.file) == (kind, value, file)


@pytest.mark.parametrize(
    ("written", "value", "revision", "file"),
    [
        ("org/name@v1.2", "org/name", "v1.2", None),
        ("org/name@refs/pr/7", "org/name", "refs/pr/7", None),
        ("org/x-GGUF@abc123:Q4_K_M", "org/x-GGUF", "abc123", "*[!a-zA-Z0-9]Q4_K_M[.-]*gguf"),
        ("org/x-GGUF@main/a.gguf", "org/x-GGUF", "main", "a.gguf"),
        ("org/name", "org/name", None, None),
    ],
)
def test_revisions(written, value, revision, file):
    name = parse(written)
    assert (name.kind, name.value, name.revision, name.file) == ("hub", value, revision, file)
    assert repository(written) == value


def test_a_path_that_exists_wins(tmp_path, monkeypatch):
    (tmp_path / "google" / "gemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse("google/gemma").kind == "local"
    assert parse("google/gemma-2").kind == "hub"
    assert parse(Path("google/gemma-2")).kind == "local"


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("~/m").value == str(tmp_path / "m")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("https://huggingface.co/google/gemma-4-E4B-it/tree/main", "'google/gemma-4-E4B-it'"),
        ("hf://google/gemma", "'google/gemma'"),
        ("a/b/c", "org/name"),
        ("org/name@", "org/name"),
        ("-bad/name", "org/name"),
        ("org/na me", "org/name"),
    ],
)
def test_not_a_name(written, said):
    with pytest.raises(InvalidRequestError) as error:
        parse(written)
    assert said in str(error.value)


@given(st.text(max_size=400))
def test_any_text_is_parsed_or_refused(text):
    try:
        kind = parse(text).kind
    except InvalidRequestError:
        return
    assert kind in {"builtin", "local", "hub"}


def test_repository():
    assert repository("org/name:Q4") == repository("org/name/f.gguf") == repository("org/name") == "org/name"
    assert repository("builtin:x") == "builtin:x"


def test_did_you_mean():
    known = ["google/gemma-4-E4B-it", "google/gemma-4-31B-it", "builtin:tiny-e2b"]
    assert did_you_mean("Google/Gemma-4-e4b-IT", known).startswith("Did you mean 'google/gemma-4-E4B-it'")
    assert "builtin:tiny-e2b" in did_you_mean("tiny-e2b", known)
    assert "google/gemma-4-E4B-it" in did_you_mean("gemma-4-E4B-it", known)
    assert did_you_mean("something else entirely", known) == ""
    assert did_you_mean("x", []) == ""
