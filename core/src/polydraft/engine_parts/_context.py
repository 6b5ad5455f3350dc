"""The context length of a model that is being loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.checkpoints.config import text_config
from polydraft.errors import ContextLengthError

if TYPE_CHECKING:
    from polydraft.contract.requests import LoadRequest

__all__ = ["check_context_length", "context_length"]

_USUAL = 4096
"""Context length if neither the caller nor the config gives one."""


def context_length(request: LoadRequest, *, longest: int | None = None, usual: int | None = None) -> int:
    """Context length in tokens, prompt and output together: the caller's, else the model's own up to ``usual``.

    Args:
        request: What is being loaded.
        longest: The model's own context length; None: ``max_position_embeddings`` of its config, if it has it.
        usual: Upper limit unless the caller asks for more; None: no limit.

    Raises:
        ContextLengthError: The caller asked for more than the model's own. For configs with
            ``max_position_embeddings``, the core has already checked this before any download.
    """
    longest = longest or _longest(request)
    check_context_length(request, longest)
    if request.context_length is not None:
        return request.context_length
    # Either limit may be missing; 4096 if both are.
    return min(longest or usual or _USUAL, usual or longest or _USUAL)


def check_context_length(request: LoadRequest, longest: int | None = None) -> None:
    """Refuse a context that is longer than the model's own.

    Raises:
        ContextLengthError: ``request.context_length`` exceeds ``longest``, or the config's number if that is None.
    """
    longest = longest or _longest(request)
    if longest is not None and (request.context_length or 0) > longest:
        raise ContextLengthError(
            f"`context_length={request.context_length}` is too long: the context of {request.target.id} is {longest} "
            "tokens.",
            f"Give `context_length={longest}` or less.",
            argument="context_length",
        )


def _longest(request: LoadRequest) -> int | None:
    found = text_config(request.target.config).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None
