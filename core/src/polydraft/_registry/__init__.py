"""The registry: pairs of target and drafter, known faults of engines, and the backends known by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polydraft._plugins import PluginHost
    from polydraft._registry.pairs import PairRegistry
    from polydraft.checkpoints._resolve import KnownNames

__all__ = ["known_names"]


def known_names(host: PluginHost | None = None, registry: PairRegistry | None = None) -> KnownNames:
    """What names ``polydraft.checkpoints._resolve`` should know: built-in models, registry ids and their formats."""
    from polydraft._plugins import default_host
    from polydraft._registry.pairs import PairRegistry
    from polydraft.checkpoints._resolve import KnownNames

    host = default_host() if host is None else host
    registry = PairRegistry.of(host) if registry is None else registry
    ids = [name for name in registry.ids() if not name.startswith("builtin:")]
    return KnownNames(local_models=host.local_models(), formats=registry.formats(), ids=tuple(ids))
