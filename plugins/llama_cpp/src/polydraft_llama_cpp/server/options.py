"""``engine_options`` of the backend ``llama-server``, and what it reads from the environment."""

from __future__ import annotations

import re

from polydraft.engine_parts.server_options import ServerOptions, ServerUrl, url_from
from polydraft.errors import InvalidRequestError
from polydraft.secrets import names_a_secret
from polydraft_gguf.options import CommonOptions
from pydantic import Field, field_validator

__all__ = ["KEY_VARIABLE", "URL_VARIABLE", "LlamaServerOptions"]

URL_VARIABLE = "POLYDRAFT_LLAMA_SERVER_URL"
KEY_VARIABLE = "POLYDRAFT_LLAMA_SERVER_API_KEY"
_SECRET_FLAGS = {"-hft"}
"""Short flags that take a secret; ``secrets.names_a_secret`` knows the long ones."""


class LlamaServerOptions(ServerOptions, CommonOptions):
    """Options by llama.cpp's names.

    With ``url`` the session is a client of that server, and no option can be given that is one of the server. Without
    it the session starts a server with these options, and stops it when it is closed. The API key of a running server
    comes from ``api_key_file``, else from the environment: ``POLYDRAFT_LLAMA_SERVER_API_KEY``, else ``LLAMA_API_KEY``.
    A server that the session starts gets that of ``api_key`` or ``api_key_file``, else a random one.
    """

    key_variables = (KEY_VARIABLE, "LLAMA_API_KEY")

    url: ServerUrl | None = url_from(URL_VARIABLE, "http://host:8080")
    n_gpu_layers: int | None = Field(
        default=None, ge=-1, description="Layers on the GPU, -1 for all; None: the server's own choice."
    )
    start_timeout: float = Field(
        default=300.0, gt=0, le=1e8, description="Seconds within which a server that the session starts must be ready."
    )
    extra_args: tuple[str, ...] = Field(default=(), description="Further flags for a server that the session starts.")

    @field_validator("extra_args")
    @classmethod
    def _no_secrets(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for word in given:
            flag = re.split(r"[=\s]", word.strip(), maxsplit=1)[0]  # a word may hold a flag and its value
            if flag in _SECRET_FLAGS or (flag.startswith("--") and names_a_secret(flag)):
                raise InvalidRequestError(
                    f"{flag} is a secret, and other users can read command lines.",
                    f"Set the environment variable {KEY_VARIABLE}, or HF_TOKEN for the Hub.",
                )
        return given

    def given_to_start(self) -> list[str]:
        """Names of the options that were given, and that only a server can take that is started here."""
        of_clients = ServerOptions.model_fields.keys() - {"start_timeout"}
        return sorted(self.model_fields_set - of_clients)
