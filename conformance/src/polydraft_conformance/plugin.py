"""The pytest plugin: hooks only. It does nothing unless a check of the suite is collected."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from polydraft_conformance.display import Display
from polydraft_conformance.items import MARK, ROW_PROPERTY, case_of, check_of
from polydraft_conformance.options import add_options, read_options

if TYPE_CHECKING:
    from collections.abc import Generator

    from polydraft import PluginHost

    from polydraft_conformance.report import Report
    from polydraft_conformance.rows import Row
    from polydraft_conformance.suite import Suite

pytest_plugins = ["polydraft_conformance.fixtures"]

SUITE: pytest.StashKey[Suite] = pytest.StashKey()
HOST: pytest.StashKey[PluginHost] = pytest.StashKey()
"""Plugins in place of the installed ones: for tests of the suite itself."""
ROWS: pytest.StashKey[list[Row]] = pytest.StashKey()
DISPLAY: pytest.StashKey[Display] = pytest.StashKey()
NUMBERS: pytest.StashKey[dict[str, Any]] = pytest.StashKey()
SETUP_SECONDS: pytest.StashKey[float] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of checks."""
    config.addinivalue_line("markers", f"{MARK}(name): a check of the polydraft conformance suite")
    config.stash[ROWS] = []
    if hasattr(config, "workerinput"):
        config.option.polydraft_seed = config.workerinput.get("polydraft_seed", config.option.polydraft_seed)
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist leaves the rows to its controller
        config.pluginmanager.register(RowCollector(config.stash[ROWS]), "polydraft-rows")
        config.stash[DISPLAY] = Display(config, config.stash[ROWS], lambda: report_so_far(config))
        config.pluginmanager.register(config.stash[DISPLAY], "polydraft-display")
        _make_report_folder(config)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's: unknown where that is not installed
def pytest_configure_node(node: Any) -> None:
    """Give a worker of pytest-xdist the seed of the run: all of them collect the same checks."""
    from polydraft_conformance.options import draw_seed

    if node.config.option.polydraft_seed is None:
        node.config.option.polydraft_seed = draw_seed()
    node.workerinput["polydraft_seed"] = node.config.option.polydraft_seed


