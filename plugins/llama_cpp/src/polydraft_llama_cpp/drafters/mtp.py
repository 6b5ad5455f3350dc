"""Gemma 4's MTP drafter ("assistant"): a second context that attends to the target's memory and stores nothing.

The protocol is that of llama.cpp's ``common/speculative.cpp`` (draft-mtp). To draft after the newest token x at
position p, run a batch of one token that carries both x and h, the target's hidden row at position p-1 after the final
norm. Each step gives logits and the h of the next step; all steps of a round run at position p.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from polydraft.contract import Sampler
from polydraft.errors import EngineError

from polydraft_llama_cpp.bindings import extension
from polydraft_llama_cpp.context import Context, ContextSettings
from polydraft_llama_cpp.model import Model

__all__ = ["MtpDrafter"]


class MtpDrafter:
    """A loaded assistant on one target's context, which was created with ``keeps_hidden`` and the same settings.

    Raises:
        EngineError: The contexts do not share their memory.
    """

    def __init__(self, model: Model, target: Context, settings: ContextSettings) -> None:
        vocab_size = target.model.vocab_size
        self._context = Context(model, settings, shared=target, keeps_hidden=True, vocab_size=vocab_size)
        if extension().llama_get_ctx_other(self._context.pointer) != target.pointer:
            self._context.free()
            raise EngineError(
                "llama.cpp created a drafter that does not share the target's memory.", "Use `drafter='ngram'`."
            )

    def propose(
        self,
        hidden: npt.NDArray[np.float32],
        newest: int,
        position: int,
        k: int,
        sampler: Sampler,
        *,
        keep_logits: bool,
    ) -> tuple[list[int], list[npt.NDArray[np.float32]]]:
        """Draft k tokens after ``newest``, which has ``position``.

        Args:
            hidden: The target's hidden row of the token before ``newest``, float32, shape (hidden_size,).
            newest: The newest token.
            position: Its absolute position.
            k: At least 1.
            sampler: Chooses the drafts.
            keep_logits: Whether to return logits.

        Returns:
            The k drafts, and their logits: k rows, float32, shape (vocab,); no rows without ``keep_logits``.
        """
        context, drafts, kept = self._context, [newest], []
        row: Any = hidden
        for step in range(k):
            context.input_row[:] = row
            # All k steps have the newest token's position: the drafter stores no KV, and sees the target's before it.
            context.decode(drafts[-1:], position, all_rows=True)
            logits = context.logits(1)
            if keep_logits:
                kept.append(logits[0].copy())
            known = drafts if sampler.needs_prefix else None
            drafts.append(int(sampler.choose_draft(logits, position + 1 + step, known)[0]))
            # A view; copied into ``input_row`` before the next forward overwrites it.
            row = context.hidden(1)[0]
        return drafts[1:], kept

    def free(self) -> None:
        """Free the context, before the target's."""
        self._context.free()
