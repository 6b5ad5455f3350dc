"""The registry: pairs of target and drafter, known faults of engines, and the backends known by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polydraft.checkpoints.resolve import KnownNames
    from polydraft.plugins import PluginHost
    from polydraft.registry.pairs import PairRegistry

__all__ = ["known_names"]


def known_names(host: PluginHost | None = None, registry: PairRegistry | None = None) -> KnownNames:
    """What names ``polydraft.checkpoints.resolve`` should know: built-in models, registry ids and their formats."""
    from polydraft.checkpoints.resolve import KnownNames
    from polydraft.plugins import default_host
    from polydraft.registry.pairs import PairRegistry

    host = default_host() if host is None else host
    registry = PairRegistry.of(host) if registry is None else registry
    ids = [name for name in registry.ids() if not name.startswith("builtin:")]
    return KnownNames(local_models=host.local_models(), formats=registry.formats(), ids=tuple(ids))
