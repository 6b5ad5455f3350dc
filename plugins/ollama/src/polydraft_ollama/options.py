"""``engine_options`` of the backend ``ollama``, and what it reads from the environment."""

from __future__ import annotations

import re
from contextlib import suppress
from ipaddress import IPv6Address
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from polydraft.engine_parts.server_options import ServerOptions, ServerUrl, variable
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

__all__ = ["HOST_VARIABLE", "KEY_VARIABLE", "OllamaOptions"]

HOST_VARIABLE = "OLLAMA_HOST"
KEY_VARIABLE = "OLLAMA_API_KEY"
_PORTS = {"http": 80, "https": 443}
_USUAL_PORT = 11434
_DURATION = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h))+")
_CLOUD = "ollama.com"
"""Reached by HTTPS without being told to."""
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that a server listens on -> those at which it is reached."""


def _url(host: Any) -> Any:
    """The URL of what ``OLLAMA_HOST`` may hold: a host, ``:port``, ``host:port`` or a URL, with Ollama's defaults."""
    if not isinstance(host, str):
        return host
    scheme, found, rest = host.strip().strip("\"'").strip().partition("://")
    if not found:
        scheme, rest = ("https", f"{scheme}:443") if scheme == _CLOUD else ("http", scheme)
    address, slash, path = rest.partition("/")
    with suppress(ValueError):
        rest = f"[{IPv6Address(address)}]{slash}{path}"  # without brackets, which Ollama takes, too
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        usual = _PORTS.get(scheme, _USUAL_PORT) if found else _USUAL_PORT
        port = usual if parts.port is None else parts.port
        name = parts.hostname or "127.0.0.1"
    except ValueError:
        return host  # refused by the check that follows
    if "@" in rest:
        return host
    name = _ANYWHERE.get(name, name)
    further = f"?{parts.query}" if parts.query else ""
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}{parts.path}{further}"


def _keep_alive(value: str | float) -> str | float:
    """Seconds as a number, which the command line gives as text; or a duration as Go reads it."""
    with suppress(ValueError):
        value = float(value)
    if not (_DURATION.fullmatch(value) if isinstance(value, str) else isfinite(value)):
        raise ValueError(f"{value} is not a duration. Give it as 10m or 1h30m, or in seconds.")
    return value


class OllamaOptions(ServerOptions):
    """Where the server is, and its own options by their names. What is left out is the server's choice.

    Further settings of Ollama have polydraft's names: ``num_ctx`` is ``context_length``, ``num_predict`` is
    ``max_new_tokens``, ``draft_num_predict`` is ``num_speculative_tokens``. A key (of ollama.com, or of a proxy) comes
    from ``api_key_file``, else from ``OLLAMA_API_KEY``.
    """

    key_variables = (KEY_VARIABLE,)

    url: Annotated[ServerUrl, BeforeValidator(_url)] | None = Field(
        default_factory=lambda: variable(HOST_VARIABLE),
        validate_default=True,
        description=f"The server, as {HOST_VARIABLE} takes it: ``host:port``, or a URL. Default: that variable, else "
        f"127.0.0.1:{_USUAL_PORT}.",
    )
    keep_alive: Annotated[str | float, AfterValidator(_keep_alive)] | None = Field(
        default=None, description="How long the model stays loaded after a request: ``10m``, or seconds; -1: for ever."
    )
    num_gpu: int | None = Field(default=None, ge=-1, description="Layers on the GPU; 0: the CPU alone.")
    main_gpu: int | None = Field(default=None, ge=0, description="The GPU for what is not split.")
    num_batch: int | None = Field(default=None, ge=1, description="Prompt tokens run in one forward.")
    num_thread: int | None = Field(default=None, ge=1, description="CPU threads.")
    use_mmap: bool | None = Field(default=None, description="Map the file into memory.")
    create_as: str | None = Field(
        default=None,
        min_length=1,
        description="Put the target and its drafter, which lie in files, on the server under this name: "
        "``polydraft ollama create NAME MODEL`` sets it.",
    )
    modelfile: Path | None = Field(
        default=None, description="With ``create_as``: where to write the Modelfile that says the same."
    )

    @model_validator(mode="after")
    def _have_an_effect(self) -> Self:
        if "start_timeout" in self.model_fields_set:
            raise ValueError("start_timeout is for servers that a session starts, and it starts no Ollama")
        if self.modelfile is not None and self.create_as is None:
            raise ValueError("modelfile is written with create_as, which is not given")
        if self.num_gpu == 0 and self.main_gpu is not None:
            raise ValueError("main_gpu has no effect with num_gpu=0, which is the CPU alone")
        return self

    def of_the_server(self) -> dict[str, Any]:
        """The options of a request that hold for all of them."""
        names = ("num_gpu", "main_gpu", "num_batch", "num_thread", "use_mmap")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
