"""The sampler that the core hands to engines: the rule with one generation's settings, seed and history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polydraft.contract.results import TokenLogprobs
from polydraft.errors import EngineError, LogitsProcessorError
from polydraft.sampling._adjustments import Bans, Penalties, wants_penalties
from polydraft.sampling._history import TokenHistory
from polydraft.sampling._host import choose_on_host
from polydraft.sampling._logprobs import token_logprobs
from polydraft.sampling._processors import ProcessorRun
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft.sampling.rule import choose_tokens

if TYPE_CHECKING:
    from polydraft.contract.arrays import ArrayOps
    from polydraft.contract.requests import TokenRequest

__all__ = ["NOT_CHOSEN", "RuleSampler"]

_NUMPY = NumpyOps()
NOT_CHOSEN = 0
"""Stands where nothing was chosen: after a draft that cannot be accepted, where nobody looks."""


class RuleSampler:
    """Implements ``polydraft.contract.Sampler`` for one generation.

    Row i's history is what was accepted before the step, then the run tokens up to its own; drafts see theirs alike.
    What is accepted is learnt from the next step's position, so that rejected drafts leave no trace.

    Args:
        ops: The engine's array operations.
        request: Settings, seed and stream are read, the prompt, and what ends the output.

    Raises:
        InvalidRequestError: The settings' logits processor is refused: see ``processor_kind``.
    """

    def __init__(self, ops: ArrayOps[Any], request: TokenRequest) -> None:
        settings = request.settings
        self._ops = ops
        self._settings = settings
        self._seed = request.seed
        self._stream = request.stream
        prompt = request.prompt_token_ids
        self._forced = {len(prompt) + index: token_id for index, token_id in settings.forced_token_ids.items()}
        self._bans = Bans(
            settings.banned_token_ids,
            request.eos_token_ids | set(settings.stop_token_ids),
            len(prompt) + settings.min_new_tokens,
        )
        penalised = wants_penalties(settings)
        self._penalties = Penalties(settings, len(prompt)) if penalised or settings.logit_bias else None
        self._processor: ProcessorRun | None = None
        if settings.logits_processor is not None:
            self._processor = ProcessorRun(ops, settings.logits_processor, len(prompt), self._forced)
        self._history: TokenHistory | None = None
        if penalised or self._processor is not None:
            self._history = TokenHistory(prompt, self._penalties.changed if self._penalties and penalised else None)

    @property
    def needs_prefix(self) -> bool:
        """Whether a penalty or a processor looks at earlier tokens."""
        return self._history is not None

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """See ``polydraft.contract.Sampler.choose``."""
        if self._processor is None:
            ops, entered = self._entered(logits)
            block = self._adjusted(ops, entered, first_position, self._begin(first_position, run_token_ids))
            token_ids: list[int] = ops.tolist(self._choose(block, first_position, ops))
            for position in self._forced.keys() & range(first_position, first_position + len(token_ids)):
                token_ids[position - first_position] = self._forced[position]
        else:
            token_ids = self._choose_rows(self._processor, logits, first_position, run_token_ids)
        if self._settings.logprobs is None or not keep_logprobs:
            return token_ids, None
        return token_ids, token_logprobs(self._ops.numpy(logits), token_ids, self._settings.logprobs)

    def choose_draft(self, logits: Any, position: int, run_token_ids: Sequence[int] | None = None) -> Any:
        """See ``polydraft.contract.Sampler.choose_draft``."""
        forced = self._forced.get(position)
        ops, entered = self._entered(logits)
        draft = None if forced is not None else self._draft(ops, entered, position, run_token_ids)
        if draft is None:
            return self._ops.first_column(self._ops.column([forced or 0], logits))
        chosen = self._choose(draft, position, ops)
        return chosen if ops is self._ops else self._ops.from_numpy(chosen, logits)

    def processed(self, logits: Any, first_position: int, run_token_ids: Sequence[int]) -> Any:
        """The logits as the rule sees them, before temperature and filters.

        A step like ``choose``: arguments are the same, and the same history follows from them. All of the run tokens
        must be part of the output.

        Returns:
            A list with an array (1, vocab) for each row.
        """
        seen = self._begin(first_position, run_token_ids)
        rows = []
        for row in range(len(run_token_ids)):
            one = logits[row : row + 1]
            if self._processor is not None:
                one = self._process(self._processor, one, first_position + row, seen[: row + 1], certain=True)
            else:
                one = self._adjusted(self._ops, one, first_position + row, seen[: row + 1])
            rows.append(one)
        return rows

    def close(self, output: Sequence[int] = ()) -> None:
        """End the generation; ``output``: what was emitted. A stateful processor is free again. May be called twice."""
        if self._processor is not None:
            self._processor.close(output)

    def _entered(self, logits: Any) -> tuple[ArrayOps[Any], Any]:
        """Logits in host memory become numpy's, which is quicker; a processor is given the engine's own arrays."""
        view = self._ops.host_view(logits) if self._processor is None else None
        return (self._ops, logits) if view is None else (_NUMPY, view)

    def _choose(self, logits: Any, position: int, ops: ArrayOps[Any] | None = None) -> Any:
        """A token for each row, in the logits' library; ``ops`` are its operations, by default the engine's."""
        ops = ops or self._ops
        view = ops.host_view(logits)
        if view is None:
            return choose_tokens(ops, logits, self._settings, self._seed, self._stream, position)
        return ops.from_numpy(choose_on_host(view, self._settings, self._seed, self._stream, position), logits)

    def _choose_rows(
        self, processor: ProcessorRun, logits: Any, first_position: int, run_token_ids: Sequence[int]
    ) -> list[int]:
        """One row after the other; after a draft that the processor forbids there is nothing to choose."""
        seen = self._begin(first_position, run_token_ids)
        token_ids: list[int] = []
        for row in range(len(run_token_ids)):
            position = first_position + row
            if position in self._forced:
                token_ids.append(self._forced[position])
                continue
            certain = list(run_token_ids[1 : row + 1]) == token_ids
            one = self._process(processor, logits[row : row + 1], position, seen[: row + 1], certain=certain)
            if one is None:
                return token_ids + [NOT_CHOSEN] * (len(run_token_ids) - row)
            token_ids += self._ops.tolist(self._choose(one, position))
        return token_ids

    def _begin(self, first_position: int, run_token_ids: Sequence[int]) -> Sequence[int]:
        """Begin a step of the target: settle what it builds upon. Returns the run tokens, if rows depend on them."""
        if self._history is None:
            return ()
        self._history.commit(first_position - 1)
        self._history.ran(run_token_ids)
        return run_token_ids

    def _draft(self, ops: ArrayOps[Any], logits: Any, position: int, run_token_ids: Sequence[int] | None) -> Any | None:
        """A drafter's changed logits; None after tokens that the processor forbids."""
        if self._history is None:
            return self._adjusted(ops, logits, position, ())
        if not run_token_ids:
            raise EngineError(
                "The engine drafts without saying after which tokens, though the settings depend on them.",
                "This is a defect of the backend; report it to its authors: see Sampler.needs_prefix.",
            )
        self._history.commit(position - len(run_token_ids))
        if self._processor is not None:
            return self._process(self._processor, logits, position, run_token_ids, certain=False)
        return self._adjusted(ops, logits, position, run_token_ids)

    def _adjusted(self, ops: ArrayOps[Any], logits: Any, first_position: int, run_token_ids: Sequence[int]) -> Any:
        """With biases, penalties and bans."""
        return self._bans.apply(ops, self._penalised(ops, logits, run_token_ids), first_position)

    def _process(
        self, processor: ProcessorRun, logits: Any, position: int, run_token_ids: Sequence[int], *, certain: bool
    ) -> Any | None:
        """One row with biases, penalties, the processor and bans."""
        assert self._history is not None
        penalised = self._ops.float32(self._penalised(self._ops, logits, run_token_ids))
        processed = processor.apply(penalised, self._history.tokens, run_token_ids, certain=certain)
        if processed is None:
            return None
        allowed = self._bans.apply(self._ops, processed, position)
        if allowed is not processed and self._ops.tolist(self._ops.row_max(allowed))[0][0] == -math.inf:
            if not certain:
                return None
            raise LogitsProcessorError(
                f"The logits processor leaves only tokens for position {position} that are banned there.",
                "See banned_token_ids; min_new_tokens forbids what would end the output.",
            )
        return allowed

    def _penalised(self, ops: ArrayOps[Any], logits: Any, run_token_ids: Sequence[int]) -> Any:
        if self._penalties is None:
            return logits
        committed = len(self._history.tokens) if self._history is not None else 0
        return self._penalties.apply(ops, ops.float32(logits), committed, run_token_ids)
