"""``polydraft-conformance diff``: what broke, what was mended, what moved between two reports."""

import json

import pytest
from polydraft_conformance.__main__ import main
from polydraft_conformance.report import JSON_NAME, Report
from polydraft_conformance.rows import Row, follows_from


def row(check, status="pass", reason="", k=4, kind="mtp", target="toy", rate=None):
    numbers = {}
    if rate is not None:
        numbers = {"acceptance": {"prompts": "window", "acceptance_rate": rate, "mean_acceptance_length": 1 + 4 * rate}}
    return Row(check, "greedy", status, target, f"{target}-{kind}", kind, k, reason, 0.1, numbers)


@pytest.fixture
def write(tmp_path):
    """Writes a report, and gives its folder."""

    def write(name, rows, backend="engine", dtype="float32", usable=True, claims=None, **environment):
        found = {"python": "3.12", "versions": {"engine": "1.0"}, "devices": [], **environment}
        report = Report(backend, {"dtype": dtype, "device": "cpu", "kinds": []}, found, usable, rows=rows)
        report.reason, report.claims = "" if usable else "It needs a GPU.", claims or {}
        folder = tmp_path / name / f"{backend}-{dtype}"
        folder.mkdir(parents=True)
        (folder / JSON_NAME).write_text(json.dumps(report.as_dict()), "utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def diff(capsys):
    """Runs the command: exit code, and what it printed."""

    def diff(*arguments):
        code = main(["diff", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return diff


def test_what_broke_and_what_was_mended(write, diff):
    old = write("old", [row("test_a"), row("test_b", "fail", "x"), row("test_c"), row("test_d", "fail", "off by 1")])
    new = write(
        "new",
        [
            row("test_a", "fail", "It is wrong."),
            row("test_b"),
            row("test_c", "follows", follows_from("test_a", "x")),
            row("test_d", "fail", "off by 2"),
        ],
    )
    code, said = diff(old, new)
    assert code == 1
    assert "  Broke (2):\n    ✗ test_a (toy, mtp, k=4): pass → fail\n        It is wrong.\n    ↳ 1 follow from" in said
    assert "  Mended (1):\n    ✓ test_b (toy, mtp, k=4): fail → pass\n" in said
    assert "1 still fail as before" in said
    assert said.endswith("2 broke; 1 mended.\n")
    code, said = diff(new, old, "--json")
    assert code == 1, "test_b broke the other way round"
    (found,) = json.loads(said)["reports"]
    assert [entry["row"]["check"] for entry in found["broke"]] == ["test_b"]
    assert {entry["row"]["check"] for entry in found["mended"]} == {"test_a", "test_c"}
    code, said = diff(old, old)
    assert (code, "Nothing broke" in said) == (0, True)


def test_a_failure_that_was_not_run_before_counts(write, diff):
    old = write("old", [row("test_a")])
    new = write("new", [row("test_a"), row("test_b", "fail", "It is wrong.", k=8)])
    code, said = diff(old, new)
    assert code == 1
    assert "test_b (toy, mtp, k=8): fail, and was not run before" in said
    assert "  New:\n    checks: test_b\n    k: 8\n    1 results in all" in said


def test_other_changes_break_nothing(write, diff):
    old = write("old", [row("test_a"), row("test_b"), row("test_c", "fail", "one"), row("test_a", kind="ngram")])
    new = write(
        "new", [row("test_a", "not-claimed", "no"), row("test_b", "unchecked", "x"), row("test_c", "fail", "two")]
    )
    code, said = diff(old, new)
    assert code == 0
    assert "test_a (toy, mtp, k=4): pass → not claimed" in said
    assert "test_b (toy, mtp, k=4): pass → unchecked" in said
    assert "Fails for another reason than before (1)" in said
    assert "  Gone:\n    pairs: toy, ngram\n    1 results in all" in said


def test_claims_acceptance_and_conditions(write, diff):
    old = write("old", [row("test_a", rate=0.50)], claims={"sampling": ["seed", "top_k"], "seed_identical": True})
    new = write(
        "new",
        [row("test_a", rate=0.48)],
        claims={"sampling": ["seed", "top_p"], "seed_identical": False},
        processor="other",
        versions={"engine": "2.0"},
    )
    code, said = diff(old, new)
    assert code == 0
    assert "sampling: added top_p; removed top_k" in said
    assert "seed_identical: yes → no" in said
    assert "toy, mtp, k=4 (window prompts): 0.500 → 0.480 (-0.020); 3.00 → 2.92 tokens a round" in said
    assert "engine (version): 1.0 → 2.0" in said
    assert "processor: none → other" in said
    assert "Acceptance" not in diff(old, new, "--threshold", "0.03")[1]


def test_several_backends_are_matched(write, diff):
    for name, status in (("old", "pass"), ("new", "fail")):
        write(name, [row("test_a")], backend="one")
        write(name, [row("test_a", status, "x")], backend="one", dtype="bfloat16")
    old = write("old", [row("test_a")], backend="gone")
    new = write("new", [row("test_a", "fail", "x")], backend="added")
    code, said = diff(old, new)
    assert code == 1
    assert "one, float32, cpu: passes\n  Nothing moved." in said
    assert "one, bfloat16, cpu: passes → fails" in said
    assert "Only the old reports have: gone, float32, cpu." in said
    assert "Of these, added, float32, cpu: fails." in said


def test_a_backend_that_cannot_run_any_more(write, diff):
    gone = Row("test_backend_can_run_here", "availability", "cannot-install", reason="no")
    code, said = diff(write("old", [row("test_a")]), write("new", [gone], usable=False))
    assert code == 1
    assert "passes → cannot run here" in said
    assert "It needs a GPU." in said


def test_unusable_input(write, diff, tmp_path):
    good = write("good", [row("test_a")])
    for name, text, message in (
        ("list.json", "[]", "no JSON object"),
        ("none.json", "{", "not JSON"),
        ("bytes.json", "\x00", "not JSON"),
        ("less.json", '{"status": "pass"}', "lacks 'backend'"),
    ):
        (tmp_path / name).write_text(text)
        for arguments in ((tmp_path / name, good), (good, tmp_path / name)):
            code, said = diff(*arguments)
            assert (code, message in said) == (2, True), said
    assert diff(good, tmp_path / "missing")[0] == 2
    (tmp_path / "empty").mkdir()
    assert diff(good, tmp_path / "empty")[0] == 2
    data = json.loads((good / "engine-float32" / JSON_NAME).read_text("utf-8"))
    for change, message in (({"checks": [{"check": "test_a"}]}, "row 1 lacks"), ({"format_version": 99}, "Upgrade")):
        (tmp_path / "odd.json").write_text(json.dumps({**data, **change}))
        code, said = diff(good, tmp_path / "odd.json")
        assert (code, message in said) == (2, True), said
    write("other", [row("test_a")], backend="other")
    other = write("other", [row("test_a")], backend="another")
    code, said = diff(good, other)
    assert (code, "no backend, dtype and device in common" in said) == (2, True)
    with pytest.raises(SystemExit) as stopped:
        diff(good, good, "--threshold", "2")
    assert stopped.value.code == 2
