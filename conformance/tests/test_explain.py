"""Every check explains itself, in one form, and its page is what its docstring says."""

from pathlib import Path

import pytest
from polydraft_conformance.__main__ import main
from polydraft_conformance.catalog import load_checks
from polydraft_conformance.docstrings import read_sections
from polydraft_conformance.explain import pages, write_pages

DOCS = Path(__file__).parents[2] / "docs/checks"


@pytest.mark.parametrize("name", load_checks())
def test_every_check_says_what_it_proves_what_a_failure_means_and_where_to_look(name):
    check = load_checks()[name]
    for section in ("statement", "proves", "failure", "look"):
        text = getattr(check, section)
        assert text, f"{name} has no section {section}"
        # Whole sentences, and more than a word or two.
        assert text.endswith((".", "?")), f"{name}, {section}: {text!r}"
        assert len(text.split()) >= 4, f"{name}, {section}: {text!r}"
        assert text.count("`") % 2 == 0, f"{name}, {section}: a backtick is open"


def test_a_docstring_is_taken_apart():
    given = """It holds.

    Proves: One thing,
    and another: both.
    A failure means: They do not.
    Look at: ``code``.
    """
    assert read_sections(given) == {
        "statement": "It holds.",
        "proves": "One thing, and another: both.",
        "failure": "They do not.",
        "look": "``code``.",
    }
    assert read_sections("It holds.") == {"statement": "It holds.", "proves": "", "failure": "", "look": ""}


@pytest.mark.skipif(not DOCS.is_dir(), reason="the pages are in the repository, not in the distribution")
def test_the_pages_are_those_of_the_checks():
    made = pages()
    written = {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
    assert written == made, "run: polydraft-conformance explain --write docs/checks"


def test_pages_of_checks_that_are_gone_are_removed(tmp_path):
    (tmp_path / "test_gone.md").write_text("")
    (tmp_path / "notes.md").write_text("kept")
    assert write_pages(tmp_path) == len(load_checks())
    assert {path.name for path in tmp_path.iterdir()} == {*pages(), "notes.md"}


def test_explain_prints_one_several_or_the_list(capsys):
    assert main(["explain", "test_rollback_is_exact"]) == 0
    one = capsys.readouterr().out
    assert "What it proves:" in one
    assert "Where to look:" in one
    assert "test_drafter_rolls_back (" not in one
    assert main(["explain", "*rolls_back*", "test_rollback_is_exact[toy-mtp-k4]", "greedy_equals_plain"]) == 0
    several = capsys.readouterr().out
    assert [several.count(f"{name} (") for name in ("test_drafter_rolls_back", "test_rollback_is_exact")] == [1, 1]
    assert main(["explain"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name}\n" in listed for name in load_checks())
    assert main(["explain", "test_no_such"]) == 2
    assert "No check is named 'test_no_such'." in capsys.readouterr().err
