"""From what a check raised to a row of the report: exclusions, claims and consequences are applied here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from polydraft.errors import PolydraftError

from polydraft_conformance.catalog import load_checks
from polydraft_conformance.exclusions import describe
from polydraft_conformance.frames import backend_frames, is_suites_own
from polydraft_conformance.rows import Row, Status, follows_from
from polydraft_conformance.signals import (
    CannotInstallError,
    DeclarationError,
    ExcludedWithoutRun,
    Failed,
    LeftOut,
    ModelsDoNotSuit,
    NotClaimed,
    NotIndependentlyChecked,
    Skipped,
    TimeLimitError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import Exclusion

    from polydraft_conformance.catalog import Check
    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite

__all__ = ["Outcome", "before", "crashed_row", "judge", "make_row", "parse_node_id", "settle"]


_DECLARED = ("Undeclared skip", "Unexpected pass", "The probe ")
"""Reasons that begin so are faults of a declaration: they follow from no other failure."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a check."""

    status: Status
    reason: str = ""


def before(suite: Suite, check: Check, case: Case | None) -> None:
    """Decide whether a check is to be run.

    Raises:
        NotClaimed: The capabilities do not claim what it tests.
        ExcludedWithoutRun: It is excluded, and must not run.
        DeclarationError: It is excluded for an upstream bug that has been fixed, or the probe fails.
    """
    if check.claims is not None and suite.capabilities is not None:
        reason = check.claims(suite.capabilities)
        if reason:
            raise NotClaimed(reason)
    exclusion = suite.exclusions.find(check.name, case)
    if exclusion is None:
        return
    try:
        gone = suite.exclusions.is_gone(exclusion)
    except Exception as error:
        raise DeclarationError(f"The probe {exclusion.probe} fails: {type(error).__name__}: {error}") from error
    if gone:
        raise DeclarationError(
            f"The probe {exclusion.probe} says that the fault is gone: remove the exclusion {exclusion.check!r} "
            f"({exclusion.reason})"
        )
    if not exclusion.run:
        raise ExcludedWithoutRun(describe(exclusion))


def judge(suite: Suite, check: Check, case: Case | None, error: BaseException | None) -> Outcome:
    """The outcome of a check that was run.

    Args:
        suite: Its exclusions and earlier failures count.
        check: The check.
        case: What it ran on.
        error: What it raised; None if it passed.
    """
    exclusion = suite.exclusions.find(check.name, case)
    if error is None:
        suite.note_pass(check, case)
        return _passed(exclusion)
    if isinstance(error, CannotInstallError):
        return Outcome("cannot-install", str(error))
    # Before Skipped, from which NotClaimed and ExcludedWithoutRun are derived.
    if isinstance(error, NotClaimed):
        return Outcome("not-claimed", str(error))
    if isinstance(error, ModelsDoNotSuit):
        return Outcome("not-applicable", str(error))
    if isinstance(error, LeftOut):
        return Outcome("unchecked", f"Left out: {error}")
    if isinstance(error, NotIndependentlyChecked):
        return Outcome("unchecked", f"Not independently checked: {error}")
    if isinstance(error, ExcludedWithoutRun):
        return Outcome("excluded", str(error))
    if isinstance(error, DeclarationError):
        return Outcome("fail", str(error))
    if isinstance(error, Skipped):
        return Outcome("fail", f"{_DECLARED[0]} ({error}): what a backend leaves out, it declares as an Exclusion.")
    reason = _describe(error)
    if exclusion is not None:
        return Outcome("excluded", f"{describe(exclusion)}\n{reason}")
    # After the exclusions: a declared failure needs no cause.
    if cause := suite.cause(check, case):
        return Outcome("follows", follows_from(cause, reason))
    if case is not None and case.pair.original is not None and suite.passed_on_original(check, case):
        reason = (
            f"The backend knows the shipped model: this check passes on {case.pair.original.name} and fails on a copy "
            f"of it with other weights. {reason}"
        )
    return Outcome("fail", reason)


