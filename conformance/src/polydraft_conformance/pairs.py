"""The models that the suite runs: targets with their drafters, and the cases made from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast, get_args

from polydraft.checkpoints._names import KnownNames
from polydraft.checkpoints._resolve import resolve
from polydraft.checkpoints.config import drafter_kind, has_experts
from polydraft.checkpoints.litertlm import DRAFTER_INSIDE
from polydraft.contract import DrafterKind
from polydraft.errors import PolydraftError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft import PluginHost
    from polydraft.contract import BackendRecord, Capabilities, LocalModelRecord

    from polydraft_conformance.catalog import Check, Scope
    from polydraft_conformance.options import SuiteOptions

__all__ = ["INSIDE", "Case", "NoPairsError", "Pair", "cases", "cases_of", "find_pairs", "sliding_window"]

_SIBLINGS: tuple[tuple[str, DrafterKind], ...] = (("-assistant", "mtp"), ("-draft", "draft-model"))
_PREFIX = "builtin:"
INSIDE = "auto"
"""What stands for a drafter that is part of the target's file: `load` finds it."""
_VARIED = frozenset({"generation", "primitives", "greedy", "sampling", "settings"})
"""Groups of checks that are repeated on varied copies of the targets."""
_VARIED_QUICK = frozenset(
    {
        *("test_loads_what_was_asked", "test_generates", "test_greedy_equals_plain", "test_rows_equal_single_steps"),
        *("test_rollback_is_exact", "test_sample_equals_plain"),
    }
)
"""Those checks of a quick run."""
_NO_WINDOW = 64
"""Used as the window where a target has full attention only: lengths around it are as good as any."""


class NoPairsError(Exception):
    """No pair is available for this backend; the message explains why."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A target and, by kind, its drafters. The first kind is the one made for it."""

    target: str
    drafters: tuple[tuple[DrafterKind, str], ...]
    window: int
    original: Pair | None = None
    """What this one is a varied copy of."""
    k: int | None = None
    """The only k of a drafter that is part of the target's file; None: any."""
    has_experts: bool = False
    """Whether the target is a mixture of experts: rounding may send a token to other ones."""

    @property
    def name(self) -> str:
        """The target's name without ``builtin:`` or folders; ``varied-...`` of a varied copy."""
        if self.original is not None:
            return f"varied-{self.original.name}"
        return self.target.removeprefix(_PREFIX).rstrip("/").rpartition("/")[2]

    def called(self, model: str) -> str:
        """What reports call a model of this pair: varied copies lie in temporary folders, so by their originals."""
        if self.original is None or model == "ngram":
            return model
        originals = {self.target: self.original.target}
        originals |= {drafter: dict(self.original.drafters)[kind] for kind, drafter in self.drafters}
        return f"varied {originals[model]}" if model in originals else model

    @property
    def kinds(self) -> tuple[DrafterKind, ...]:
        """The drafter kinds it can be run with."""
        return tuple(kind for kind, _ in self.drafters)

    def case(self, k: int, kind: DrafterKind | None = None) -> Case:
        """The case of one k and drafter kind (default: the first)."""
        kind = kind or self.drafters[0][0]
        return Case(pair=self, kind=kind, drafter=dict(self.drafters)[kind], k=self.k or k)


@dataclass(frozen=True, slots=True)
class Case:
    """A target, a drafter, and k."""

    pair: Pair
    kind: DrafterKind
    drafter: str
    k: int

    @property
    def drafter_name(self) -> str:
        """What the report calls the drafter: varied copies by their originals, since their folders are temporary."""
        return self.pair.called(self.drafter)

    @property
    def id(self) -> str:
        """The name in pytest's output: ``tiny-e2b-mtp-k4``."""
        return f"{self.pair.name}-{self.kind}-k{self.k}"

    def with_drafter(self, drafter: str, kind: DrafterKind) -> Case:
        """The same with another drafter."""
        return Case(pair=self.pair, kind=kind, drafter=drafter, k=self.k)


