"""One engine in this process: how it can decode a target, loading it, timing calls, and its verdicts."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft._load import open_session
from polydraft._registry.resolver import Prepared, Resolver
from polydraft._session.session import Session
from polydraft._tune._bench import Group, LoadedInfo, NotMeasurable, Sample, Way, failure_of
from polydraft._tune._identity import device_peak, hardware_of, installed, peak_memory, weights_of
from polydraft.contract.stepping import SteppingEngine
from polydraft.errors import InvalidRequestError, PolydraftError, SpeculationUnavailableError
from polydraft.verification._plan import sliding_window
from polydraft.verification._run import check_session
from polydraft.verification._store import find, save
from polydraft.verification._subject import subject_of, with_running

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polydraft._plugins import PluginHost
    from polydraft._tune._prompts import TunePrompt
    from polydraft.verification._records import Subject
    from polydraft.verification._verdict import Verdict

__all__ = ["LoadedEngine", "ways_of"]

_WARM_UP = 8
"""Tokens of the call before the first one that counts."""


def ways_of(target: str | Path, given: Mapping[str, Any], backend: str, *, named: bool) -> tuple[Way, ...]:
    """How a backend decodes the target by the rules of ``load``: plainly, with the usual drafter, and with n-grams.

    Args:
        target: As for ``load``.
        given: All arguments of ``load``, checked; a ``drafter`` that is named is the only one.
        backend: Name of the backend.
        named: Whether the caller named it.

    Raises:
        NotMeasurable: It cannot load the target as asked.
    """
    resolver = Resolver({**given, "backend": backend, "num_speculative_tokens": None})

    def prepare(drafter: Any) -> Prepared:
        return resolver.asking(drafter=drafter).prepare(target)

    try:
        first = prepare(given["drafter"])
    except InvalidRequestError:
        raise  # wrong for every backend
    except PolydraftError as error:
        raise NotMeasurable("refused", str(error)) from error
    diagnosis = first.state.diagnosis
    if diagnosis is not None and diagnosis.rank == 0 and not named:
        raise NotMeasurable("refused", f"It is used only if it is named. {' '.join(diagnosis.notes)}".strip())
    capabilities = first.backend.capabilities()
    most = capabilities.max_speculative_tokens
    found = [Way()]
    for drafter in (given["drafter"], "ngram") if given["drafter"] == "auto" else (given["drafter"],):
        try:
            plan = (first if drafter == given["drafter"] else prepare(drafter)).request.plan
        except PolydraftError:  # no n-gram drafting here
            continue
        if plan.kind is not None and plan.kind not in {way.method for way in found}:
            found.append(
                Way(
                    method=plan.kind,
                    drafter=plan.drafter.id if plan.drafter else None,
                    argument=None if drafter is None else str(drafter),
                    recommended=min(plan.num_speculative_tokens, most),
                    most=most,
                    any_k=capabilities.exposes_logits and given["exactness"] == "standard",
                )
            )
    return tuple(found)


class LoadedEngine:
    """A loaded group. Calls are made one after the other.

    A stepping engine is loaded once, for the largest k: a session for each smaller one shares it. Other engines, and
    steps of one fixed shape, decode with the k that they were loaded with.

    Args:
        target: As for ``load``.
        given: All arguments of ``load``, checked.
        group: What to load.
        host: The plugins.

    Raises:
        NotMeasurable: It cannot be loaded.
    """

    def __init__(self, target: str | Path, given: Mapping[str, Any], group: Group, host: PluginHost) -> None:
        self._host = host
        asked = {
            **given,
            "backend": group.backend,
            "drafter": group.way.argument,
            "num_speculative_tokens": group.k or None,
        }
        started = time.monotonic()
        try:
            self._prepared = Resolver(asked).prepare(target)
            # Every measurement runs its whole prompt.
            request = self._prepared.request.model_copy(update={"prefix_cache_bytes": 0})
            self._session = open_session(self._prepared.backend, request)
        except PolydraftError as error:
            raise NotMeasurable("refused", str(error)) from error
        except Exception as error:
            raise NotMeasurable("failed", failure_of(error)) from error
        self._load_seconds = time.monotonic() - started
        self._group = group
        self._any_k = isinstance(self._session.engine, SteppingEngine) and given["exactness"] == "standard"
        # The core runs the loop of a stepping engine here; a whole engine may have processes of its own.
        self._computes_here = isinstance(
            self._session.engine, SteppingEngine
        ) and self._session.running.device.startswith("cpu")
        self._sessions = {group.k: self._session}
        self._warm: set[int] = set()

    def info(self) -> LoadedInfo:
        """What it says of itself."""
        running, request = self._session.running, self._prepared.request
        drafter, packing = request.plan.drafter, request.packing
        return LoadedInfo(
            any_k=self._any_k,
            load_seconds=self._load_seconds,
            dtype=running.dtype,
            device=running.device,
            packing=packing.name if packing else "",
            quantized=packing is not None and packing.quantized and packing.chosen_by == "auto",
            versions=installed(self._host, self._prepared.state.record),
            hardware=hardware_of(self._prepared),
            target_weights=weights_of(request.target, request.hub),
            drafter_weights=None if drafter is None else weights_of(drafter, request.hub),
            **self.memory(),
        )

    def memory(self) -> dict[str, int | None]:
        """The fields of ``LoadedInfo`` that grow."""
        on_device = not self._session.running.device.startswith("cpu")
        return {
            "peak_memory_bytes": peak_memory(),
            "device_memory_bytes": device_peak(self._session) if on_device else None,
        }

    def measure(self, k: int, prompt: TunePrompt, max_new_tokens: int, limit: float) -> Sample:
        """As ``Bench.measure``.

        Raises:
            NotMeasurable: It failed.
        """
        try:
            if k not in self._warm:
                self._call(k, prompt, min(_WARM_UP, max_new_tokens), limit)
                self._warm.add(k)
            return self._call(k, prompt, max_new_tokens, limit)
        except PolydraftError as error:
            raise NotMeasurable("failed", str(error)) from error
        except Exception as error:
            raise NotMeasurable("failed", failure_of(error)) from error

    def _call(self, k: int, prompt: TunePrompt, max_new_tokens: int, limit: float) -> Sample:
        """What a user's call does, from its first line to its result."""
        session = self._of(k)
        given: Any = prompt.prompt if isinstance(prompt.prompt, str) else list(prompt.prompt)
        speculate: Any = "auto" if k or self._group.way.method is None else "off"
        first = None
        computed = time.process_time()
        started = time.perf_counter()
        try:
            stream = session.stream(given, max_new_tokens=max_new_tokens, speculate=speculate)
        except PolydraftError:
            if not prompt.raw:
                raise
            stream = session.stream(prompt.raw, max_new_tokens=max_new_tokens, speculate=speculate)  # no template
        cut = False
        with stream:
            for chunk in stream:
                passed = time.perf_counter() - started
                if first is None and chunk.token_ids:
                    first = passed
                if passed > limit and not cut:
                    cut = True
                    stream.cancel()
        seconds = time.perf_counter() - started
        computed = time.process_time() - computed
        result = stream.result
        assert result is not None
        return Sample(
            seconds=seconds,
            cpu_seconds=computed if self._computes_here else None,
            first_token_seconds=first,
            num_tokens=len(result.token_ids),
            digest=hashlib.sha256(repr(result.token_ids).encode()).hexdigest()[:16],
            cut=cut and result.finish_reason == "cancelled",
            stats=result.stats,
        )

    def _of(self, k: int) -> Session:
        """The session with this k, over the one engine."""
        if k == 0 or not self._any_k:
            return self._session
        if k not in self._sessions:
            running = self._session.running.model_copy(update={"num_speculative_tokens": k})
            self._sessions[k] = Session(self._session.engine, running, self._prepared.backend.capabilities())
        return self._sessions[k]

    def verdict(self, k: int, seconds: float) -> Verdict | None:
        """As ``Bench.verdict``; what is found is kept, as ``polydraft verify`` keeps it."""
        session = self._of(k)
        try:
            subject = self._subject(k, session)
            if kept := find(subject, loaded=True).verification:
                return kept.verdict if kept.compares else None
            if not seconds:
                return None
            found = check_session(
                session,
                subject,
                self._prepared.backend.capabilities(),
                sliding_window(self._prepared.request.target.config),
                time_limit=seconds,
            )
            if not subject.unknown and self._subject(k, session) == subject:
                with suppress(OSError):  # it is only not kept
                    save(found)
        except (InvalidRequestError, SpeculationUnavailableError):  # too little time, or no draft in it
            return None
        return found.verdict if found.compares else None

    def _subject(self, k: int, session: Session) -> Subject:
        request = self._prepared.request
        plan = request.plan.model_copy(update={"num_speculative_tokens": k})
        request = request.model_copy(update={"plan": plan})
        prepared = Prepared(self._prepared.backend, self._prepared.state, request)
        return with_running(subject_of(prepared, self._host), session.running, request)

    def close(self) -> None:
        """Free the engine; the sessions of other k hold nothing of their own."""
        self._session.close()
