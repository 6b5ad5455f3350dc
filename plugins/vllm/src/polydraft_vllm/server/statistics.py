"""A server's statistics of speculation, from a response or from its counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polydraft.contract import GenerationStats

if TYPE_CHECKING:
    from polydraft_vllm.server.client import ServerClient

__all__ = ["CounterReading", "from_response"]

_DRAFTS = "vllm:spec_decode_num_drafts_total"
_DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens_total"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
_FINISHED = "vllm:request_success_total"
_BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")


def from_response(speculation: Mapping[str, Any]) -> GenerationStats:
    """Counts from a response's ``metrics.speculative_decoding``; ``num_tokens`` is left 0.

    vLLM's numbers include drafts that were accepted and then cut off by a limit.

    Raises:
        ValueError: They cannot be true. (Other errors: they are of another shape.)
    """
    # Bin j: the number of rounds in which exactly j drafts were accepted.
    histogram = [int(count) for count in speculation.get("acceptance_histogram") or ()]
    drafts, drafted = int(speculation["num_spec_steps"]), int(speculation["num_draft_tokens"])
    accepted = int(speculation["num_accepted_draft_tokens"])
    if drafts < 0 or not 0 <= accepted <= drafted or min(histogram, default=0) < 0:
        raise ValueError(f"{accepted} of {drafted} drafted tokens were accepted, in {drafts} rounds")
    return GenerationStats(
        num_tokens=0,
        num_drafts=drafts,
        num_draft_tokens=drafted,
        num_accepted_tokens=accepted,
        accepted_per_position=tuple(sum(histogram[position + 1 :]) for position in range(len(histogram) - 1)),
    )


class CounterReading:
    """The server's counters at one time. The difference of two is that of one request only if it ran alone."""

    def __init__(self, client: ServerClient) -> None:
        self._samples = client.metrics()

    @property
    def speculates(self) -> bool | None:
        """Whether the server was started with a drafter; None if it has none of vLLM's counters."""
        return _DRAFTS in self._samples if any(name.startswith("vllm:") for name in self._samples) else None

    @property
    def busy(self) -> bool:
        """Whether a request is running or waiting."""
        return any(self._sum(name) > 0 for name in _BUSY)

    def since(self, earlier: CounterReading) -> GenerationStats | None:
        """The counts of the one request that has run since ``earlier``; None unless it was exactly one."""
        # Idle before and after, and one request finished: no other request's drafts are in the difference.
        alone = not earlier.busy and not self.busy and self._sum(_FINISHED) - earlier._sum(_FINISHED) == 1
        if not alone or not self.speculates:
            return None
        return GenerationStats(
            num_tokens=0,
            num_drafts=int(self._sum(_DRAFTS) - earlier._sum(_DRAFTS)),
            num_draft_tokens=int(self._sum(_DRAFT_TOKENS) - earlier._sum(_DRAFT_TOKENS)),
            num_accepted_tokens=int(self._sum(_ACCEPTED) - earlier._sum(_ACCEPTED)),
            accepted_per_position=tuple(
                int(after - before)
                for after, before in zip(self._positions(), earlier._positions() or [0] * 128, strict=False)
            ),
        )

    def _sum(self, name: str) -> float:
        return sum(self._samples.get(name, {}).values())

    def _positions(self) -> list[float]:
        by_position: dict[int, float] = {}
        for labels, value in self._samples.get(_PER_POSITION, {}).items():
            position = int(dict(labels).get("position", 0))
            by_position[position] = by_position.get(position, 0.0) + value
        return [by_position[position] for position in sorted(by_position)]
