"""``engine_options`` of the backend ``vllm-server``, and what it reads from the environment."""

from __future__ import annotations

from typing import Self

from polydraft.engine_parts.server_options import ServerOptions, ServerUrl, url_from
from polydraft.errors import InvalidRequestError
from pydantic import Field, model_validator

from polydraft_vllm.options import VllmOptions

__all__ = ["KEY_VARIABLE", "URL_VARIABLE", "VllmServerOptions"]

URL_VARIABLE = "POLYDRAFT_VLLM_SERVER_URL"
KEY_VARIABLE = "POLYDRAFT_VLLM_SERVER_API_KEY"


class VllmServerOptions(ServerOptions, VllmOptions):
    """``engine_options`` of ``load(..., backend="vllm-server")``.

    With ``url`` the session is a client of that server, and the engine arguments of ``VllmOptions`` cannot be given.
    Without it the session starts its own server on the loopback interface, with these arguments, and stops it when
    it is closed. The API key comes from ``api_key_file``, else from the environment:
    ``POLYDRAFT_VLLM_SERVER_API_KEY``, else ``VLLM_API_KEY``.
    """

    key_variables = (KEY_VARIABLE, "VLLM_API_KEY")

    url: ServerUrl | None = url_from(URL_VARIABLE, "http://host:8000")
    served_model_name: str | None = Field(default=None, description="Name under which that server serves the target.")
    port: int | None = Field(
        default=None, ge=1, le=65535, description="Port of a server that the session starts; None: a free one."
    )
    connect_retries: int = Field(
        default=2, ge=0, description="How often a failed connection is tried again. A request is never sent twice."
    )

    @model_validator(mode="after")
    def _have_an_effect(self) -> Self:
        if self.url is not None and (given := self.given_to_start()):
            raise InvalidRequestError(
                f"{', '.join(given)} cannot be set: with url, the server runs already.",
                "Leave it out, or give it to the command that starts the server.",
            )
        if self.url is None and self.served_model_name is not None:
            raise InvalidRequestError(
                "served_model_name is what a server at a url calls the target, and no url is given.",
                f"Give url, or set {URL_VARIABLE}.",
            )
        return self

    def given_to_start(self) -> list[str]:
        """Names of the options that were given, and that only a server can take that is started here."""
        of_clients = {*ServerOptions.model_fields, "served_model_name", "connect_retries"} - {"start_timeout"}
        return sorted((self.model_fields_set - of_clients) | self.further.keys())
