"""Properties that a target and its drafter must have for some checks, measured before these run.

A check on models that lack what it needs would fail, and blame the backend. So each property is measured first, in a
way that a backend's speculation has no part in: from plain outputs, the core's own n-gram lookup on them, the draft
model loaded as a target of its own, logits. Where it cannot be measured so, the models count as suited. polydraft's
own models are known to suit, and are not measured, so that no backend passes on them by lacking something; only
whether n-grams come back depends on a run's prompts, and is computed by the core for every stepping engine.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
from polydraft._loop.ngram import NgramDrafter

from polydraft_conformance.acceptance import is_known
from polydraft_conformance.bench import Bench
from polydraft_conformance.counting import stepping_engine
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.primitives import prefill_logits
from polydraft_conformance.prompts import prompts_that_fit
from polydraft_conformance.signals import ModelsDoNotSuit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from polydraft.contract import DrafterKind, GenerationResult

    from polydraft_conformance.catalog import Check
    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite

__all__ = [
    "PROPERTIES",
    "Property",
    "lacking",
    "least_context",
    "need_suited_models",
    "prompts_that_fit",
    "said_of_models",
]

_EOS_LIMIT = 96
_PLACES = 16
"""Contexts that a draft model is compared with its target on, and that certainty is measured on."""
_LEAST_SURPRISE = 0.29
"""Mean of -ln p of the most probable token at temperature 1.4: below it, samples that must differ may be equal. Three
samples of 16 tokens of probability exp(-0.29) are all the most probable ones in less than one of a million runs."""

_REPEATING = (
    "Use a model whose text repeats, as that of one trained on a few sentences does, or another pair for n-grams."
)


@dataclass(frozen=True, slots=True)
class Property:
    """One property, and the checks that prove nothing on models that lack it."""

    name: str
    measure: Callable[[Bench], str | None]
    """What was found where it is lacking, one sentence; None where the models have it."""
    remedy: str
    """What would give it, one sentence."""
    needed_by: tuple[str, ...]
    """Names of checks, as globs."""
    kinds: tuple[DrafterKind, ...] | None = None
    """Drafter kinds that it concerns; None: all of them."""
    of_prompts: bool = False
    """Whether it depends on the prompts as well: then it is measured on models that are known to suit, too."""

    def concerns(self, check: str, case: Case) -> bool:
        """Whether a check on a case needs it."""
        return (self.kinds is None or case.kind in self.kinds) and any(
            fnmatchcase(check, name) for name in self.needed_by
        )


def least_context(window: int) -> int:
    """Tokens of context that the suite cannot do without: outputs past the window, of prompts of many lengths."""
    return max(2 * window + 40, window + 230)


def lacking(bench: Bench) -> list[tuple[Property, str]]:
    """The properties that the models of a case lack, each with what was found."""
    found = []
    for needed in PROPERTIES:
        if needed.kinds is None or bench.case.kind in needed.kinds:
            lack = _measured(needed, bench)
            if lack is not None:
                found.append((needed, lack))
    return found


def need_suited_models(suite: Suite, check: Check, case: Case) -> None:
    """End a check whose models lack what it needs.

    Raises:
        ModelsDoNotSuit: They do; the message names the property.
    """
    needed = [candidate for candidate in PROPERTIES if candidate.concerns(check.name, case)]
    if not needed:
        return
    bench = Bench(suite, case, suite.session(case), {})
    for candidate in needed:
        lack = _measured(candidate, bench)
        if lack is not None:
            raise ModelsDoNotSuit(f"{case.pair.name} does not suit this check: {lack} {candidate.remedy}")


def said_of_models(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """For the end of a run: groups of checks of which none could show anything on the models of a pair.

    Args:
        rows: Those of a JSON report.
    """
    groups: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        if row["target"]:
            groups.setdefault((row["group"], row["target"], row["kind"]), set()).add(row["status"])
    return [
        f"No check of the group {group} applies to {target} with {kind}: the models lack what they need "
        "(test_models_suit_the_checks says what)."
        for (group, target, kind), statuses in groups.items()
        if "not-applicable" in statuses and statuses <= {"not-applicable", "not-claimed", "unchecked"}
        # That check itself is the only one of its group.
        if group != "availability"
    ]


def _measured(needed: Property, bench: Bench) -> str | None:
    if is_known(bench.case.pair) and not (needed.of_prompts and stepping_engine(bench.session)):
        return None
    place = bench.case if needed.kinds else bench.case.pair
    try:
        return bench.suite.cache.once(("suits", needed.name, place), lambda: needed.measure(bench))
    except Exception:  # what is wrong, the checks say: they call the same
        return None


def _ends(bench: Bench) -> str | None:
    """By an EOS, or with one inside: then the backend goes on after it, which is a defect."""
    prompts = prompts_that_fit(bench.session, bench.suite.options.seed, _EOS_LIMIT)
    ends = bench.session.tokenizer.eos_token_ids
    for prompt in prompts:
        result = bench.session.generate(prompt, max_new_tokens=_EOS_LIMIT, speculate="off")
        if result.finish_reason == "eos" or ends & set(result.token_ids):
            return None
    return f"none of {len(prompts)} greedy answers has an end-of-sequence token within {_EOS_LIMIT} tokens."


def _repeats(bench: Bench) -> str | None:
    drafted, _, longest, tokens = _looked_up(bench)
    if longest >= bench.case.k:
        return None
    return (
        f"n-gram lookup finds {drafted} drafts in {tokens} tokens of its plain outputs, at most {longest} in a row "
        f"(k={bench.case.k})."
    )


def _repeats_rightly(bench: Bench) -> str | None:
    drafted, accepted, _, tokens = _looked_up(bench)
    if accepted:
        return None
    return f"n-gram lookup finds {drafted} drafts in {tokens} tokens of its plain outputs, and none of them is right."


def _looked_up(bench: Bench) -> tuple[int, int, int, int]:
    """What the core's n-gram drafter would do on the plain outputs: drafted, accepted, longest draft, tokens."""
    drafted = accepted = longest = tokens = 0
    for plain in _plain_outputs(bench):
        output = plain.token_ids
        ngram = NgramDrafter()
        ngram.extend((*plain.prompt_token_ids, output[0]))
        at = 1
        tokens += len(output)
        while at < len(output):
            draft = ngram.propose(min(bench.case.k, len(output) - at - 1)) if len(output) - at > 1 else []
            right = 0
            while right < len(draft) and draft[right] == output[at + right]:
                right += 1
            drafted, accepted, longest = drafted + len(draft), accepted + right, max(longest, len(draft))
            ngram.extend(output[at : at + right + 1])
            at += right + 1
    return drafted, accepted, longest, tokens


