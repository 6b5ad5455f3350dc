"""``engine_options`` of the backend ``vllm``: vLLM's engine arguments, by their own names."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from polydraft.contract import DrafterKind, EngineOptions
from polydraft.errors import InvalidRequestError
from polydraft.secrets import names_a_secret
from pydantic import ConfigDict, Field, model_validator

__all__ = ["VllmOptions"]


class VllmOptions(EngineOptions):
    """``engine_options`` of ``load(..., backend="vllm")``.

    The fields below are those that polydraft checks or gives another default. **Every other engine argument of
    the installed vLLM is accepted under its own name** and checked at load (``EngineArgs``). None leaves the choice to
    vLLM.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    kv_cache_memory_bytes: int | None = Field(
        default=None,
        ge=1,
        description="KV cache in bytes. Default on CPU, unless gpu_memory_utilization or VLLM_CPU_KVCACHE_SPACE "
        "says it: see ``resources.default_kv_bytes``.",
    )
    enforce_eager: bool | None = Field(
        default=None,
        description="No compilation. Default: True on CPU (compiling takes over a minute), vLLM's on GPUs.",
    )
    max_num_seqs: int | None = Field(default=None, ge=1, description="Requests in one batch.")
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    data_parallel_size: int = Field(default=1, ge=1, description="In process 1; a server accepts more.")
    distributed_executor_backend: Literal["uni", "mp", "ray", "external_launcher"] | None = None
    async_scheduling: bool | None = Field(
        default=None,
        description="Schedule a step while one runs. Default: vLLM's, but off with a drafter on its V1 runner.",
    )
    speculative_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Further keys for vLLM's speculative_config, such as draft_tensor_parallel_size. polydraft sets "
        "method, model and num_speculative_tokens.",
        json_schema_extra={"drafters": [*get_args(DrafterKind)]},
    )

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        for name in self.further:
            if names_a_secret(name):
                raise InvalidRequestError(
                    f"{name} is a secret, and this backend does not take it.",
                    "For the Hub use `token` or HF_TOKEN; for a server's API key set VLLM_API_KEY.",
                )
        return self

    @property
    def further(self) -> dict[str, Any]:
        """The engine arguments that are not fields above."""
        return dict(self.model_extra or {})