def make_row(
    check: Check, case: Case | None, outcome: Outcome, *, seconds: float = 0.0, numbers: dict[str, Any] | None = None
) -> Row:
    """The row of a check on a case."""
    return Row(
        check=check.name,
        group=check.group,
        status=outcome.status,
        target=case.pair.name if case else None,
        drafter=case.drafter_name if case else None,
        kind=case.kind if case else None,
        k=case.k if case else None,
        reason=outcome.reason,
        seconds=round(seconds, 3),
        numbers=numbers or {},
    )


def crashed_row(nodeid: str, reason: str) -> Row | None:
    """The row of a check whose process died; None for a test that is not the suite's.

    Args:
        nodeid: All that is known of the test.
        reason: What happened.
    """
    check, (target, kind, k) = parse_node_id(nodeid)
    return Row(check.name, check.group, "fail", target=target, kind=kind, k=k, reason=reason) if check else None


def settle(rows: Sequence[Row]) -> list[Row]:
    """The rows, with every failure that an earlier check's explains marked as following from it.

    A process knows of its own failures only; what other workers found, or what a process that died knew, is known here.

    Args:
        rows: All rows of a run.
    """
    checks = load_checks()
    failed: dict[str, set[tuple[str | None, str | None]]] = {}
    for row in rows:
        if row.status in {"fail", "follows"} and row.check in checks:
            wide = checks[row.check].scope in {"backend", "once", "target"}
            failed.setdefault(row.check, set()).add((row.target, None if wide else row.kind))

    def settled(row: Row) -> Row:
        check = checks.get(row.check)
        if row.status != "fail" or check is None or row.reason.startswith(_DECLARED):
            return row
        places = {(None, None), (row.target, None), (row.target, row.kind)}
        cause = next((name for name in check.after if failed.get(name, set()) & places), None)
        return row if cause is None else replace(row, status="follows", reason=follows_from(cause, row.reason))

    return [settled(row) for row in rows]


def parse_node_id(nodeid: str) -> tuple[Check | None, tuple[str | None, str | None, int | None]]:
    """The check that a test is, if it is one, and its case: target, drafter kind and k."""
    file, _, function = nodeid.rpartition("::")
    name, _, case_id = function.partition("[")
    check = load_checks().get(name)
    if check is not None and not file.endswith(f"test_{check.group}.py"):
        check = None
    return check, _parse_case_id(case_id.rstrip("]"))


def _passed(exclusion: Exclusion | None) -> Outcome:
    if exclusion is None:
        return Outcome("pass")
    if exclusion.probe is not None:  # prompts are drawn: some do not show a fault that the probe still sees
        return Outcome("excluded", f"{describe(exclusion)}\nIt holds for the prompts of this run.")
    return Outcome(
        "fail",
        f"{_DECLARED[1]}: the backend excludes it by {exclusion.check!r} ({describe(exclusion)}), but it holds. "
        "Remove or narrow the exclusion.",
    )


def _describe(error: BaseException) -> str:
    """The reason: what the suite says, or what a backend raised, with its frames."""
    if isinstance(error, AssertionError | Failed) and not isinstance(error, TimeLimitError) and is_suites_own(error):
        return str(error)
    said = [f"{type(error).__name__}: {error}"]
    if isinstance(error, TimeLimitError):
        said = [f"Time limit: {error}"]
    elif isinstance(error, PolydraftError):  # the first line says what is wrong
        said = [f"{type(error).__name__}: {error.message}", *([error.hint] if error.hint else [])]
    return "\n".join([*said, *backend_frames(error)])


def _parse_case_id(case_id: str) -> tuple[str | None, str | None, int | None]:
    """``tiny-e2b-draft-model-k4`` -> its parts."""
    rest, _, k = case_id.rpartition("-k")
    # Names and kinds both contain hyphens: only known kinds tell where the name ends.
    for kind in ("draft-model", "mtp", "ngram", "eagle3", "dflash"):
        if rest.endswith("-" + kind) and k.isdigit():
            return rest.removesuffix("-" + kind), kind, int(k)
    return None, None, None
