"""One sequence on a loaded model: the prompt in chunks, then steps of a few rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from polydraft.contract import EngineSequence, Sampler, Step
from torch import Tensor

from polydraft_transformers.decoder import Decoder
from polydraft_transformers.device_rounds import DeviceRounds, Drafting, Lane, Ran
from polydraft_transformers.kv_cache import KvCache, SavedKv, capacity_at
from polydraft_transformers.resources import out_of_memory

__all__ = ["TorchLogits", "TransformersSequence"]


class TorchLogits:
    """Logits where torch keeps them."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def numpy(self) -> npt.NDArray[np.float32]:
        """Copy to the host: float32, shape (rows, vocab)."""
        copied: npt.NDArray[np.float32] = self._logits.detach().float().cpu().numpy().copy()
        return copied


class TransformersSequence(EngineSequence):
    """A sequence with its own KV buffers.

    Args:
        target: The model; of a draft model's sequence, the draft model.
        chunk: Prompt tokens run in one forward; None: as the model likes it.
        lock: Held while the model runs.
        rounds: That it shares with other sequences; None: its own, if the model runs rounds.
    """

    def __init__(
        self, target: Decoder, chunk: int | None, lock: threading.Lock, rounds: DeviceRounds | None = None
    ) -> None:
        self.target = target
        self.cache: KvCache = target.open_cache()
        self._chunk = chunk or target.chunk
        self._lock = lock
        self._hidden: Tensor | None = None  # hidden rows of the tokens that the last forward ran
        self._hidden_from = 0  # position of the first of them
        self._sound = True
        self._ran: Ran | None = None
        """The round that ``propose`` has run, for ``verify``."""
        if rounds is None and target.runs_rounds:
            rounds = DeviceRounds(target, self.drafting(), lock)
        self._rounds = rounds
        self._lane = None if rounds is None else Lane(rounds, self.cache)
        self._parked: SavedKv | None = None

    def drafting(self) -> Drafting | None:
        """What drafts in rounds on a GPU; None: nothing."""
        return None

    @property
    def length(self) -> int:
        """Number of tokens whose KV is stored; not after ``close``."""
        return (self._parked or self.cache).length

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt, or the rest of it, in chunks; other sequences' forwards may run between them."""
        tokens = list(token_ids)
        self._go_another_way()
        with self._computing(f"making room for a prompt of {len(tokens)} tokens"):
            self.cache.reserve(self.length + len(tokens) + self.target.step_rows + 1)
        for start in range(0, len(tokens), self._chunk):
            self.check_cancelled()
            with self._computing(f"running a prompt of {len(tokens)} tokens"):
                end = start + self._chunk
                self._hidden = self.run_prompt(tokens[start:end], last=end >= len(tokens))
                self._hidden_from = self.length - len(self._hidden)
        with self._computing("choosing the first token"):
            assert self._hidden is not None
            # The head on one row: for a whole chunk its output would be (chunk, vocab).
            logits = self.target.logits(self._hidden[-1:])
            chosen, logprobs = sampler.choose(logits, self.length, tokens[-1:])
            return Step(chosen, TorchLogits(logits.clone()) if keep_logits else None, logprobs)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts in one forward, or in two where fixed steps must not cross a border."""
        tokens = list(token_ids)
        ran = None if keep_logits else self._round_of(tokens, sampler)
        if ran is not None:
            first = self._hidden_from = ran.position
            self._hidden = ran.hidden[: len(tokens)]
            self.cache.length += len(tokens)
            return Step(ran.choice.chosen(ran.chosen[: len(tokens)], first + 1, tokens))
        with self._computing("verifying drafts"):
            self._go_another_way()
            first = self._hidden_from = self.length
            # The span of a fixed step depends on its positions only: it ends where the span doubles.
            border = capacity_at(first) - first if self.target.fixed and self.cache.masked else len(tokens)
            hidden, logits = self.run_step(tokens[:border])
            if border < len(tokens):
                hidden, logits = hidden.clone(), logits.clone()  # the next step may overwrite them
                more_hidden, more_logits = self.run_step(tokens[border:])
                hidden, logits = torch.cat([hidden, more_hidden]), torch.cat([logits, more_logits])
            # A round may write over what a captured step gave.
            self._hidden = hidden if self._lane is None else hidden.clone()
            # Row i chooses the token at position first + 1 + i.
            chosen, logprobs = sampler.choose(logits, first + 1, tokens)
            return Step(chosen, TorchLogits(logits.clone()) if keep_logits else None, logprobs)

    def _round_of(self, tokens: list[int], sampler: Sampler) -> Ran | None:
        """The round that has run these tokens; a plain step runs as one without drafts."""
        ran, self._ran = self._ran, None
        if ran is None and len(tokens) == 1 and self._hidden is not None:
            ran = self._run_round(tokens[0], 0, sampler, self._hidden[:1], "verifying drafts")
        return ran if ran is not None and ran.answers(tokens, self.length, sampler) else None

    def _run_round(self, newest: int, k: int, sampler: Sampler, hidden: Tensor, what: str) -> Ran | None:
        """As ``Lane.run``; None, too, where no rounds run."""
        if self._lane is None:
            return None
        with self._failing(what):
            return self._lane.run(newest, k, sampler, hidden)

    def _go_another_way(self) -> None:
        """What has been run for tokens that may still come is not used."""
        self._ran = None
        if self._lane is not None:
            self._lane.forget()

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        parked, self._parked = self._parked, None
        if parked is not None:
            with self._computing("going back to kept tokens"):
                self.cache = self.target.open_cache()
                self.cache.restore(parked)
            self._lane = None if self._rounds is None else Lane(self._rounds, self.cache)
        self.cache.go_back(length)

    def reusable(self, length: int) -> int:
        """All of it, where sliding layers can go back so far; with fixed steps, as many as were run in full chunks."""
        if not self._sound:
            return 0
        if self.target.fixed:
            length -= length % self._chunk
        return length if (self._parked or self.cache).reaches(length) else 0

    @property
    def held_bytes(self) -> int:
        """Size of the KV."""
        return (self._parked or self.cache).num_bytes

    def accept_by_chance(self, chance: float) -> bool:
        """In the rounds that run on a GPU."""
        if self._lane is None:
            return False
        self._lane.chance = chance
        return True

    def part_seconds(self) -> tuple[float, float, float] | None:
        """Of the rounds that run on a GPU; the drafts' choices are part of drafting."""
        if self._lane is None:
            return None
        drafting, verifying, choosing = self._lane.seconds = self._lane.seconds or [0.0] * 3
        return drafting, verifying, choosing

    def park(self) -> None:
        """Where steps are captured, copy the KV, so that the buffers, and what was captured over them, serve others."""
        if self.target.captures:
            with self._computing("keeping the KV of a prompt"):
                self._parked = self.cache.saved()
            self._give_back()

    def run_prompt(self, tokens: list[int], *, last: bool = True) -> Tensor:
        """Run a chunk of the prompt after the stored tokens.

        Returns:
            Final-normed hidden rows (rows, hidden_size) of its last tokens: of the last chunk at least as many as a
            step has.
        """
        target, cache = self.target, self.cache
        cache.wrote(cache.length + len(tokens))
        kept = min(target.step_rows, len(tokens)) if last else 0
        cache.begin_prompt(len(tokens), target.device, kept=kept, records=target.runs_rounds)
        run = torch.tensor([target.run_as.get(token, token) for token in tokens], device=target.device)
        hidden = target.network.run(run, cache)
        cache.length += len(tokens)
        return hidden

    def run_step(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Run at most ``step_rows`` tokens after the stored ones.

        Returns:
            Final-normed hidden rows (tokens, hidden_size) and logits (tokens, vocab). A captured step overwrites them
            when it runs again.
        """
        target, cache, count, first = self.target, self.cache, len(tokens), self.cache.length
        run = [target.run_as.get(token, token) for token in tokens]
        if not (target.fixed or target.captures):
            cache.wrote(first + count)
            inputs = torch.tensor([run, [*range(first, first + count)]], device=target.device)
            token_ids, positions = inputs.unbind()
            # A row alone sees all that is stored. Transformers' code would make a mask of its own.
            all_seen = count == 1 and target.network.traceable(1)
            cache.begin_step(positions, first + count, positions, all_seen=all_seen, first=first)
            hidden, logits = target.run_rows(token_ids, cache)
            cache.length += count
            return hidden, logits
        rows = target.step_rows if target.fixed or count > 1 else count
        # Position p always runs in row p % rows: a kernel's order of sums may depend on the row.
        shift = first % rows if target.fixed else 0
        # Row r runs the token with index `order[r]`. The padding rows run copies of the last token: in a mixture they
        # need the same experts as it does.
        order = [(row - shift) % rows for row in range(rows)]
        inputs = torch.tensor(
            [
                [run[min(index, count - 1)] for index in order],
                [first + min(index, count - 1) for index in order],  # positions
                [first + index for index in order],  # slots
                [(shift + index) % rows for index in range(rows)],  # the row of each token
            ],
            device=target.device,
        )
        span = cache.span_at(first + count - 1)
        cache.wrote(first + rows)

        def forward(inputs: Tensor) -> tuple[Tensor, Tensor]:
            token_ids, positions, slots, row_of_token = inputs
            cache.begin_step(positions, span, slots)
            hidden, logits = target.run_rows(token_ids, cache)
            return (hidden[row_of_token], logits[row_of_token]) if target.fixed else (hidden, logits)

        hidden, logits = (cache.captured("step", span, forward, inputs) if target.captures else forward)(inputs)
        cache.length += count
        return hidden[:count], logits[:count]

    def close(self) -> None:
        """Give the buffers back."""
        self._parked = None
        self._give_back()

    def _give_back(self) -> None:
        if hasattr(self, "cache"):
            # First: what another sequence may take up is no longer this one's.
            if self._lane is not None:
                self._lane.close()
            # Buffers in which a forward failed may hold NaN or part of a step.
            if self._sound:
                self.target.give_back(self.cache)
            del self.cache
            self._lane = self._hidden = None

    @contextmanager
    def _computing(self, what: str) -> Iterator[None]:
        """Run the model: one sequence at a time, and never again with a cache in which a forward failed."""
        with self._failing(what), self._lock:
            yield

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            with torch.inference_mode():
                yield
        except BaseException as error:
            self._sound = False
            memory_error = out_of_memory(error, what, "Give a smaller `context_length` or a shorter prompt.")
            if memory_error is not None:
                raise memory_error from error
            raise
