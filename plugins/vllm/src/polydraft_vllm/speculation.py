"""From polydraft's drafter kinds to vLLM's ``speculative_config``, for each supported version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from polydraft.errors import InvalidRequestError, SpeculationUnavailableError

if TYPE_CHECKING:
    from packaging.version import Version
    from polydraft.contract import DrafterKind

__all__ = ["METHODS", "Method", "ngram_sizes", "speculative_config"]


@dataclass(frozen=True, slots=True)
class Method:
    """How one drafter kind is configured for a range of vLLM versions."""

    kind: DrafterKind
    versions: str
    method: str
    takes_model: bool
    source: str
    """Where vLLM's source defines it, or what was run."""


METHODS: tuple[Method, ...] = (
    Method("mtp", ">=0.26", "mtp", True, "config/speculative.py: gemma4_mtp, of MTPModelTypes; run with 0.26 to 0.32"),
    Method("draft-model", ">=0.26", "draft_model", True, "spec_decode/draft_model.py; run with 0.26 and 0.32"),
    Method("ngram", ">=0.26", "ngram", False, "spec_decode/ngram_proposer.py; run with 0.26 and 0.32"),
    Method("eagle3", ">=0.26", "eagle3", True, "spec_decode/eagle.py; read, not run"),
    Method("dflash", ">=0.26", "dflash", True, "spec_decode/dflash.py; read, not run"),
)
"""One row per kind and range of versions. A version that names a method differently gets another row."""

_OURS = frozenset({"method", "model", "num_speculative_tokens"})
_OF_NGRAMS = frozenset({"prompt_lookup_max", "prompt_lookup_min"})
_OF_MODELS = frozenset(
    (
        *("draft_tensor_parallel_size", "quantization", "moe_backend", "attention_backend", "kv_cache_dtype"),
        *("max_model_len", "revision", "code_revision", "draft_load_config", "draft_sample_method"),
    )
)
"""Keys that vLLM reads for drafters of these kinds only, and ignores without a word elsewhere."""
_MISREAD = ("eagle-", "eagle3", "dflash", "dspark")
"""vLLM goes by these parts of a drafter's path, whatever ``method`` says (config/speculative.py)."""


def ngram_sizes() -> dict[str, int]:
    """The n-gram lengths of polydraft's own drafter, so that this kind drafts the same on every engine."""
    return {"prompt_lookup_max": 4, "prompt_lookup_min": 2}


def speculative_config(
    kind: DrafterKind,
    drafter: Path | str | None,
    k: int,
    version: Version,
    extra: Mapping[str, Any] | None = None,
    *,
    tensor_parallel_size: int = 1,
) -> dict[str, Any]:
    """vLLM's ``speculative_config`` for a drafter.

    Args:
        kind: The drafter's kind.
        drafter: Its folder or Hub id; None for ``ngram``.
        k: ``num_speculative_tokens``, the bonus token excluded, as vLLM counts too.
        version: vLLM's release.
        extra: Further keys from the user, such as ``draft_tensor_parallel_size``.
        tensor_parallel_size: Workers that share the target.

    Raises:
        SpeculationUnavailableError: This version has no such method.
        InvalidRequestError: ``extra`` has a key that polydraft sets or that vLLM ignores for this kind, or vLLM would
            misread the drafter.
    """
    row = next((row for row in METHODS if row.kind == kind and version in SpecifierSet(row.versions)), None)
    if row is None:
        raise SpeculationUnavailableError(
            f"vLLM {version} has no drafters of kind {kind}.", "Use another version, or another drafter."
        )
    extra = dict(extra or {})
    if taken := sorted(_OURS & extra.keys()):
        raise InvalidRequestError(
            f"The engine option `speculative_config` sets {', '.join(taken)}.",
            "Give `drafter` and `num_speculative_tokens` instead.",
        )
    drawn = sorted(name for name in extra if name.startswith("synthetic_"))
    if drawn or extra.get("rejection_sample_method") == "synthetic":
        raise InvalidRequestError(
            f"With {drawn[0] if drawn else 'rejection_sample_method=synthetic'} of `speculative_config`, vLLM accepts "
            "drafts by chance, whatever the target would choose.",
            "Leave it out: speculation must not change the output. `polydraft bench --synthetic-acceptance` measures "
            "speeds with other engines.",
        )
    ignored = _OF_MODELS if kind == "ngram" else _OF_NGRAMS
    if useless := sorted(name for name in extra if name in ignored or name.startswith("suffix_decoding_")):
        raise InvalidRequestError(
            f"{', '.join(useless)} of `speculative_config` has no effect on drafters of kind {kind}.", "Leave it out."
        )
    draft_size = extra.get("draft_tensor_parallel_size")
    sizes = {tensor_parallel_size} if kind == "draft-model" else {1, tensor_parallel_size}
    if draft_size is not None and draft_size not in sizes:
        raise InvalidRequestError(
            f"draft_tensor_parallel_size is {draft_size}, and tensor_parallel_size {tensor_parallel_size}.",
            f"vLLM runs a drafter of kind {kind} on as many GPUs as the target"
            f"{', or on one' if 1 in sizes else ''}: give {' or '.join(map(str, sorted(sizes)))}.",
        )
    config: dict[str, Any] = {"method": row.method, "num_speculative_tokens": k}
    if row.takes_model:
        if drafter is None:
            raise InvalidRequestError(f"Speculation of kind {kind} needs a drafter.", "Give one as `drafter`.")
        name = str(drafter)
        marks = [mark for mark in _MISREAD if mark in name.lower()]
        if marks and kind in ("mtp", "draft-model"):
            raise InvalidRequestError(
                f"vLLM would not run the drafter {name} as {kind}, because its path contains {marks[0]!r}.",
                "Move or rename the folder.",
            )
        config["model"] = name
    if kind == "ngram":
        config.update(ngram_sizes())
    return {**config, **extra}
