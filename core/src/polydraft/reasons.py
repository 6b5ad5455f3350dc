"""Why speculation is off: the sentences, in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.contract.requests import OffReason

if TYPE_CHECKING:
    from polydraft.contract.records import FaultRecord

__all__ = ["by_caller", "by_engine", "by_fault", "no_drafter", "slower", "too_few_tokens"]


def by_caller(what: str = "`drafter=None`") -> OffReason:
    """The caller asked for plain decoding, by ``drafter=None`` or ``speculate="off"``."""
    return OffReason(code="caller", message=f"The caller asked for plain decoding ({what}).")


def no_drafter(target: str, why: str = "") -> OffReason:
    """No drafter is known for the target, and n-gram drafting is not available either."""
    return OffReason(code="no-drafter", message=why or f"No drafter is known for {target}; give one as `drafter`.")


def by_fault(fault: FaultRecord, version: str) -> OffReason:
    """A known fault of the installed engine version forbids it."""
    return OffReason(
        code="fault", message=f"{fault.distribution} {version} has a known fault: {fault.summary} {fault.remedy}"
    )


def too_few_tokens() -> OffReason:
    """The limit leaves no room for a draft."""
    return OffReason(code="length", message="Too few tokens are left to draft any.")


def by_engine(message: str) -> OffReason:
    """The engine says why."""
    return OffReason(code="engine", message=message)


def slower(message: str) -> OffReason:
    """``polydraft tune`` measured that plain decoding is faster; the message has the figures."""
    return OffReason(code="slower", message=message)
