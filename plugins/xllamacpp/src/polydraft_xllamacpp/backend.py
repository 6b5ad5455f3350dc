"""The backend ``xllamacpp``: llama.cpp's own server in this process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

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
    WholeEngine,
)

from polydraft_xllamacpp.options import XllamacppOptions
from polydraft_xllamacpp.plugin import DRAFTER_KINDS

__all__ = ["XllamacppBackend"]

_SAMPLING = frozenset(
    (
        *("temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "logprobs"),
        *("repetition_penalty", "logit_bias", "banned_token_ids", "guided"),
    )
)
"""What llama.cpp does as ``GenerationSettings`` says: its frequency and presence penalties count the prompt, too."""


class XllamacppBackend(Backend):
    """Runs GGUF files, and checkpoints that it can convert to GGUF."""

    options = XllamacppOptions

    def capabilities(self) -> Capabilities:
        """What the server offers.

        It draws one number per emitted token, so that a seed gives the same tokens with and without drafts, except
        where the noise of the logits flips a draw: more than can be called identical.
        """
        return Capabilities(
            drafter_kinds=DRAFTER_KINDS,
            sampling=_SAMPLING,
            concurrent_calls=True,
            max_speculative_tokens=16,
        )

    def diagnose(self) -> Diagnosis:
        """Import the engine, and list its devices."""
        try:
            import xllamacpp as engine

            from polydraft_xllamacpp.settings import gpus

            found = gpus(engine)
        except (ImportError, OSError, AttributeError) as error:
            return Diagnosis(
                usable=False,
                engine_version=version("xllamacpp"),
                reason=f"xllamacpp {version('xllamacpp')} cannot be imported: {error}",
                remedy="pip install --force-reinstall --no-deps xllamacpp",
            )
        devices = [
            DeviceRecord(
                name=name,
                description=one["description"],
                total_memory_bytes=one["memory_total"] or None,
                free_memory_bytes=one["memory_free"] or None,
            )
            for name, one in found.items()
        ]
        notes = [engine.get_system_info().strip(" |")]
        if not devices:
            notes.append("The wheel is for the CPU only; xllamacpp's own package index has wheels for GPUs.")
        return Diagnosis(
            usable=True,
            engine_version=version("xllamacpp"),
            devices=(DeviceRecord(name="cpu", description="CPU"), *devices),
            notes=tuple(notes),
            rank=42,
            depends_on=(),
        )

    def conformance_exclusions(self) -> Iterable[Exclusion]:
        """Log-probabilities of characters that are spread over tokens, which tiny-e2b draws where all is allowed."""
        yield Exclusion(
            check="test_samples_follow_the_settings",
            pair="tiny-e2b",
            drafter_kind="ngram",
            status="notyet",
            reason="llama.cpp's server gives no log-probabilities of the first tokens of a character that is spread "
            "over several, so such an answer is an error; whether a sample has one depends on the seed.",
            probe="polydraft_xllamacpp.probes:split_characters_lack_logprobs",
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Why a checkpoint that is not GGUF cannot be converted."""
        from polydraft_gguf.files import refusal

        return refusal(target, plan)

    def build(self, request: LoadRequest) -> Mapping[str, str]:
        """The shared library, byte for byte, the instruction sets that GGML uses here, and the code of the plugin."""
        import xllamacpp as engine
        from polydraft.checkpoints.contents import libraries_digest
        from polydraft_gguf.files import code

        folder = Path(engine.__file__).parent
        return {"xllamacpp's library": libraries_digest(folder), "GGML": engine.get_system_info(), **code()}

    def server_command(self, request: LoadRequest, *, host: str, port: int) -> ServerCommand:
        """The command of the same server, as a program of this plugin. It asks for the key in ``LLAMA_API_KEY``."""
        from polydraft_xllamacpp.loading import server_command

        return server_command(request, host=host, port=port)

    def load_engine(self, request: LoadRequest) -> WholeEngine:
        """Start the server in this process."""
        from polydraft_xllamacpp.loading import load_pair

        return load_pair(request)
