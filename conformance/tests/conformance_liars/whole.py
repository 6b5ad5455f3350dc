"""A whole engine: a loop of its own over the reference model, with rejection sampling. And the same with defects."""

from __future__ import annotations

import numpy as np
from polydraft._session.session import Session
from polydraft.contract import GenerationStats, Round
from polydraft.sampling._sampler import RuleSampler


def softmax(logits, temperature):
    shifted = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return shifted / shifted.sum()


class Whole(Session):
    """Honest: drafts are drawn from the drafter, accepted with probability min(1, p/q) (Leviathan et al. 2023)."""

    def __init__(self, engine, request, capabilities):
        self.engine = engine
        super().__init__(engine.tokenizer, engine.running(request), capabilities)

    def close_engine(self):
        self.engine.close()

    def rounds(self, generation):
        request = generation.request
        self.report(generation)
        random = np.random.default_rng([request.seed, request.stream])
        sampler = RuleSampler(self.engine.array_ops, request)
        sequence = self.engine.open_sequence()
        try:
            step = sequence.prefill(request.prompt_token_ids, sampler, keep_logits=True)
            newest = self.draw(random, step.logits.numpy()[0], request)
            step = self.scored(sampler, step.logits.numpy(), sequence.length, [newest])
            finished = generation.tracker.push(newest, is_draft=False)
            yield Round(token_ids=(newest,), num_draft_tokens=0, num_accepted_tokens=0, logprobs=step)
            while finished is None and not generation.cancelled.is_set():
                k = min(request.num_speculative_tokens, self.running.context_length - sequence.length - 1)
                drafts, drafter_rows = self.draft(sequence, newest, k, sampler, request, random)
                base = sequence.length
                step = sequence.verify([newest, *drafts], sampler, keep_logits=True)
                rows = step.logits.numpy()
                tokens, accepted = self.accept(random, rows, drafts, drafter_rows, request)
                logprobs = self.scored(sampler, rows, base + 1, tokens)
                tokens, logprobs = self.emitted(tokens, logprobs, accepted)
                kept = 0
                for index, token in enumerate(tokens):
                    finished = generation.tracker.push(token, is_draft=index < accepted)
                    kept += 1
                    if finished is not None:
                        break
                accepted = min(accepted, kept)
                sequence.rollback(base + 1 + min(accepted, kept))
                newest = tokens[kept - 1]
                yield Round(
                    token_ids=tuple(tokens[:kept]),
                    num_draft_tokens=len(drafts),
                    num_accepted_tokens=accepted,
                    logprobs=None if logprobs is None else logprobs[:kept],
                )
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

    def scored(self, sampler, rows, position, tokens):
        """Log-probabilities of the tokens, as the core would give them."""
        from polydraft.sampling._logprobs import token_logprobs

        if sampler._settings.logprobs is None:
            return None
        return token_logprobs(rows[: len(tokens)], tokens, sampler._settings.logprobs)

    def emitted(self, tokens, logprobs, accepted):
        return tokens, logprobs

    def report(self, generation):
        """The loop's own counts are right."""


class BonusDropped(Whole):
    """The target's own token at the end of a round is lost where drafts were accepted."""

    def emitted(self, tokens, logprobs, accepted):
        return (tokens[:-1], logprobs and logprobs[:-1]) if accepted else (tokens, logprobs)


class Biased(Whole):
    """Transformers 5.22: drafts by argmax, accepts by the drafter's own probability of them."""

    def draft(self, sequence, newest, k, sampler, request, random):
        settings = request.settings.model_copy(update={"temperature": 0.0})
        greedy = RuleSampler(self.engine.array_ops, request.model_copy(update={"settings": settings}))
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
        if generation.request.speculate:
            generation.counts.stats = lambda: self.made_up(len(generation.tracker.token_ids))

    @staticmethod
    def made_up(count):
        return GenerationStats(
            num_tokens=count,
            num_target_steps=count - 1,
            num_drafts=count - 1,
            num_draft_tokens=4 * (count - 1),
            num_accepted_tokens=4 * (count - 1),
            accepted_per_position=(count - 1,) * 4,
        )


class WholeSilent(Whole):
    """Speculation is off, and nobody is told."""

    def draft(self, sequence, newest, k, sampler, request, random):
        return [], []


class WholeUnverified(Whole):
    """Drafts are taken unseen."""

    def accept(self, random, rows, drafts, drafter_rows, request):
        return [*drafts, self.draw(random, rows[len(drafts)], request)], len(drafts)
