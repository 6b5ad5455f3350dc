"""The client of an Ollama server, as docs.ollama.com/api describes it. Fields that are not described are ignored.

Not the client of the package ``ollama``: that one has no version and no ``draft_files``, reads lines of any length,
follows redirects with the key, and cannot be cancelled while the server is silent. It sends files (``create.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from packaging.version import Version
from polydraft.engine_parts.http_client import EventStream, HttpClient, NotConnectedError, Patience
from polydraft.errors import (
    BackendUnavailableError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
    OutOfMemoryError,
    PolydraftError,
    SpeculationUnavailableError,
)

from polydraft_ollama.options import KEY_VARIABLE, OllamaOptions
from polydraft_ollama.plugin import FIRST_VERSION

__all__ = ["OllamaClient", "can_draft", "counts_prompts"]

_CONTEXT = re.compile(
    r"context (?:length|size|window)|longer than the context|exceeds? the (?:available )?context", re.I
)
_MEMORY = re.compile(r"more (?:system |gpu )?memory|out of memory|insufficient memory|cudaMalloc failed", re.I)
_NOT_FOUND = re.compile(r"model ['\"]?(?P<name>[^'\"]+?)['\"]? not found", re.I)
_RELEASE = re.compile(r"v?(\d+(?:\.\d+)*)")
"""What a version begins with: what follows (``-rc1``, ``-12-g1234567``) is not always one of Python's."""
_BUSY = (408, 429, 503)
_SHOWN = 20
"""Models that an error names."""


def can_draft(version: str) -> bool:
    """Whether a server of this version has speculative decoding of GGUF models; one built from source says 0.0.0."""
    release = _release(version)
    return not any(release) or release >= Version(FIRST_VERSION).release


def counts_prompts(version: str) -> bool:
    """Whether a server of this version counts all of a prompt: 0.30.0 leaves out what its cache had (ollama#16428)."""
    return _release(version) != (0, 30, 0)


def _release(version: str) -> tuple[int, ...]:
    found = _RELEASE.match(version)
    return Version(found[1]).release if found else ()


class OllamaClient(HttpClient):
    """A client that several threads can use. Errors never contain the key."""

    def __init__(self, options: OllamaOptions, model: str = "") -> None:
        assert options.url is not None
        super().__init__(
            options.url, name="Ollama", key=options.key(), key_variable=KEY_VARIABLE, limits=options.limits()
        )
        self.model = model
        """What its requests are about, for errors."""

    def version(self) -> str:
        """The server's version.

        Raises:
            BackendUnavailableError: Nothing answers, or it is not Ollama.
        """
        try:
            found = self.json("/api/version")
        except NotConnectedError as error:
            raise NotConnectedError(
                error.message, "Start it: `ollama serve`, or the app. OLLAMA_HOST says where it is, if not here."
            ) from error
        except ModelNotFoundError:
            raise self._not_ollama() from None
        version = found.get("version") if isinstance(found, dict) else None
        if not isinstance(version, str):
            raise self._not_ollama()
        return self.shown(version)

    def models(self) -> list[dict[str, Any]]:
        """The server's models; each has a ``name``."""
        found = self.json("/api/tags")
        models = found.get("models") if isinstance(found, dict) else ""
        if not isinstance(models, list | None):
            raise self.malformed("its models are not a list")
        named = (model for model in models or () if isinstance(model, dict))
        return [{**model, "name": str(model.get("name") or model.get("model") or "")} for model in named]

    def show(self, name: str) -> dict[str, Any]:
        """What the server knows of a model.

        Raises:
            ModelNotFoundError: It has none of that name.
        """
        try:
            found = self.json("/api/show", {"model": name})
        except ModelNotFoundError as error:
            names: list[str] = []
            with suppress(PolydraftError):  # the first error says more
                names = [self.shown(model["name"]) for model in self.models()[:_SHOWN]]
            if not names:
                raise
            raise ModelNotFoundError(error.message, f"It has: {', '.join(names)}. {error.hint}") from None
        if not isinstance(found, dict):
            raise self.malformed("what it shows of the model is not an object")
        return found

    def answer(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        num_tokens: int,
        num_prompt_tokens: int = 0,
        cancelled: Callable[[], bool] | None = None,
        patience: Patience | None = None,
    ) -> EventStream:
        """Start a streamed answer; returns once the server has accepted the request."""
        return self.stream(
            path,
            {**body, "stream": True},
            num_tokens=num_tokens,
            num_prompt_tokens=num_prompt_tokens,
            cancelled=cancelled,
            patience=patience,
            lines=True,
        )

    def refusal(self, status: int, said: str, kind: str) -> PolydraftError:
        """The error for an answer with this status, or for one inside a stream."""
        if "draft_num_predict" in said:
            return SpeculationUnavailableError(
                f"{self.name} does not know draft_num_predict: {said}",
                f"Update it to {FIRST_VERSION} or later (https://ollama.com/download), or give `drafter=None`.",
            )
        if found := _NOT_FOUND.search(said):
            return self._unknown(found["name"], said)
        if status == 404:
            return self._unknown(self.model, said)
        if _CONTEXT.search(said):
            return ContextLengthError(
                f"{self.name} answers: {said}", "Shorten the prompt, or load the model with a larger `context_length`."
            )
        if _MEMORY.search(said):
            return OutOfMemoryError(f"{self.name} answers: {said}", "Load a smaller model, or a smaller context.")
        if status in _BUSY:
            return EngineError(f"{self.name} is busy ({status}): {said}", "Try again later.")
        if status == 401:
            return BackendUnavailableError(
                f"{self.name} does not accept {'the API key' if self.key else 'a request without an API key'}.",
                f"Set the environment variable {KEY_VARIABLE} to {'the right one' if self.key else 'it'}; for a model "
                "of ollama.com run `ollama signin`.",
            )
        if status == 403:
            return BackendUnavailableError(f"{self.name} forbids the request: {said}", "Look at its settings.")
        if 400 <= status < 500:
            return InvalidRequestError(f"{self.name} refuses the request: {said}", "Change what it names.")
        return super().refusal(status, said, kind)

    def _unknown(self, name: str, said: str) -> ModelNotFoundError:
        if not name:
            return ModelNotFoundError(f"{self.name} answers: {said}", "Check the url.")
        return ModelNotFoundError(
            f"{self.name} has no model {name!r}.",
            f"Download it: `ollama pull {name}`; or make it from files: `polydraft ollama create {name} MODEL`.",
        )

    def _not_ollama(self) -> BackendUnavailableError:
        return BackendUnavailableError(
            f"The server at {self.url} is not Ollama.", "Set OLLAMA_HOST, or `engine_options={'url': ...}`."
        )