def find_pairs(
    host: PluginHost, record: BackendRecord, capabilities: Capabilities, options: SuiteOptions
) -> tuple[Pair, ...]:
    """The pairs to run: built-in ones whose format the backend takes, or those that the user named.

    Raises:
        NoPairsError: None is left, or a named one cannot be found.
    """
    kinds = capabilities.drafter_kinds
    if unknown := set(options.kinds) - set(get_args(DrafterKind)):
        raise NoPairsError(
            f"There is no drafter kind {sorted(unknown)[0]!r}; there are {', '.join(get_args(DrafterKind))}."
        )
    if options.kinds:
        kinds = kinds & cast("frozenset[DrafterKind]", frozenset(options.kinds))
    known = KnownNames(local_models=host.local_models())
    given = [_given_pair(text, host, known) for text in options.pairs if "=" in text]
    patterns = [text.removeprefix(_PREFIX) for text in options.pairs if "=" not in text]
    builtin = [] if given and not patterns else _builtin_pairs(host, record, known)
    for pattern in patterns:
        if not any(fnmatchcase(pair.name, pattern) for pair in builtin):
            names = ", ".join(pair.name for pair in builtin) or "none"
            raise NoPairsError(
                f"No built-in target that the backend {record.name!r} takes is named {pattern!r}; there are: {names}."
            )
    if patterns:
        builtin = [pair for pair in builtin if any(fnmatchcase(pair.name, pattern) for pattern in patterns)]
    found = []
    for pair in [*given, *builtin]:
        usable = tuple((kind, drafter) for kind, drafter in pair.drafters if kind in kinds)
        if usable:
            found.append(replace(pair, drafters=usable))
    if not found:
        raise NoPairsError(
            f"There is no pair to run the backend {record.name!r} on: it takes the formats "
            f"{', '.join(sorted(record.formats))} and the drafter kinds {', '.join(sorted(kinds)) or 'none'}. "
            "Install polydraft-builtin-pairs, or name a pair: --polydraft-pairs TARGET=DRAFTER."
        )
    return tuple(found)


def cases_of(check: Check, pairs: Sequence[Pair], k_values: Sequence[int], *, quick: bool = False) -> list[Case]:
    """The cases that a check is repeated for, those on varied copies included.

    Args:
        check: Its scope decides, and its group.
        pairs: All pairs of the run, varied copies too.
        k_values: All k of the run, the usual one first.
        quick: Leave out combinations.
    """
    found = cases([pair for pair in pairs if pair.original is None], check.scope, k_values, quick=quick)
    varied = [pair for pair in pairs if pair.original is not None]
    if check.group not in _VARIED or check.scope in {"backend", "once"} or (quick and check.name not in _VARIED_QUICK):
        return found
    return [*found, *cases(varied, check.scope, k_values[:1], quick=quick)]


def cases(pairs: Sequence[Pair], scope: Scope, k_values: Sequence[int], *, quick: bool = False) -> list[Case]:
    """The cases that a check of one scope is repeated for; where not for every k, then for the first.

    Args:
        pairs: All pairs of the run.
        scope: The check's scope.
        k_values: All k of the run, the usual one first.
        quick: Leave out combinations: every target and every drafter kind still occurs.
    """
    usual = k_values[0]
    if scope == "backend":
        return []
    if scope == "once":
        return [pairs[0].case(usual)]
    own = [pair.case(usual) for pair in pairs]
    if scope == "target":
        return own
    every = [pair.case(usual, kind) for pair in pairs for kind in pair.kinds]
    each_kind = _one_of_each_kind(pairs, usual)
    if scope == "method":
        return each_kind if quick else every
    covering = [case for case in every if case in own or case in each_kind]
    if scope == "kind":
        return covering if quick else every
    others = [pair.case(k, kind) for pair in pairs if not pair.k for kind in pair.kinds for k in k_values[1:]]
    wanted = {(case.pair, case.kind) for case in covering}
    return [*every, *(case for case in others if not quick or (case.pair, case.kind) in wanted)]


