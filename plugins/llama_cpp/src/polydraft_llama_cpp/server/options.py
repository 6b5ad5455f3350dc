"""``engine_options`` of the backend ``llama-server``, and what it reads from the environment."""

from __future__ import annotations

import os
from functools import partial

from polydraft.engines import serving
from pydantic import Field

from polydraft_llama_cpp.options import CommonOptions

__all__ = ["KEY_VARIABLE", "URL_VARIABLE", "LlamaServerOptions", "api_key"]

URL_VARIABLE = "POLYDRAFT_LLAMA_SERVER_URL"
KEY_VARIABLE = "POLYDRAFT_LLAMA_SERVER_API_KEY"

api_key = partial(serving.api_key, KEY_VARIABLE, "LLAMA_API_KEY")
"""The key of a running server."""


class LlamaServerOptions(CommonOptions):
    """Options by llama.cpp's names.

    With ``url`` the session is a client of that server, and no other option can be given. Without it the session starts
    a server with these options, and stops it when it is closed. The API key of a running server comes from the
    environment: ``POLYDRAFT_LLAMA_SERVER_API_KEY``, else ``LLAMA_API_KEY``.
    """

    url: str | None = Field(
        default_factory=lambda: os.environ.get(URL_VARIABLE) or None,
        description="URL of a running server, ``http://host:8080``. Default: the environment variable "
        f"{URL_VARIABLE}; if that is not set, the session starts a server.",
    )
    n_gpu_layers: int | None = Field(
        default=None, ge=-1, description="Layers on the GPU, -1 for all; None: the server's own choice."
    )
    start_timeout: float = Field(
        default=300.0, gt=0, le=1e8, description="Seconds within which a server that the session starts must be ready."
    )
    extra_args: tuple[str, ...] = Field(default=(), description="Further flags for a server that the session starts.")
