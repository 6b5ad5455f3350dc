"""The client of a vLLM server: the ``openai`` client for generation, plain HTTP for what OpenAI's API does not have."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
from polydraft.errors import (
    BackendUnavailableError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
)

from polydraft_vllm.server.options import KEY_VARIABLE, VllmServerOptions, api_key

__all__ = ["NotConnectedError", "ServedModel", "ServerClient", "base_url"]

_NO_KEY = "EMPTY"  # the openai client requires a key; a server without keys ignores it
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>[^}]*)\})?\s+(?P<value>\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_BACKOFF = 0.5
_BUSY_CODES = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS)
_ANSWER_TIMEOUT = 60.0
"""Seconds to wait for answers for which the server generates nothing."""
_KEEPALIVE = 2.0
"""Seconds for which an idle connection is kept: less than the five after which vLLM's server closes it."""


class NotConnectedError(BackendUnavailableError):
    """No connection was made: nothing was sent."""


class ServedModel:
    """A model as the server names it."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.id = str(data.get("id", ""))
        self.root = str(data.get("root") or "")
        self.max_model_len = data.get("max_model_len")
        self.owned_by = str(data.get("owned_by", ""))

    def is_called(self, *names: str) -> bool:
        """Whether one of these is its name or path."""
        own = {self.id, self.root} - {""}
        tails = {name.rstrip("/").rpartition("/")[2].lower() for name in own}
        return any(name in own or name.rstrip("/").rpartition("/")[2].lower() in tails for name in names if name)


def base_url(text: str) -> str:
    """The server's root: without ``/v1`` and trailing slashes.

    Raises:
        InvalidRequestError: It is not an HTTP URL, or contains a password.
    """
    try:
        parts = urlsplit(text)
        secret = parts.username or parts.password or parts.query or parts.fragment
        usable = parts.scheme in ("http", "https") and bool(httpx.URL(text).host) and (parts.port or 1) > 0
    except (ValueError, httpx.InvalidURL):
        secret, usable = None, False
    if secret:
        raise InvalidRequestError(
            "The url contains more than the server's address (a user name, a password or a query).",
            f"Set the API key in the environment variable {KEY_VARIABLE}.",
        )
    if not usable:
        raise InvalidRequestError(f"`url={text!r}` is not the URL of a server.", "Give it as http://host:8000.")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


class ServerClient:
    """A client that several threads can use. Errors and logs never contain the API key.

    ``own``: the server was started here, and is not reached through a proxy.
    """

    def __init__(self, url: str, options: VllmServerOptions, *, own: bool = False) -> None:
        self.url = base_url(url)
        self._options = options
        self._key = api_key()
        key = self._key or _NO_KEY
        timeout = httpx.Timeout(options.read_timeout, connect=options.connect_timeout, pool=options.read_timeout)
        self._answer_timeout = httpx.Timeout(
            min(options.read_timeout, _ANSWER_TIMEOUT), connect=options.connect_timeout, pool=options.read_timeout
        )
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=_KEEPALIVE)
        self._http = httpx.Client(
            timeout=timeout, limits=limits, headers={"Authorization": f"Bearer {key}"}, trust_env=not own
        )
        # No retries by the client: a generation that was sent must not be sent again.
        self._openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=timeout, http_client=self._http
        )

    def close(self) -> None:
        """Close all connections."""
        self._openai.close()

    def version(self) -> str:
        """vLLM's version.

        Raises:
            BackendUnavailableError: Nothing answers, or it is not a vLLM server.
        """
        found = self._get_json("/version")
        version = found.get("version") if isinstance(found, dict) else None
        if not isinstance(version, str):
            raise self.not_vllm()
        return version

    def models(self) -> list[ServedModel]:
        """The models that it serves. Errors as for ``version``."""
        found = self._get_json("/v1/models")
        data = found.get("data") if isinstance(found, dict) else None
        entries = data if isinstance(data, list) else ()
        models = [ServedModel(entry) for entry in entries if isinstance(entry, dict)]
        if not any(model.owned_by == "vllm" for model in models):
            raise self.not_vllm()
        return models

    def tokenize(self, model: str, text: str) -> list[int] | None:
        """The server's token ids of a text, without special tokens; None if it does not have this endpoint."""
        with self._errors():
            answer = self._http.post(
                f"{self.url}/tokenize",
                json={"model": model, "prompt": text, "add_special_tokens": False},
                timeout=self._answer_timeout,
            )
            if answer.status_code != httpx.codes.OK:
                return None
            tokens = answer.json().get("tokens")
        return tokens if isinstance(tokens, list) else None

    def metrics(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """``/metrics``: name -> labels -> value. Empty if the server has none."""
        with self._errors():
            answer = self._http.get(f"{self.url}/metrics", timeout=self._answer_timeout)
        if answer.status_code != httpx.codes.OK:
            return {}
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for match in _SAMPLE.finditer(answer.text):
            labels = tuple(sorted(_LABEL.findall(match["labels"] or "")))
            found.setdefault(match["name"], {})[labels] = float(match["value"])
        return found

    def complete(self, **arguments: Any) -> Any:
        """Start a streamed completion; returns once the server has accepted it.

        Raises:
            PolydraftError: The server refuses it, or cannot be reached.
        """
        for attempt in range(self._options.connect_retries + 1):
            try:
                with self._errors():
                    return self._openai.completions.create(
                        stream=True, stream_options={"include_usage": True}, **arguments
                    )
            except NotConnectedError:  # nothing was sent
                if attempt == self._options.connect_retries:
                    raise
                time.sleep(_BACKOFF * 2**attempt)
        raise AssertionError("unreachable")

    @contextmanager
    def errors_while_reading(self) -> Iterator[None]:
        """Turn errors in the middle of a stream into typed ones."""
        try:
            with self._errors():
                yield
        except BackendUnavailableError as error:
            raise EngineError(error.message, error.hint) from error

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except openai.APIStatusError as error:
            raise self._refusal(error) from self._shown(error)
        except (openai.APIConnectionError, httpx.TransportError) as error:
            cause = error if isinstance(error, httpx.TransportError) else error.__cause__
            if isinstance(cause, (httpx.ConnectError, httpx.ConnectTimeout)):
                hint = "Check that it is running, and the url."
                if "CERTIFICATE" in str(cause):
                    hint = "If its certificate is your own, set SSL_CERT_FILE to the file of the authority."
                raise NotConnectedError(f"No connection to the vLLM server at {self.url}: {cause}.", hint) from error
            if isinstance(cause, httpx.TimeoutException) or isinstance(error, openai.APITimeoutError):
                raise EngineError(
                    f"The vLLM server at {self.url} did not answer in time.",
                    "Look at its log, or give read_timeout a larger value.",
                ) from error
            raise EngineError(
                f"The connection to the vLLM server at {self.url} broke: {cause or error}.",
                "The server may have died: look at its log.",
            ) from error
        except RecursionError as error:  # JSON nested too deeply
            raise self.not_vllm() from error
        except openai.APIError as error:
            raise EngineError(
                f"The vLLM server at {self.url} failed: {self._without_key(error.message)}", "Look at its log."
            ) from self._shown(error)

    def _without_key(self, text: str) -> str:
        """A server's message; some servers repeat the request's key in their errors."""
        return text.replace(self._key, "***") if self._key else text

    def _shown(self, error: openai.APIError) -> openai.APIError | None:
        """The error, to be the cause of a typed one; None if it contains the key."""
        return error if self._without_key(f"{error} {error.body}") == f"{error} {error.body}" else None

    def _refusal(self, error: openai.APIStatusError) -> Exception:
        code = error.status_code
        if code in (401, 403):
            return self._wrong_key()
        body = error.body if isinstance(error.body, dict) else {}
        said = self._without_key(str(body.get("message") or error.message).partition("\n")[0])
        if code == httpx.codes.NOT_FOUND:
            return ModelNotFoundError(f"The vLLM server at {self.url} answers: {said}", "Give served_model_name.")
        if code == httpx.codes.BAD_REQUEST and "context length" in said:
            return ContextLengthError(f"The vLLM server answers: {said}", "Shorten the prompt.")
        if code < 500 and code not in _BUSY_CODES:
            return InvalidRequestError(f"The vLLM server refuses the request: {said}", "Change what it names.")
        return EngineError(f"The vLLM server at {self.url} failed ({code}): {said}", "Look at its log.")

    def _get_json(self, path: str) -> Any:
        with self._errors():
            answer = self._http.get(f"{self.url}{path}", timeout=self._answer_timeout)
        if answer.status_code in (401, 403):
            raise self._wrong_key()
        try:
            return answer.raise_for_status().json()
        except (httpx.HTTPStatusError, ValueError, RecursionError):
            raise self.not_vllm() from None

    def _wrong_key(self) -> BackendUnavailableError:
        return BackendUnavailableError(
            f"The vLLM server at {self.url} does not accept the API key.",
            f"Set the environment variable {KEY_VARIABLE} to the right one.",
        )

    def not_vllm(self) -> BackendUnavailableError:
        """The error for a server whose answers are not those of vLLM."""
        return BackendUnavailableError(
            f"The server at {self.url} is not a vLLM server.", "Give the url of a server that `vllm serve` started."
        )
