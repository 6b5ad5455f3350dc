"""What an engine chose, and the logits that it chose from: recorded at its primitives, or calculated by another one."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import polydraft
from polydraft import default_host
from polydraft.contract import EngineSequence, GenerationSettings, Sampler, Step
from polydraft.errors import PolydraftError
from polydraft.verification import GreedySampler, epsilon_of

from polydraft_conformance.counting import WrappedSequence, stepping_engine, wrapped_sequences
from polydraft_conformance.oracle import adjusted
from polydraft_conformance.primitives import logits_of
from polydraft_conformance.settings_proof import Choice, Trial, faults_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polydraft.contract import GenerationResult, SteppingEngine, TokenLogprobs

    from polydraft_conformance.bench import Bench
    from polydraft_conformance.oracle import Row
    from polydraft_conformance.streams import Streamed

__all__ = ["BEST", "Recording", "other_engine", "recorded", "rows_of", "scored_trial", "told_row", "told_trial"]

BEST = 20
"""Log-probabilities to ask for: all engines can give so many."""
_RECORDED_SLACK = 5e-4
"""Logits that were recorded are those that were chosen from, but the core sums probabilities in fixed point."""
_TOLD_SLACK = 2e-3
"""Log-probabilities may be summed in float32, and rounded for transport."""
_FOREIGN_SLACK = 5e-3
"""Another engine's logits differ by its rounding: less than 2e-3 in float32."""
_FOREIGN_EPSILONS = 4


class Recording(WrappedSequence):
    """Asks for the logits of every step, and keeps them with the tokens that were chosen."""

    def __init__(self, inner: EngineSequence) -> None:
        super().__init__(inner)
        self.prompt: tuple[int, ...] = ()
        self.stored: list[int] = []
        """The tokens in the sequence."""
        self.choices: list[Choice] = []

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Record the choice after the prompt."""
        step = super().prefill(token_ids, sampler, keep_logits=True)
        self.prompt, self.stored = tuple(token_ids), list(token_ids)
        self._keep(step, [()], [])
        return step

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Record the choice of every row."""
        before = self.stored[len(self.prompt) :]
        step = super().verify(token_ids, sampler, keep_logits=True)
        self.stored += token_ids
        self._keep(step, [(*before, *token_ids[: row + 1]) for row in range(len(token_ids))], list(token_ids[1:]))
        return step

    def rollback(self, length: int) -> None:
        """Forget tokens."""
        super().rollback(length)
        del self.stored[length:]

    def _keep(self, step: Step, prefixes: Sequence[tuple[int, ...]], drafts: list[int]) -> None:
        rows = logits_of(step)
        for row, (token, prefix) in enumerate(zip(step.token_ids, prefixes, strict=True)):
            if token < 0:
                continue  # no token could be chosen: the loop runs the newest one alone
            self.choices.append(
                Choice(
                    token=token,
                    output=prefix,
                    logits=rows[row],
                    row=row,
                    is_last=bool(drafts) and row == len(drafts),
                    is_emitted=step.token_ids[:row] == drafts[:row],
                )
            )

    def trial(self, result: GenerationResult, eos_token_ids: frozenset[int], *, all_rows: bool) -> Trial:
        """Its choices under the settings of its result.

        Args:
            result: What came out.
            eos_token_ids: The request's.
            all_rows: Rows after rejected drafts as well.
        """
        length = len(result.token_ids)
        choices = [choice for choice in self.choices if len(choice.output) < length and (all_rows or choice.is_emitted)]
        return Trial(result.settings, self.prompt, choices, eos_token_ids, _RECORDED_SLACK, result.settings.seed or 0)


@contextmanager
def recorded(engine: SteppingEngine) -> Iterator[list[Recording]]:
    """The recordings of all sequences opened inside the ``with`` block."""
    recordings: list[Recording] = []

    def wrap(inner: EngineSequence) -> EngineSequence:
        recordings.append(Recording(inner))
        return recordings[-1]

    with wrapped_sequences(engine, wrap):
        yield recordings


@contextmanager
def other_engine(bench: Bench) -> Iterator[SteppingEngine | None]:
    """Another installed backend's engine with the case's target, whose logits can be read; None if there is none.

    Only for targets that are shipped with a plugin: others may be too large to be loaded twice.
    """
    suite = bench.suite
    target = bench.case.pair.target
    if not target.startswith("builtin:"):
        yield None
        return
    form = suite.record.formats
    for host in (suite.host, default_host()):
        for name, record in host.backends().items():
            if record.factory == suite.record.factory or not record.formats & form:
                continue
            try:
                if not host.backend(name).capabilities().exposes_logits:
                    continue
                session = polydraft.load(
                    target, drafter=None, backend=name, dtype=suite.options.dtype, device="cpu", host=host
                )
            except (PolydraftError, ImportError, OSError):
                continue
            with closing(session):
                engine = stepping_engine(session)
                if engine is not None:
                    bench.numbers["logits_of"] = f"{session.running.backend} ({session.running.engine_version})"
                    yield engine
                    return
    yield None


