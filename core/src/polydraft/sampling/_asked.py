"""What a sampler has been asked to choose for, so that an engine that passes other ids or positions is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DEFECT", "Asked"]

DEFECT = "This is a defect of the backend; report it to its authors."
"""What to do about an engine that breaks the contract."""


class Asked:
    """The call of the engine's that is under way; each method raises an ``EngineError`` that names the broken rule."""

    def __init__(self) -> None:
        self._method = ""
        self._first = 0  # position that the first row chooses, and the first draft has
        self._chooses: int | None = None  # the same; None while drafting
        self._run: list[int] = []
        self._drafts_to = 0  # the next position that may be drafted

    def ask(self, method: str, first_position: int, token_ids: list[int]) -> None:
        """Before a call of the engine's: what it has to choose for."""
        self._method, self._run = method, token_ids
        self._first = self._drafts_to = first_position
        self._chooses = None if method == "propose" else first_position

    def checked(self, first_position: int, run_token_ids: Sequence[int]) -> list[int]:
        """The ids that ``choose`` was given, if they and the position are those that were asked for."""
        # Not only ``!=``: that of an array is an array.
        if first_position != self._chooses or type(run_token_ids) is not list or run_token_ids != self._run:
            self._check_choice(first_position, run_token_ids)
        return self._run

    def check_draft(self, position: int, run_token_ids: Sequence[int] | None) -> None:
        """Positions of drafts follow the newest token's, one after the other; ``run_token_ids``: None if not read."""
        if not self._first <= position <= self._drafts_to:
            raise EngineError(
                f"`choose_draft` was given the position {position}: the first draft of this round has the position "
                f"{self._first}, `length` + 1, and each further one the next.",
                DEFECT,
            )
        if position == self._drafts_to:
            self._drafts_to = position + 1
        if run_token_ids is not None:
            wanted = position - self._first + 1
            if len(run_token_ids) != wanted or run_token_ids[0] != self._run[0]:
                raise EngineError(
                    f"`choose_draft` for draft {wanted} of a round was given the ids {_ids(run_token_ids)}: "
                    f"`run_token_ids` are the newest token, {self._run[0]}, and the drafts of the round so far, "
                    f"{wanted} in all.",
                    DEFECT,
                )

    def _check_choice(self, first_position: Any, run_token_ids: Any) -> None:
        """Raise unless ids of another type than a list are equal all the same."""
        asked, method = self._run, self._method
        if method == "propose":
            raise EngineError(
                "propose called `choose`, which chooses the target's tokens: drafts are for `choose_draft`.", DEFECT
            )
        given = _ids(run_token_ids)
        if given != asked and method == "verify":
            raise EngineError(
                f"verify was given the ids {asked} but chose for {given}: `run_token_ids` of `sampler.choose` are the "
                "ids of all rows, the newest token and every draft, not the last one alone.",
                DEFECT,
            )
        if given != asked:
            raise EngineError(
                f"prefill chose for {len(given)} ids: it chooses one token, from the row of the prompt's last id: "
                "`sampler.choose(logits[-1:], len(token_ids), token_ids[-1:])`, with logits of shape (rows, vocab).",
                DEFECT,
            )
        if first_position != self._first:
            after = "`length` before the step, plus 1" if method == "verify" else "the number of the prompt's ids"
            raise EngineError(
                f"{method} chose from position {first_position} on, not {self._first}: `first_position` of "
                f"`sampler.choose` is one past the position of the id that row 0 ran ({after}).",
                DEFECT,
            )


def _ids(given: Any) -> list[Any]:
    """Ids of any integer type, as Python's where they are."""
    try:
        return [int(token_id) for token_id in given]
    except (TypeError, ValueError):
        return [given]
