"""Drafters whose acceptance is known: useless copies of a case's drafter, and ones that are always right.

Statistics that do not tell them apart are not measured.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polydraft.checkpoints._names import KnownNames
from polydraft.checkpoints._resolve import resolve
from polydraft.errors import PolydraftError

from polydraft_conformance.changed_checkpoints import Tensors, change_config, change_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polydraft.contract import ModelSource

    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite

__all__ = ["UselessDrafter", "perfect_drafter", "useless_drafter"]

_LARGEST = 500_000_000
"""Bytes of the largest weight file that is copied."""
_LEFT = 0.75
"""Toy models share their habits: other weights are right 0.4 times as often, measured over hundreds of tokens."""
_NEAR_TIES = 0.3
_ASSISTANT = "agreement"
"""A toy assistant's config says how often it is right."""


@dataclass(frozen=True, slots=True)
class UselessDrafter:
    """A copy of a drafter that cannot be of use."""

    case: Case
    what: str
    """What was done to it, for messages."""
    share: float | None
    """How much of the own drafter's acceptance may be left; None: it always drafts the same token."""

    def most(self, output: Sequence[int], own: int, *, exact: bool) -> int:
        """The most drafts that can be right.

        Args:
            output: The greedy output.
            own: Accepted drafts of the case's own drafter in this output.
            exact: Whether the target's choices do not depend on its steps: else it may choose, at a near tie, what a
                drafter that is never right takes for wrong.
        """
        if self.share is not None:
            return int(max(self.share, 0.0 if exact else _NEAR_TIES) * own)
        # Whichever token it drafts: it is right where that token comes out.
        return max(Counter(output[1:]).values(), default=0)


def useless_drafter(suite: Suite, case: Case, folder: Path) -> UselessDrafter | None:
    """A copy of the case's drafter without knowledge; None where its format cannot be changed here.

    Args:
        suite: Resolves the drafter.
        case: Its drafter is a model.
        folder: Where the copy goes; it must not exist.
    """
    source = _source(suite, case)
    if source is None or source.path is None:
        return None
    weights = source.path / "model.safetensors"
    if source.format == "reference":
        shutil.copytree(source.path, folder)
        if _ASSISTANT in source.config:
            change_config(folder, **{_ASSISTANT: 0.0})
            return UselessDrafter(case.with_drafter(str(folder), case.kind), "which is never right", 0.0)
        change_config(folder, seed=int(source.config["seed"]) + 1 + suite.options.seed)
        return UselessDrafter(case.with_drafter(str(folder), case.kind), "whose weights are others", _LEFT)
    if not weights.is_file() or weights.stat().st_size > _LARGEST:
        return None
    shutil.copytree(source.path, folder)
    change_tensors(folder, _zeros)
    return UselessDrafter(case.with_drafter(str(folder), case.kind), "whose weights are all 0", None)


def perfect_drafter(suite: Suite, case: Case, folder: Path) -> Case | None:
    """The case with a drafter that is always right; None where there is none of its kind.

    Args:
        suite: Resolves the drafter.
        case: Its drafter is a model.
        folder: Where a changed copy goes; it must not exist.
    """
    source = _source(suite, case)
    if source is None or source.path is None or _ASSISTANT not in source.config:
        return None
    shutil.copytree(source.path, folder)
    change_config(folder, **{_ASSISTANT: 1.0})
    return case.with_drafter(str(folder), case.kind)


def _source(suite: Suite, case: Case) -> ModelSource | None:
    try:
        return resolve(case.drafter, role="drafter", known=KnownNames(local_models=suite.host.local_models()))
    except PolydraftError:
        return None


def _zeros(tensors: Tensors) -> None:
    """All weights 0: whatever the context, the logits of all tokens are equal."""
    for name, (dtype, shape, values) in tensors.items():
        tensors[name] = dtype, shape, bytes(len(values))
