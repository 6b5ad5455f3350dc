"""docs/one-round.md names functions that exist, in the files that it links."""

import ast
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs/one-round.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the page is in the repository, not in the distribution")


def functions(file):
    """Qualified names of a file's functions and methods."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))


def steps():
    """The text of each step."""
    return re.split(r"^\d+\. ", PAGE.read_text(encoding="utf-8").partition("\n1. ")[2], flags=re.MULTILINE)


def test_there_are_nine_steps_and_each_links_its_file():
    assert len(steps()) == 9
    assert all(re.search(r"\]\(\.\./[^)]+\.py\)", step) for step in steps())


@pytest.mark.parametrize("step", range(9))
def test_the_functions_of_a_step_are_in_its_files(step):
    text = steps()[step]
    files = [PAGE.parent / link for link in re.findall(r"\]\((\.\./[^)]+\.py)\)", text)]
    known = {name for file in files for name in functions(file)}
    named = re.findall(r"`([A-Z]\w*\.\w+|run_rounds|choose_tokens|choose_on_host)`", text)
    assert named
    # The last step's text also describes what a whole engine does instead.
    assert not set(named) - known
