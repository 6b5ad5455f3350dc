"""What a server is told: where it listens, its key, and its limits."""

from __future__ import annotations

import re
from typing import Any, Self

from polydraft import Session
from polydraft.contract import WholeEngine
from polydraft.errors import InvalidRequestError
from polydraft.secrets import Secret
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

__all__ = ["KEY_VARIABLE", "ServerSettings", "server_settings"]

KEY_VARIABLE = "POLYDRAFT_API_KEY"
"""The environment variable that ``polydraft serve`` reads the key from."""

_BATCHED, _IN_TURN = 64, 4
"""Generations at a time on an engine that batches them, and on one that steps them in turn, each with a KV cache."""
_BYTES_PER_TOKEN = 16
"""Bytes of a request for each token of the context: more than any text or list of ids that fits takes."""
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[1-9][0-9]{0,4})?(?=[/?#]|$)")
"""As browsers write it: without a path, and a default port left out."""


class ServerSettings(BaseModel):
    """Limits and names of a server. The defaults are safe for a server that other programs of this machine use."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535, description="0: any free port.")
    key: Secret | None = Field(default=None, description="Requests must send it as a bearer token; None: no key.")
    no_auth: bool = Field(default=False, description="Listen on an address that others reach, without a key.")
    names: tuple[str, ...] = Field(default=(), description="What requests call the model; empty: the target's id.")
    origins: tuple[str, ...] = Field(default=(), description="Web origins whose pages may call it (CORS).")
    defaults: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of ``Session.generate`` for what a request leaves out."
    )
    max_running: int | None = Field(
        default=None, ge=1, description="Generations at a time; None: as many as the engine takes."
    )
    max_waiting: int = Field(default=256, ge=0, description="Generations that may wait; more are refused with 429.")
    request_seconds: float = Field(
        default=600.0, gt=0, le=1e8, description="Time limit of a generation, its wait included."
    )
    read_seconds: float = Field(default=30.0, gt=0, le=1e8, description="Time in which a client must send its request.")
    write_seconds: float = Field(default=60.0, gt=0, le=1e8, description="Time in which a client must take an event.")
    stop_seconds: float = Field(
        default=30.0, ge=0, le=1e8, description="Time that generations get to end when it stops."
    )
    max_body_bytes: int | None = Field(
        default=None, ge=1, description="Size limit of a request; None: 1 MiB, and 16 bytes for each token of context."
    )

    @field_validator("names")
    @classmethod
    def _no_empty_name(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not all(name.strip() for name in names):
            raise InvalidRequestError("A name of the model is empty.", "Give one that requests can send as `model`.")
        return names

    @field_validator("origins")
    @classmethod
    def _as_browsers_write_them(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for given in origins:
            begin = _ORIGIN.match(given.lower())
            meant = "" if begin is None else begin[0]
            for scheme, port in (("http:", ":80"), ("https:", ":443")):
                meant = meant.removesuffix(port) if meant.startswith(scheme) else meant
            if not given or given not in ("*", "null", meant):
                form = meant or "scheme://host[:port], such as https://example.org, or * for all"
                raise InvalidRequestError(f"No web page has the origin {given!r}.", f"Give {form}.")
        return origins

    @model_validator(mode="after")
    def _key_or_none(self) -> Self:
        if self.no_auth and self.key is not None:
            raise ValueError("no_auth has no effect with a key: leave one of them out")
        return self

    def running_at_once(self, session: Session) -> int:
        """Generations at a time on a session's engine."""
        if session.running.concurrency == "serial":
            return 1
        if self.max_running is not None:
            return self.max_running
        engine = session.engine
        if isinstance(engine, WholeEngine) and not engine.picks_k:
            return _BATCHED
        # Where polydraft's loop runs, here or in a worker, calls take turns step by step, or share them.
        return max(_IN_TURN, engine.shared_sequences)

    def note(self, session: Session) -> str:
        """That ``max_running`` has no effect on a session's engine, one sentence; else empty."""
        if (self.max_running or 1) == 1 or session.running.concurrency != "serial":
            return ""
        return f"max_running={self.max_running} has no effect: {session.running.backend} runs one generation at a time."

    def body_limit(self, context_length: int) -> int:
        """Bytes of a request's body."""
        return (1 << 20) + _BYTES_PER_TOKEN * context_length if self.max_body_bytes is None else self.max_body_bytes


def server_settings(**given: Any) -> ServerSettings:
    """``ServerSettings(**given)``, with errors for the user of a command.

    Raises:
        InvalidRequestError: A name or an origin is wrong.
    """
    try:
        return ServerSettings(**given)
    except ValidationError as error:
        found = error.errors()[0].get("ctx", {}).get("error")
        raise (found if isinstance(found, InvalidRequestError) else error) from None
