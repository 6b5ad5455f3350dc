"""The core's session with a defect: what a stepping backend can break by overriding it."""

from __future__ import annotations

import itertools

from polydraft._session.stepping import SteppingSession
from polydraft.contract import GenerationStats


class StatisticsMadeUp(SteppingSession):
    """Says that three of four drafts were accepted."""

    def rounds(self, generation):
        if generation.request.speculate:
            generation.counts.stats = lambda: self.made_up(len(generation.tracker.token_ids))
        return super().rounds(generation)

    @staticmethod
    def made_up(count):
        steps = max(1, count // 4)
        return GenerationStats(
            num_tokens=count,
            num_target_steps=steps,
            num_drafts=steps,
            num_draft_tokens=4 * steps,
            num_accepted_tokens=3 * steps,
            accepted_per_position=(steps, steps, steps, 0),
        )


class TemperatureIgnored(SteppingSession):
    """Decodes greedily, whatever was asked for."""

    def rounds(self, generation):
        settings = generation.request.settings.model_copy(update={"temperature": 0.0})
        generation.request = generation.request.model_copy(update={"settings": settings})
        return super().rounds(generation)


class SeedIgnored(SteppingSession):
    """Draws with a seed of its own, another one in each call."""

    seeds = itertools.count(1)

    def rounds(self, generation):
        told = generation.request
        generation.request = told.model_copy(update={"seed": next(self.seeds)})
        yield from super().rounds(generation)
        generation.request = told


class StopStringMissed(SteppingSession):
    """Looks for stop strings at the ends of rounds only."""

    def rounds(self, generation):
        tracker = generation.tracker
        push = tracker.push

        def push_blindly(token_id, *, is_draft):
            reason = push(token_id, is_draft=is_draft)
            if is_draft and reason == "stop" and isinstance(tracker.stop_match, str):
                tracker.finish_reason = tracker.stop_match = None
                return None
            return reason

        tracker.push = push_blindly
        return super().rounds(generation)
