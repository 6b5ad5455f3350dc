"""A bench in this process, for plugins that no other process has."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft._measuring.loaded import LoadedEngine, ways_of
from polydraft._session.monitor import SpeculationWarning

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polydraft._measuring.bench import AnyK, CallSettings, Group, LoadedInfo, Sample, Way
    from polydraft._measuring.prompts import MeasuredPrompt
    from polydraft._plugins import PluginHost
    from polydraft.verification._verdict import Verdict

__all__ = ["BenchHere"]


class BenchHere:
    """Loads every engine into this process: memory is that of all of them together, and a crash ends everything.

    Args:
        target: As for ``load``.
        given: All arguments of ``load``, checked.
        host: The plugins.
        named: Whether the caller named the backends.
    """

    def __init__(self, target: str | Path, given: Mapping[str, Any], host: PluginHost, *, named: bool) -> None:
        self._target = target
        self._given = given
        self._host = host
        self._named = named
        self._loaded: dict[Group, LoadedEngine] = {}
        self._infos: dict[Group, LoadedInfo] = {}

    def ways(self, backend: str) -> tuple[Way, ...]:
        """As ``Bench.ways``."""
        return ways_of(self._target, self._given, backend, named=self._named)

    def load(self, group: Group) -> LoadedInfo:
        """As ``Bench.load``."""
        engine = self._engine(group)
        self._infos[group] = engine.info()
        return self._infos[group]

    def info(self, group: Group) -> LoadedInfo:
        """As ``Bench.info``."""
        if group in self._loaded:
            self._infos[group] = self._infos[group].model_copy(update=self._loaded[group].memory())
        return self._infos[group]

    def measure(self, group: Group, k: AnyK, prompt: MeasuredPrompt, settings: CallSettings, limit: float) -> Sample:
        """As ``Bench.measure``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SpeculationWarning)  # low acceptance is what is measured
            return self._engine(group).measure(k, prompt, settings, limit)

    def verdict(self, group: Group, k: int, seconds: float) -> Verdict | None:
        """As ``Bench.verdict``."""
        return self._engine(group).verdict(k, seconds)

    def together(self, groups: list[Group]) -> bool:
        """As ``Bench.together``."""
        return all(group in self._loaded for group in groups)

    def unload(self, group: Group) -> None:
        """As ``Bench.unload``."""
        if group in self._loaded:
            self.info(group)
            self._loaded.pop(group).close()

    def close(self) -> None:
        """As ``Bench.close``."""
        for group in list(self._loaded):
            self.unload(group)

    def _engine(self, group: Group) -> LoadedEngine:
        if group not in self._loaded:
            self._loaded[group] = LoadedEngine(self._target, self._given, group, self._host)
        return self._loaded[group]
