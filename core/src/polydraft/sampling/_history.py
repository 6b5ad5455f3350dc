"""The tokens before each row, derived from what engines run: no call reports which drafts were accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from polydraft.errors import EngineError

__all__ = ["TokenHistory"]

Watcher = Callable[[int, int, int], None]


class TokenHistory:
    """The committed tokens of one sequence: prompt, and output up to the newest step.

    A step runs tokens at the positions before those that it chooses for. The first position of the next step shows how
    many of them were kept. So a token is committed only once a later step builds on it; a rejected draft never is.

    Args:
        prompt: The prompt's tokens.
        changed: Called with (position, token id, +1 or -1) for each token that is committed, and for each that is taken
            back; for the prompt's tokens at once.
    """

    def __init__(self, prompt: Sequence[int], changed: Watcher | None = None) -> None:
        self.prompt_length = len(prompt)
        self.tokens: list[int] = []
        self._pending: list[int] = []  # run by the newest step, after the committed ones
        self._changed = changed
        self._extend(prompt)

    def commit(self, length: int) -> None:
        """Commit exactly the first ``length`` tokens.

        Raises:
            EngineError: Some of them were never run.
        """
        missing = length - len(self.tokens)
        if missing > len(self._pending):
            raise EngineError(
                f"The engine asked for the token at position {length + 1} before running the tokens that precede it.",
                "This is a defect of the backend; report it to its authors.",
            )
        # Drafts are accepted from the front: the rest of ``_pending`` was rejected, and ``ran`` replaces it.
        if missing > 0:
            self._extend(self._pending[:missing])
            del self._pending[:missing]
        elif missing < 0:
            for position in range(len(self.tokens) - 1, length - 1, -1):
                token_id = self.tokens.pop()
                if self._changed is not None:
                    self._changed(position, token_id, -1)

    def ran(self, token_ids: Sequence[int]) -> None:
        """Record the tokens run after the committed ones; the next step's position shows how many are kept."""
        self._pending = list(token_ids)

    def _extend(self, token_ids: Sequence[int]) -> None:
        for position, token_id in enumerate(token_ids, len(self.tokens)):
            self.tokens.append(token_id)
            if self._changed is not None:
                self._changed(position, token_id, 1)
