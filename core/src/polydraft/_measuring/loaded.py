"""One engine in this process: how it can decode a target, loading it, timing calls, and its verdicts."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft._load import open_session
from polydraft._measuring.bench import (
    AnyK,
    CallSettings,
    Group,
    LoadedInfo,
    NotMeasurable,
    Sample,
    Way,
    failure_of,
)
from polydraft._measuring.identity import device_peak, hardware_of, installed, peak_memory, weights_of
from polydraft._measuring.timed import TimedEngine
from polydraft._measuring.warming import warm_up
from polydraft._registry.resolver import Prepared, Resolver
from polydraft._session.session import Session
from polydraft.checkpoints.litertlm import DRAFTER_INSIDE
from polydraft.contract.results import GenerationStats
from polydraft.contract.stepping import SteppingEngine
from polydraft.engine_parts.server_options import THE_SERVERS
from polydraft.errors import InvalidRequestError, PolydraftError, SpeculationUnavailableError
from polydraft.verification._plan import sliding_window
from polydraft.verification._run import check_session
from polydraft.verification._store import find, save
from polydraft.verification._subject import subject_of, with_running

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polydraft._loop.schedule import Schedule
    from polydraft._measuring.prompts import MeasuredPrompt
    from polydraft._plugins import PluginHost
    from polydraft.contract.upstream import UpstreamCall
    from polydraft.verification._records import Subject
    from polydraft.verification._verdict import Verdict

__all__ = ["LoadedEngine", "ways_of"]


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
            prepared = first if drafter == given["drafter"] else prepare(drafter)
        except PolydraftError:  # no n-gram drafting here
            continue
        plan, source = prepared.request.plan, prepared.request.target
        if plan.kind is not None and plan.kind not in {way.method for way in found}:
            found.append(
                Way(
                    method=plan.kind,
                    drafter=plan.drafter.id if plan.drafter else None,
                    argument=None if drafter is None else str(drafter),
                    recommended=min(plan.num_speculative_tokens, most),
                    most=most,
                    any_k=capabilities.exposes_logits and given["exactness"] == "standard",
                    one_k=source.format == "litertlm" and DRAFTER_INSIDE in source.config,
                    upstream=own.name if (own := first.backend.upstream(prepared.request)) else "",
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
            "num_speculative_tokens": "auto" if group.picks_k else group.k or None,
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
        self._sessions: dict[tuple[AnyK, TimedEngine | None], Session] = {}
        self._timed: dict[tuple[bool, bool, float | None], TimedEngine] = {}
        """By ``split``, ``by_host`` and ``synthetic_acceptance``."""
        self._schedule: Schedule | None = None
        self._upstream: UpstreamCall | None = None
        self._prompt_ids: dict[str, tuple[int, ...]] = {}
        self._warm: set[tuple[AnyK, bool, bool]] = set()

    def info(self) -> LoadedInfo:
        """What it says of itself."""
        running, request = self._session.running, self._prepared.request
        drafter, packing = request.plan.drafter, request.packing
        return LoadedInfo(
            any_k=self._any_k,
            steps=isinstance(self._session.engine, SteppingEngine),
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
        running = self._session.running
        on_device = not running.device.startswith("cpu")
        return {
            "peak_memory_bytes": None if running.device.startswith(THE_SERVERS) else peak_memory(),
            "device_memory_bytes": device_peak(self._session) if on_device else None,
        }

    def measure(self, k: AnyK, prompt: MeasuredPrompt, settings: CallSettings, limit: float) -> Sample:
        """As ``Bench.measure``.

        Raises:
            NotMeasurable: It failed.
        """
        call = self._upstream_call if settings.upstream else self._call
        try:
            way = k, settings.upstream, settings.split  # rounds that are split may be recorded anew
            if way not in self._warm:

                def short(tokens: int) -> GenerationStats:
                    return call(k, prompt, settings.model_copy(update={"max_new_tokens": tokens}), limit).stats

                warm_up(short, settings.max_new_tokens)
                self._warm.add(way)
            return call(k, prompt, settings, limit)
        except PolydraftError as error:
            raise NotMeasurable("failed", str(error)) from error
        except Exception as error:
            raise NotMeasurable("failed", failure_of(error)) from error

    def _call(self, k: AnyK, prompt: MeasuredPrompt, settings: CallSettings, limit: float) -> Sample:
        """A call of polydraft's loop.

        Where an engine chooses tokens in its steps, the parts of rounds are those of a second call, in which the host
        chooses; not where it runs whole rounds on a device, which then would be other rounds.
        """
        sample = self._called(k, prompt, settings, limit)
        if sample.parts is None or sample.parts.verify is not None or not self._computes_here:
            return sample
        other = self._called(k, prompt, settings, limit, by_host=True).parts
        assert other is not None
        return sample.model_copy(update={"parts": sample.parts.in_shares_of(other)})

    def _called(
        self, k: AnyK, prompt: MeasuredPrompt, settings: CallSettings, limit: float, *, by_host: bool = False
    ) -> Sample:
        """What a user's call does, from its first line to its result."""
        timed = self._timed_engine(settings, by_host=by_host)
        session = self._of(k, timed)
        given: Any = prompt.prompt if isinstance(prompt.prompt, str) else list(prompt.prompt)
        # What is not asked for is not given: not every engine takes everything.
        arguments: Any = {
            "max_new_tokens": settings.max_new_tokens,
            "speculate": "auto" if k or self._group.way.method is None else "off",
            **({"ignore_eos": True} if settings.ignore_eos else {}),
            **({"temperature": settings.temperature} if settings.temperature else {}),
            **({"seed": settings.seed} if settings.seed is not None else {}),
        }
        first = None
        computed = time.process_time()
        started = time.perf_counter()
        try:
            stream = session.stream(given, **arguments)
        except PolydraftError:
            if not prompt.raw:
                raise
            stream = session.stream(prompt.raw, **arguments)  # no template
        cut = False
        with stream:
            for chunk in stream:
                passed = time.perf_counter() - started
                if first is None and chunk.token_ids != ():
                    first = passed
                if passed > limit and not cut:
                    cut = True
                    stream.cancel()
        seconds = time.perf_counter() - started
        computed = time.process_time() - computed
        result = stream.result
        assert result is not None
        self._prompt_ids[prompt.model_dump_json()] = result.prompt_token_ids
        return Sample(
            seconds=seconds,
            cpu_seconds=computed if self._computes_here else None,
            first_token_seconds=first,
            num_tokens=result.stats.num_tokens,
            digest="" if result.token_ids is None else _digest(result.token_ids),
            cut=cut and result.finish_reason == "cancelled",
            stats=result.stats,
            parts=timed.parts() if timed is not None and timed.split else None,
        )

    def _upstream_call(self, k: AnyK, prompt: MeasuredPrompt, settings: CallSettings, limit: float) -> Sample:
        """The same by the engine's own loop."""
        assert isinstance(k, int)
        key = prompt.model_dump_json()
        if key not in self._prompt_ids:
            self._call(k, prompt, settings.model_copy(update={"max_new_tokens": 1, "upstream": False}), limit)
        if self._upstream is None:
            own = self._prepared.backend.upstream(self._prepared.request)
            assert own is not None
            self._upstream = own.open(self._session.engine)
        ends = frozenset() if settings.ignore_eos else self._session.tokenizer.eos_token_ids
        token_ids: list[int] = []
        rounds: list[tuple[int, float]] = []
        computed = time.process_time()
        started = time.perf_counter()

        def emit(new: Sequence[int]) -> None:
            passed = time.perf_counter() - started
            rounds.append((len(new), passed))
            token_ids.extend(new)
            if passed > limit:
                raise _TooLong

        cut = False
        try:
            self._upstream(self._prompt_ids[key], k, settings.max_new_tokens, ends, emit)
        except _TooLong:
            cut = True
        seconds = time.perf_counter() - started
        computed = time.process_time() - computed
        return Sample(
            seconds=seconds,
            cpu_seconds=computed if self._computes_here else None,
            first_token_seconds=rounds[0][1] if rounds else None,
            num_tokens=len(token_ids),
            digest=_digest(token_ids),
            cut=cut,
            stats=_counted(rounds, k),
        )

    def _timed_engine(self, settings: CallSettings, *, by_host: bool) -> TimedEngine | None:
        """What stands between the loop and the engine; None: nothing, as in every other session."""
        engine, split, chance = self._session.engine, settings.split, settings.synthetic_acceptance
        if not isinstance(engine, SteppingEngine) or (not split and chance is None):
            return None
        key = split, by_host, chance
        if key not in self._timed:
            self._timed[key] = TimedEngine(engine, split=split, by_host=by_host, synthetic_acceptance=chance)
        return self._timed[key]

    def _of(self, k: AnyK, timed: TimedEngine | None = None) -> Session:
        """The session with this k, over the one engine."""
        if not self._any_k:
            k = self._group.k
        if timed is None and (k in {0, self._group.k} or not self._any_k):
            return self._session
        if (k, timed) not in self._sessions:
            running = self._session.running
            if k == "auto":  # as ``load`` would have it
                most = min(self._group.k, 2 * self._group.way.recommended)
                running = running.model_copy(update={"max_speculative_tokens": most})
            elif k:
                running = running.model_copy(update={"num_speculative_tokens": k})
            engine = self._session.engine if timed is None else timed
            made = self._sessions[k, timed] = Session(engine, running, self._prepared.backend.capabilities())
            if k == "auto":  # rounds are split with the ks that were measured
                made.schedule = self._schedule = self._schedule or made.schedule
        return self._sessions[k, timed]

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


class _TooLong(Exception):  # noqa: N818 - ends a call of the engine's own loop
    """The time is over."""


def _digest(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(repr(tuple(token_ids)).encode()).hexdigest()[:16]


def _counted(rounds: Sequence[tuple[int, float]], k: int) -> GenerationStats:
    """Statistics of rounds of which the numbers of tokens and the times are known: each ends with a bonus token."""
    seconds = [passed for _, passed in rounds] or [0.0]
    told: dict[str, Any] = {}
    if k:
        accepted = [tokens - 1 for tokens, _ in rounds]
        told = {
            "num_drafts": len(rounds),
            "num_accepted_tokens": sum(accepted),
            "accepted_per_position": tuple(sum(one > at for one in accepted) for at in range(k)),
        }
    return GenerationStats(
        num_tokens=sum(tokens for tokens, _ in rounds),
        num_target_steps=max(len(rounds) - 1, 0),
        prefill_seconds=seconds[0],
        decode_seconds=seconds[-1] - seconds[0],
        **told,
    )
