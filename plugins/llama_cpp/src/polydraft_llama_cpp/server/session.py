"""A session on a llama-server: requests translated, rounds read from its timings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from polydraft._session import Generation, Session
from polydraft.contract import Capabilities, Round, RunningInfo, TokenRequest
from polydraft.errors import EngineError, UnsupportedError

from polydraft_llama_cpp.model import Model
from polydraft_llama_cpp.server.client import Client
from polydraft_llama_cpp.server.process import ServerProcess
from polydraft_llama_cpp.tokenizer import GgufTokenizer

__all__ = ["LlamaServerSession"]


@dataclass
class _Pending:
    """Tokens that the server sent with equal timings: those of one round."""

    tokens: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


class LlamaServerSession(Session):
    """See ``Session``. A server cannot turn drafts off for a request: plain calls go to a second server.

    Args:
        vocabulary: The target's file, loaded without weights.
        running: What runs.
        capabilities: The backend's.
        drafting: The server with the drafter; of a plain session the only one.
        plain: Starts (or names) the server without drafter, on the first plain call; None: there is none.
        owned: Processes to end with the session.
    """

    def __init__(
        self,
        vocabulary: Model,
        running: RunningInfo,
        capabilities: Capabilities,
        drafting: Client,
        plain: Callable[[], ServerProcess] | None,
        owned: list[ServerProcess],
    ) -> None:
        self._vocabulary = vocabulary
        self._drafting = drafting
        self._start_plain = plain
        self._plain: Client | None = None
        self._owned = owned
        self._starting = threading.Lock()
        super().__init__(GgufTokenizer(vocabulary), running, capabilities)

    @property
    def drafting_process(self) -> int | None:
        """Process id of the server with the drafter; None if it was not started here."""
        return self._owned[0].pid if self._owned else None

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Ask for tokens until the tracker says stop; where the server ends at an id that is no end here, go on."""
        try:
            yield from self._rounds(generation)
        except EngineError as error:
            for process in self._owned:
                try:
                    process.check_alive()
                except EngineError as ended:
                    raise ended from error
            raise

    def _rounds(self, generation: Generation) -> Iterator[Round]:
        request = generation.request
        client = self._client(speculate=request.speculate)
        limit = min(request.settings.max_new_tokens, request.max_total_tokens - len(request.prompt_token_ids))
        emitted: list[int] = []
        while len(emitted) < limit and not generation.cancelled.is_set():
            for pending in self._answer(client, request, emitted, limit - len(emitted), generation):
                finished, kept = None, 0
                for index, token in enumerate(pending.tokens):
                    finished = generation.tracker.push(token, is_draft=index < pending.accepted)
                    kept += 1
                    if finished is not None:
                        break
                emitted.extend(pending.tokens[:kept])
                yield Round(
                    token_ids=tuple(pending.tokens[:kept]),
                    num_draft_tokens=pending.drafted,
                    num_accepted_tokens=min(pending.accepted, kept),
                )
                if finished is not None:
                    return

    def _answer(
        self, client: Client, request: TokenRequest, emitted: list[int], count: int, generation: Generation
    ) -> Iterator[_Pending]:
        """The rounds of one request to the server."""
        settings = request.settings
        completion = client.complete(
            {
                "prompt": [*request.prompt_token_ids, *emitted],
                "n_predict": count,
                "temperature": settings.temperature,
                "top_k": settings.top_k,
                "top_p": settings.top_p,
                "min_p": settings.min_p,
                "samplers": ["top_k", "top_p", "min_p", "temperature"],
                # The server takes 32 bits, and the largest for "draw one"; each continuation has a seed of its own.
                "seed": (request.seed + 0x9E3779B1 * (request.stream + len(emitted))) % 0xFFFFFFFF,
                "return_tokens": True,
                "timings_per_token": True,
                "cache_prompt": bool(emitted),
            }
        )
        pending, clock, drafted, accepted, got = _Pending(), None, 0, 0, 0
        try:
            for event in completion:
                if generation.cancelled.is_set():
                    return
                timings, tokens = event.get("timings") or {}, event.get("tokens") or []
                if tokens and timings.get("predicted_ms") != clock and pending.tokens:
                    yield pending
                    pending = _Pending()
                if tokens:
                    clock = timings.get("predicted_ms")
                    now = int(timings.get("draft_n", 0)), int(timings.get("draft_n_accepted", 0))
                    pending.drafted += now[0] - drafted
                    pending.accepted += now[1] - accepted
                    drafted, accepted = now
                    pending.tokens.extend(int(token) for token in tokens)
                    got += len(tokens)
            if pending.tokens:
                yield pending
        finally:
            completion.close()
        if not got:
            raise EngineError("llama-server gave an answer without tokens.", "Its version is perhaps too old.")

    def _client(self, *, speculate: bool) -> Client:
        if speculate or self.running.method is None:
            return self._drafting
        with self._starting:
            if self._plain is None:
                if self._start_plain is None:
                    raise UnsupportedError(
                        f"The server at {self._drafting.url} drafts for every request.",
                        "Load a second session with drafter=None on a server without drafter.",
                    )
                process = self._start_plain()
                self._owned.append(process)
                self._plain = process.client
            return self._plain

    def close_engine(self) -> None:
        """End the servers that were started here."""
        for process in self._owned:
            process.close()
        self._vocabulary.free()


def drafts_in(client: Client, prompt: list[int]) -> Any:
    """``draft_n`` of a short greedy answer; None where the server drafted nothing."""
    body = {"prompt": prompt, "n_predict": 12, "temperature": 0, "cache_prompt": False}
    return client.post("/completion", body).get("timings", {}).get("draft_n")
