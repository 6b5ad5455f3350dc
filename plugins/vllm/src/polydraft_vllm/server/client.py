"""The client of a vLLM server: completions as streams of events, and what else its endpoints say."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from polydraft.engine_parts.http_client import EventStream, HttpClient, NotConnectedError
from polydraft.errors import (
    BackendUnavailableError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
    PolydraftError,
)

from polydraft_vllm.server.options import KEY_VARIABLE, VllmServerOptions

__all__ = ["EndedByErrorError", "ServedModel", "ServerClient"]

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>[^}]*)\})?\s+(?P<value>\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_READ = ("vllm:spec_decode", "vllm:request_success", "vllm:num_requests")
_BACKOFF = 0.5
_BUSY_CODES = (408, 429)
"""Request timeout, too many requests."""
_ENDED_BY_ERROR = "Internal server error"
"""What a stream says of a request with the finish reason ``error`` (``GenerationError`` in vllm/exceptions.py)."""


class EndedByErrorError(EngineError):
    """The server ended one request with an error, and works on.

    polydraft's scheduler does so with requests whose logits are not finite; vLLM gives the client no reason.
    """


class ServedModel:
    """A model as the server names it."""

    def __init__(self, data: Mapping[str, Any], shown: Callable[[str], str]) -> None:
        self.id = str(data.get("id", ""))
        self.root = shown(str(data.get("root") or ""))
        self.max_model_len = data.get("max_model_len")
        self.owned_by = str(data.get("owned_by", ""))

    def is_called(self, *names: str) -> bool:
        """Whether one of these is its name or path."""
        own = {self.id, self.root} - {""}
        tails = {name.rstrip("/").rpartition("/")[2].lower() for name in own}
        return any(name in own or name.rstrip("/").rpartition("/")[2].lower() in tails for name in names if name)


class ServerClient(HttpClient):
    """A client that several threads can use. Errors and logs never contain the API key.

    ``own``: the server was started here, and is not reached through a proxy.
    """

    def __init__(self, url: str, options: VllmServerOptions, *, own: bool = False) -> None:
        super().__init__(
            url,
            name="The vLLM server",
            key=options.key(),
            key_variable=KEY_VARIABLE,
            limits=options.limits(),
            own=own,
        )
        self._connect_retries = options.connect_retries

    def version(self) -> str:
        """vLLM's version.

        Raises:
            BackendUnavailableError: Nothing answers, or it is not a vLLM server.
        """
        found = self._described("/version")
        version = found.get("version") if isinstance(found, dict) else None
        if not isinstance(version, str):
            raise self.not_vllm()
        return self.shown(version)

    def models(self) -> list[ServedModel]:
        """The models that it serves. Errors as for ``version``."""
        found = self._described("/v1/models")
        data = found.get("data") if isinstance(found, dict) else None
        entries = data if isinstance(data, list) else ()
        models = [ServedModel(entry, self.shown) for entry in entries if isinstance(entry, dict)]
        if not any(model.owned_by == "vllm" for model in models):
            raise self.not_vllm()
        return models

    def tokenize(self, model: str, text: str) -> list[int] | None:
        """The server's token ids of a text, without special tokens; None if it does not have this endpoint."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        answer = self.json("/tokenize", body, optional=True)
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        return tokens if isinstance(tokens, list) else None

    def metrics(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """The counters of ``/metrics`` that are read here: name -> labels -> value. Empty if the server has none.

        Raises:
            MalformedAnswerError: A value is not a finite number.
        """
        text = (self.get("/metrics", optional=True) or b"").decode(errors="replace")
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for match in _SAMPLE.finditer(text):
            if match["name"].startswith(_READ):
                labels = tuple(sorted(_LABEL.findall(match["labels"] or "")))
                found.setdefault(match["name"], {})[labels] = self._number(match["value"])
        return found

    def complete(self, body: Mapping[str, Any], *, cancelled: Callable[[], bool] | None = None) -> EventStream:
        """Start a streamed completion; returns once the server has accepted it.

        Raises:
            PolydraftError: The server refuses it, or cannot be reached.
        """
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        for attempt in range(self._connect_retries + 1):
            try:
                return self.stream(
                    "/v1/completions",
                    streamed,
                    num_tokens=body["max_tokens"],
                    num_prompt_tokens=len(body["prompt"]),
                    cancelled=cancelled,
                )
            except NotConnectedError:  # nothing was sent
                if attempt == self._connect_retries:
                    raise
                time.sleep(_BACKOFF * 2**attempt)
        raise AssertionError("unreachable")

    def refusal(self, status: int, said: str, kind: str) -> PolydraftError:
        """The error for an answer with this status."""
        if status >= 500 and said == _ENDED_BY_ERROR:
            hint = "Look at its log; servers of `polydraft serve` do so where the target's logits are not finite."
            return EndedByErrorError(f"{self.name} failed: {said}.", hint)
        if status == 404:
            return ModelNotFoundError(f"{self.name} answers: {said}", "Give served_model_name.")
        if status == 400 and "context length" in said:
            return ContextLengthError(f"The vLLM server answers: {said}", "Shorten the prompt.")
        if 400 <= status < 500 and status not in {401, 403, *_BUSY_CODES}:
            return InvalidRequestError(f"The vLLM server refuses the request: {said}", "Change what it names.")
        return super().refusal(status, said, kind)

    def not_vllm(self) -> BackendUnavailableError:
        """The error for a server whose answers are not those of vLLM."""
        return BackendUnavailableError(
            f"The server at {self.url} is not a vLLM server.", "Give the url of a server that `vllm serve` started."
        )

    def _described(self, path: str) -> Any:
        """What the server says about itself; one that has no such page is not vLLM's."""
        try:
            return self.json(path)
        except (ModelNotFoundError, InvalidRequestError):
            raise self.not_vllm() from None

    def _number(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.malformed(f"a counter is {text}")
        return value
