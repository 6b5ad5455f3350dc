"""What a run shows while it goes on and at its end."""

import re

import pytest
from polydraft_conformance.claims import expect
from polydraft_conformance.defects import stepping
from polydraft_conformance.defects.making import defective
from polydraft_conformance.frames import backend_frames, is_suites_own
from polydraft_conformance.rendering import summary
from polydraft_conformance.rendering.causes import causes
from polydraft_conformance.rendering.statuses import look_of, said_of_a_run
from polydraft_conformance.rendering.terminal import Live, Place, Style, clock, cut, write_line
from polydraft_conformance.rows import STATUSES, Row, follows_from


def row(check="test_a", status="pass", reason="", k=4, kind="mtp", group="greedy", seconds=0.5):
    return Row(check, group, status, "toy", None, kind, k, reason, seconds).as_dict()


def place(found):
    return Place(found["check"], found["group"], found["target"], found["kind"], found["k"])


class Screen:
    """A writer that keeps what was written, and what is red of it."""

    def __init__(self):
        self.text = self.red = ""

    def write(self, content, *, flush=False, **markup):
        self.text += content
        self.red += content if markup.get("red") else ""


def text_of(lines):
    screen = Screen()
    for line in lines:
        write_line(screen, line)
    return screen.text


ROWS = [
    row(),
    row("test_b", "fail", "It is wrong by 0.25.\nevidence: 7\nmore evidence"),
    row("test_c", "follows", follows_from("test_b", "It is wrong, too."), group="sampling"),
    row("test_b", "fail", "It is wrong by 1e-3.", k=1),
    row("test_d", "follows", follows_from("test_c", "And this."), group="sampling"),
    row("test_e", "not-claimed", "It is not claimed.", group="sampling"),
    row("test_e", "pass", k=1, group="sampling"),
]


def test_causes_are_told_once():
    (cause,) = causes(ROWS)
    assert (cause.check, cause.cases) == ("test_b", ["toy, mtp, k=4", "toy, mtp, k=1"])
    assert cause.followers == {"test_c": 1, "test_d": 1}, "test_d follows through test_c"
    other = causes([*ROWS, row("test_b", "fail", "Something else.", kind="ngram")])
    assert [len(found.rows) for found in other] == [2, 1]


def test_a_log_has_plain_lines_only():
    screen = Screen()
    live = Live(screen, Style(), [place(found) for found in ROWS])
    for found in ROWS:
        live.start(place(found))
        live.add(found)
    lines = screen.text.splitlines()
    assert len(lines) == 2, "one for the cause, one for the target with its drafter"
    assert lines[0] == "✗ test_b (toy, mtp, k=4): It is wrong by 0.25."
    assert lines[1] == "[7/7] toy, mtp: 2 failed, 2 follow, 2 passed, 1 not claimed (0:00)"
    assert all(char.isprintable() or char == "\n" for char in screen.text)


def test_the_bar_is_red_once_something_failed():
    screen = Screen()
    live = Live(screen, Style(live=True), [place(found) for found in ROWS])
    live.start(place(ROWS[0]))
    live.add(ROWS[0])
    assert screen.text.count("\n") - screen.text.count("\x1b[1A") == 1, "one line stands, the bar"
    assert screen.red == ""
    live.add(ROWS[1])
    assert "━" in screen.red
    screen.text = ""
    live.add(row("test_f"))
    assert "━" in screen.red.splitlines()[-1]
    live.erase()
    assert screen.text.count("\n") == screen.text.count("\x1b[1A") - 1, "also the bar before it was emptied"
    live.erase()
    assert screen.text.endswith("\x1b[2K")


def test_verbose_runs_leave_failures_to_pytest():
    screen = Screen()
    live = Live(screen, Style(verbosity=1), [place(found) for found in ROWS])
    for found in ROWS:
        live.add(found)
    assert screen.text == ""


def test_what_a_backend_says_moves_no_cursor():
    assert text_of([[("a\x1b[2J\rb\u202e", None)]]) == "a\\x1b[2J\\rb\\u202e\n"


def test_a_line_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert cut([("x" * 12, None), ("y" * 12, "bad")], Style()) == [("x" * 12, None), ("y" * 6 + "…", "bad")]


