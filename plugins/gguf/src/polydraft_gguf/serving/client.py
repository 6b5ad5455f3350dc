"""The HTTP client of llama.cpp's server: its errors, and completions as streams of events."""

from __future__ import annotations

import http
from collections.abc import Callable, Generator
from typing import Any

from polydraft.engine_parts.http_client import HttpClient, Patience
from polydraft.errors import ContextLengthError, EngineError, InvalidRequestError, PolydraftError

__all__ = ["Client"]


class Client(HttpClient):
    """A client of one server; arguments are those of ``HttpClient``."""

    def complete(
        self, body: dict[str, Any], cancelled: Callable[[], bool], patience: Patience
    ) -> Generator[dict[str, Any]]:
        """The events of a streamed completion, one per token, until the server says that it ends.

        ``patience`` is that of the whole generation. Close the generator to end it before. Errors are those of
        ``HttpClient.stream``.
        """
        with self.stream(
            "/completion",
            {**body, "stream": True},
            num_tokens=body["n_predict"],
            num_prompt_tokens=len(body["prompt"]),
            cancelled=cancelled,
            patience=patience,
        ) as events:
            for event in events:
                yield event
                if event.get("stop"):
                    return
        if not cancelled():
            raise EngineError(f"{self.name} ended an answer before it was complete.", "Look at the server's log.")

    def refusal(self, status: int, said: str, kind: str) -> PolydraftError:
        """The error for an answer with this status."""
        if kind == "exceed_context_size_error":
            return ContextLengthError(f"{self.name}: {said}", "Load it with a larger `context_length`.")
        if status == http.HTTPStatus.BAD_REQUEST and "failed to parse grammar" in said:
            return InvalidRequestError(
                f"The grammar in `guided`, or what is made of it, cannot be read by {self.name}: {said}",
                "Correct it: each name needs its rule, no rule may begin with itself, and repetitions have a limit.",
                argument="guided",
            )
        return super().refusal(status, said, kind)
