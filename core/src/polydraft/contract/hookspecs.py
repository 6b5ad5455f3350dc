"""The hooks of a polydraft plugin.

A plugin is a module (or class) named by an entry point of the group ``polydraft``; it implements any of these
hooks with ``polydraft.contract.hookimpl``. Hooks return cheap records: import the engine only in the backend's class,
which ``BackendRecord.factory`` names.

    # pyproject.toml
    [project.entry-points.polydraft]
    my-engine = "my_package.plugin"
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from polydraft.contract.records import BackendRecord, CacheRecord, FaultRecord, LocalModelRecord, PairRecord

__all__ = ["PolydraftSpec", "hookimpl"]

PROJECT_NAME = "polydraft"
ENTRY_POINT_GROUP = "polydraft"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)
"""Decorator: marks a function as the plugin's implementation of the hook of the same name."""


class PolydraftSpec:
    """All hooks. Each is optional; each may return several records."""

    @hookspec
    def polydraft_backends(self) -> Iterable[BackendRecord]:
        """Name the backends that this plugin provides.

        >>> from polydraft import contract
        >>> @contract.hookimpl
        ... def polydraft_backends():
        ...     yield contract.BackendRecord(
        ...         name="my-engine",
        ...         factory="my_package.backend:MyBackend",
        ...         summary="My engine on the CPU",
        ...         formats={"safetensors"},
        ...         drafter_kinds={"draft-model", "ngram"},
        ...         engine="my-engine",
        ...         requires={"my-engine": ">=1.2"},
        ...         install_hint="pip install polydraft-my-engine",
        ...     )
        >>> [record.name for record in polydraft_backends()]
        ['my-engine']
        """
        return ()

    @hookspec
    def polydraft_pairs(self) -> Iterable[PairRecord]:
        """Add target-drafter pairs to the registry (after the user's own file, before the core's list).

        >>> from polydraft import contract
        >>> @contract.hookimpl
        ... def polydraft_pairs():
        ...     yield contract.PairRecord(
        ...         target="my-org/big", drafter="my-org/small", kind="draft-model",
        ...         num_speculative_tokens={"*": 5},
        ...     )
        >>> [pair.drafter for pair in polydraft_pairs()]
        ['my-org/small']
        """
        return ()

    @hookspec
    def polydraft_faults(self) -> Iterable[FaultRecord]:
        """Add known faults of engine versions: ``doctor`` shows them, ``load`` refuses those of severity ``refuse``.

        >>> from polydraft import contract
        >>> @contract.hookimpl
        ... def polydraft_faults():
        ...     yield contract.FaultRecord(
        ...         id="my-engine-1-3-crash", distribution="my-engine", versions="==1.3.0", affects="all",
        ...         severity="refuse", summary="my-engine 1.3.0 crashes at start.",
        ...         remedy="pip install 'my-engine!=1.3.0'",
        ...     )
        >>> [fault.versions for fault in polydraft_faults()]
        ['==1.3.0']
        """
        return ()

    @hookspec
    def polydraft_local_models(self) -> Iterable[LocalModelRecord]:
        """Name models that this plugin ships; users load them as ``builtin:<name>``.

        >>> from polydraft import contract
        >>> @contract.hookimpl
        ... def polydraft_local_models():
        ...     yield contract.LocalModelRecord(name="tiny", path="/opt/models/tiny")
        >>> [model.name for model in polydraft_local_models()]
        ['tiny']
        """
        return ()

    @hookspec
    def polydraft_caches(self) -> Iterable[CacheRecord]:
        """Name the folders in which this plugin keeps files between runs; ``polydraft cache`` lists and clears them.

        >>> from polydraft import contract
        >>> @contract.hookimpl
        ... def polydraft_caches():
        ...     yield contract.CacheRecord(
        ...         name="my-engine", summary="compiled kernels", path="/home/me/.cache/polydraft/my-engine"
        ...     )
        >>> [cache.name for cache in polydraft_caches()]
        ['my-engine']
        """
        return ()
