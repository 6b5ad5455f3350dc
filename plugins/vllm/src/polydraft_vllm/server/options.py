"""``engine_options`` of the backend ``vllm-server``, and what it reads from the environment."""

from __future__ import annotations

import os
from functools import partial

from polydraft.engines import serving
from pydantic import Field

from polydraft_vllm.options import VllmOptions

__all__ = ["KEY_VARIABLE", "URL_VARIABLE", "VllmServerOptions", "api_key"]

URL_VARIABLE = "POLYDRAFT_VLLM_SERVER_URL"
KEY_VARIABLE = "POLYDRAFT_VLLM_SERVER_API_KEY"

api_key = partial(serving.api_key, KEY_VARIABLE, "VLLM_API_KEY")
"""The key of a running server."""


class VllmServerOptions(VllmOptions):
    """``engine_options`` of ``load(..., backend="vllm-server")``.

    With ``url`` the session is a client of that server, and the engine arguments of ``VllmOptions`` cannot be given.
    Without it the session starts its own server on the loopback interface, with these arguments, and stops it when
    it is closed. The API key of a running server comes from the environment: ``POLYDRAFT_VLLM_SERVER_API_KEY``, else
    ``VLLM_API_KEY``.
    """

    url: str | None = Field(
        default_factory=lambda: os.environ.get(URL_VARIABLE) or None,
        description="URL of a running server, ``http://host:8000``; a trailing /v1 is allowed. Default: the "
        f"environment variable {URL_VARIABLE}; if that is not set, the session starts a server.",
    )
    served_model_name: str | None = Field(default=None, description="Name under which that server serves the target.")
    port: int | None = Field(
        default=None, ge=1, le=65535, description="Port of a server that the session starts; None: a free one."
    )
    start_timeout: float = Field(
        default=600.0,
        gt=0,
        le=1e8,
        description="Seconds within which a server that the session starts must be ready.",
    )
    connect_timeout: float = Field(default=10.0, gt=0, le=1e8, description="Seconds to connect.")
    read_timeout: float = Field(
        default=600.0, gt=0, le=1e8, description="Seconds to wait for an answer or the next token."
    )
    connect_retries: int = Field(
        default=2, ge=0, description="How often a failed connection is tried again. A request is never sent twice."
    )

    @property
    def engine_arguments(self) -> set[str]:
        """Names of the engine arguments that were given: a running server has its own."""
        return (self.model_fields_set & VllmOptions.model_fields.keys()) | self.further.keys()
