"""The state of one run: the backend under test, its pairs, its open session, and what has been found so far."""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polydraft
from polydraft import default_host
from polydraft._isolation import Isolator
from polydraft._registry.diagnosing import backend_state
from polydraft._registry.faults import FaultRegistry
from polydraft.contract import Diagnosis
from polydraft.hardware import processor
from polydraft.verification import VERDICTS

from polydraft_conformance.cache import RunCache
from polydraft_conformance.exclusions import Exclusions
from polydraft_conformance.pairs import NoPairsError, find_pairs
from polydraft_conformance.signals import LeftOut
from polydraft_conformance.varied import varied_pairs

if TYPE_CHECKING:
    from polydraft import PluginHost, Session
    from polydraft.contract import BackendRecord, Capabilities
    from polydraft.verification import Verdict

    from polydraft_conformance.catalog import Check
    from polydraft_conformance.options import SuiteOptions
    from polydraft_conformance.pairs import Case, Pair

__all__ = ["Suite", "open_suite"]


@dataclass(slots=True)
class Suite:
    """One run of the suite on one backend."""

    host: PluginHost
    options: SuiteOptions
    record: BackendRecord
    diagnosis: Diagnosis
    capabilities: Capabilities | None = None
    """None where the backend is not usable: then its engine may not even import."""
    pairs: tuple[Pair, ...] = ()
    exclusions: Exclusions = field(default_factory=lambda: Exclusions(()))
    cache: RunCache = field(default_factory=RunCache)
    verdicts: list[tuple[Verdict, dict[str, Any]]] = field(default_factory=list)
    """Verdicts of the check in progress, each with its evidence; the check's row takes them."""
    _session: tuple[Case, Session] | None = None
    workspace: tempfile.TemporaryDirectory[str] | None = None
    """Holds the varied copies of models."""
    _passed: set[tuple[str, Pair, str]] = field(default_factory=set)
    """(check, pair, drafter kind) of what has passed."""
    _failed: dict[str, set[tuple[str | None, str | None]]] = field(default_factory=dict)

    @property
    def k_values(self) -> tuple[int, ...]:
        """The k to run, the usual one first, up to the largest that the backend claims."""
        most = self.capabilities.max_speculative_tokens if self.capabilities else 1
        values = self.options.k_values[:1] if self.options.one_session else self.options.k_values
        return tuple(dict.fromkeys(min(k, most) for k in values))

    @property
    def hardware(self) -> str:
        """The device's description, or the processor's name."""
        device = self.options.device
        found = [known.description for known in self.diagnosis.devices if known.name == device]
        described = "" if device.partition(":")[0] == "cpu" else "".join(found)
        return described or processor() or platform.machine()

    def take_verdicts(self) -> dict[str, Any]:
        """The verdicts since the last call, for a row's numbers: counts, and the evidence of all but EXACT."""
        taken, self.verdicts = self.verdicts, []
        if not taken:
            return {}
        counts = Counter(verdict for verdict, _ in taken)
        return {
            "verdicts": {verdict: counts[verdict] for verdict in VERDICTS},
            "differences": [evidence for verdict, evidence in taken if verdict != "EXACT"],
        }

    def session(self, case: Case) -> Session:
        """The session of a case. One is kept open at a time; checks of a case come one after the other.

        Raises:
            PolydraftError: The backend cannot load the pair.
        """
        if self._session is None or self._session[0] != case:
            if self.options.one_session and (case.kind, case.drafter) not in case.pair.drafters:
                raise LeftOut("It loads another drafter, and `--polydraft-one-session` was given.")
            self.close()
            self._session = (case, self._load(case))
        return self._session[1]

    def load(self, case: Case, **changes: Any) -> Session:
        """A new session, which the caller closes.

        Args:
            case: What to load.
            changes: Arguments of ``polydraft.load`` that replace the suite's.
        """
        if self.options.one_session:
            raise LeftOut("It loads a further session, and `--polydraft-one-session` was given.")
        return self._load(case, **changes)

    @property
    def prefix_cache_bytes(self) -> int | None:
        """As ``load`` takes it: none for stepping engines, of which checks count what the loop asks of a new sequence.

        The checks of later turns load sessions of their own.
        """
        return 0 if self.capabilities is not None and self.capabilities.exposes_logits else None

    def _load(self, case: Case, **changes: Any) -> Session:
        arguments: dict[str, Any] = {
            "drafter": case.drafter,
            "backend": self.options.backend,
            "num_speculative_tokens": case.k,
            "dtype": self.options.dtype,
            "device": self.options.device,
            "isolation": self.options.isolation,
            "prefix_cache_bytes": self.prefix_cache_bytes,
        }
        session = polydraft.load(host=self.host, **{"target": case.pair.target, **arguments, **changes})
        # What is compared here are tokens: those that an engine's text has, where it gives text.
        session.spells_ids = True
        return session

    def in_dtype(self, dtype: str) -> Suite:
        """The same run in another dtype, which shares nothing that was measured in this one's."""
        options = replace(self.options, dtype=dtype)
        return replace(self, options=options, cache=RunCache(), verdicts=[], _session=None, _failed={})

    def close(self) -> None:
        """Close the shared session."""
        if self._session is not None:
            (_, session), self._session = self._session, None
            session.close()

    def end(self) -> None:
        """Close the shared session, and remove the varied copies of models."""
        self.close()
        if self.workspace is not None:
            self.workspace.cleanup()

    def abandon(self) -> None:
        """Forget the shared session without closing it: it hangs, and so might ``close``."""
        self._session = None

    def note_failure(self, check: Check, case: Case | None) -> None:
        """Remember that a check failed (or follows from one that did)."""
        self._failed.setdefault(check.name, set()).add(_place(check, case))

    def note_pass(self, check: Check, case: Case | None) -> None:
        """Remember that a check passed."""
        if case is not None:
            self._passed.add((check.name, case.pair, case.kind))

    def passed_on_original(self, check: Check, case: Case | None) -> bool:
        """Whether a check passed on the model that a case's is a varied copy of."""
        original = case.pair.original if case else None
        return case is not None and original is not None and (check.name, original, case.kind) in self._passed

    def cause(self, check: Check, case: Case | None) -> str | None:
        """A check that this one builds upon and that failed for the same target and drafter kind."""
        places = {(None, None)} | ({(case.pair.name, None), (case.pair.name, case.kind)} if case else set())
        for name in check.after:
            if self._failed.get(name, set()) & places:
                return name
        return None


