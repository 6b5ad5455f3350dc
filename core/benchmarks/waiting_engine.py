"""An engine that computes nothing: each round waits, as a GPU's does, and emits three tokens.

What a process of its own costs shows best here: an engine that computes varies by more than that from run to run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from polydraft.contract import (
    Backend,
    BackendRecord,
    Capabilities,
    Diagnosis,
    EngineOptions,
    Generation,
    LoadRequest,
    ModelSource,
    Round,
    RunningInfo,
    SpeculationPlan,
    WholeEngine,
)

__all__ = ["RECORD", "Waiting", "request"]

RECORD = BackendRecord(
    name="waiting",
    factory="waiting_engine:Waiting",
    summary="computes nothing",
    formats=frozenset({"none"}),
    drafter_kinds=frozenset({"ngram"}),
    engine="none",
    install_hint="pip install polydraft",
)
_TOKENS = (7, 8, 9)
_DRAFTED, _ACCEPTED = 4, 2


class Options(EngineOptions):
    """How long a round waits."""

    milliseconds: float = 0.0


class Bytes:
    """A tokenizer whose tokens are the printable bytes."""

    vocab_size = 96
    bos_token_id = None
    eos_token_ids: frozenset[int] = frozenset()
    special_token_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return [byte % self.vocab_size for byte in text.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        """The byte of a token."""
        return bytes([32 + token_id])

    def token_id(self, token: str) -> int | None:
        """No token has a name."""
        return None

    def chat(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> list[int]:
        """The first message."""
        return self.encode(str(messages[0]["content"]))


class Engine(WholeEngine):
    """Waits."""

    def __init__(self, request: LoadRequest) -> None:
        assert isinstance(request.engine_options, Options)
        self._seconds = request.engine_options.milliseconds / 1000
        self.tokenizer = Bytes()
        self.running = RunningInfo.of(
            request,
            engine="none",
            engine_version="1",
            dtype="none",
            device="cpu",
            context_length=1 << 20,
            concurrency="serial",
        )

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Rounds of three tokens, two of them drafts, until the output ends."""
        while generation.finish_reason is None:
            if self._seconds:
                time.sleep(self._seconds)
            yield generation.emit(_TOKENS, num_draft_tokens=_DRAFTED, num_accepted_tokens=_ACCEPTED)

    def close(self) -> None:
        """There is nothing to free."""


class Waiting(Backend):
    """Makes the engine."""

    options = Options

    def capabilities(self) -> Capabilities:
        """It can do nothing."""
        return Capabilities(drafter_kinds=frozenset({"ngram"}), sampling=frozenset({"seed"}))

    def diagnose(self) -> Diagnosis:
        """Always there."""
        return Diagnosis(usable=True, engine_version="1")

    def load_engine(self, request: LoadRequest) -> Engine:
        """There are no weights."""
        return Engine(request)


def request(milliseconds: float) -> LoadRequest:
    """What ``load`` would hand to the backend."""
    return LoadRequest(
        backend="waiting",
        target=ModelSource(id="none", kind="local", format="none"),
        plan=SpeculationPlan(kind="ngram", num_speculative_tokens=_DRAFTED, chosen_by="caller"),
        engine_options=Options(milliseconds=milliseconds),
    )
