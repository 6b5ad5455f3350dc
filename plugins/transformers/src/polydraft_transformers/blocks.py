"""Where the tokens of one forward stand, which KV slots they write, and what they may see.

The token at position p lies in slot p of a full layer's buffer, and in slot p % ring of a sliding layer's. Nothing else
decides the slot, so a row's attention adds up the same keys in the same order whatever ran before it: plainly, or after
rejected drafts. A ring has room for the window and for the rows that a rollback takes back: a slot that a rejected
draft overwrote never holds a position that is still seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Block", "draft_block", "fixed_rows", "prefill_block", "ring_slots", "step_block"]


def ring_slots(window: int, step_rows: int) -> int:
    """Slots of a sliding layer: the window, one row more that Gemma 4's drafter sees, and those of two steps.

    A step writes up to ``step_rows`` slots beyond the newest token, and a rollback takes back as many tokens before it.
    """
    return -(-(window + 2 * step_rows + 2) // 8) * 8


def fixed_rows(k: int) -> int:
    """Rows of a fixed step: a multiple of 8, so that sessions with k up to 7, or without a drafter, give equal bits."""
    return -(-(k + 1) // 8) * 8


@dataclass(slots=True)
class Block:
    """One forward over ``rows`` tokens.

    ``positions`` has shape (rows,), and so has ``slots``: where a full layer stores each row's KV. Masks are additive
    (0 or -inf), shape (rows, keys), in the model's dtype; None where every key is seen. A prefill's sliding layers see
    ``prefix`` (slots of earlier tokens, in order) and the new rows, and store the new rows that the ring has room for;
    a step's write first and see the whole ring.
    """

    rows: int
    positions: torch.Tensor
    span: int
    full_mask: torch.Tensor | None
    sliding_mask: torch.Tensor | None
    slots: torch.Tensor | None = None
    ring: torch.Tensor | None = None
    prefix: torch.Tensor | None = None
    first: int | None = None

    @property
    def folds(self) -> bool:
        """Whether the query heads of a KV head become rows of it: in steps, where rows are few."""
        return self.first is None


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def step_block(
    positions: torch.Tensor, slots: torch.Tensor, span: int, ring: int, window: int | None, dtype: torch.dtype
) -> Block:
    """A step: every shape follows from the arguments' shapes, every value from ``positions``, on the device.

    Args:
        positions: Int64, shape (rows,). A padding row repeats the last token's.
        slots: Int64, shape (rows,): the positions, and for padding rows those behind the last token, which hold nothing
            yet: no two rows write one slot.
        span: Slots of the full layers that are attended; above every position.
        ring: Slots of the sliding layers; see ``ring_slots``.
        window: Tokens that a sliding layer sees, the row's own included; None if there is no such layer.
        dtype: Of the masks.
    """
    rows = positions.shape[0]
    column = positions[:, None]
    full = _additive(torch.arange(span, device=positions.device) <= column, dtype)
    if window is None:
        return Block(rows, positions, span, full, None, slots=slots)
    # How far back the latest position that can lie in a slot is. What a later row, or a rejected draft, has written
    # there seems at least `ring - 2 * step_rows` back, which is outside the window.
    back = (column - torch.arange(ring, device=positions.device)) % ring
    sliding = _additive(back < (column + 1).clamp(max=window), dtype)
    return Block(rows, positions, span, full, sliding, slots=slots, ring=slots % ring)


def prefill_block(
    first: int, count: int, ring: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Block:
    """A chunk of the prompt: ``count`` tokens from position ``first`` on."""
    positions = torch.arange(first, first + count, device=device)
    column = positions[:, None]
    full = _additive(torch.arange(first + count, device=device) <= column, dtype)
    if window is None:
        return Block(count, positions, first + count, full, None, first=first)
    earlier = torch.arange(max(first - window + 1, 0), first, device=device)
    seen = torch.cat([earlier, positions])
    sliding = _additive((seen <= column) & (seen > column - window), dtype)
    kept, prefix = positions[-ring:] % ring, earlier % ring
    return Block(count, positions, first + count, full, sliding, ring=kept, prefix=prefix, first=first)


def draft_block(
    position: torch.Tensor, span: int, ring: int, window: int | None, dtype: torch.dtype, *, all_seen: bool
) -> Block:
    """One row of an MTP drafter at the newest token's position p: it sees the target's KV before p, writes none.

    Upstream's mask lets the drafter see distances up to the window, inclusive: one row more than the target's own
    layers (create_bidirectional_sliding_window_mask in masking_utils.py).

    Args:
        position: Int64, shape (1,).
        span: Slots of the full layers that are attended.
        ring: Slots of the sliding layers.
        window: The target's.
        dtype: Of the masks.
        all_seen: Whether ``span`` equals the position, so that full layers need no mask.
    """
    column = position[:, None]
    full = None if all_seen else _additive(torch.arange(span, device=position.device) < column, dtype)
    if window is None:
        return Block(1, position, span, full, None)
    back = (column - torch.arange(ring, device=position.device)) % ring
    sliding = _additive((back > 0) & (back <= column.clamp(max=window + 1)), dtype)
    return Block(1, position, span, full, sliding)
