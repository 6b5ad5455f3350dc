"""``verify``: load a pair, check it, keep what was found. What ``polydraft verify`` calls."""

from __future__ import annotations

from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING, Any

from polydraft._load import open_session, prepare
from polydraft._numbers import as_float, shown
from polydraft._plugins import default_host
from polydraft.errors import InvalidRequestError, PolydraftError, SpeculationUnavailableError, SystemResourceError
from polydraft.files import check_writable, system_error, system_errors
from polydraft.verification._plan import sliding_window
from polydraft.verification._run import check_session
from polydraft.verification._store import folder, save
from polydraft.verification._subject import subject_of, with_running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from polydraft.contract.results import RunningInfo
    from polydraft.verification._records import CheckedCase, Verification

__all__ = ["verify"]


def verify(
    target: str | Path,
    *,
    time_limit: float | None = None,
    keep: bool = True,
    loaded: Callable[[RunningInfo], None] | None = None,
    progress: Callable[[CheckedCase], None] | None = None,
    **arguments: Any,
) -> Verification:
    """Load a pair, compare its speculative output with its plain output, and keep what was found.

    Args:
        target: As for ``polydraft.load``.
        time_limit: Seconds for the check, loading not counted; None: one pass over the prompts, at most a minute.
        keep: Keep the result for ``load(verified=...)``.
        loaded: Called with what really runs, once it is loaded.
        progress: Called with each case as it is done.
        **arguments: Further arguments of ``polydraft.load``.

    Raises:
        PolydraftError: As for ``load`` and ``check_session``; or the result cannot be kept.
    """
    seconds = None if time_limit is None else as_float(time_limit)
    if time_limit is not None and not (seconds and 0 < seconds < inf):  # NaN is not above 0
        raise InvalidRequestError(
            f"`time_limit={shown(time_limit)}` is not a number of seconds.",
            "Give a positive number.",
            argument="time_limit",
        )
    with system_errors(f"{target} cannot be verified"):
        return _verify(target, seconds, keep, loaded, progress, arguments)


def _verify(
    target: str | Path,
    time_limit: float | None,
    keep: bool,
    loaded: Callable[[RunningInfo], None] | None,
    progress: Callable[[CheckedCase], None] | None,
    arguments: dict[str, Any],
) -> Verification:
    prepared = prepare(target, **arguments)
    plan = prepared.request.plan
    if plan.kind is None:
        why = plan.off.message if plan.off else "No drafter was found."
        raise SpeculationUnavailableError(f"There is nothing to verify, speculation is off: {why}", "Give a drafter.")
    subject = subject_of(prepared, arguments.get("host") or default_host())
    if subject is None:
        raise PolydraftError(
            "These weights cannot be identified, so a verification could not be kept.",
            "Give the models as folders, or by a commit: `revision=<commit>`.",
        )
    window = sliding_window(prepared.request.target.config)
    if keep:
        # Before the check: its result would be lost.
        with _keeping("The verification could not be kept"):
            check_writable(folder())
    with open_session(prepared.backend, prepared.request) as session:
        if loaded is not None:
            loaded(session.running)
        found = check_session(
            session,
            with_running(subject, session.running),
            prepared.backend.capabilities(),
            window,
            time_limit=time_limit,
            progress=progress,
        )
    if keep:
        with _keeping(f"The verification ({found.verdict}) cannot be kept"):
            save(found)
    return found


@contextmanager
def _keeping(what: str) -> Iterator[None]:
    hint = "Fix the folder, or verify without keeping the result."
    try:
        yield
    except OSError as error:
        refused = system_error(error, what)
        if refused is None:
            at = f" ({error.filename})" if error.filename is not None else ""
            raise PolydraftError(f"{what}: {error.strerror or error}{at}.", hint) from error
        raise SystemResourceError(refused.message, f"{refused.hint} Or verify without keeping the result.") from error
