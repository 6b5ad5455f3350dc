"""The backend: capabilities, diagnosis, and which models it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from polydraft.contract import (
    Backend,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    LoadRequest,
    ModelSource,
    SpeculationPlan,
    SteppingEngine,
    Upstream,
    UpstreamCall,
    WholeEngine,
)
from polydraft.files import system_error

from polydraft_transformers.dtypes import check_dtype
from polydraft_transformers.options import TransformersOptions

__all__ = ["TransformersBackend"]


class TransformersBackend(Backend):
    """Runs safetensors checkpoints on CPU and CUDA."""

    options = TransformersOptions

    def capabilities(self) -> Capabilities:
        """The same for every supported version."""
        return Capabilities(
            drafter_kinds=frozenset({"mtp", "draft-model", "ngram"}),
            exactness=frozenset({"standard", "bitwise"}),
            seed_identical=True,
            exposes_logits=True,
            reuses_prefixes=True,
            concurrent_calls=True,
            max_speculative_tokens=16,
        )

    def diagnose(self) -> Diagnosis:
        """Import torch, and list its devices."""
        installed = version("transformers")
        try:
            devices = _devices()
        except (ImportError, OSError) as error:
            refused = system_error(error, "torch cannot be imported")
            return Diagnosis(
                usable=False,
                engine_version=installed,
                reason=refused.message if refused else f"torch cannot be imported: {error}",
                remedy=refused.hint if refused else "pip install --force-reinstall torch",
            )
        return Diagnosis(
            usable=True,
            engine_version=installed,
            devices=devices,
            notes=(f"torch {version('torch')}",),
            rank=60 if len(devices) > 1 else 50,
            depends_on=(),
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """An assistant as target, and quantized weights."""
        if target.model_type.endswith("_assistant"):
            return f"{target.id} is an assistant (a drafter); it cannot generate by itself."
        quantization = target.config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "an unknown method") if isinstance(quantization, dict) else ""
            return f"The weights of {target.id} are quantized ({method}); this backend runs plain weights only."
        return None

    def build(self, request: LoadRequest) -> Mapping[str, str]:
        """The commit that torch was built from, its compile flags and libraries."""
        import torch

        return {"torch's build": f"{torch.version.git_version} {torch.__config__.show()}"}

    def load_engine(self, request: LoadRequest) -> SteppingEngine:
        """Load target and drafter with Transformers, which is imported here."""
        check_dtype(request.dtype)
        from polydraft_transformers.loading import load_pair

        return load_pair(request)

    def upstream(self, request: LoadRequest) -> Upstream:
        """Transformers' ``generate``."""

        def opened(engine: SteppingEngine | WholeEngine) -> UpstreamCall:
            from polydraft_transformers.engine import TransformersEngine
            from polydraft_transformers.upstream import Generate

            assert isinstance(engine, TransformersEngine)
            return Generate(engine)

        how = "assistant_model" if request.plan.drafter else "prompt_lookup_num_tokens"
        return Upstream(f"generate({how}=)", opened)


def _devices() -> tuple[DeviceRecord, ...]:
    import torch

    from polydraft_transformers.resources import available_memory

    found = [DeviceRecord(name="cpu", description="CPU", free_memory_bytes=available_memory(torch.device("cpu")))]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            DeviceRecord(
                name=f"cuda:{index}",
                description=torch.cuda.get_device_name(index),
                total_memory_bytes=total,
                free_memory_bytes=free,
            )
        )
    return tuple(found)
