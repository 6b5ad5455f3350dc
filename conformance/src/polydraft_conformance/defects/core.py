"""Defects of the core, which the suite must find as well: each is put in place with pytest's ``monkeypatch``."""

from __future__ import annotations

from polydraft._session.call import Call
from polydraft.contract import GenerationStats
from polydraft.sampling._grammar import GrammarRun
from polydraft.text._tracker import OutputTracker

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.making import defective

__all__ = ["DEFECTS"]


def statistics_made_up(monkeypatch):
    """Say that three of four drafts were accepted."""
    honest = Call.stats

    def stats(self):
        found = honest(self)
        if not found.num_drafts:
            return found
        steps = max(1, found.num_tokens // 4)
        return GenerationStats(
            num_tokens=found.num_tokens,
            num_target_steps=steps,
            num_drafts=steps,
            num_draft_tokens=4 * steps,
            num_accepted_tokens=3 * steps,
            accepted_per_position=(steps, steps, steps, 0),
        )

    monkeypatch.setattr(Call, "stats", stats)


def stop_strings_missed(monkeypatch):
    """Look for stop strings at the ends of rounds only."""
    honest = OutputTracker.push

    def push(self, token_id, *, is_draft):
        reason = honest(self, token_id, is_draft=is_draft)
        if is_draft and reason == "stop" and isinstance(self.stop_match, str):
            self.finish_reason = self.stop_match = None
            return None
        return reason

    monkeypatch.setattr(OutputTracker, "push", push)


def masks_of_the_first_row(monkeypatch):
    """Look up what may come once a round: drafted rows get the first row's answer."""
    honest = GrammarRun.masks

    def masks(self, committed, run_token_ids):
        found = honest(self, committed, run_token_ids)
        return found[:1] * len(found)

    monkeypatch.setattr(GrammarRun, "masks", masks)


DEFECTS = (
    Defect(
        "core: stop string missed inside a draft",
        "test_stop_string_inside_a_draft",
        "was missed inside a draft",
        defective,
        patch=stop_strings_missed,
    ),
    Defect(
        "core: statistics made up",
        "test_statistics_equal_counts",
        "Statistics are wrong",
        defective,
        patch=statistics_made_up,
    ),
    Defect(
        "core: what may come looked up once a round",
        "test_outputs_match",
        "does not match what `guided` asks for",
        defective,
        patch=masks_of_the_first_row,
    ),
)