def test_one_line_for_each_check():
    lines = text_of(summary.table(ROWS, Style())).splitlines()
    assert lines[0] == "greedy"
    assert re.fullmatch(r"  ✓ test_a  1 of 1 passed +0\.5 s", lines[1])
    assert re.fullmatch(r"  ✗ test_b  2 of 2 failed +1\.0 s", lines[2])
    assert lines[3].strip() == "It is wrong by 0.25. (toy, mtp, k=4 and 1 more)"
    assert re.fullmatch(r"  ↳ test_c  1 of 1 follow +0\.5 s  from test_b", lines[5])
    assert re.fullmatch(r"  ✓ test_e  1 of 2 passed, 1 not claimed +1\.0 s", lines[7])
    quiet = text_of(summary.table(ROWS, Style(verbosity=-1, unicode=False))).splitlines()
    assert [line.split()[:2] for line in quiet] == [["X", "greedy"], [">", "sampling"]]
    assert text_of(summary.table(ROWS, Style(verbosity=-2))) == ""


def test_failures_are_told_with_what_they_mean():
    explained = {"test_b": {"failure": "The cache\nis stale.", "look": "rollback."}}
    said = text_of(summary.failures(ROWS, Style(), explained))
    assert said.count("It is wrong") == 1
    assert "    evidence: 7\n    more evidence\n" in said
    assert "2 more follow from it: test_c, test_d" in said
    assert "a failure means: The cache is stale." in said
    assert "look at: rollback." in said


def test_every_status_has_a_look():
    assert all(look_of(status).one for status in STATUSES)
    greens = {status for status in STATUSES if look_of(status).tone == "good"}
    assert greens == {"pass"}
    assert look_of("of-a-later-version").tone == "off"
    assert said_of_a_run("incomplete")[0] == "is incomplete"


def test_the_command_that_repeats_a_run():
    command = summary.repeat_command(["-k", "a or b", "--polydraft-backend", "x"], 7)
    assert command.endswith("-k 'a or b' --polydraft-backend x --polydraft-seed=7")
    assert summary.repeat_command(["--polydraft-seed=3"], 3).count("--polydraft-seed") == 1
    assert "seed" not in summary.repeat_command(["-q"], None)


def test_clock():
    assert [clock(seconds) for seconds in (7.4, 61, 3723)] == ["0:07", "1:01", "1:02:03"]


def test_a_backend_s_own_frames():
    def engine():
        raise KeyError("k")

    def core():
        try:
            engine()
        except KeyError as error:
            raise ValueError("The engine failed.") from error

    with pytest.raises(ValueError, match="engine failed") as raised:
        core()
    assert backend_frames(raised.value)[-1].endswith('in engine: raise KeyError("k")')
    assert not is_suites_own(raised.value)
    with pytest.raises(AssertionError) as found:
        expect(False, "It is wrong.")
    assert is_suites_own(found.value)


def test_a_run_on_the_terminal(conformance, capfd, tmp_path):
    """pytest's lists of failures stay empty; a backend's exception comes with its own frames, without the suite's."""
    report = tmp_path / "report"
    conformance(
        *("-v", "--polydraft-kinds", "mtp", "-k", "test_generates or test_drafts_are_made or availability"),
        *("--polydraft-report", str(report)),
        backend=defective(stepping.Raising),
    )
    said = capfd.readouterr().out
    assert "ValueError: no more" in said
    assert re.search(r'at polydraft_conformance\.defects\.stepping:\d+ in verify: raise ValueError\("no more"\)', said)
    assert "checks/test_generation.py" not in said
    assert "short test summary" not in said
    assert "FAILURES" not in said
    assert "Traceback" not in said
    assert f"report: {report / 'conformance-report.html'}" in said
    assert re.search(r"reference fails: \d failed, \d follow, 2 passed, in 0:\d\d", said)
    assert not any(char in said for char in "\x1b\r")


def test_an_interrupted_run_is_no_pass(conformance, capfd, tmp_path):
    class Interrupted(stepping.Raising):
        def verify(self, token_ids, sampler, *, keep_logits=False):
            raise KeyboardInterrupt

    conformance(
        *(
            "-v",
            "--polydraft-kinds",
            "mtp",
            "-k",
            "declarations or test_generates",
            "--polydraft-report",
            str(tmp_path),
        ),
        backend=defective(Interrupted),
    )
    said = capfd.readouterr().out
    assert "reference is incomplete: 3 passed" in said
    assert re.search(r"3 of \d+ were run", said)
    assert "incomplete" in (tmp_path / "conformance-report.md").read_text("utf-8").splitlines()[0]
    assert '<article class="card warn"' in (tmp_path / "conformance-report.html").read_text("utf-8")
