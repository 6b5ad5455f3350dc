"""The backend ``ollama``: the models of a running server."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING

from polydraft.contract import Backend, Capabilities, DeviceRecord, Diagnosis, LoadRequest
from polydraft.engine_parts.server_options import said_by
from polydraft.errors import PolydraftError
from pydantic import ValidationError

from polydraft_ollama.options import OllamaOptions

if TYPE_CHECKING:
    from polydraft.contract import ModelSource, SpeculationPlan, WholeEngine

__all__ = ["OllamaBackend"]

_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "seed"})
"""Its frequency and presence penalties count the prompt, too. Its log-probabilities are 0 where tokens were drafted
(llama.cpp#27972)."""
_SECONDS = 2.0
"""How long a diagnosis waits for each answer of the server."""
_SHOWN = 20
"""Models that a diagnosis names."""


class OllamaBackend(Backend):
    """A client of a server at ``OLLAMA_HOST``, or of the one on this machine."""

    options = OllamaOptions

    def capabilities(self) -> Capabilities:
        """What the server offers. It shows no tokens, and ends at its end of sequence, whatever is asked."""
        return Capabilities(
            drafter_kinds=frozenset({"mtp"}), sampling=_SAMPLING, ignores_eos=False, concurrent_calls=True
        )

    def diagnose(self) -> Diagnosis:
        """Whether the server answers, its version and its models. ``auto`` never chooses it."""
        from polydraft_ollama.client import OllamaClient, can_draft
        from polydraft_ollama.plugin import FIRST_VERSION

        notes, found = [], ""
        try:
            client = OllamaClient(OllamaOptions(connect_timeout=_SECONDS, answer_timeout=_SECONDS))
            found = client.version()
            notes.append(f"Ollama {found} at {client.url}.")
            if not can_draft(found):
                notes.append(f"It has no speculative decoding; update it to {FIRST_VERSION} or later.")
            names = [client.shown(model["name"]) for model in client.models()]
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            models = f"{', '.join(names[:_SHOWN])}{more}" if names else "none; `ollama pull` downloads one"
            notes.append(f"Its models: {models}.")
        # A server elsewhere may be named when a model is loaded.
        except ValidationError as error:
            notes.append(said_by(error))
        except PolydraftError as error:
            notes.append(str(error))
        return Diagnosis(
            usable=True,
            engine_version=found or package_version("ollama"),
            devices=(DeviceRecord(name="cpu", description="the server's"),),
            notes=tuple(notes),
            rank=0,
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Why files cannot be made into a model of the server."""
        if target.kind == "served":
            return None
        from polydraft_gguf.files import refusal

        return refusal(target, plan)

    def build(self, request: LoadRequest) -> Mapping[str, str] | None:
        """The server's version and the digest of the model's files; None where it does not tell them."""
        from polydraft_ollama.client import OllamaClient
        from polydraft_ollama.model import digest_of

        options: OllamaOptions = request.engine_options or OllamaOptions()
        name = options.create_as or request.target.id
        try:
            client = OllamaClient(options, name)
            version, digest = client.version(), digest_of(client, name)
        except PolydraftError:
            return None
        return {"Ollama": version, "model": digest} if digest else None

    def load_engine(self, request: LoadRequest) -> WholeEngine:
        """Find the model on the server, or create it there."""
        from polydraft_ollama.loading import load_pair

        return load_pair(request)
