"""``engine_options`` of the backend ``vllm-server``, and what it reads from the environment."""

from __future__ import annotations

from polydraft.engine_parts.server_options import ServerOptions, ServerUrl, url_from
from pydantic import Field

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

    @property
    def engine_arguments(self) -> set[str]:
        """Names of the engine arguments that were given: a running server has its own."""
        return (self.model_fields_set & VllmOptions.model_fields.keys()) | self.further.keys()
