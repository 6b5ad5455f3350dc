"""The backend: diagnosis, capabilities, and from a load request to an engine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError

from polydraft.contract import (
    Backend,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    Exclusion,
    LoadRequest,
    ModelSource,
    SpeculationPlan,
    SteppingEngine,
)

from polydraft_llama_cpp.options import LlamaCppOptions

__all__ = ["LlamaCppBackend"]

_INSTALL = "pip install 'llama-cpp-python>=0.3.36'"


class LlamaCppBackend(Backend):
    """Runs GGUF files in this process, and checkpoints that it can convert to GGUF."""

    options = LlamaCppOptions

    def capabilities(self) -> Capabilities:
        """What works with the installed version. Bitwise steps are refused on GPUs: they were measured on the CPU."""
        from polydraft_llama_cpp.bindings import extension

        kinds = {"draft-model", "ngram", "mtp"}
        try:
            if extension() is None:
                kinds.remove("mtp")
        except ImportError:
            pass  # not installed: `diagnose` says so
        return Capabilities.model_validate(
            {
                "drafter_kinds": kinds,
                "exactness": {"standard", "bitwise"},
                "seed_identical": True,
                "exposes_logits": True,
                "concurrent_calls": False,
                "max_speculative_tokens": 16,
            }
        )

    def diagnose(self) -> Diagnosis:
        """Import the engine and look at its devices."""
        from polydraft_llama_cpp import bindings

        try:
            installed = bindings.version_of()
        except PackageNotFoundError:
            return Diagnosis(usable=False, reason="llama-cpp-python is not installed.", remedy=_how_to_build())
        try:
            found = bindings.devices()
        except (ImportError, AttributeError) as error:
            return Diagnosis(
                usable=False,
                engine_version=installed,
                reason=f"llama-cpp-python {installed} cannot be imported: {error}",
                remedy=f"Build it again: {_how_to_build('--force-reinstall --no-cache-dir ')}",
            )
        notes = [bindings.library().llama_print_system_info().decode(errors="replace").strip(" |\n")]
        if reason := bindings.missing_for_mtp():
            notes.append(
                f"{reason} engine_options={{'allow_untested': True}} runs MTP all the same, if it is exported."
            )
        if len(found) == 1:
            notes.append("Built for the CPU only. " + _gpu_hint())
        return Diagnosis(
            usable=True,
            engine_version=installed,
            devices=tuple(
                DeviceRecord(
                    name=device.name,
                    description=device.description,
                    total_memory_bytes=device.total_bytes or None,
                    free_memory_bytes=device.free_bytes or None,
                )
                for device in found
            ),
            notes=tuple(notes),
            rank=45,
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Checkpoints that are not GGUF and cannot be converted."""
        from polydraft_llama_cpp.conversion.checkpoint import Checkpoint
        from polydraft_llama_cpp.conversion.write import why_not

        for source in (target, plan.drafter):
            if source is None or source.format == "gguf":
                continue
            if source.path is None:
                return f"{source.id} has safetensors weights; load a GGUF file of it (`polydraft pairs` lists some)."
            if reason := why_not(Checkpoint(source.path)):
                return reason
        return None

    def conformance_exclusions(self) -> Iterable[Exclusion]:
        """The drafter's window, and the CPU's GELU; a build with a GPU is checked there, where GELU is exact."""
        from polydraft_llama_cpp.bindings import devices

        yield Exclusion(
            check="test_drafter_logits_equal_reference",
            drafter_kind="mtp",
            status="notyet",
            reason="In sliding-window layers llama.cpp lets an MTP drafter see two tokens fewer than Transformers; "
            "up to the window's length the logits are the same.",
            probe="polydraft_llama_cpp.probes:drafter_window_is_narrow",
        )
        if all(device.is_cpu for device in devices()):
            yield Exclusion(
                check="test_rows_equal_single_steps",
                pair="tiny-[e23]*",
                status="notyet",
                reason="llama.cpp's CPU looks GELU up in a table of float16, so that logits in float32 carry float16's "
                "noise (0.002); tiny-llama has no GELU, and passes.",
                probe="polydraft_llama_cpp.probes:gelu_is_rounded",
            )

    def load_engine(self, request: LoadRequest) -> SteppingEngine:
        """Load the pair; see ``loading``."""
        from polydraft_llama_cpp.loading import load_pair

        return load_pair(request)


def _gpu_hint() -> str:
    flag = "-DGGML_METAL=on" if sys.platform == "darwin" else "-DGGML_CUDA=on"
    return (
        f"For a GPU: CMAKE_ARGS='{flag}' pip install --force-reinstall --no-cache-dir llama-cpp-python "
        "(Vulkan: -DGGML_VULKAN=on)."
    )


def _how_to_build(extra: str = "") -> str:
    """It is a source package: what building it here lacks, then the command."""
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))
    missing = "" if compiler else "Install a C++ compiler first (apt install g++; xcode-select --install). "
    return f"{missing}{_INSTALL.replace('install ', f'install {extra}', 1)} (compiles for some minutes). {_gpu_hint()}"