def _place(check: Check, case: Case | None) -> tuple[str | None, str | None]:
    """The scope of a failure: a target and drafter kind, a target with all its drafters, or the whole backend."""
    if case is None:
        return (None, None)
    return (case.pair.name, case.kind if check.scope in {"method", "kind", "case"} else None)


def open_suite(options: SuiteOptions, host: PluginHost | None = None) -> Suite:
    """Find the backend and what to run it on. No weights are loaded.

    Args:
        options: What the user asked for.
        host: The plugins; default: the installed ones.

    Raises:
        PolydraftError: There is no such backend, or its plugin is broken.
        NoPairsError: There is nothing to run it on.
    """
    host = host or default_host()
    # Workers that only answer questions end by themselves.
    isolator = Isolator(host, options.isolation)
    backend = isolator.backend(options.backend)
    record = host.backends()[options.backend]
    if record.own_names:
        raise NoPairsError(
            f"The backend {record.name} runs models of its server, by their names there, and the suite's models are "
            f"files. Check a model of the server: `polydraft verify --backend {record.name} --model NAME`."
        )
    # As `load` does: the record's requirements come first, since `diagnose` may rely on them.
    state = backend_state(isolator, record, FaultRegistry.of(host))
    diagnosis = state.diagnosis or Diagnosis(usable=False, reason=state.problem, remedy=state.remedy)
    suite = Suite(host, options, record, diagnosis)
    if suite.diagnosis.usable:
        suite.capabilities = backend.capabilities()
        suite.exclusions = Exclusions.of(backend.conformance_exclusions())
        pairs = find_pairs(host, suite.record, suite.capabilities, options)
        suite.workspace = tempfile.TemporaryDirectory()
        varied = () if options.one_session else varied_pairs(host, pairs, options, Path(suite.workspace.name))
        suite.pairs = (*pairs, *varied)
    return suite
