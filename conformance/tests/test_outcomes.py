"""From what a check raised to what the report says."""

import threading
from types import SimpleNamespace

import pytest
from polydraft.contract import Exclusion
from polydraft_conformance.catalog import Check, check, load_checks, matching_checks, rank
from polydraft_conformance.exclusions import Exclusions
from polydraft_conformance.limits import time_limit
from polydraft_conformance.options import SuiteOptions
from polydraft_conformance.outcomes import crashed_row, judge, make_row, settle
from polydraft_conformance.pairs import Pair, cases, sliding_window
from polydraft_conformance.rows import Row
from polydraft_conformance.signals import CannotInstallError, NotClaimed, TimeLimitError
from polydraft_conformance.suite import Suite

PAIR = Pair("builtin:small", (("mtp", "builtin:small-assistant"), ("ngram", "ngram")), 16)
CASE = PAIR.case(4)
FIRST = Check("test_first", "group", "case", "It holds.")
SECOND = Check("test_second", "group", "case", "It holds, too.", after=("test_first",))


@pytest.fixture
def suite():
    return Suite(None, SuiteOptions("small"), None, SimpleNamespace(usable=True))


def skipped():
    return pytest.skip.Exception("not today")


def test_statuses(suite):
    assert judge(suite, FIRST, CASE, None).status == "pass"
    assert judge(suite, FIRST, CASE, AssertionError("it is wrong")).status == "fail"
    assert judge(suite, FIRST, CASE, NotClaimed("no sampling")) == judge(suite, FIRST, None, NotClaimed("no sampling"))
    assert judge(suite, FIRST, CASE, NotClaimed("no sampling")).status == "not-claimed"
    assert judge(suite, FIRST, None, CannotInstallError("no GPU")).status == "cannot-install"


def test_an_undeclared_skip_fails(suite):
    outcome = judge(suite, FIRST, CASE, skipped())
    assert outcome.status == "fail"
    assert "Undeclared skip (not today)" in outcome.reason


def test_a_skip_in_an_excluded_check_fails_too(suite):
    suite.exclusions = Exclusions.of([Exclusion(check="*", status="never", reason="makes no sense")])
    assert judge(suite, FIRST, CASE, skipped()).status == "fail"


def test_reasons_name_the_error(suite):
    assert judge(suite, FIRST, CASE, AssertionError("it is wrong")).reason == "it is wrong"
    assert judge(suite, FIRST, CASE, KeyError("k")).reason == "KeyError: 'k'"
    assert judge(suite, FIRST, CASE, TimeLimitError("too slow")).reason == "Time limit: too slow"


def test_consequences(suite):
    suite.note_failure(FIRST, CASE)
    assert judge(suite, SECOND, CASE, AssertionError("wrong")).status == "follows"
    assert judge(suite, SECOND, CASE, AssertionError("wrong")).reason == "Follows from test_first.\nwrong"
    assert judge(suite, SECOND, PAIR.case(8), AssertionError("wrong")).status == "follows", "another k"
    assert judge(suite, SECOND, PAIR.case(4, "ngram"), AssertionError("wrong")).status == "fail", "another drafter"
    assert judge(suite, SECOND, CASE, None).status == "pass"


def test_a_target_s_failure_explains_all_its_drafters(suite):
    suite.note_failure(Check("test_first", "group", "target", "It holds."), CASE)
    assert judge(suite, SECOND, PAIR.case(4, "ngram"), AssertionError("wrong")).status == "follows"


def test_exclusions_come_before_consequences(suite):
    suite.note_failure(FIRST, CASE)
    suite.exclusions = Exclusions.of([Exclusion(check="test_second", status="notimpl", reason="not done yet")])
    assert judge(suite, SECOND, CASE, AssertionError("wrong")).status == "excluded"


def test_a_process_that_died():
    row = crashed_row("checks/test_greedy.py::test_greedy_equals_plain[tiny-e2b-draft-model-k4]", "gone")
    assert (row.target, row.kind, row.k, row.status) == ("tiny-e2b", "draft-model", 4, "fail")
    assert crashed_row("checks/test_availability.py::test_backend_can_run_here", "gone").target is None
    assert crashed_row("tests/test_others.py::test_generates", "gone") is None


