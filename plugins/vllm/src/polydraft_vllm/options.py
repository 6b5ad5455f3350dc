"""The backend's options: vLLM's engine arguments, by their own names."""

from __future__ import annotations

from typing import Any, Literal

from polydraft.contract import EngineOptions
from pydantic import ConfigDict, Field

__all__ = ["VllmOptions", "VllmServerOptions"]


class VllmOptions(EngineOptions):
    """``engine_options`` of ``load(..., backend="vllm")``.

    The fields below are those that polydraft gives a default or a check of its own; **every other engine argument of
    the installed vLLM is taken under its own name** and checked at load (``EngineArgs``). None leaves the choice to
    vLLM.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    kv_cache_memory_bytes: int | None = Field(
        default=None, ge=1, description="KV cache in bytes. Default on CPU: see ``loading.default_kv_bytes``."
    )
    enforce_eager: bool | None = Field(
        default=None,
        description="No compilation. Default: True on CPU (compiling takes over a minute), vLLM's on GPUs.",
    )
    max_num_seqs: int | None = Field(default=None, ge=1, description="Requests in one batch. Default on CPU: 16.")
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    data_parallel_size: int = Field(default=1, ge=1, description="1 in process; a server takes more.")
    distributed_executor_backend: Literal["uni", "mp", "ray", "external_launcher"] | None = None
    async_scheduling: bool = Field(
        default=False, description="Off: only then can one session decode plainly and with speculation (tested so)."
    )
    speculative_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Further keys for vLLM's speculative_config, such as draft_tensor_parallel_size; method, model and "
        "k are polydraft's.",
    )

    @property
    def further(self) -> dict[str, Any]:
        """The engine arguments that are not fields above."""
        return dict(self.model_extra or {})


class VllmServerOptions(VllmOptions):
    """``engine_options`` of ``load(..., backend="vllm-server")``.

    With ``url`` the session is a client of that server, and none of the engine arguments above may be given. Without,
    it starts a server of its own on the loopback interface, with these arguments, and stops it when it is closed.
    """

    url: str | None = Field(default=None, description="Of the server: ``http://host:8000``; a trailing /v1 is allowed.")
    served_model_name: str | None = Field(default=None, description="The name by which it serves the target.")
    api_key_variable: str = Field(
        default="VLLM_API_KEY", description="Environment variable that holds the key. The key itself is no option."
    )
    port: int | None = Field(default=None, ge=1, le=65535, description="Of a server of our own; None: a free one.")
    start_timeout: float = Field(default=600.0, gt=0, description="Seconds until a server of our own must be ready.")
    connect_timeout: float = Field(default=10.0, gt=0, description="Seconds to connect.")
    read_timeout: float = Field(default=600.0, gt=0, description="Seconds without any answer or further token.")
    connect_retries: int = Field(
        default=2, ge=0, description="Connections tried again if none came about; what was sent is never sent again."
    )