def _one_of_each_kind(pairs: Sequence[Pair], k: int) -> list[Case]:
    """A case of each drafter kind, on as many pairs as possible, preferably those that a drafter of it was made for."""
    found: dict[DrafterKind, Case] = {}
    for pair in pairs:
        found.setdefault(pair.kinds[0], pair.case(k))
    for kind in dict.fromkeys(kind for pair in pairs for kind in pair.kinds):
        having = [pair for pair in pairs if kind in pair.kinds]
        unused = [pair for pair in having if pair not in {case.pair for case in found.values()}]
        found.setdefault(kind, (unused or having)[0].case(k, kind))
    return list(found.values())


def sliding_window(config: dict[str, Any]) -> int:
    """The sliding window of a target's config, in tokens; 64 where it has none."""
    text: Any = config.get("text_config", config)
    window = text.get("sliding_window") if isinstance(text, dict) else None
    return window if isinstance(window, int) and window > 0 else _NO_WINDOW


def _fixed_k(config: dict[str, Any]) -> int | None:
    inside = config.get(DRAFTER_INSIDE)
    return inside["num_speculative_tokens"] if isinstance(inside, dict) else None


def _given_pair(text: str, host: PluginHost, known: KnownNames) -> Pair:
    """A pair that the user wrote as TARGET=DRAFTER. Its kind comes from a plugin's record, or else from its config."""
    target, _, drafter = text.partition("=")
    try:
        config = resolve(target, known=known).config
        kind: DrafterKind = "ngram"
        if drafter == INSIDE and (inside := config.get(DRAFTER_INSIDE)):
            kind = inside["kind"]
        elif drafter != "ngram":
            recorded = [pair.kind for _, pair in host.pairs() if (pair.target, pair.drafter) == (target, drafter)]
            kind = recorded[0] if recorded else drafter_kind(resolve(drafter, role="drafter", known=known).config)
    except PolydraftError as error:
        raise NoPairsError(f"--polydraft-pairs {text}: {error}") from error
    drafters: list[tuple[DrafterKind, str]] = [(kind, drafter)]
    if kind != "ngram":
        drafters.append(("ngram", "ngram"))
    k = _fixed_k(config) if drafter == INSIDE else None
    return Pair(target, tuple(drafters), sliding_window(config), k=k, has_experts=has_experts(config))


def _builtin_pairs(host: PluginHost, record: BackendRecord, known: KnownNames) -> list[Pair]:
    """Every shipped target of a format that the backend takes, with every drafter that fits it."""
    models = {name: model for name, model in host.local_models().items() if model.format in record.formats}
    recorded = [pair for _, pair in host.pairs()]
    pairs = []
    for name, model in models.items():
        drafters: dict[DrafterKind, str] = {}
        for pair in recorded:
            if pair.target != _PREFIX + name:
                continue
            if pair.drafter and pair.drafter.removeprefix(_PREFIX) in models:
                drafters.setdefault(pair.kind, pair.drafter)
            elif pair.drafter is None and pair.kind != "ngram":
                drafters.setdefault(pair.kind, INSIDE)
        for suffix, kind in _SIBLINGS:
            if name + suffix in models:
                drafters.setdefault(kind, _PREFIX + name + suffix)
        if not drafters:
            continue
        config = resolve(_PREFIX + name, known=known).config
        if "draft-model" not in drafters and (other := _draft_model(model, config, models, known)):
            drafters["draft-model"] = _PREFIX + other
        drafters["ngram"] = "ngram"
        window, k = sliding_window(config), _fixed_k(config)
        pairs.append(Pair(_PREFIX + name, tuple(drafters.items()), window, k=k, has_experts=has_experts(config)))
    return pairs


def _draft_model(
    target: LocalModelRecord, config: dict[str, Any], models: dict[str, LocalModelRecord], known: KnownNames
) -> str | None:
    """A shipped draft model with the target's tokens: of the same format, with as many tokens."""
    for name, model in models.items():
        if name.endswith("-draft") and model.format == target.format:
            other = resolve(_PREFIX + name, known=known).config
            if _vocab_size(other) == _vocab_size(config):
                return name
    return None


def _vocab_size(config: dict[str, Any]) -> Any:
    text: Any = config.get("text_config", config)
    return text.get("vocab_size")
