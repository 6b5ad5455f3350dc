"""``verify``: load a pair, check it, keep what was found. What ``polydraft verify`` calls."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from polydraft._load import open_session, prepare
from polydraft._load_arguments import refuse_in_measurements
from polydraft._numbers import MOST_SECONDS, as_seconds, shown
from polydraft._plugins import default_host
from polydraft._sealed import check_writable, keep_result
from polydraft.errors import InvalidRequestError, PolydraftError, SpeculationUnavailableError
from polydraft.files import system_errors
from polydraft.verification._plan import sliding_window
from polydraft.verification._run import check_session
from polydraft.verification._store import folder, save
from polydraft.verification._subject import subject_of, with_running

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from polydraft.contract.requests import Prompt
    from polydraft.contract.results import RunningInfo
    from polydraft.verification._records import CheckedCase, Subject, Verification

__all__ = ["verify"]

_LOADED = {"dtype", "device"}

_progress = logging.getLogger("polydraft.progress")


def verify(
    target: str | Path,
    *,
    time_limit: float | None = None,
    keep: bool = True,
    loaded: Callable[[RunningInfo], None] | None = None,
    progress: Callable[[CheckedCase], None] | None = None,
    prompts: Sequence[Prompt] | None = None,
    **arguments: Any,
) -> Verification:
    """Load a pair, compare its speculative output with its plain output, and keep what was found.

    Args:
        target: As for ``polydraft.load``.
        time_limit: Seconds for the check, loading not counted; None: one pass over the prompts, at most a minute.
        keep: Keep the result for ``load(verified=...)``.
        loaded: Called with what really runs, once it is loaded.
        progress: Called with each case as it is done.
        prompts: What to decode, as ``Session.generate`` takes it; None: built-in prompts, short and long ones.
        **arguments: Further arguments of ``polydraft.load``.

    Raises:
        PolydraftError: As for ``load`` and ``check_session``; or the result cannot be kept, or files changed meanwhile.
    """
    seconds = None if time_limit is None else as_seconds(time_limit)
    if time_limit is not None and seconds is None:
        raise InvalidRequestError(
            f"`time_limit={shown(time_limit)}` is not a number of seconds.",
            f"Give a positive number of at most {MOST_SECONDS:.0f}.",
            argument="time_limit",
        )
    with system_errors(f"{target} cannot be verified"):
        return _verify(target, seconds, keep, loaded, progress, prompts, arguments)


def _verify(
    target: str | Path,
    time_limit: float | None,
    keep: bool,
    loaded: Callable[[RunningInfo], None] | None,
    progress: Callable[[CheckedCase], None] | None,
    prompts: Sequence[Prompt] | None,
    arguments: dict[str, Any],
) -> Verification:
    refuse_in_measurements(arguments)
    prepared = prepare(target, **arguments)
    plan = prepared.request.plan
    if plan.kind is None:
        why = plan.off.message if plan.off else "No drafter was found."
        hint = "Give that k." if plan.off and plan.off.code == "slower" else "Give a drafter."
        raise SpeculationUnavailableError(f"There is nothing to verify, speculation is off: {why}", hint)
    host = arguments.get("host") or default_host()
    _progress.info("Reading the weights of %s", target)
    subject = subject_of(prepared, host)
    if keep:
        if subject.builds is None:
            raise _cannot_be_kept(subject)
        keep_result(lambda: check_writable(folder()), f"A verification of {subject.target}")
    window = sliding_window(prepared.request.target.config)
    # Each output is that of its own prefill.
    request = prepared.request.model_copy(update={"prefix_cache_bytes": 0})
    with open_session(prepared.backend, request, process_reason=prepared.process_reason) as session:
        if loaded is not None:
            loaded(session.running)
        subject = with_running(subject, session.running, prepared.request)
        if keep and subject.unknown:
            raise _cannot_be_kept(subject)
        found = check_session(
            session,
            subject,
            prepared.backend.capabilities(),
            window,
            time_limit=time_limit,
            progress=progress,
            prompts=prompts,
        )
    if keep and subject_of(prepared, host).model_dump(exclude=_LOADED) != subject.model_dump(exclude=_LOADED):
        raise PolydraftError(
            f"The files of {subject.target}, of its drafter or of the engine changed while they were verified, so the "
            f"result ({found.verdict}) is not kept.",
            "Verify again when nothing changes them.",
        )
    if keep:
        keep_result(lambda: save(found), f"A verification of {subject.target}")
    return found


def _cannot_be_kept(subject: Subject) -> PolydraftError:
    return PolydraftError(
        f"{subject.unknown} A verification of it could not be kept.",
        "Verify without keeping the result: `keep=False`.",
    )
