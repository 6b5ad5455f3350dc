"""The catalogue of defects as a product: its command, and the README's table of what a quick run does not catch."""

from pathlib import Path

import pytest
from polydraft_conformance.__main__ import main
from polydraft_conformance.catalog import load_checks
from polydraft_conformance.defects.catalogue import catalogue
from polydraft_conformance.defects.running import to_table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- full only: begin -->\n", "<!-- full only: end -->"


def test_every_defect_names_a_check_and_a_cause():
    checks = load_checks()
    for defect in catalogue():
        assert defect.check in checks, defect.name
        assert defect.also <= checks.keys(), defect.name
        assert len(defect.cause) > 5, defect.name


def test_the_command_lists_all(capsys):
    assert main(["defects"]) == 0
    printed = capsys.readouterr().out
    assert all(defect.name in printed and defect.cause in printed for defect in catalogue())


def test_the_command_runs_some(capsys):
    assert main(["defects", "--run", "drafter off", "cheat: knows the usual k"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["caught         drafter off", "full run only  cheat: knows the usual k"]


def test_an_unknown_defect(capsys):
    assert main(["defects", "--run", "drafter of"]) == 2
    assert "No defect is named 'drafter of'" in capsys.readouterr().err


def test_without_the_reference_engine(capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "polydraft_conformance.defects.running", None)
    assert main(["defects"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_the_readme_says_what_a_quick_run_does_not_catch():
    """`polydraft-conformance defects --full-only` prints the table anew."""
    text = README.read_text("utf-8")
    start = text.index(BEGIN) + len(BEGIN)
    assert text[start : text.index(END)] == to_table(full_only=True) + "\n"


@pytest.mark.parametrize("defect", catalogue(), ids=lambda defect: defect.name)
def test_its_backend_can_be_made(defect):
    with defect.in_place() as backend:
        assert backend().capabilities().drafter_kinds
