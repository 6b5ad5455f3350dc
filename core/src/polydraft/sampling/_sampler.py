"""The sampler that the core hands to engines: the rule with one generation's settings, seed and history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from polydraft.contract.results import TokenLogprobs
from polydraft.errors import EngineError, LogitsProcessorError, NonFiniteLogitsError, StructuredOutputError
from polydraft.sampling._adjustments import Bans, Penalties, wants_penalties
from polydraft.sampling._asked import DEFECT, Asked
from polydraft.sampling._grammar import forbid
from polydraft.sampling._history import TokenHistory
from polydraft.sampling._host import choose_on_host
from polydraft.sampling._logprobs import token_logprobs
from polydraft.sampling._processors import ProcessorRun
from polydraft.sampling._soundness import UNSOUND, largest_logits, telling_logits, with_unsound
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft.sampling.rule import choose_tokens

if TYPE_CHECKING:
    from polydraft.contract.arrays import ArrayOps
    from polydraft.contract.requests import GenerationSettings, TokenRequest
    from polydraft.sampling._grammar import GrammarRun

__all__ = ["NOT_CHOSEN", "RuleSampler"]

_NUMPY = NumpyOps()
NOT_CHOSEN = 0
"""Placeholder for rows after the first rejected draft; never read."""


class RuleSampler:
    """Implements ``polydraft.contract.Sampler`` for one generation.

    Row i sees the tokens accepted before the step, then the step's tokens up to its own; drafts likewise. The position
    of the next step shows which drafts were accepted (diagram in ``polydraft.sampling``).

    Args:
        ops: The engine's array operations.
        request: Its prompt, settings, seed, noise stream and end-of-sequence ids are used.
        dtype: That of ``session.running``, for errors.
        vocab_size: Logits must have at least this many columns.
        grammar: What the output must match.

    Raises:
        InvalidRequestError: The logits processor is neither a pure function nor stateful, or is in use.
    """

    def __init__(
        self,
        ops: ArrayOps[Any],
        request: TokenRequest,
        dtype: str = "",
        vocab_size: int = 0,
        grammar: GrammarRun | None = None,
    ) -> None:
        settings = request.settings
        self._grammar = grammar
        self._vocab_size = vocab_size
        self._ops = ops
        self._host_only = type(ops) is NumpyOps  # what stands in for an engine without operations of its own
        self._dtype = dtype
        self._settings = settings
        self._seed = request.seed
        self._stream = request.stream
        prompt = request.prompt_token_ids
        # Absolute position -> token, as positions are counted everywhere here.
        self.asked: Asked | None = None
        """What the loop has asked the engine to choose for; None: it is not known."""
        self._forced = {len(prompt) + index: token_id for index, token_id in settings.forced_token_ids.items()}
        self._bans: Bans | None = None
        if settings.banned_token_ids or settings.min_new_tokens:
            # Without stop strings: which token completes one is not known before it is chosen.
            ends = request.eos_token_ids | set(settings.stop_token_ids)
            self._bans = Bans(settings.banned_token_ids, ends, len(prompt) + settings.min_new_tokens)
        penalised = wants_penalties(settings)
        self._penalties = Penalties(settings, len(prompt)) if penalised or settings.logit_bias else None
        self._processor: ProcessorRun | None = None
        if settings.logits_processor is not None:
            self._processor = ProcessorRun(ops, settings.logits_processor, len(prompt), self._forced)
        self._history: TokenHistory | None = None
        # Position -> of a draft of this round, the number that tells whether its row is sound: a float, or an array
        # (1,) on the device, read only where the target rejects the draft.
        self._drafted_from: dict[int, Any] = {}
        # Biases alone look at no earlier token, and need no history.
        if penalised or self._processor is not None or grammar is not None:
            self._history = TokenHistory(prompt, self._penalties.changed if self._penalties and penalised else None)

    @property
    def needs_prefix(self) -> bool:
        """Whether a penalty, a processor or a grammar looks at earlier tokens."""
        return self._history is not None

    def forced_drafts(self, position: int, newest: int, most: int) -> list[int]:
        """Drafts that no drafter is needed for, after the newest token at a position: what the grammar forces."""
        if self._grammar is None or self._history is None:
            return []
        self._history.commit(position)
        return self._grammar.forced(self._history.tokens, newest, most)

    def allowed_drafts(self, position: int, newest: int, draft: list[int]) -> list[int]:
        """A draft that was not chosen by ``choose_draft``, up to the first token that the grammar forbids."""
        if self._grammar is None or self._history is None or not draft:
            return draft
        self._history.commit(position)
        return self._grammar.allowed(self._history.tokens, newest, draft)

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """The target's tokens, one per row of ``logits`` (rows, vocab); row 0 chooses for ``first_position``.

        Of several rows, ``UNSOUND`` for one from which no token can be chosen: if the loop gets there, it runs the
        newest token alone. ``NOT_CHOSEN`` for rows after a draft that the grammar or the processor forbids.

        Raises:
            NonFiniteLogitsError: The only row is such a row; or the step rejects a draft that was chosen from one.
            StructuredOutputError: The grammar and the other settings leave no token.
            EngineError: The engine gave logits of another shape.
        """
        run_token_ids = self._checked_rows(logits, first_position, run_token_ids)
        self._start_step(first_position, run_token_ids)
        ops, rows = self._on_host(logits)
        if self._grammar is not None and self._processor is None:
            token_ids = self._choose_matching(ops, rows, first_position, run_token_ids)
        elif self._processor is not None:
            largest = ops.tolist(largest_logits(ops, rows))
            token_ids = self._choose_rows(self._processor, logits, largest, first_position, run_token_ids)
        else:
            adjusted = self._adjusted(ops, rows, first_position, run_token_ids)
            chosen = self._pick(ops, adjusted, first_position)
            token_ids = with_unsound(ops, self._telling(ops, rows, adjusted, chosen), chosen)
            # Last, since a forced token overrules logits and filters.
            for position in self._forced.keys() & range(first_position, first_position + len(token_ids)):
                if token_ids[position - first_position] != UNSOUND:
                    token_ids[position - first_position] = self._forced[position]
        self._check_step(ops, rows, token_ids, first_position, run_token_ids)
        if self._settings.logprobs is None or not keep_logprobs:
            return token_ids, None
        return token_ids, token_logprobs(self._ops.numpy(logits), token_ids, self._settings.logprobs)

    def choose_draft(self, logits: Any, position: int, run_token_ids: Sequence[int] | None = None) -> Any:
        """A draft for ``position``, from logits (1, vocab): shape (1,), in the logits' library and on their device."""
        changed = self._draft_logits(logits, position, run_token_ids)
        if changed is None:
            return self._constant(self._forced.get(position, NOT_CHOSEN), logits)
        ops, raw, row = changed
        chosen = self._pick(ops, row, position)
        self._remember(ops, self._telling(ops, raw, row, chosen), position)
        # A draft chosen in numpy goes back into the engine's library, which feeds it to the drafter.
        return chosen if ops is self._ops else self._ops.from_numpy(chosen, logits)

    @property
    def settings_and_noise(self) -> tuple[GenerationSettings, int, int]:
        """The generation's settings, and the noise's seed and stream."""
        return self._settings, self._seed, self._stream

    def chooses_on_device(self, first_position: int) -> bool:
        """Whether, from a position on, tokens are chosen by the rule alone: ``sampling.on_device`` says what for."""
        settings = self._settings
        return (
            # A sampler of another kind decides in its own way.
            type(self) is RuleSampler
            and not self._host_only
            and self._history is None
            and self._penalties is None
            and settings.logprobs is None
            and settings.typical_p == 1.0
            and all(position < first_position for position in self._forced)
            and (self._bans is None or self._bans.end_before(first_position))
        )

    def count_drafts(self, first_position: int, largest: Sequence[float]) -> None:
        """Drafts were chosen on a device, in a row from a position on; ``largest``: of each one's logits."""
        for position, value in enumerate(largest, first_position):
            if self.asked is not None:
                self.asked.check_draft(position, None)
            if not math.isfinite(value):
                self._drafted_from[position] = value

    def count_choices(self, token_ids: list[int], first_position: int, run_token_ids: Sequence[int]) -> None:
        """The target's tokens were chosen on a device: a step of several rows, or of one that is sound.

        Raises:
            NonFiniteLogitsError: It rejects a draft that was chosen from a row that is not sound.
        """
        if self.asked is not None:
            run_token_ids = self.asked.checked(first_position, run_token_ids)
        self._check_drafts(token_ids, first_position, run_token_ids)

    def processed(self, logits: Any, first_position: int, run_token_ids: Sequence[int]) -> Any:
        """The logits after biases, penalties, processor and bans, before temperature and filters.

        Counts as a step, like ``choose``, with the same arguments. All run tokens must be part of the output.

        Returns:
            A list with an array (1, vocab) for each row.

        Raises:
            NonFiniteLogitsError: No token can be chosen from one of them.
        """
        self._start_step(first_position, run_token_ids)
        for row, value in enumerate(self._ops.tolist(largest_logits(self._ops, logits))):
            if not math.isfinite(value):
                raise NonFiniteLogitsError.at(value, first_position + row, self._dtype)
        rows = []
        for row in range(len(run_token_ids)):
            position, run = first_position + row, run_token_ids[: row + 1]
            one = logits[row : row + 1]
            if self._processor is not None:
                one = self._process(self._processor, one, position, run, certain=True)
            else:
                one = self._adjusted(self._ops, one, position, run)
            rows.append(one)
        return rows

    def close(self, output: Sequence[int] = ()) -> None:
        """End the generation and release a stateful processor; ``output``: the emitted tokens. May be called twice."""
        if self._processor is not None:
            self._processor.close(output)

    def _checked_rows(self, logits: Any, first_position: int, run_token_ids: Sequence[int]) -> Sequence[int]:
        """The run tokens; refuse others than were asked for, and logits of another shape than (run tokens, vocab).

        They would be chosen from in silence.
        """
        if self.asked is not None:
            run_token_ids = self.asked.checked(first_position, run_token_ids)
        shape: Sequence[int] = getattr(logits, "shape", ())
        rows = len(run_token_ids)
        if len(shape) != 2 or shape[0] != rows or shape[1] < self._vocab_size:
            wanted = f"({rows}, {self._vocab_size or 'vocab'})"
            turned = len(shape) == 2 and shape[1] == rows and shape[0] >= self._vocab_size > 0
            raise EngineError(
                f"The engine gave logits of shape {tuple(shape)} to `sampler.choose` for {rows} "
                f"{'token' if rows == 1 else 'tokens'}: they have one row per token that was run and one column per "
                f"token id, here {wanted}{', so these are transposed' if turned else ''}.",
                DEFECT,
            )
        self._check_library(logits)
        return run_token_ids

    def _check_library(self, logits: Any) -> None:
        """Refuse arrays of another library than the engine's operations are for."""
        if self._host_only and not isinstance(logits, np.ndarray):
            library = type(logits).__module__.partition(".")[0]
            raise EngineError(
                f"The engine gave logits of the type {library}.{type(logits).__name__}, and has no `array_ops`: "
                "without them, logits are numpy arrays.",
                DEFECT,
            )
        if self._host_only and logits.dtype.kind != "f":
            raise EngineError(f"The engine gave logits of the dtype {logits.dtype}: they are floats.", DEFECT)

    def _start_step(self, first_position: int, run_token_ids: Sequence[int]) -> None:
        """Commit the tokens that this step of the target builds on."""
        if self._history is not None:
            # Row 0 ran the token at ``first_position - 1``: what precedes it is part of the output.
            self._history.commit(first_position - 1)
            self._history.ran(run_token_ids)

    def _on_host(self, logits: Any) -> tuple[ArrayOps[Any], Any]:
        """Logits in host memory as numpy arrays, for which choosing is faster; others as they are."""
        view = self._ops.host_view(logits)
        return (self._ops, logits) if view is None else (_NUMPY, view)

    def _telling(self, ops: ArrayOps[Any], raw: Any, adjusted: Any, chosen: Any) -> Any:
        """A number for each row that is finite exactly where the ``raw`` row is sound: an array; of numpy's a list."""
        # Biases and penalties leave NaN and infinities what they are; bans and processors may replace them.
        if ops is _NUMPY and self._bans is None and self._processor is None and self._grammar is None:
            return telling_logits(adjusted, chosen)
        largest = largest_logits(ops, raw)
        return ops.tolist(largest) if ops is _NUMPY else largest

    def _remember(self, ops: ArrayOps[Any], telling: Any, position: int) -> None:
        """Keep whether the row that a draft was chosen from is sound; ``telling`` is that of this one row."""
        if ops is not _NUMPY:
            self._drafted_from[position] = telling  # drafting must not wait for the device
        elif not math.isfinite(telling[0]):
            self._drafted_from[position] = telling[0]

    def _check_step(
        self, ops: ArrayOps[Any], rows: Any, token_ids: list[int], first_position: int, run_token_ids: Sequence[int]
    ) -> None:
        """Raise for a single row, or for the draft that the step rejects, if it is not sound; forget the drafts."""
        if token_ids == [UNSOUND]:
            value = ops.tolist(largest_logits(ops, rows))[0]
            raise NonFiniteLogitsError.at(value, first_position, self._dtype)
        self._check_drafts(token_ids, first_position, run_token_ids)

    def _check_drafts(self, token_ids: list[int], first_position: int, run_token_ids: Sequence[int]) -> None:
        if not self._drafted_from:
            return
        for row, draft in enumerate(run_token_ids[1:]):
            if token_ids[row] != draft:
                # Not if the target's own row is unsound: what the drafter saw of the target was, too.
                if token_ids[row] != UNSOUND:
                    self._check_draft(first_position + row)
                break
        self._drafted_from.clear()

    def _check_draft(self, position: int) -> None:
        telling = self._drafted_from.get(position, 0.0)
        value = telling if isinstance(telling, float) else self._ops.tolist(telling)[0]
        if not math.isfinite(value):
            raise NonFiniteLogitsError.at(value, position, self._dtype, drafter=True)

    def _adjusted(self, ops: ArrayOps[Any], logits: Any, first_position: int, run_token_ids: Sequence[int]) -> Any:
        """Logits (rows, vocab) with biases, penalties and bans; None for one that the grammar does not reach."""
        if self._grammar is not None:
            logits = self._matching(ops, logits, run_token_ids)
            if logits is None:
                return None
        logits = self._penalised(ops, logits, run_token_ids) if self._penalties is not None else logits
        return self._bans.apply(ops, logits, first_position) if self._bans is not None else logits

    def _choose_matching(
        self, ops: ArrayOps[Any], rows: Any, first_position: int, run_token_ids: Sequence[int]
    ) -> list[int]:
        """The choices from the rows (rows, vocab) that the grammar reaches; ``NOT_CHOSEN`` for the others."""
        assert self._grammar is not None
        assert self._history is not None
        count = len(self._grammar.masks(self._history.tokens, run_token_ids))
        reached = rows[:count]
        adjusted = self._adjusted(ops, reached, first_position, run_token_ids[:count])
        chosen = self._pick(ops, adjusted, first_position)
        token_ids = with_unsound(ops, self._telling(ops, reached, adjusted, chosen), chosen)
        best = telling_logits(adjusted, chosen) if ops is _NUMPY else ops.tolist(largest_logits(ops, adjusted))
        for row, value in enumerate(best):
            # A row after a wrong draft is never asked for.
            if token_ids[row] == UNSOUND or list(run_token_ids[1 : row + 1]) != token_ids[:row]:
                break
            if value == -math.inf:
                raise _nothing_left(first_position + row)
        return token_ids + [NOT_CHOSEN] * (len(run_token_ids) - count)

    def _check_left(self, ops: ArrayOps[Any], row: Any, position: int) -> None:
        """Raise if a row (1, vocab) that the grammar has masked has no token left."""
        if self._grammar is not None and ops.tolist(largest_logits(ops, row))[0] == -math.inf:
            raise _nothing_left(position)

    def _matching(self, ops: ArrayOps[Any], logits: Any, run_token_ids: Sequence[int]) -> Any | None:
        """Logits (rows, vocab) masked by the grammar: of all run tokens, or one row, which follows all of them.

        None if it does not reach that row.
        """
        assert self._grammar is not None
        assert self._history is not None
        masks = self._grammar.masks(self._history.tokens, run_token_ids)
        if len(masks) < len(run_token_ids):
            return None
        return forbid(ops, logits, masks[-logits.shape[0] :])

    def _pick(self, ops: ArrayOps[Any], logits: Any, position: int) -> Any:
        """A token for each row (rows, vocab) by the rule, in the library of ``ops``: int64, shape (rows,)."""
        if self._settings.temperature == 0.0:
            return ops.argmax(logits)  # of equal ones the first: the lowest id
        choose = choose_on_host if ops is _NUMPY else partial(choose_tokens, ops)
        return choose(logits, self._settings, self._seed, self._stream, position)

    def _pick_one(self, logits: Any, position: int) -> int:
        """The token for one row (1, vocab) of the engine's library."""
        ops, row = self._on_host(logits)
        return int(ops.tolist(self._pick(ops, row, position))[0])

    def _draft_logits(
        self, logits: Any, position: int, run_token_ids: Sequence[int] | None
    ) -> tuple[ArrayOps[Any], Any, Any] | None:
        """A drafter's logits (1, vocab), raw and after all settings but temperature and filters, and the operations.

        None if no draft is chosen: the token is forced, or follows tokens that the processor or the grammar forbids.
        """
        shape: Sequence[int] = getattr(logits, "shape", ())
        if len(shape) != 2 or shape[0] != 1:
            raise EngineError(
                f"The engine gave logits of shape {tuple(shape)} to `sampler.choose_draft`: it takes one row, of shape "
                "(1, vocab).",
                DEFECT,
            )
        self._check_library(logits)
        if self.asked is not None:
            self.asked.check_draft(position, run_token_ids if self._history is not None else None)
        if position in self._forced:
            return None
        run = self._known_prefix(position, run_token_ids) if self._history is not None else ()
        ops, row = self._on_host(logits)
        if self._processor is not None:
            value = ops.tolist(largest_logits(ops, row))[0]
            if not math.isfinite(value):  # not for the processor
                self._drafted_from[position] = value
                return None
            processed = self._process(self._processor, logits, position, run, certain=False)
            if processed is None:
                return None
            ops, processed = self._on_host(processed)
            return ops, row, processed
        adjusted = self._adjusted(ops, row, position, run)
        return None if adjusted is None else (ops, row, adjusted)

    def _known_prefix(self, position: int, run_token_ids: Sequence[int] | None) -> Sequence[int]:
        """The newest token and the drafts before ``position``; what precedes them is committed."""
        if not run_token_ids or self._history is None:
            raise EngineError(
                "The engine drafts without saying after which tokens, though the settings depend on them.",
                f"{DEFECT} (`Sampler.needs_prefix`)",
            )
        self._history.commit(position - len(run_token_ids))
        return run_token_ids

    def _constant(self, token_id: int, like: Any) -> Any:
        """One token id in the engine's library, on the device of ``like``: shape (1,)."""
        return self._ops.first_column(self._ops.column([token_id], like))

    def _choose_rows(
        self,
        processor: ProcessorRun,
        logits: Any,
        largest: Sequence[float],
        first_position: int,
        run_token_ids: Sequence[int],
    ) -> list[int]:
        """Choose row by row; ``NOT_CHOSEN`` after a draft that the processor forbids, or after an ``UNSOUND`` row."""
        token_ids: list[int] = []
        for row in range(len(run_token_ids)):
            position = first_position + row
            if not math.isfinite(largest[row]):
                return [*token_ids, UNSOUND] + [NOT_CHOSEN] * (len(run_token_ids) - row - 1)
            if position in self._forced:
                token_ids.append(self._forced[position])
                continue
            # Whether every draft before this row equals the choice of the row that it followed.
            certain = list(run_token_ids[1 : row + 1]) == token_ids
            one = self._process(processor, logits[row : row + 1], position, run_token_ids[: row + 1], certain=certain)
            if one is None:
                return token_ids + [NOT_CHOSEN] * (len(run_token_ids) - row)
            token_ids.append(self._pick_one(one, position))
        return token_ids

    def _process(
        self, processor: ProcessorRun, logits: Any, position: int, run_token_ids: Sequence[int], *, certain: bool
    ) -> Any | None:
        """One row (1, vocab) with biases, penalties, the processor and bans, in the engine's library.

        None if the grammar, the processor or the bans leave no token after drafts that may be wrong (``certain`` is
        False).
        """
        assert self._history is not None
        if self._grammar is not None:
            logits = self._matching(self._ops, logits, run_token_ids)
            if logits is None:
                return None
        penalised = self._ops.float32(self._penalised(self._ops, logits, run_token_ids))
        processed = processor.apply(penalised, self._history.tokens, run_token_ids, certain=certain)
        if processed is not None and self._grammar is not None:
            # Again: the processor may have raised the logit of a token that it was shown as forbidden.
            processed = self._matching(self._ops, processed, run_token_ids)
            if certain:
                self._check_left(self._ops, processed, position)
        if processed is None or self._bans is None:
            return processed
        # After the processor, which could otherwise raise the logit of a banned token again.
        allowed = self._bans.apply(self._ops, processed, position)
        if allowed is not processed and self._ops.tolist(self._ops.row_max(allowed))[0][0] == -math.inf:
            if not certain:
                return None
            raise LogitsProcessorError(
                f"The logits processor leaves only tokens for position {position} that are banned there.",
                "Ban fewer tokens; until `min_new_tokens` is reached, those that end the output are suppressed as "
                "well.",
            )
        return allowed

    def _penalised(self, ops: ArrayOps[Any], logits: Any, run_token_ids: Sequence[int]) -> Any:
        if self._penalties is None:
            return logits
        if self._history is None:  # biases alone
            return self._penalties.apply(ops, ops.float32(logits), 0, ())
        return self._penalties.apply(ops, ops.float32(logits), len(self._history.tokens), run_token_ids)


def _nothing_left(position: int) -> StructuredOutputError:
    return StructuredOutputError(
        f"No token is left for position {position}: those that `guided` allows there are forbidden by another setting, "
        "or by the model itself.",
        "Leave out `banned_token_ids`, `min_new_tokens` or the logits processor, whichever forbids them.",
    )
