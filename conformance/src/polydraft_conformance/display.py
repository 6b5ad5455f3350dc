"""pytest's hooks for the terminal: checks are shown by ``rendering.terminal``, tests of others as pytest shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from polydraft_conformance.items import MARK, place_of, places_of_ids, status_of
from polydraft_conformance.rendering import terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from pathlib import Path

    from _pytest.terminal import TerminalReporter

    from polydraft_conformance.rendering.terminal import Place
    from polydraft_conformance.report import Report
    from polydraft_conformance.rows import Row

__all__ = ["Display"]


class Display:
    """Shows a run of the suite, in the process that sees all reports. It does nothing where no check is run."""

    def __init__(self, config: pytest.Config, rows: list[Row], report: Callable[[], Report]) -> None:
        """Show what is added to ``rows``; ``report`` gives the report so far."""
        self._config = config
        self._rows = rows
        self._report = report
        self._shown = 0
        self._planned: dict[str, Place] = {}
        self._node_ids: Sequence[str] = ()
        self._others = False
        self._line_is_open = False
        self._live: terminal.Live | None = None

    @property
    def planned(self) -> int:
        """Number of rows that a complete run has; 0 where nothing was collected."""
        self._know_items()
        return len(self._planned)

    @property
    def seconds(self) -> float:
        """Since the first check."""
        return self._live.seconds if self._live else 0.0

    @property
    def style(self) -> terminal.Style:
        """How much is shown, and by which characters."""
        reporter, option = self._reporter, self._config.option
        undisturbed = (
            getattr(option, "capture", "no") != "no"
            and not getattr(option, "usepdb", False)
            and not getattr(option, "trace", False)
            and not getattr(option, "setupshow", False)
            and not self._logs_live()
        )
        return terminal.style_of(
            is_terminal=reporter is not None and bool(reporter.isatty),
            may_update=undisturbed,
            verbosity=option.verbose,
        )

    @property
    def shows_tracebacks(self) -> bool:
        """Whether pytest shows failed checks as other tests, with tracebacks and captured output."""
        return self._config.option.verbose > 0 or self._config.option.tbstyle not in {"auto", "no"}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note what is going to run."""
        places = {item.nodeid: place_of(item) for item in session.items}
        self._planned = {node_id: place for node_id, place in places.items() if place is not None}
        self._others = len(self._planned) < len(places)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """Note what the workers are going to run: all collect the same."""
        self._node_ids = ids

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Keep pytest from naming the files of checks, and show the check that runs."""
        place = self._planned.get(nodeid)
        reporter = self._reporter
        if reporter is not None and not self._node_ids:  # pytest-xdist shows no files
            reporter.showfspath = None if place is None else False
        if place is None:
            self._erase()
        elif live := self._started():
            live.start(place)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Generator[None, None, None]:
        """Show what became of a check."""
        is_check = self._is_check(report)
        if not is_check:
            self._erase()
        yield
        if is_check and (live := self._started()):
            for row in self._rows[self._shown :]:
                live.add(row.as_dict())
            self._shown = len(self._rows)
        elif not is_check:
            self._line_is_open = True

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, Any] | None:
        """Count a check as pytest would, and show no letter for it; with -v, its status in words."""
        from polydraft_conformance.rendering.statuses import look_of

        if not isinstance(report, pytest.TestReport) or not self._is_check(report):
            return None
        status = status_of(report)
        if status is None and not report.failed:  # its setup, or its teardown
            return ("", "", "")
        status = status or "fail"  # its process died
        word = {"pass": "PASSED", "fail": "FAILED"}.get(status, look_of(status).past)
        markup = {"good": {"green": True}, "bad": {"red": True}, "warn": {"yellow": True}}.get(look_of(status).tone, {})
        # An empty letter and word would leave it out of pytest's percentage, which others' tests show.
        shown = (word, markup) if self._config.option.verbose > 0 else (" ", {}) if self._others else ""
        category = "failed" if status == "fail" else "xfailed" if hasattr(report, "wasxfail") else report.outcome
        return (category, "", shown)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        """Leave the terminal to pytest after the last check, or after an interrupt."""
        try:
            return (yield)
        finally:
            self._erase()

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_testnodedown(self) -> None:
        """pytest-xdist is about to tell that a worker died."""
        self._erase()

    @pytest.hookimpl(tryfirst=True)
    def pytest_internalerror(self) -> None:
        """Leave the terminal to pytest."""
        self._erase()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: TerminalReporter) -> Generator[None, None, None]:
        """Keep pytest's lists of failures and skips to others' tests, unless tracebacks are wanted."""
        if self.shows_tracebacks or not self._rows:
            return (yield)
        kept = dict(terminalreporter.stats)
        for category, reports in kept.items():
            terminalreporter.stats[category] = [report for report in reports if not self._is_check(report)]
        try:
            return (yield)
        finally:
            terminalreporter.stats.update(kept)

    def summarize(self, page: Path | None) -> None:
        """Show the end of the run, and where its HTML report is, if one was written."""
        from polydraft_conformance.rendering import summary
        from polydraft_conformance.rendering.statuses import said_of_a_run

        reporter, style, report = self._reporter, self.style, self._report()
        if reporter is None:
            return
        data = report.as_dict()
        colour = {"pass": "green", "fail": "red"}.get(report.status, "yellow")
        title = f"polydraft conformance of {report.backend}: {said_of_a_run(report.status)[0]}"
        reporter.write_sep("=", title, **{colour: True})
        table = summary.table(data["checks"], style)
        self._write(terminal.cut(line, style) if style.live else line for line in table)
        if found := list(summary.failures(data["checks"], style, data["explanations"])):
            reporter.write_sep("-", "failures, by cause", red=True)
            self._write(found)
        self._write(
            summary.ending(
                data,
                seconds=self.seconds,
                planned=self.planned,
                arguments=[str(argument) for argument in self._config.invocation_params.args],
                page=page,
                has_tracebacks=self.shows_tracebacks,
            )
        )

    def _write(self, lines: Iterable[terminal.Line]) -> None:
        if self._reporter is not None:
            for line in lines:
                terminal.write_line(self._reporter, line)

    @property
    def _reporter(self) -> TerminalReporter | None:
        """pytest's; None with ``-p no:terminal``."""
        return cast("TerminalReporter | None", self._config.pluginmanager.getplugin("terminalreporter"))

    def _is_check(self, report: Any) -> bool:
        return MARK in getattr(report, "keywords", ()) or getattr(report, "nodeid", None) in self._planned

    def _started(self) -> terminal.Live | None:
        """The display, begun when the first check is."""
        reporter = self._reporter
        if reporter is None:
            return None
        if self._line_is_open:  # pytest's line of others' results
            self._line_is_open = False
            reporter.ensure_newline() if reporter.currentfspath else reporter.write("\n")
        if self._live is None:
            from polydraft_conformance.rendering.summary import heading

            self._know_items()
            style = self.style
            if style.verbosity == 0:
                reporter.ensure_newline()
                self._write(heading(self._report().as_dict(), self._planned.values()))
            self._live = terminal.Live(reporter, style, list(self._planned.values()))
        return self._live

    def _know_items(self) -> None:
        """What the workers of pytest-xdist run; not before it is needed, since it imports the suite's checks."""
        if self._node_ids and not self._planned:
            self._planned = places_of_ids(self._node_ids)
            self._others = len(self._planned) < len(self._node_ids)

    def _erase(self) -> None:
        if self._live is not None:
            self._live.erase()

    def _logs_live(self) -> bool:
        try:
            return bool(self._config.getini("log_cli"))
        except ValueError:  # -p no:logging
            return False
