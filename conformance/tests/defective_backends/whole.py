"""A whole engine: its own loop over the reference model, with rejection sampling. And the same with defects."""

from __future__ import annotations

import numpy as np
from polydraft.contract import GenerationStats, WholeEngine
from polydraft.sampling._logprobs import token_logprobs
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.numpy_ops import array_ops_of


def softmax(logits, temperature):
    shifted = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return shifted / shifted.sum()


class Whole(WholeEngine):
    """Honest: drafts are drawn from the drafter, accepted with probability min(1, p/q) (Leviathan et al. 2023)."""

    def __init__(self, engine):
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.running = engine.running

    def close(self):
        self.engine.close()

    def rounds(self, generation):
        request = generation.request
        random = np.random.default_rng([request.seed, request.stream])
        sampler = RuleSampler(array_ops_of(self.engine), request)
        sequence = self.engine.open_sequence()
        try:
            rows = sequence.prefill(request.prompt_token_ids, sampler, keep_logits=True).logits.numpy()
            newest = self.draw(random, rows[0], request)
            logprobs = self.scored(request, rows, [newest])
            yield generation.emit([newest], num_draft_tokens=0, num_accepted_tokens=0, logprobs=logprobs)
            while generation.finish_reason is None and not generation.cancelled():
                k = min(request.num_speculative_tokens, self.running.context_length - sequence.length - 1)
                drafts, drafter_rows = self.draft(sequence, newest, k, sampler, request, random)
                base = sequence.length
                rows = sequence.verify([newest, *drafts], sampler, keep_logits=True).logits.numpy()
                tokens, accepted = self.accept(random, rows, drafts, drafter_rows, request)
                logprobs = self.scored(request, rows, tokens)
                tokens, logprobs = self.emitted(tokens, logprobs, accepted)
                emitted = generation.emit(
                    tokens, num_draft_tokens=len(drafts), num_accepted_tokens=accepted, logprobs=logprobs
                )
                sequence.rollback(base + 1 + emitted.num_accepted_tokens)
                newest = emitted.token_ids[-1]
                if generation.finish_reason is not None:  # nothing is read after the last round
                    self.report(generation)
                yield emitted
        finally:
            sequence.close()

    def draft(self, sequence, newest, k, sampler, request, random):
        """k drafts, and the drafter's logits of each."""
        if k < 1 or not request.speculate:
            return [], []
        proposal = sequence.propose(newest, k, sampler, keep_logits=True)
        return proposal.token_ids, proposal.logits.numpy() if proposal.logits else []

    def accept(self, random, rows, drafts, drafter_rows, request):
        """The tokens of a round, and how many of them are accepted drafts."""
        temperature = request.settings.temperature
        tokens = []
        for index, draft in enumerate(drafts):
            if temperature == 0.0:
                choice = int(rows[index].argmax())
            else:
                choice = self.reject(random, rows[index], drafter_rows[index], draft, temperature)
            tokens.append(choice)
            if choice != draft:
                return tokens, index
        return [*tokens, self.draw(random, rows[len(drafts)], request)], len(drafts)

    def reject(self, random, target_row, drafter_row, draft, temperature):
        """A sample of the target: the draft was chosen for certain, so q is 1 there."""
        p = softmax(target_row, temperature)
        if random.random() < p[draft]:
            return draft
        p[draft] = 0.0
        return int(random.choice(len(p), p=p / p.sum()))

    def draw(self, random, row, request):
        temperature = request.settings.temperature
        if temperature == 0.0:
            return int(row.argmax())
        p = softmax(row, temperature)
        return int(random.choice(len(p), p=p))

    def scored(self, request, rows, tokens):
        """Log-probabilities of the tokens, as the core would give them."""
        if request.settings.logprobs is None:
            return None
        return token_logprobs(rows[: len(tokens)], tokens, request.settings.logprobs)

    def emitted(self, tokens, logprobs, accepted):
        return tokens, logprobs

    def report(self, generation):
        """Report nothing: the counts of rounds are right."""


class BonusDropped(Whole):
    """The target's own token at the end of a round is lost where drafts were accepted."""

    def emitted(self, tokens, logprobs, accepted):
        return (tokens[:-1], logprobs and logprobs[:-1]) if accepted else (tokens, logprobs)


class Biased(Whole):
    """Transformers 5.22: drafts by argmax, accepts by the drafter's own probability of them."""

    def draft(self, sequence, newest, k, sampler, request, random):
        settings = request.settings.model_copy(update={"temperature": 0.0})
        greedy = RuleSampler(array_ops_of(self.engine), request.model_copy(update={"settings": settings}))
        return super().draft(sequence, newest, k, greedy, request, random)

    def reject(self, random, target_row, drafter_row, draft, temperature):
        p, q = softmax(target_row, temperature), softmax(drafter_row, temperature)
        if random.random() < p[draft] / q[draft]:
            return draft
        rest = np.maximum(p - q, 0.0)
        rest = rest if rest.sum() > 0 else p
        return int(random.choice(len(p), p=rest / rest.sum()))


class WholeStatisticsMadeUp(Whole):
    """Says that every draft was accepted."""

    def report(self, generation):
        if not generation.request.speculate:
            return
        rounds = len(generation.token_ids) - 1
        generation.report(
            GenerationStats(
                num_tokens=rounds + 1,
                num_target_steps=rounds,
                num_drafts=rounds,
                num_draft_tokens=4 * rounds,
                num_accepted_tokens=4 * rounds,
                accepted_per_position=(rounds,) * 4,
            )
        )


class WholeSilent(Whole):
    """Speculation is silently off."""

    def draft(self, sequence, newest, k, sampler, request, random):
        return [], []


class WholeUnverified(Whole):
    """Every draft is accepted."""

    def accept(self, random, rows, drafts, drafter_rows, request):
        return [*drafts, self.draw(random, rows[len(drafts)], request)], len(drafts)
