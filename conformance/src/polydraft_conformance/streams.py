"""Streams in detail: which output tokens were drafts, and which text each token completes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft import Session
    from polydraft.contract import Chunk, GenerationResult

__all__ = ["SeenRound", "Streamed", "stop_strings", "streamed"]


@dataclass(frozen=True, slots=True)
class SeenRound:
    """One round, as its chunk shows it."""

    number: int
    """0 is the prefill's."""
    before: int
    """Output tokens before it."""
    tokens: int
    drafted: int | None
    """None: not reported; so is ``accepted``."""
    accepted: int | None


@dataclass(frozen=True, slots=True)
class Streamed:
    """The chunks of one generation."""

    chunks: tuple[Chunk, ...]
    result: GenerationResult

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens."""
        return tuple(token for chunk in self.chunks for token in chunk.token_ids)

    @property
    def text(self) -> str:
        """All text."""
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def rounds(self) -> list[SeenRound]:
        """The chunks that have tokens."""
        found: list[SeenRound] = []
        before = 0
        for chunk in self.chunks:
            if chunk.token_ids:
                count = len(chunk.token_ids)
                found.append(SeenRound(len(found), before, count, chunk.num_draft_tokens, chunk.num_accepted_tokens))
                before += count
        return found

    def inside_drafts(self) -> list[int]:
        """Indices of output tokens that were accepted drafts and not the last of their round: a stop there cuts it."""
        indices, start = [], 0
        for chunk in self.chunks:
            # Accepted drafts come first in a chunk, the bonus token last.
            last = len(chunk.token_ids) - 1
            indices += [start + offset for offset in range(min(chunk.num_accepted_tokens or 0, last))]
            start += len(chunk.token_ids)
        return indices

    def texts(self) -> dict[int, str]:
        """Number of tokens -> the text so far, at the ends of chunks."""
        texts, count, text = {0: ""}, 0, ""
        for chunk in self.chunks:
            count += len(chunk.token_ids)
            text += chunk.text
            texts[count] = text
        return texts


def streamed(session: Session, prompt: Any, **settings: Any) -> Streamed:
    """Stream a generation to its end."""
    stream = session.stream(prompt, **settings)
    chunks = tuple(stream)
    assert stream.result is not None, "A stream that has ended has no result."
    return Streamed(chunks, stream.result)


def stop_strings(plain: Streamed, index: int) -> list[str]:
    """Stop strings that output token ``index`` completes, and no earlier one.

    Args:
        plain: Plain decoding, one token per chunk.
        index: Output token.

    Returns:
        One that lies within the token's text, and one that starts in the token before; none where the token adds no
        text, or where the text occurred earlier.
    """
    texts = plain.texts()
    if index not in texts or index + 1 not in texts:
        return []
    before, after = texts[index], texts[index + 1]
    found = []
    for start in (len(before), len(before) - 1, len(before) - 4):
        stop = after[start:] if 0 <= start < len(after) else ""
        if len(after) > len(before) and stop.strip() and stop not in found and _first(plain, stop, len(before)):
            found.append(stop)
    return found


def _first(plain: Streamed, stop: str, end_of_previous: int) -> bool:
    """Whether the first match of ``stop`` ends after the previous token's text, and no special token is before it.

    Stop strings are matched against special tokens' names as well, which are in ``raw_text`` only.
    """
    text, raw = plain.text, plain.result.raw_text
    start = text.find(stop)
    return start + len(stop) > end_of_previous and raw.find(stop) == start and raw.startswith(text[:start])


def pick(indices: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the indices, evenly spread."""
    step = max(1, len(indices) // count)
    return list(indices[::step])[:count]
