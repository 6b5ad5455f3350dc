"""The backend: what it can do, whether it can run here, and which models it refuses."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from polydraft.checkpoints.config import is_assistant
from polydraft.checkpoints.contents import libraries_digest
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

from polydraft_mlx.options import MlxOptions

__all__ = ["MlxBackend"]


class MlxBackend(Backend):
    """Runs checkpoints of Transformers and of MLX on Apple silicon, on Linux CPUs, and on CUDA."""

    options = MlxOptions

    def capabilities(self) -> Capabilities:
        """Capabilities with every supported version."""
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
        """Import mlx and list the devices."""
        installed = version("mlx-lm")
        try:
            devices = _devices()
        except (ImportError, OSError) as error:
            # What `import mlx.core` says after `pip install mlx` without an extra on Linux.
            reason = f"mlx cannot be imported: {error}"
            if "libmlx" in str(error):
                reason = (
                    "mlx is installed without its library; on Linux it needs an extra: [cpu], [cuda12] or [cuda13]."
                )
            remedy = f"pip install 'mlx-lm{'[cpu]' if sys.platform == 'linux' else ''}=={installed}'"
            if refused := system_error(error, "mlx cannot be imported"):
                reason, remedy = refused.message, refused.hint
            return Diagnosis(usable=False, engine_version=installed, reason=reason, remedy=remedy)
        return Diagnosis(
            usable=True,
            engine_version=installed,
            devices=devices,
            notes=(f"mlx {version('mlx')}",),
            rank=70 if len(devices) > 1 else 40,
            depends_on=(),
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Refuse an assistant as the target."""
        if is_assistant(target.config):
            return f"{target.id} is an assistant (a drafter); it cannot generate by itself."
        return None

    def build(self, request: LoadRequest) -> Mapping[str, str]:
        """MLX's libraries, byte for byte: they may come from another distribution than ``mlx``."""
        import mlx.core as mx

        return {"MLX's libraries": libraries_digest(Path(mx.__file__).parent)}

    def load_engine(self, request: LoadRequest) -> SteppingEngine:
        """Load the pair."""
        from polydraft_mlx.loading import load_pair

        return load_pair(request)

    def upstream(self, request: LoadRequest) -> Upstream | None:
        """mlx-lm's with a draft model; with an assistant mlx-vlm's, where it is installed."""
        kind = request.plan.kind
        if kind != "draft-model" and not (kind == "mtp" and find_spec("mlx_vlm")):
            return None

        def opened(engine: SteppingEngine | WholeEngine) -> UpstreamCall:
            from polydraft_mlx.engine import MlxEngine

            assert isinstance(engine, MlxEngine)
            if kind == "mtp":
                from polydraft_mlx.vlm_upstream import GenerateStep

                return GenerateStep(request, engine.running.dtype)
            from polydraft_mlx.upstream import StreamGenerate

            return StreamGenerate(engine, request)

        return Upstream("generate_step(draft_kind='mtp')" if kind == "mtp" else "stream_generate(draft_model=)", opened)


def _devices() -> tuple[DeviceRecord, ...]:
    import mlx.core as mx

    from polydraft_mlx.resources import devices, find_device, free_memory

    found = []
    for name in devices():
        device = find_device(name)
        info = mx.device_info(device)
        total = info.get("memory_size") or info.get("total_memory")
        found.append(
            DeviceRecord(
                name=name,
                description=str(info.get("device_name", name)),
                total_memory_bytes=int(total) if total else None,
                free_memory_bytes=free_memory(device),
            )
        )
    return tuple(found)
