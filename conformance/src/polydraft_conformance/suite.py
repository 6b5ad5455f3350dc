"""The state of one run: the backend under test, its pairs, sessions, and what has been found so far."""

from __future__ import annotations

import platform
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polydraft
from polydraft import default_host
from polydraft.hardware import processor

from polydraft_conformance.comparison import VERDICTS
from polydraft_conformance.exclusions import Exclusions
from polydraft_conformance.pairs import find_pairs
from polydraft_conformance.report import Report, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polydraft import PluginHost, Session
    from polydraft.contract import BackendRecord, Capabilities, Diagnosis

    from polydraft_conformance.catalog import Check
    from polydraft_conformance.comparison import Comparison
    from polydraft_conformance.options import SuiteOptions
    from polydraft_conformance.pairs import Case, Pair
    from polydraft_conformance.rows import Row

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
    cache: dict[Any, Any] = field(default_factory=dict)
    """What checks share: results by key; see ``evidence``."""
    comparisons: list[Comparison] = field(default_factory=list)
    """Verdicts of the check under way; its row takes them."""
    _session: tuple[Case, Session] | None = None
    _failed: dict[str, set[tuple[str | None, str | None]]] = field(default_factory=dict)

    @property
    def k_values(self) -> tuple[int, ...]:
        """The k to run, the usual one first; none is larger than what the backend claims."""
        most = self.capabilities.max_speculative_tokens if self.capabilities else 1
        return tuple(dict.fromkeys(min(k, most) for k in self.options.k_values))

    @property
    def hardware(self) -> str:
        """The device's description, or the processor's name."""
        device = self.options.device
        found = [known.description for known in self.diagnosis.devices if known.name == device]
        described = "" if device.partition(":")[0] == "cpu" else "".join(found)
        return described or processor() or platform.machine()

    def take_verdicts(self) -> dict[str, Any]:
        """The verdicts since the last call, for a row's numbers: counts, and the evidence of all but EXACT."""
        taken, self.comparisons = self.comparisons, []
        if not taken:
            return {}
        counts = Counter(comparison.verdict for comparison in taken)
        return {
            "verdicts": {verdict: counts[verdict] for verdict in VERDICTS},
            "differences": [dict(comparison.evidence) for comparison in taken if comparison.verdict != "EXACT"],
        }

    def report(self, rows: list[Row]) -> Report:
        """The report of this run."""
        options = {
            "pairs": list(self.options.pairs),
            "kinds": list(self.options.kinds),
            "dtype": self.options.dtype,
            "device": self.options.device,
            "quick": self.options.quick,
            "k": list(self.k_values),
        }
        return Report(
            backend=self.options.backend,
            options=options,
            environment=environment(self.diagnosis, _distributions(self.host, self.record)),
            usable=self.diagnosis.usable,
            engine=self.record.engine,
            engine_version=self.diagnosis.engine_version,
            reason=self.diagnosis.reason,
            remedy=self.diagnosis.remedy,
            claims=_claims(self.capabilities) if self.capabilities else {},
            rows=sorted(rows, key=lambda row: row.group),
        )

    def session(self, case: Case) -> Session:
        """The session of a case. One is kept open at a time; checks of a case come one after the other.

        Raises:
            PolydraftError: The backend cannot load the pair.
        """
        if self._session is None or self._session[0] != case:
            self.close()
            self._session = (case, self.load(case))
        return self._session[1]

    def load(self, case: Case, **changes: Any) -> Session:
        """A session of its own, which the caller closes.

        Args:
            case: What to load.
            changes: Arguments of ``polydraft.load`` that replace the suite's.
        """
        arguments: dict[str, Any] = {
            "drafter": case.drafter,
            "backend": self.options.backend,
            "num_speculative_tokens": case.k,
            "dtype": self.options.dtype,
            "device": self.options.device,
        }
        return polydraft.load(case.pair.target, host=self.host, **{**arguments, **changes})

    @contextmanager
    def opened(self, case: Case, **changes: Any) -> Iterator[Session]:
        """``load``, closed at the end of a ``with`` block."""
        session = self.load(case, **changes)
        try:
            yield session
        finally:
            session.close()

    def close(self) -> None:
        """Close the shared session."""
        if self._session is not None:
            (_, session), self._session = self._session, None
            session.close()

    def abandon(self) -> None:
        """Forget the shared session without closing it: it hangs, and so might ``close``."""
        self._session = None

    def note_failure(self, check: Check, case: Case | None) -> None:
        """Remember that a check failed (or follows from one that did)."""
        self._failed.setdefault(check.name, set()).add(_place(check, case))

    def cause(self, check: Check, case: Case | None) -> str | None:
        """The check that failed for the same target and drafter kind, and that this one builds upon."""
        places = {(None, None)} | ({(case.pair.name, None), (case.pair.name, case.kind)} if case else set())
        for name in check.after:
            if self._failed.get(name, set()) & places:
                return name
        return None


def _place(check: Check, case: Case | None) -> tuple[str | None, str | None]:
    """What a failure speaks of: a target and drafter kind, a target with all its drafters, or the whole backend."""
    if case is None:
        return (None, None)
    return (case.pair.name, case.kind if check.scope in {"kind", "case"} else None)


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
    backend = host.backend(options.backend)
    suite = Suite(host, options, host.backends()[options.backend], backend.diagnose())
    if suite.diagnosis.usable:
        suite.capabilities = backend.capabilities()
        suite.exclusions = Exclusions.of(backend.conformance_exclusions())
        suite.pairs = find_pairs(host, suite.record, suite.capabilities, options)
    return suite


def _distributions(host: PluginHost, record: BackendRecord) -> list[str]:
    """What the backend's results depend on: its plugin, and the distributions it requires."""
    plugins = [
        status.distribution for status in host.statuses() if record.name in status.backends and status.distribution
    ]
    return [*plugins, record.engine, *(name for key in record.requires for name in key.split("|"))]


def _claims(capabilities: Capabilities) -> dict[str, Any]:
    """JSON-ready, sets in order."""
    values = capabilities.model_dump(mode="json")
    return {name: sorted(value) if isinstance(value, list) else value for name, value in values.items()}