def rows_of(engine: SteppingEngine, prompt: Sequence[int], output: Sequence[int]) -> list[Row]:
    """The logits that each output token is chosen from, by a plain run of the text: each of shape (vocab,)."""
    sampler = GreedySampler(engine)
    size = engine.max_draft_tokens + 1
    rows: list[Row] = []
    with closing(engine.open_sequence()) as sequence:
        rows += list(logits_of(sequence.prefill(list(prompt), sampler, keep_logits=True)))
        for start in range(0, len(output) - 1, size):
            run = list(output[start : min(start + size, len(output) - 1)])
            rows += list(logits_of(sequence.verify(run, sampler, keep_logits=True)))
    return rows


def scored_trial(
    engine: SteppingEngine, pieces: Streamed, eos_token_ids: frozenset[int], k: int, precision: str
) -> Trial:
    """The choices of a streamed generation, with the logits of another engine.

    Args:
        engine: Gives the logits.
        pieces: The generation under test.
        eos_token_ids: The request's.
        k: Draft tokens of a round; 0: plain decoding.
        precision: What the engine under test runs in.
    """
    result = pieces.result
    logits = rows_of(engine, result.prompt_token_ids, result.token_ids)
    largest = max(float(np.abs(row[np.isfinite(row)]).max()) for row in logits)
    epsilon = max(epsilon_of(engine.running.precision), epsilon_of(precision))
    slack = max(_FOREIGN_SLACK, _FOREIGN_EPSILONS * epsilon * largest)
    choices = _choices(pieces, logits, k)
    return Trial(result.settings, result.prompt_token_ids, choices, eos_token_ids, slack)


def told_trial(pieces: Streamed, vocab_size: int, eos_token_ids: frozenset[int], k: int) -> Trial:
    """The choices of a streamed generation, with the engine's own log-probabilities of the best tokens.

    Only choices whose probabilities they tell are kept. Under temperature 1 alone that is all of them; under filters,
    those where all that the filters leave is among the best tokens; else those that are among the best, given that.

    Args:
        pieces: The generation under test, with log-probabilities.
        vocab_size: Number of tokens.
        eos_token_ids: The request's.
        k: Draft tokens of a round; 0: plain decoding.
    """
    result = pieces.result
    entries = result.logprobs or ()
    whole = is_bare(result.settings)
    rows = [told_row(entry, vocab_size, whole=whole) for entry in entries]
    trial = Trial(result.settings, result.prompt_token_ids, _choices(pieces, rows, k), eos_token_ids, _TOLD_SLACK)
    if whole:
        return trial
    least = [min(logprob for _, logprob in entry.top) for entry in entries]
    told = [choice for choice, floor in zip(trial.choices, least, strict=True) if _tells(trial, choice, floor)]
    return replace(trial, choices=told)


def is_bare(settings: GenerationSettings) -> bool:
    """Whether tokens are drawn from the target's own probabilities: temperature 1, and nothing else."""
    return settings.temperature == 1.0 and len(faults_of(settings)) == len(faults_of(GenerationSettings(temperature=1)))


def told_row(entry: TokenLogprobs, vocab_size: int, *, whole: bool) -> Row:
    """Logits, shape (vocab,), that give the best tokens their log-probabilities.

    ``whole``: the others share what is left, so that each bet on them is one on all of them. Otherwise they are -inf.
    """
    left = max(1.0 - sum(math.exp(logprob) for _, logprob in entry.top), 1e-12)
    others = max(1, vocab_size - len(entry.top))
    row = np.full(vocab_size, math.log(left / others) if whole else -np.inf)
    for token, logprob in entry.top:
        row[token] = logprob
    return row


def _tells(trial: Trial, choice: Choice, floor: float) -> bool:
    """Whether the best tokens tell all that the settings leave; ``floor``: no other has a larger log-probability."""
    settings = trial.settings
    if len(choice.output) in settings.forced_token_ids:
        return True
    most = Counter(choice.output).most_common(1)
    # How much an unlisted token may have gained.
    gain = max(0.0, *settings.logit_bias.values(), 0.0) if settings.logit_bias else 0.0
    gain += max(0.0, -settings.presence_penalty)
    gain += max(0.0, -settings.frequency_penalty) * (most[0][1] if most else 0)
    row = adjusted(choice.logits, settings, trial.prompt, choice.output, trial.eos_token_ids)
    best = np.sort(row)[::-1]
    if settings.temperature == 0.0:
        edge = best[0]
    elif settings.top_k:
        edge = best[settings.top_k - 1]
    elif settings.min_p:
        edge = best[0] + settings.temperature * math.log(settings.min_p)
    else:
        return settings.top_p == settings.typical_p == 1.0 and bool(np.isfinite(choice.logits[choice.token]))
    return bool(edge > floor + gain + 4 * trial.slack)


def _choices(pieces: Streamed, logits: Sequence[Row], k: int) -> list[Choice]:
    """The tokens of a generation by round, each with its row of logits."""
    output = pieces.result.token_ids
    choices: list[Choice] = []
    for chunk in pieces.chunks:
        known = chunk.num_accepted_tokens is not None
        for row, token in enumerate(chunk.token_ids):
            index = len(choices)
            place = row if known else None
            choices.append(Choice(token, output[:index], logits[index], place, is_last=known and 0 < k == row))
    return choices
