"""The entry point: the backend's record, its known faults, its cache and its built-in pair. It imports no engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from polydraft.caches import CacheFolder
from polydraft.contract import (
    BackendRecord,
    CacheRecord,
    DrafterKind,
    FaultRecord,
    LocalModelRecord,
    PairRecord,
    hookimpl,
)

__all__ = [
    "CACHE",
    "DRAFTER_KINDS",
    "SUPPORTED_VERSIONS",
    "polydraft_backends",
    "polydraft_caches",
    "polydraft_faults",
    "polydraft_local_models",
    "polydraft_pairs",
]

SUPPORTED_VERSIONS = ">=0.18.1"
"""0.18.1 is tested."""

DRAFTER_KINDS: frozenset[DrafterKind] = frozenset({"mtp"})

CACHE = ("litert_lm", "POLYDRAFT_LITERT_LM_CACHE")
"""The cache of what LiteRT-LM compiles and of the unpacked built-in pair; the variable that names another folder."""

_BUILTIN = "tiny-e2b-litertlm"


@hookimpl
def polydraft_backends() -> Iterable[BackendRecord]:
    """The backend ``litert_lm``."""
    yield BackendRecord(
        name="litert_lm",
        factory="polydraft_litert_lm.backend:LitertLmBackend",
        summary="LiteRT-LM, as on phones: .litertlm files with the drafter inside",
        formats=frozenset({"litertlm"}),
        drafter_kinds=DRAFTER_KINDS,
        engine="litert-lm-api",
        requires={"litert-lm-api": SUPPORTED_VERSIONS},
        install_hint="pip install 'polydraft[litert-lm]'",
    )


@hookimpl
def polydraft_local_models() -> Iterable[LocalModelRecord]:
    """The built-in target ``tiny-e2b`` with its drafter, in one file."""
    path = Path(__file__).with_name("data") / _BUILTIN
    yield LocalModelRecord(name=_BUILTIN, path=str(path), format="litertlm")


@hookimpl
def polydraft_pairs() -> Iterable[PairRecord]:
    """The drafter inside that file."""
    yield PairRecord(target=f"builtin:{_BUILTIN}", drafter=None, kind="mtp", format="litertlm")


@hookimpl
def polydraft_caches() -> Iterable[CacheRecord]:
    """What is compiled and unpacked."""
    folder = CacheFolder(*CACHE)
    yield CacheRecord(
        name=folder.name, summary="what LiteRT-LM compiles, and the built-in pair", path=str(folder.path), bounded=False
    )


@hookimpl
def polydraft_faults() -> Iterable[FaultRecord]:
    """Known faults of LiteRT-LM's versions; ``polydraft_litert_lm.probes`` sees the first."""
    yield FaultRecord(
        id="litert-lm-speculative-sampling",
        distribution="litert-lm-api",
        versions=SUPPORTED_VERSIONS,
        affects="sampling",
        severity="warn",
        summary="With speculation it ignores temperature and seed from the second token on, and is greedy.",
        remedy="Nothing to do: calls with a temperature above 0 are decoded plainly, or refused with `speculate='on'`.",
        link="https://github.com/google-ai-edge/LiteRT-LM/issues/3017",
    )
