"""The options that the backends of all servers share: where the server is, its key, and how long it may take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from polydraft.contract.backend import EngineOptions
from polydraft.engine_parts.http_client import HttpLimits
from polydraft.errors import InvalidRequestError
from polydraft.secrets import Secret

__all__ = ["THE_SERVERS", "ServerOptions", "ServerUrl", "said_by", "url_from", "variable"]

THE_SERVERS = "the server's"
"""``device`` or ``dtype`` of a ``RunningInfo`` where a server runs already and does not tell its own: the core then
says that ``load``'s arguments of these names have no effect."""


def _checked_url(text: str) -> str:
    """The server's root: without ``/v1`` and trailing slashes.

    Raises:
        InvalidRequestError: It is not an HTTP URL, or contains a user name, a password or a query.
    """
    try:
        parts = urlsplit(text)
        # urlsplit drops some control characters, and accepts the others.
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
        usable = usable and text.isascii() and text.isprintable() and not set(text) & set(' "<>\\^`{|}')
        further = bool(parts.query or parts.fragment)
    except ValueError:
        usable = further = False
    if "@" in text or further:
        raise InvalidRequestError(
            "The url contains more than the server's address (a user name, a password or a query).",
            "Give the API key as api_key_file, or in its environment variable.",
        )
    if not usable:
        raise InvalidRequestError(f"`url={text!r}` is not the URL of a server.", "Give it as http://host:port.")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


ServerUrl = Annotated[str, AfterValidator(_checked_url)]
"""The root of a server, ``http://host:8000``; a ``/v1`` at its end is dropped. A key is no part of it."""


class _FromVariable(str):
    """The text of an environment variable, which a sentence about it names."""

    __slots__ = ("name",)
    name: str


def variable(name: str) -> str:
    """What an environment variable holds, as a default of ``url``; empty: nothing."""
    found = _FromVariable(os.environ.get(name, ""))
    found.name = name
    return found


def said_by(error: ValidationError) -> str:
    """What is wrong with an option: one sentence or two."""
    return f"{error.errors()[0]['msg'].removeprefix('Value error, ').rstrip('.')}."


def url_from(name: str, example: str) -> Any:
    """The field ``url`` of a backend's options, whose default an environment variable sets."""
    return Field(
        default_factory=lambda: variable(name) or None,
        validate_default=True,
        description=f"URL of a running server, ``{example}``; a trailing /v1 is allowed. Default: the environment "
        f"variable {name}; if that is not set, the session starts a server.",
    )


class ServerOptions(EngineOptions):
    """Options of a client of a server, which are the same for every engine's.

    A server's API key comes from ``api_key_file``, else from the first of ``key_variables`` that is set. Apps may pass
    it as ``api_key``; the command line does not take it, because other users can read command lines.
    """

    key_variables: ClassVar[tuple[str, ...]] = ()
    """The environment variables of the key: this backend's own first, then the engine's."""

    url: ServerUrl | None = None

    @field_validator("url", mode="wrap")
    @classmethod
    def _names_its_variable(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if isinstance(value, _FromVariable):
                raise ValueError(f"{said_by(error)} {value.name} holds it.") from None
            raise

    api_key: Secret | None = Field(
        default=None,
        exclude=True,
        repr=False,
        description="API key of the server; from Python only.",
    )
    api_key_file: Path | None = Field(default=None, description="File whose only content is the API key.")
    start_timeout: float = Field(
        default=600.0, gt=0, le=1e8, description="Seconds within which a server that the session starts must be ready."
    )
    connect_timeout: float = Field(default=10.0, gt=0, le=1e8, description="Seconds to connect.")
    answer_timeout: float = Field(
        default=60.0, gt=0, le=1e8, description="Seconds for a whole answer for which the server generates nothing."
    )
    read_timeout: float = Field(
        default=600.0, gt=0, le=1e8, description="Seconds to wait for the first or the next token."
    )
    token_timeout: float = Field(
        default=10.0,
        gt=0,
        le=1e8,
        description="Seconds per token on average: an answer has to end within ``read_timeout``, and this for each "
        "token that was asked for.",
    )

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("api_key and api_key_file exclude one another")
        return self

    def check_command(self, *further: str) -> None:
        """Refuse what only a client uses, where a server's command is made (``Backend.server_command``).

        Args:
            further: The backend's own options that only a client uses.

        Raises:
            InvalidRequestError: One was given.
        """
        of_clients = {*(name for name in ServerOptions.model_fields if name.endswith("_timeout")), *further}
        if given := sorted(self.model_fields_set & of_clients):
            raise InvalidRequestError(
                f"{', '.join(given)} has no effect: it is for the client of a server, and this one is only started.",
                "Leave it out.",
                argument="engine_options",
            )

    def key(self) -> Secret | None:
        """The API key; None if none is given.

        Raises:
            InvalidRequestError: The file cannot be read, or a header cannot hold the key. Its value is not shown.
        """
        return self.given_key() or Secret.from_environment(*self.key_variables)

    def given_key(self) -> Secret | None:
        """The API key of ``api_key`` or ``api_key_file``, the environment left aside. Errors as for ``key``."""
        return self.api_key if self.api_key_file is None else Secret.from_file(self.api_key_file)

    def limits(self) -> HttpLimits:
        """How long the server may take."""
        return HttpLimits(
            connect_timeout=self.connect_timeout,
            answer_timeout=min(self.answer_timeout, self.read_timeout),
            read_timeout=self.read_timeout,
            token_timeout=self.token_timeout,
        )
