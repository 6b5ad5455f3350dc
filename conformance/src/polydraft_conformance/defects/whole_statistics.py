"""Whole engines whose statistics are not what happened."""

from __future__ import annotations

from functools import partial

from polydraft.contract import GenerationStats
from polydraft_reference.drafters.mtp import AssistantDrafter

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.honest import FEW_CLAIMS, Whole
from polydraft_conformance.defects.making import defective

__all__ = ["DEFECTS"]


class Rounds:
    """The emitted rounds of one call: what an engine would count."""

    def __init__(self, generation):
        self.generation = generation
        self.drafts = []
        """(drafted, accepted) of every round."""

    def __getattr__(self, name):
        return getattr(self.generation, name)

    def emit(self, token_ids, *, num_draft_tokens, num_accepted_tokens, **others):
        said = self.said(num_draft_tokens, num_accepted_tokens)
        emitted = self.generation.emit(token_ids, num_draft_tokens=said[0], num_accepted_tokens=said[1], **others)
        self.drafts.append((said[0], self.counted(num_accepted_tokens, emitted)))
        return emitted

    def said(self, drafted, accepted):
        """What is said of a round."""
        return drafted, accepted

    def counted(self, accepted, emitted):
        """The accepted drafts in the totals."""
        return emitted.num_accepted_tokens


class Reporting(Whole):
    """Reports totals of its own; subclasses change them."""

    rounds_class = Rounds

    def rounds(self, generation):
        return super().rounds(self.rounds_class(generation))

    def totals(self, generation):
        """[drafted, accepted, rounds, steps] and acceptance by position."""
        drafts = [(drafted, accepted) for drafted, accepted in generation.drafts if drafted]
        longest = max((drafted for drafted, _ in drafts), default=0)
        positions = [sum(accepted > place for _, accepted in drafts) for place in range(longest)]
        sums = [sum(drafted for drafted, _ in drafts), sum(accepted for _, accepted in drafts), len(drafts)]
        return [*sums, len(generation.drafts) - 1], positions

    def report(self, generation):
        if not generation.request.speculate:
            return
        (drafted, accepted, rounds, steps), positions = self.totals(generation)
        generation.report(
            GenerationStats(
                num_tokens=len(generation.token_ids),
                num_target_steps=steps,
                num_drafts=rounds,
                num_draft_tokens=drafted,
                num_accepted_tokens=accepted,
                accepted_per_position=tuple(positions),
            )
        )


class ConstantRate(Reporting):
    """Says that six of ten drafts were accepted."""

    def totals(self, generation):
        (drafted, _, rounds, steps), _ = super().totals(generation)
        accepted = round(0.6 * drafted)
        share, rest = divmod(accepted, 4)
        return [drafted, accepted, rounds, steps], [share + (place < rest) for place in range(4)]


class BeyondTheEnd(Rounds):
    """Counts accepted drafts that the end of the output cut off, as metrics taken before detokenizing do."""

    def counted(self, accepted, emitted):
        return accepted


class CountsBeyondTheEnd(Reporting):
    rounds_class = BeyondTheEnd


class Accumulates(Reporting):
    """Counters run on from request to request."""

    def __init__(self, engine):
        super().__init__(engine)
        self.before = [0, 0, 0, 0]
        self.positions = []

    def totals(self, generation):
        found, positions = super().totals(generation)
        self.before = [one + other for one, other in zip(self.before, found, strict=True)]
        longest = max(len(positions), len(self.positions))
        padded = [[*one, *[0] * (longest - len(one))] for one in (positions, self.positions)]
        self.positions = [one + other for one, other in zip(*padded, strict=True)]
        return self.before, self.positions


class BonusAccepted(Rounds):
    """Counts the bonus token of each round as an accepted draft."""

    def said(self, drafted, accepted):
        return drafted, min(drafted, accepted + 1)


class CountsBonus(Reporting):
    rounds_class = BonusAccepted


class Zeros(Rounds):
    """Says 0 of what it does not know."""

    def said(self, drafted, accepted):
        return 0, 0


class ReportsZeros(Reporting):
    rounds_class = Zeros

    def totals(self, generation):
        rounds = (len(generation.token_ids) + 1) // 3
        return [4 * rounds, 2 * rounds, rounds, rounds], [rounds, rounds]


class PositionsEstimated(Reporting):
    """Acceptance by position is spread evenly."""

    def totals(self, generation):
        found, positions = super().totals(generation)
        share, rest = divmod(found[1], max(1, len(positions)))
        return found, [share + (place < rest) for place in range(len(positions))]


class OneRoundMore(Reporting):
    """Counts the prefill as a round."""

    def totals(self, generation):
        (drafted, accepted, rounds, steps), positions = super().totals(generation)
        return [drafted, accepted, rounds + 1, steps + 1], positions


class OtherDrafter(Whole):
    """Drafts with what it has at hand, whichever drafter was loaded: all numbers agree."""

    def __init__(self, engine):
        super().__init__(engine)
        engine.drafter = AssistantDrafter(engine.target, 0.7, 1)


class LeaksAfterCancel(Reporting):
    """The counts of a cancelled request are in those of the next one."""

    def __init__(self, engine):
        super().__init__(engine)
        self.left = [0, 0, 0, 0]

    def rounds(self, generation):
        call = Rounds(generation)
        try:
            yield from Whole.rounds(self, call)
        finally:
            if generation.finish_reason is None:
                self.left = super().totals(call)[0]

    def totals(self, generation):
        found, positions = super().totals(generation)
        left, self.left = self.left, [0, 0, 0, 0]
        positions[:1] = [positions[0] + left[1]] if positions else []
        return [one + other for one, other in zip(found, left, strict=True)], positions


def whole(name, engine, check, cause, **further):
    """A defect of a whole engine that claims few settings."""
    return Defect(f"whole: {name}", check, cause, partial(defective, whole=engine, **FEW_CLAIMS), **further)


DEFECTS = (
    whole("a constant acceptance rate", ConstantRate, "test_statistics_equal_counts", "acceptance rate is made up"),
    whole(
        "accepted drafts after the end are counted",
        CountsBeyondTheEnd,
        "test_statistics_equal_counts",
        "after the end of the output",
        also=frozenset({"test_statistics_of_outputs_cut_short"}),
    ),
    whole("counters accumulate", Accumulates, "test_statistics_equal_counts", "counts of earlier requests are added"),
    whole(
        "bonus tokens are accepted ones",
        CountsBonus,
        "test_rounds_end_with_a_bonus_token",
        "The bonus token is counted as an accepted draft",
    ),
    whole("0 in place of None", ReportsZeros, "test_rounds_end_with_a_bonus_token", "0 is reported for drafts"),
    whole(
        "acceptance by position is estimated",
        PositionsEstimated,
        "test_statistics_equal_counts",
        "acceptance by position is not what was accepted",
    ),
    whole("one round more", OneRoundMore, "test_statistics_equal_counts", "one round too many is counted"),
    whole(
        "another drafter than the loaded one",
        OtherDrafter,
        "test_right_drafts_are_accepted",
        "Acceptance does not depend on the drafter",
        met_by=frozenset({"test_target_drafts_for_itself"}),
    ),
    whole(
        "a cancelled request's counts leak",
        LeaksAfterCancel,
        "test_statistics_of_outputs_cut_short",
        "counts of earlier requests are added",
    ),
)
