"""Sentences write arguments as code in backticks, so that the command line can show its flags in their place."""

import ast
import re
import tomllib
from pathlib import Path

import polydraft
import pytest
from polydraft._flags import FLAGS

CORE = Path(polydraft.__file__).parent
SOURCES = sorted([*CORE.rglob("*.py"), *(Path(__file__).parents[3] / "plugins").glob("*/src/**/*.py")])
GIVEN = re.compile(rf"\b({'|'.join(FLAGS)})=")
NAMED = re.compile(rf"\b({'|'.join(name for name in FLAGS if '_' in name)})\b")  # the others are English words as well


def outside_code(text):
    return " ".join(text.replace("``", "`").split("`")[::2])


def texts(root):
    """The strings of a tree in which blanks separate words, without docstrings; the values in f-strings are ``{}``."""
    skipped = set()
    for node in ast.walk(root):
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            skipped.update(map(id, node.values))
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def bare_arguments(source):
    """Sentences that give an argument outside code, and sentences of errors that name one there."""
    tree = ast.parse(source)
    found = [text for text in texts(tree) if " " in text and GIVEN.search(outside_code(text))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
            sentences = [text for part in (*node.args, *node.keywords) for text in texts(part)]
            found += [text for text in sentences if " " in text and NAMED.search(outside_code(text))]
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise EngineError("It failed.", "Use drafter=None.")', ["Use drafter=None."]),
        ('raise EngineError(f"It failed with dtype={name!r}.")', ["It failed with dtype={}."]),
        ('note = "It drafts " f"{k} tokens: seed=3 was given."', ["It drafts {} tokens: seed=3 was given."]),
        ('raise errors.EngineError("No.", hint="Give a smaller context_length.")', ["Give a smaller context_length."]),
        ('raise EngineError(f"`dtype={name!r}` is unknown.", "Use `drafter=None`.", argument="time_limit")', []),
        ('def load():\n    """Loads: drafter=None is plain."""', []),
    ],
)
def test_the_rule(source, found):
    assert bare_arguments(source) == found


def test_every_sentence_writes_arguments_as_code():
    found = {file.as_posix(): bare_arguments(file.read_text(encoding="utf-8")) for file in SOURCES}
    assert len(found) > 90
    assert {file: sentences for file, sentences in found.items() if sentences} == {}


def test_the_table_of_faults_writes_arguments_as_code():
    faults = tomllib.loads((CORE / "_registry/data/faults.toml").read_text(encoding="utf-8"))["fault"]
    assert faults
    for fault in faults:
        assert not GIVEN.search(outside_code(f"{fault['summary']} {fault.get('remedy', '')}"))