def suite_of(config: pytest.Config) -> Suite:
    """The suite of this run, opened on first use.

    Raises:
        pytest.UsageError: No backend is named, there is no such backend, or nothing to run it on.
    """
    from polydraft.errors import PolydraftError

    from polydraft_conformance.pairs import NoPairsError
    from polydraft_conformance.suite import open_suite

    if SUITE not in config.stash:
        options = read_options(config)
        if options is None:
            raise pytest.UsageError("Name the backend to check: --polydraft-backend NAME.")
        try:
            config.stash[SUITE] = open_suite(options, config.stash.get(HOST, None))
        except (PolydraftError, NoPairsError) as error:
            raise pytest.UsageError(str(error)) from error
    return config.stash[SUITE]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeat a check for the cases of its scope."""
    mark = next(metafunc.definition.iter_markers(MARK), None)
    if mark is None:
        return
    from polydraft_conformance.catalog import CHECKS
    from polydraft_conformance.pairs import cases_of

    try:
        suite = suite_of(metafunc.config)
    except pytest.UsageError:
        return  # reported once, when all items are collected
    check = CHECKS[mark.args[0]]
    if suite.diagnosis.usable and check.scope != "backend":
        found = cases_of(check, suite.pairs, suite.k_values, quick=suite.options.quick)
        metafunc.parametrize("polydraft_case", found, ids=[case.id for case in found])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order checks by case, so that each pair is loaded once; keep only availability if the backend cannot run."""
    checks = {item: check for item in items if (check := check_of(item))}
    if not checks:
        return
    from polydraft_conformance.catalog import rank

    suite = suite_of(config)
    if not suite.diagnosis.usable:
        left_out = [item for item, check in checks.items() if (check.group, check.scope) != ("availability", "backend")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
        return

    def order(item: pytest.Item) -> tuple[Any, ...]:
        case = case_of(item)
        check = checks[item]
        if case is None:
            return (-1, -1, -1, *rank(check))
        # A varied copy comes after the first case of its original: what it shows is known early.
        varied = case.pair.original is not None
        pair = suite.pairs.index(case.pair.original or case.pair)
        return (pair, case.pair.kinds.index(case.kind), suite.k_values.index(case.k), varied, *rank(check))

    others = [item for item in items if item not in checks]
    items[:] = [*others, *sorted(checks, key=order)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where ``-n`` is given without ``--dist``, a target's checks stay in one process."""
    if config.getoption("dist") != "load" or read_options(config) is None:
        return None
    from polydraft_conformance.by_target import ByTarget

    return ByTarget(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Apply claims and exclusions, and limit the time that loading takes."""
    check = check_of(item)
    if check is None:
        return (yield)
    from polydraft_conformance.limits import time_limit
    from polydraft_conformance.outcomes import before
    from polydraft_conformance.suitability import need_suited_models

    suite = suite_of(item.config)
    item.stash[NUMBERS] = {}
    before(suite, check, case_of(item))
    with time_limit(suite.options.time_limit):
        if (case := case_of(item)) is not None:
            need_suited_models(suite, check, case)
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Limit the time that a check takes."""
    check = check_of(item)
    if check is None:
        return (yield)
    from polydraft_conformance.limits import time_limit

    with time_limit(suite_of(item.config).options.time_limit * check.time_factor):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn what pytest saw into the suite's outcome, and send the row along with the report."""
    report = yield
    check = check_of(item)
    if check is None:
        return report
    from polydraft_conformance.outcomes import judge, make_row
    from polydraft_conformance.signals import TimeLimitError

    error = call.excinfo.value if call.excinfo else None
    if call.when == "setup":
        item.stash[SETUP_SECONDS] = call.duration
    if (call.when == "setup" and error is None) or (call.when == "teardown" and error is None):
        return report
    suite, case = suite_of(item.config), case_of(item)
    if isinstance(error, TimeLimitError):
        suite.abandon()
    outcome = judge(suite, check, case, error)
    if outcome.status in {"fail", "follows"}:
        suite.note_failure(check, case)
    _set_outcome(report, outcome.status, outcome.reason)
    seconds = call.duration + (item.stash.get(SETUP_SECONDS, 0.0) if call.when == "call" else 0.0)
    measured: dict[str, Any] = item.stash.get(NUMBERS, {})
    row = make_row(check, case, outcome, seconds=seconds, numbers={**measured, **suite.take_verdicts()})
    report.user_properties.append((ROW_PROPERTY, row.as_dict()))
    return report


def _set_outcome(report: pytest.TestReport, status: str, reason: str) -> None:
    """The outcome for pytest: excluded checks and consequences as expected failures, claims not made as skips."""
    if status in {"pass", "cannot-install"}:
        report.outcome = "passed"
        report.longrepr = None
    elif status == "fail":
        if report.outcome != "failed" or not report.longrepr:
            report.longrepr = reason
        report.outcome = "failed"
    elif status in {"not-claimed", "not-applicable", "unchecked"}:
        report.outcome = "skipped"
    else:
        report.outcome = "skipped"
        report.wasxfail = reason.splitlines()[0]


class RowCollector:
    """Collects the rows of all reports, in the one process that sees them all."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the row from a report; a check whose process died has none."""
        from polydraft_conformance.rows import Row

        sent = [value for name, value in report.user_properties if name == ROW_PROPERTY]
        self.rows.extend(Row(**value) for value in sent if isinstance(value, dict))
        if not sent and report.failed and report.when not in {"setup", "call", "teardown"}:
            from polydraft_conformance.outcomes import crashed_row

            last_line = report.longreprtext.strip().splitlines()[-1]
            if row := crashed_row(report.nodeid, f"The process died: {last_line}"):
                self.rows.append(row)


def _make_report_folder(config: pytest.Config) -> None:
    """Find out before the run, not after it, that no report can be written."""
    folder: Path | None = config.getoption("polydraft_report", None)
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(
            f"--polydraft-report={folder}: no folder can be made there: {error.strerror}. Name another one."
        ) from error


def report_so_far(config: pytest.Config) -> Report:
    """The report of a run, as far as it has come."""
    from polydraft_conformance.outcomes import settle
    from polydraft_conformance.report import report_of

    rows = config.stash[ROWS]
    if config.pluginmanager.hasplugin("dsession"):  # pytest-xdist: each worker knows of its own failures only
        rows = settle(rows)
    return report_of(suite_of(config), rows, planned=config.stash[DISPLAY].planned)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Close what is open, and write the report."""
    config = session.config
    if SUITE in config.stash:
        config.stash[SUITE].end()
    if hasattr(config, "workerinput") or not config.stash.get(ROWS, []):
        return
    folder = suite_of(config).options.report
    if folder is not None:
        from polydraft_conformance.report import write

        write(report_so_far(config), folder)


def pytest_terminal_summary(config: pytest.Config) -> None:
    """One line for each check, the failures by cause, the result, and where the report is."""
    if not config.stash.get(ROWS, []):
        return
    from polydraft_conformance.report import HTML_NAME

    folder = suite_of(config).options.report
    config.stash[DISPLAY].summarize(folder / HTML_NAME if folder else None)
