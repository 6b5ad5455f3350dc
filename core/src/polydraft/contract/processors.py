"""Logits processors: user code that changes the logits of a position before its token is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

__all__ = ["LogitsProcessor", "StatefulLogitsProcessor"]

LogitsProcessor = Callable[[Sequence[int], Any], Any]
"""A pure function ``(prefix_ids, logits) -> logits``.

``prefix_ids``: all tokens before the position: the prompt, the output, and for a drafted position the drafts before it.
``logits``: float32, shape (vocab,), an array of the engine's own library on its own device; a copy, which may be
changed in place. Returns an array of the same library and shape; ``-inf`` forbids a token, NaN and ``+inf`` are errors.

Pure: the result depends on the arguments alone. The function is also called after drafts that are later rejected, and
may be called several times for one position.
"""


@runtime_checkable
class StatefulLogitsProcessor(Protocol):
    """A logits processor with a state, such as a grammar's matcher.

    The state reflects the output tokens that were accepted and not rolled back, without the prompt. A session advances
    it along drafts, rolls it back, and leaves it at the emitted tokens. Only one generation may use it at a time.

    ``reset()``, if defined, is called before each generation. Without it, the session rolls all tokens back when the
    generation has ended.
    """

    def __call__(self, prefix_ids: Sequence[int], logits: Any) -> Any:
        """The logits of the position after the accepted tokens; arguments and result as for ``LogitsProcessor``."""

    def accept(self, token_id: int) -> Any:
        """Advance by one output token, which may be a draft.

        The call before left its logit above ``-inf``, or the setting ``forced_token_ids`` forces it.
        """

    def rollback(self, num_tokens: int) -> Any:
        """Forget the last ``num_tokens`` accepted tokens: restore exactly the state before them."""
