"""From what a check raised to a row of the report: exclusions, claims and consequences are applied here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from polydraft_conformance.catalog import load_checks
from polydraft_conformance.exclusions import describe
from polydraft_conformance.rows import Row, Status
from polydraft_conformance.signals import (
    CannotInstallError,
    DeclarationError,
    ExcludedWithoutRun,
    Failed,
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

__all__ = ["Outcome", "before", "crashed_row", "judge", "make_row", "target_of"]


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
        return _passed(exclusion)
    if isinstance(error, CannotInstallError):
        return Outcome("cannot-install", str(error))
    # Before Skipped, from which NotClaimed and ExcludedWithoutRun are derived.
    if isinstance(error, NotClaimed):
        return Outcome("not-claimed", str(error))
    if isinstance(error, NotIndependentlyChecked):
        return Outcome("unchecked", f"Not independently checked: {error}")
    if isinstance(error, ExcludedWithoutRun):
        return Outcome("excluded", str(error))
    if isinstance(error, DeclarationError):
        return Outcome("fail", str(error))
    if isinstance(error, Skipped):
        return Outcome("fail", f"Undeclared skip ({error}): what a backend leaves out, it declares as an Exclusion.")
    reason = _describe(error)
    if exclusion is not None:
        return Outcome("excluded", f"{describe(exclusion)}\n{reason}")
    # After the exclusions: a declared failure needs no cause.
    if cause := suite.cause(check, case):
        return Outcome("follows", f"Follows from {cause}.\n{reason}")
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
        drafter=case.drafter if case else None,
        kind=case.kind if case else None,
        k=case.k if case else None,
        reason=outcome.reason,
        seconds=round(seconds, 3),
        numbers=numbers or {},
    )


def crashed_row(nodeid: str, reason: str, earlier: Sequence[Row] = ()) -> Row:
    """The row of a check whose process died.

    Args:
        nodeid: All that is known of the check.
        reason: What happened.
        earlier: Rows so far: what the process knew of earlier failures died with it.
    """
    name, _, case_id = nodeid.rpartition("::")[2].partition("[")
    check = load_checks().get(name)
    target, kind, k = _parse_case_id(case_id.rstrip("]"))
    row = Row(
        check=name, group=check.group if check else "", status="fail", target=target, kind=kind, k=k, reason=reason
    )
    causes = [
        other.check
        for other in earlier
        if check is not None
        and other.check in check.after
        and other.status in {"fail", "follows"}
        # (None, None): a check of the backend as a whole.
        and (other.target, other.kind) in {(target, kind), (None, None)}
    ]
    if causes:
        return replace(row, status="follows", reason=f"Follows from {causes[0]}.\n{reason}")
    return row


def target_of(nodeid: str) -> str | None:
    """The target that a check runs on; None for checks that load none, and for tests that are no checks."""
    name, _, case_id = nodeid.rpartition("::")[2].partition("[")
    return _parse_case_id(case_id.rstrip("]"))[0] if name in load_checks() else None


def _passed(exclusion: Exclusion | None) -> Outcome:
    if exclusion is None:
        return Outcome("pass")
    return Outcome(
        "fail",
        f"Unexpected pass: the backend excludes it by {exclusion.check!r} ({describe(exclusion)}), but it holds. "
        "Remove or narrow the exclusion.",
    )


def _describe(error: BaseException) -> str:
    if isinstance(error, TimeLimitError):
        return f"Time limit: {error}"
    if isinstance(error, AssertionError | Failed):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _parse_case_id(case_id: str) -> tuple[str | None, str | None, int | None]:
    """``tiny-e2b-draft-model-k4`` -> its parts."""
    rest, _, k = case_id.rpartition("-k")
    # Names and kinds both contain hyphens: only known kinds tell where the name ends.
    for kind in ("draft-model", "mtp", "ngram", "eagle3", "dflash"):
        if rest.endswith("-" + kind) and k.isdigit():
            return rest.removesuffix("-" + kind), kind, int(k)
    return None, None, None