def _sometimes_right(bench: Bench) -> str | None:
    """The draft model, loaded as a target, along the target's plain outputs."""
    contexts: list[tuple[list[int], int]] = []
    for plain in _plain_outputs(bench):
        output = plain.token_ids
        places = range(1, len(output), max(1, 3 * len(output) // _PLACES))
        contexts += [([*plain.prompt_token_ids, *output[:at]], output[at]) for at in places]
    suite, case = bench.suite, bench.case
    right = 0
    with closing(suite.load(case, target=case.drafter, drafter=None, num_speculative_tokens=None)) as drafter:
        for context, following in contexts:
            right += drafter.generate(context, speculate="off", **greedy_settings(1)).token_ids[0] == following
    if right:
        return None
    return f"{case.drafter}, loaded as a target, predicts none of {len(contexts)} tokens of its plain outputs."


def _uncertain(bench: Bench) -> str | None:
    """From logits, where there are any: sampling itself is what is under test."""
    engine = stepping_engine(bench.session)
    if engine is None or not bench.capabilities.exposes_logits:
        return None
    plain = _plain_outputs(bench)[1]
    surprise: list[float] = []
    for at in range(0, len(plain.token_ids), max(1, len(plain.token_ids) // _PLACES)):
        row = prefill_logits(engine, [*plain.prompt_token_ids, *plain.token_ids[:at]])[-1].astype(np.float64) / 1.4
        surprise.append(float(np.log(np.exp(row - row.max()).sum())))
    mean = sum(surprise) / len(surprise)
    if mean >= _LEAST_SURPRISE:
        return None
    return f"at temperature 1.4 it gives its best token {np.exp(-mean):.1%} on (geometric) average."


def _plain_outputs(bench: Bench) -> list[GenerationResult]:
    """Those of the case's evidence, which shares them."""
    return [bench.plain(prompt.token_ids, **greedy_settings(prompt.max_new_tokens)) for prompt in bench.window_prompts]


PROPERTIES = (
    Property(
        "ends",
        _ends,
        "Train it on texts with an end, or raise the logit of the end-of-sequence token.",
        ("test_eos_ends_the_output", "test_eos_at_every_place_of_a_draft", "test_min_new_tokens"),
    ),
    Property(
        "repeats",
        _repeats,
        _REPEATING,
        ("test_drafts_are_made", "test_rounds_draft_k_tokens"),
        ("ngram",),
        of_prompts=True,
    ),
    Property(
        "repeats rightly",
        _repeats_rightly,
        _REPEATING,
        ("test_drafts_are_accepted",),
        ("ngram",),
        of_prompts=True,
    ),
    Property(
        "drafter is sometimes right",
        _sometimes_right,
        "Use a drafter that was trained on the same texts, or the target's weights with noise.",
        ("test_drafts_are_accepted", "test_sampled_drafts_are_accepted", "test_*_inside_a_draft"),
        ("draft-model",),
    ),
    Property(
        "uncertain",
        _uncertain,
        "Use a model that is less certain, such as one trained for fewer steps, or divide its logits by a constant.",
        ("test_temperature_changes_the_output", "test_seed_decides_the_output", "test_samples_follow_the_distribution"),
    ),
)
"""All properties, in the order in which they are reported."""
