"""A user's logits processor: what changes the logits of a position before its token is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

__all__ = ["LogitsProcessor", "StatefulLogitsProcessor"]

LogitsProcessor = Callable[[Sequence[int], Any], Any]
"""A pure function ``(prefix_ids, logits) -> logits``.

``prefix_ids``: all tokens before the position, the prompt's first (for a drafted position the drafts before it, too).
``logits``: float32, shape (vocab,), an array of the engine's own library on its own device; a copy, which may be
changed in place. Returned: an array of the same library and shape; ``-inf`` forbids a token, NaN and ``+inf`` are
errors.

Pure: what it returns depends on its arguments alone. It is called for drafted tokens that are then rejected, and once
or several times for one position.
"""


@runtime_checkable
class StatefulLogitsProcessor(Protocol):
    """A logits processor with a state, such as a grammar's matcher.

    The state follows the output: it stands for the output tokens that were accepted and not rolled back (the prompt is
    not among them). A session moves it along drafts and back, and leaves it at the tokens that were emitted. One
    generation uses it at a time.

    ``reset()``, if there is one, is called before a generation. Without it the session rolls the state back to where it
    was once the generation has ended.
    """

    def __call__(self, prefix_ids: Sequence[int], logits: Any) -> Any:
        """The logits of the position after the accepted tokens; arguments and result as for ``LogitsProcessor``."""
        ...

    def accept(self, token_id: int) -> Any:
        """One more token of the output, perhaps a draft.

        The call before left its logit above ``-inf``, or the setting ``forced_token_ids`` put it there.
        """
        ...

    def rollback(self, num_tokens: int) -> Any:
        """Forget the last ``num_tokens`` accepted tokens: exactly the state before them."""
        ...
