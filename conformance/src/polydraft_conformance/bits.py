"""The bits of logits, by the position they choose for: what ``exactness="bitwise"`` promises to be equal."""

from __future__ import annotations

import hashlib
import secrets
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from polydraft.errors import InvalidRequestError, UnsupportedError

from polydraft_conformance.counting import RowRecorder, stepping_engine, wrapped_sequences

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polydraft.contract import GenerationResult, SteppingEngine
    from polydraft.verification import Logits

    from polydraft_conformance.bench import Bench
    from polydraft_conformance.prompts import WindowPrompt

__all__ = ["BitwiseRun", "bits_of", "bitwise_sessions", "recorded_bits", "run_bitwise"]

_DTYPES = ("bfloat16",)
"""Run in addition to the suite's own dtype: where the last bits matter most."""


@dataclass(slots=True)
class BitwiseRun:
    """One prompt under one set of settings, plainly and with speculation."""

    prompt: WindowPrompt
    settings: dict[str, Any]
    plain: GenerationResult
    speculative: GenerationResult
    plain_bits: dict[int, bytes] = field(default_factory=dict)
    """Absolute position -> digest of the logits that the token there was chosen from; empty for a whole engine."""
    speculative_bits: dict[int, bytes] = field(default_factory=dict)
    difference: str = ""
    """How the two outputs differ, for a message; empty if they are the same tokens."""

    @property
    def positions(self) -> range:
        """Absolute positions of the output."""
        start = len(self.plain.prompt_token_ids)
        return range(start, start + len(self.plain.token_ids))

    @property
    def place(self) -> str:
        """Prompt and settings, for messages."""
        temperature = self.settings["temperature"]
        how = f"temperature {temperature:g}" if temperature else "greedy"
        return f"(prompt {self.prompt.place} of the window, {how})"


def bits_of(row: Logits) -> bytes:
    """A digest of one row of logits. Float32 holds every bit of the narrower floats.

    Rows with NaN get a digest that no other has: equal bits of NaN are not equal logits.
    """
    if np.isnan(row).any():
        return secrets.token_bytes(16)
    return hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=16).digest()


def bitwise_sessions(bench: Bench, refused: dict[str, str]) -> Iterator[Bench]:
    """Sessions with ``exactness="bitwise"``: in the suite's dtype, and in bfloat16 where the backend takes it.

    In a quick run, of pairs after the first only the one in bfloat16, or else in the suite's dtype.

    Args:
        bench: Loads them; each is closed before the next one.
        refused: Gets the dtypes that the backend refuses, with its reason; on a CPU never the suite's own.
    """
    usual = bench.suite.options.dtype
    one = bench.quick and bench.case.pair != bench.suite.pairs[0]
    for dtype in dict.fromkeys((*_DTYPES, usual) if one else (usual, *_DTYPES)):
        try:
            session = bench.suite.load(bench.case, exactness="bitwise", dtype=dtype)
        except (UnsupportedError, InvalidRequestError) as error:
            # Steps of fixed shape may have been measured on CPUs only: elsewhere a refusal takes the claim back.
            elsewhere = bench.suite.options.device != "cpu" and isinstance(error, UnsupportedError)
            if dtype == usual and not elsewhere:
                raise
            refused[dtype] = str(error)
            continue
        with closing(session):
            yield bench.on(session)
        if one:
            return


def run_bitwise(bench: Bench, settings: Sequence[dict[str, Any]]) -> list[BitwiseRun]:
    """Decode the window prompts with each of the settings, plainly and with speculation; keep every row's bits.

    In a quick run, those across and past the window; settings after the first only past it.
    """
    runs = []
    session, engine = bench.session, stepping_engine(bench.session)
    prompts = bench.window_prompts[1:] if bench.quick else bench.window_prompts
    for prompt in prompts:
        for some in settings[:1] if bench.quick and prompt is not prompts[-1] else settings:
            call = {**some, "max_new_tokens": prompt.max_new_tokens, "ignore_eos": True}
            token_ids = list(prompt.token_ids)
            with recorded_bits(engine) as plain_bits:
                plain = session.generate(token_ids, speculate="off", **call)
            with recorded_bits(engine) as speculative_bits:
                speculative = session.generate(token_ids, speculate="on", **call)
            run = BitwiseRun(prompt, call, plain, speculative, plain_bits, speculative_bits)
            wrong = (
                f"Bitwise exactness is broken in {session.running.dtype}: speculation changed the output {run.place}."
            )
            try:
                bench.same(plain, speculative, wrong=wrong)
            except AssertionError as error:  # judged now, while the session is open
                run.difference = str(error)
            runs.append(run)
    return runs


@contextmanager
def recorded_bits(engine: SteppingEngine | None) -> Iterator[dict[int, bytes]]:
    """Inside the ``with`` block, digests of the logits by the absolute position that they choose for.

    A later forward replaces an earlier one's: rows of rejected drafts belong to another text.
    """
    bits: dict[int, bytes] = {}
    if engine is None:
        yield bits
        return

    def keep(first: int, rows: Logits) -> None:
        bits.update((first + index, bits_of(row)) for index, row in enumerate(rows))

    with wrapped_sequences(engine, lambda inner: RowRecorder(inner, keep)):
        yield bits
