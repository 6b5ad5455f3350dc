"""Structured output: the one place where ``response_format`` and forced tool calls become arguments of ``generate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polydraft_server.problems import ApiError

__all__ = ["guided_arguments"]


def guided_arguments(response_format: Mapping[str, Any] | None, *, forced_tool: bool) -> dict[str, Any]:
    """Arguments of ``Session.generate`` that force the output into a shape.

    Args:
        response_format: The request's; None and ``{"type": "text"}`` force nothing.
        forced_tool: Whether ``tool_choice`` forces a call.

    Raises:
        ApiError: The request forces a shape: there is no structured output yet.
    """
    if response_format is not None and response_format.get("type") != "text":
        raise _refused("`response_format`", "response_format")
    if forced_tool:
        raise _refused("A `tool_choice` that forces a call", "tool_choice")
    return {}


def _refused(what: str, field: str) -> ApiError:
    return ApiError.of(
        400,
        f"{what} needs structured output, which this server does not have yet.",
        "Leave it out, and describe the shape in the prompt.",
        code="unsupported",
        param=field,
    )