def test_failures_that_several_processes_found_are_put_together():
    """Each worker knows of its own only."""

    def row(check, kind, reason="wrong"):
        return Row(check, "speculation", "fail", "toy", None, kind, 4, reason)

    rows = [
        row("test_drafts_are_accepted", "mtp"),
        row("test_drafts_are_made", "mtp"),
        row("test_drafts_are_accepted", "ngram"),
        row("test_drafts_are_accepted", "mtp", "Unexpected pass: it holds."),
    ]
    settled = settle(rows)
    assert [found.status for found in settled] == ["follows", "fail", "fail", "fail"]
    assert settled[0].reason == "Follows from test_drafts_are_made.\nwrong"


def test_a_row_names_its_case():
    row = make_row(
        FIRST, CASE, judge(Suite(None, SuiteOptions("small"), None, None), FIRST, CASE, None), seconds=1.23456
    )
    assert (row.target, row.drafter, row.kind, row.k) == ("small", "builtin:small-assistant", "mtp", 4)
    assert row.case == "small, mtp, k=4"
    assert row.seconds == 1.235


def test_cases_of_each_scope():
    other = Pair("builtin:other", (("ngram", "ngram"),), 16)
    pairs = (PAIR, other)
    assert cases(pairs, "backend", (4, 1)) == []
    assert [case.id for case in cases(pairs, "once", (4, 1))] == ["small-mtp-k4"]
    assert [case.id for case in cases(pairs, "target", (4, 1))] == ["small-mtp-k4", "other-ngram-k4"]
    assert [case.id for case in cases(pairs, "kind", (4, 1))] == ["small-mtp-k4", "small-ngram-k4", "other-ngram-k4"]
    assert len(cases(pairs, "case", (4, 1))) == 6


def test_a_quick_run_covers_every_pair_and_kind():
    pairs = [
        Pair(
            f"builtin:{name}", (("mtp", f"builtin:{name}-assistant"), ("draft-model", "draft"), ("ngram", "ngram")), 16
        )
        for name in ("one", "two")
    ]
    pairs.append(Pair("builtin:three", (("draft-model", "draft"), ("ngram", "ngram")), 16))

    def ids(scope):
        return [case.id for case in cases(pairs, scope, (4, 1), quick=True)]

    assert ids("kind") == ["one-mtp-k4", "two-mtp-k4", "two-ngram-k4", "three-draft-model-k4"]
    assert set(ids("method")) == {"one-mtp-k4", "two-ngram-k4", "three-draft-model-k4"}
    assert len([name for name in ids("case") if name.endswith("k4")]) == 8
    assert [name for name in ids("case") if name.endswith("k1")] == [name[:-1] + "1" for name in ids("kind")]


def test_sliding_windows():
    assert sliding_window({"sliding_window": 32}) == 32
    assert sliding_window({"text_config": {"sliding_window": 512}, "sliding_window": 1}) == 512
    assert sliding_window({"sliding_window": None}) == sliding_window({}) == 64


def test_every_prerequisite_is_a_check():
    checks = load_checks()
    assert len(checks) > 30
    for found in checks.values():
        assert set(found.after) <= set(checks), found.name
        assert all(rank(checks[name]) < rank(found) for name in found.after), found.name
        assert found.statement.endswith((".", ":")), found.name
    assert matching_checks("test_greedy_*") == ["test_greedy_equals_plain"]


def test_a_check_needs_a_docstring():
    def test_nothing():
        pass

    with pytest.raises(ValueError, match="docstring"):
        check(scope="once")(test_nothing)


def test_time_limit():
    import time

    ended = threading.Event()
    engine = threading.Thread(target=ended.wait, name="engine")
    engine.start()
    with pytest.raises(TimeLimitError, match=r"0\.05") as caught, time_limit(0.05):
        time.sleep(5)
    ended.set()
    _, here, *others = str(caught.value).splitlines()
    assert here.startswith("thread MainThread: ")
    assert here.endswith(" test_time_limit")
    assert any(line.startswith("thread engine: ") and line.endswith(" wait") for line in others)
    with time_limit(5):
        pass
    time.sleep(0.06)
