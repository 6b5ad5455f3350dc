"""The backend ``llama_cpp``: llama.cpp in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from polydraft.contract import (
    Backend,
    Capabilities,
    Diagnosis,
    DrafterKind,
    Exclusion,
    LoadRequest,
    ModelSource,
    SpeculationPlan,
    SteppingEngine,
)

from polydraft_llama_cpp.options import LlamaCppOptions
from polydraft_llama_cpp.plugin import COMPILE, CUDA_FLAGS
from polydraft_llama_cpp.wheel import TESTED

__all__ = ["LlamaCppBackend"]


class LlamaCppBackend(Backend):
    """Runs GGUF files in this process, and checkpoints that it can convert to GGUF."""

    options = LlamaCppOptions

    def capabilities(self) -> Capabilities:
        """Capabilities with the installed version. Bitwise steps were measured on the CPU: GPUs are refused at load."""
        from polydraft_llama_cpp.bindings import extension

        kinds: set[DrafterKind] = {"draft-model", "ngram", "mtp"}
        try:
            if extension() is None:
                kinds.remove("mtp")
        except ImportError:
            pass  # `diagnose` reports it
        return Capabilities(
            drafter_kinds=frozenset(kinds),
            exactness=frozenset({"standard", "bitwise"}),
            seed_identical=True,
            exposes_logits=True,
            reuses_prefixes=True,
            max_speculative_tokens=16,
        )

    def diagnose(self) -> Diagnosis:
        """Import the engine and list its devices."""
        from polydraft_llama_cpp import bindings
        from polydraft_llama_cpp.resources import devices

        installed, compiled = bindings.version_of(), bindings.engine_name() == bindings.COMPILED
        try:
            found = devices()
        except (ImportError, AttributeError) as error:
            return Diagnosis(
                usable=False,
                engine_version=installed,
                reason=f"{bindings.engine_name()} {installed} cannot be imported: {error}",
                remedy="Build it again: pip install --force-reinstall --no-cache-dir llama-cpp-python (it needs a C++ "
                f"compiler and some minutes). {_gpu_hint()}"
                if compiled
                else f"pip install xllamacpp=={TESTED[-1]}",
            )
        notes = [f"{bindings.engine_name()}: {bindings.system_info()}"]
        if reason := bindings.missing_for_mtp():
            notes.append(
                f"{reason} `engine_options={{'allow_untested': True}}` runs MTP nevertheless, if it is exported."
            )
        if len(found) == 1:
            notes.append("Built for the CPU only. " + _gpu_hint())
        if not compiled:
            notes.append("llama-cpp-python, compiled for this processor, is faster: " + COMPILE)
        return Diagnosis(
            usable=True,
            engine_version=installed,
            devices=tuple(device.record for device in found),
            notes=tuple(notes),
            rank=45,
            depends_on=(),
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Why a checkpoint that is not GGUF cannot be converted."""
        from polydraft_gguf.files import refusal

        return refusal(target, plan)

    def build(self, request: LoadRequest) -> Mapping[str, str]:
        """The shared libraries, byte for byte, the instruction sets that GGML uses here, and the code of the plugin."""
        from polydraft_gguf.files import code

        from polydraft_llama_cpp.bindings import build

        return {**build(), **code()}

    def conformance_exclusions(self) -> Iterable[Exclusion]:
        """The drafter's window, and the CPU's GELU. A build for a GPU is checked on that, where GELU is exact."""
        from polydraft_llama_cpp.resources import devices

        yield Exclusion(
            check="test_drafter_logits_equal_reference",
            drafter_kind="mtp",
            status="notyet",
            reason="In sliding-window layers an MTP drafter sees two tokens fewer in llama.cpp than in Transformers; "
            "up to the window's length the logits are the same.",
            probe="polydraft_llama_cpp.probes:drafter_window_is_narrow",
        )
        if all(device.is_cpu for device in devices()):
            yield Exclusion(
                check="test_rows_equal_single_steps",
                pair="tiny-[e23]*",
                status="notyet",
                reason="On the CPU, llama.cpp looks GELU up in a table of float16 values, so logits in float32 carry "
                "float16's noise (0.002); tiny-llama, which does not use GELU, passes.",
                probe="polydraft_llama_cpp.probes:gelu_is_rounded",
            )

    def load_engine(self, request: LoadRequest) -> SteppingEngine:
        """Load the pair into this process."""
        from polydraft_llama_cpp.loading import load_pair

        return load_pair(request)


def _gpu_hint() -> str:
    flag = "-DGGML_METAL=on" if sys.platform == "darwin" else CUDA_FLAGS
    return (
        f"For a GPU: CMAKE_ARGS='{flag}' pip install --force-reinstall --no-cache-dir llama-cpp-python "
        "(Vulkan: -DGGML_VULKAN=on)."
    )
