"""LiteRT-LM's own objects: an engine, and one answer of it, read by a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from polydraft.contract import GenerationSettings
from polydraft.errors import EngineError

__all__ = ["Answer", "Piece", "Runtime", "Sampler"]

_WAIT = 0.05
"""Seconds after which a reader that waits for text sees whether it was cancelled."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """How tokens are chosen, by LiteRT-LM's names."""

    top_k: int
    top_p: float
    temperature: float
    seed: int

    @classmethod
    def of(cls, settings: GenerationSettings, seed: int, vocab_size: int) -> Sampler:
        """The sampler of a call; greedy is the best of one."""
        if settings.temperature == 0:
            return cls(top_k=1, top_p=1.0, temperature=1.0, seed=0)
        return cls(
            top_k=settings.top_k or vocab_size,
            top_p=settings.top_p,
            temperature=settings.temperature,
            seed=seed & 0x7FFFFFFF,  # a C int
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of text as it came: with drafts, that of a round."""

    text: str
    received: float
    """A time of ``time.perf_counter``."""


class Runtime:
    """One engine of LiteRT-LM.

    Args:
        path: The model's file.
        device: ``cpu`` or ``gpu``.
        threads: On the CPU.
        length: Tokens of the KV cache.
        cache_dir: An existing folder for what is compiled; None: nothing is kept.
        speculates: Whether it drafts.

    Raises:
        EngineError: It cannot be made.
    """

    def __init__(
        self, path: Path, device: str, threads: int, length: int, cache_dir: Path | None, *, speculates: bool
    ) -> None:
        import litert_lm

        self._library = litert_lm
        litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
        backend = litert_lm.Backend.CPU(thread_count=threads) if device == "cpu" else litert_lm.Backend.GPU()
        try:
            self._engine = litert_lm.Engine(
                str(path),
                backend=backend,
                max_num_tokens=length,
                cache_dir=":nocache" if cache_dir is None else str(cache_dir),
                enable_speculative_decoding=speculates,
                enable_benchmark=speculates,  # which counts an answer's tokens
            )
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"LiteRT-LM {version('litert-lm-api')} cannot make an engine of {path}: {error}",
                "Its own words are on standard error.",
            ) from error

    def token_ids(self, text: str) -> list[int]:
        """What the engine makes of a text; nothing is added."""
        try:
            return [int(token_id) for token_id in self._engine.tokenize(text)]
        except RuntimeError as error:
            raise EngineError(f"LiteRT-LM cannot tokenize {text[:40]!r}: {error}", "Give other text.") from error

    def answer(self, contents: Sequence[str], sampler: Sampler, limit: int | None, *, speculate: bool) -> Answer:
        """Start to generate.

        Args:
            contents: The prompt, in parts that are tokenized one by one.
            sampler: How tokens are chosen.
            limit: Most tokens; None: as many as the context holds.
            speculate: Whether this answer is drafted.
        """
        config = self._library.SamplerConfig(
            top_k=sampler.top_k, top_p=sampler.top_p, temperature=sampler.temperature, seed=sampler.seed
        )
        try:
            session = self._engine.create_session(
                apply_prompt_template=False,
                sampler_config=config,
                max_output_tokens=limit,
                enable_speculative_decoding=speculate,
            )
        except RuntimeError as error:
            raise EngineError(f"LiteRT-LM cannot start a session: {error}") from error
        return Answer(session, contents, counts=speculate)

    def score(self, contents: Sequence[str], text: str) -> float:
        """Natural log-probability of the tokens of a text after a prompt."""
        try:
            with self._engine.create_session(apply_prompt_template=False) as session:
                session.run_prefill(list(contents))
                return float(sum(session.run_text_scoring([text]).token_scores[0]))
        except (RuntimeError, LookupError) as error:
            raise EngineError(f"LiteRT-LM cannot score {text!r}: {error}") from error

    def close(self) -> None:
        """Free the engine. May be called twice."""
        self._engine.close()


class Answer:
    """One answer of the engine, read by a thread of its own.

    Args:
        session: A session of LiteRT-LM that has seen nothing.
        contents: The prompt.
        counts: Whether the engine counts its tokens.
    """

    def __init__(self, session: Any, contents: Sequence[str], *, counts: bool) -> None:
        self._session = session
        self._contents = list(contents)
        self._counts = counts
        self._closed = False
        self.num_tokens: int | None = None
        """How many tokens the engine counted, of an answer with drafts that has ended by itself."""
        self._found: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="polydraft-litert-lm", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self._session.run_prefill(self._contents)
            if not self._closed:
                for responses in self._session.run_decode_async():
                    self._found.put(Piece(responses.texts[0], time.perf_counter()))
                if self._counts and not self._closed:
                    self.num_tokens = self._session.get_benchmark_info().last_decode_token_count
            self._found.put(None)
        except BaseException as error:  # raised again where the answer is read
            self._found.put(error)

    def wake(self) -> None:
        """Have ``pieces`` look whether it is cancelled. Any thread may call this."""
        self._found.put(Piece("", 0.0))

    def pieces(self) -> Iterator[Piece | None]:
        """The pieces of the answer; None: nothing has come for a while.

        Raises:
            EngineError: LiteRT-LM failed.
        """
        while True:
            try:
                found = self._found.get(timeout=_WAIT)
            except queue.Empty:
                yield None
                continue
            if found is None:
                return
            if isinstance(found, BaseException):
                if isinstance(found, RuntimeError):
                    raise EngineError(f"LiteRT-LM failed: {found}") from found
                raise found
            yield found if found.text else None

    def close(self) -> None:
        """End the answer, and wait until it has ended. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            self._session.cancel_process()
        self._thread.join()
        self._session.close()
