"""A model's KV, in buffers where a token's position decides its slot, and what each row of a forward sees of them.

The token at position p lies in slot p of a full layer's buffer, and in slot p % ring of a sliding layer's. Nothing else
decides the slot, so a row's attention adds up the same keys in the same order whatever ran before it: plain steps, or
rejected drafts. A ring has room for the window and for the rows that a rollback takes back: a slot that a rejected
draft overwrote never holds a position that is still seen. Rolling back, past a sliding window too, is therefore setting
``KvCache.length``: what rejected drafts wrote is masked until it is overwritten.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polydraft_transformers.graphs import Captured

__all__ = ["KvCache", "SavedKv", "StepLayout", "capacity_at", "ring_slots"]

_FIRST_CAPACITY = 256
_MADE = itertools.count()


def ring_slots(window: int, step_rows: int) -> int:
    """Slots of a sliding layer: the window, one more row that Gemma 4's drafter sees, and the rows of two steps.

    A step writes up to ``step_rows`` slots beyond the newest token, and a rollback takes back as many tokens before it.
    """
    return -(-(window + 2 * step_rows + 2) // 8) * 8


def capacity_at(position: int) -> int:
    """Slots of a full layer that a captured or fixed step attends to at a position: the next power of two."""
    return max(_FIRST_CAPACITY, 1 << position.bit_length())


@dataclass(slots=True)
class StepLayout:
    """Where the rows of one forward store their KV, and what they see.

    A step stores its rows first and then attends to the buffers. A chunk of the prompt may be longer than a ring: its
    sliding layers see the slots in ``prefix``, in order, then the chunk's own rows, and store the last rows that the
    ring has room for. Later layers that share their KV run for the last rows alone, as a step.
    """

    positions: Tensor
    """Int64, shape (rows,)."""
    span: int
    """Slots of the full layers that are attended; -1: all that there are."""
    masks: dict[str, Tensor | None]
    """For each kind of layer: additive (0 or -inf), shape (rows, keys), in the model's dtype; None: all is seen. Empty
    where attention goes by positions."""
    near: int = 0
    """Distance of the nearest token that a row of a step sees: 1 for an MTP drafter's, which is not stored."""
    slots: Tensor | None = None
    """Int64, shape (rows,): where full layers store each row; None: an MTP drafter's row, which is not stored."""
    ring: Tensor | None = None
    """Int64: where sliding layers store the rows."""
    prefix: Tensor | None = None
    is_prompt: bool = False
    room: tuple[Tensor, Tensor, Tensor] | None = None
    """Keys and values of a chunk and of what it sees of a sliding layer, one layer after the other, and their place."""
    parts: tuple[StepLayout, ...] = ()
    """Of a step of several sequences that needs masks: the layout of each one's rows."""
    kept: int = 0
    """Of a chunk: how many of its last rows go on where no later layer stores KV; 0: only KV is wanted."""
    records: bool = False
    """Whether what runs for these rows is recorded."""


@dataclass(frozen=True, slots=True)
class SavedKv:
    """What a cache stored, without its buffers."""

    length: int
    written: int
    rows: dict[int, tuple[Tensor, Tensor]]
    """By layer: keys and values, (1, kv_heads, rows, head_dim): all tokens of a full layer, a sliding one's ring."""
    window: int | None
    ring: int

    def reaches(self, length: int) -> bool:
        """Whether all that a row after the first ``length`` tokens sees is stored, and nothing else is seen.

        A ring that has never been full has lost nothing. Else what was written after these tokens must have taken the
        slots of tokens that lie before the window.
        """
        return self.window is None or self.written <= max(self.ring, length + self.ring - self.window - 1)

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return sum(part.nbytes for parts in self.rows.values() for part in parts)


class KvCache:
    """KV of one sequence; also what Transformers' attention layers take for a ``Cache``.

    Args:
        windows: Sliding window of each layer in tokens, its own row included; None for a layer with full attention.
        step_rows: Rows of a step at most.
        dtype: Of keys, values and masks.
        masked: Whether steps have masks, or their rows' positions say what they see.
        masks_prompts: The same for prompts.
    """

    is_compileable = False

    def __init__(
        self,
        windows: Sequence[int | None],
        step_rows: int,
        dtype: torch.dtype,
        *,
        masked: bool = True,
        masks_prompts: bool = True,
    ) -> None:
        self.windows = windows
        self._window = next(filter(None, windows), None)
        self.ring = ring_slots(self._window or 0, step_rows)
        self._spare = step_rows  # slots of full layers beyond the capacity, which the padding rows of a step write
        self._dtype = dtype
        self.masked = masked
        self._masks_prompts = masks_prompts
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._table: Tensor | None = None
        # Of masks, and for how many tokens they are made: see ``_make_tables``.
        self._tables: tuple[int, Tensor, tuple[Tensor, ...]] | None = None
        self._moved = False  # whether the table does not say where the buffers are
        self.made = next(_MADE)
        """Changes when buffers are made, and no other cache has the same: who knows where they were looks again."""
        self.capacity = 0
        """Tokens that full layers have room for."""
        self._captured: dict[tuple[Hashable, torch.Size, int], Captured] = {}
        self.length = 0
        self._written = 0  # end of the positions that have been written since the cache was empty
        self.layout: StepLayout

    def begin_step(
        self,
        positions: Tensor,
        span: int,
        slots: Tensor | None = None,
        *,
        all_seen: bool = False,
        first: int | None = None,
    ) -> None:
        """Lay out the step that follows. Every shape follows from the arguments' shapes, so that it can be captured.

        Args:
            positions: Int64, shape (rows,). A padding row repeats the last token's.
            span: Slots of the full layers that are attended; none of the positions is beyond them.
            slots: Int64, shape (rows,): the positions, and for padding rows those after the last token, which hold
                nothing yet: no two rows write one slot. None for the row of an MTP drafter. It sees the tokens before
                its position, of them one more than the window holds (create_bidirectional_sliding_window_mask in
                Transformers' masking_utils.py).
            all_seen: Whether every slot within ``span`` is seen, so that full layers need no mask.
            first: Where the host knows it, the first of positions that follow one another; on a CPU masks are then
                looked up.
        """
        near = 1 if slots is None else 0  # distance of the nearest token that a row sees
        self.reserve(span)
        ring = None if slots is None or self._window is None else slots % self.ring
        found = None
        if first is not None and self.masked and positions.is_cpu:
            found = self._looked_up(first, len(positions), span, near)
        if found is not None:
            full, sliding = found
            masks: dict[str, Tensor | None] = {"full_attention": None if all_seen else full}
            if sliding is not None:
                masks["sliding_attention"] = sliding
            self.layout = StepLayout(positions, span, masks, near, slots, ring)
            return
        column = positions[:, None]
        masks = {}
        if self.masked:
            seen = None if all_seen else torch.arange(near, near + span, device=positions.device) <= column
            masks["full_attention"] = seen if seen is None else self._additive(seen)
        if self.masked and self._window is not None:
            # Distance from each row back to the newest position that a slot can hold, less `near`. A slot that a later
            # row or a rejected draft has overwritten seems at least `ring - 2 * step_rows` back: outside the window.
            back = (column - torch.arange(near, near + self.ring, device=positions.device)) % self.ring
            masks["sliding_attention"] = self._additive(back < (column + 1 - near).clamp(max=self._window + near))
        self.layout = StepLayout(positions, span, masks, near, slots, ring)

    def _looked_up(self, first: int, rows: int, span: int, near: int) -> tuple[Tensor, Tensor | None] | None:
        """The masks of full and sliding layers for the rows at ``first`` and after, as views of tables.

        None where rows need a mask that no table has: some see a whole window, and others less.
        """
        whole = self._window is not None and first >= self._window + 2 * near - 1
        if not whole and self._window is not None and first + rows > self._window + 2 * near:
            return None
        if self._tables is None or self._tables[0] < self.capacity:
            self._tables = self.capacity, *self._make_tables(self.capacity)
        size, full, sliding = self._tables
        start = size - first + near
        causal = full[:rows, start : start + span]
        if self._window is None:
            return causal, None
        if not whole:
            return causal, full[:rows, start : start + self.ring]
        start = (near - first) % self.ring
        return causal, sliding[near][:rows, start : start + self.ring]

    def _make_tables(self, size: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Masks of which every row's is the one before it moved by a slot, for the rows of a step.

        Row r of the first sees what is not beyond column ``size + r``, and of each other one, which repeat, the
        window before it: as the rows of steps do, and as those of an MTP drafter.
        """
        row = torch.arange(self._spare)[:, None]
        full = self._additive(torch.arange(size + self._spare + self.ring) <= row + size)
        if self._window is None:
            return full, ()
        back = (row - torch.arange(2 * self.ring)) % self.ring
        return full, tuple(self._additive(back < self._window + near) for near in (0, 1))

    def begin_prompt(self, count: int, device: torch.device, *, kept: int, records: bool = False) -> None:
        """Lay out a chunk of the prompt: ``count`` tokens after the stored ones, of which the last ``kept`` go on.

        What runs for those alone may be recorded if it ``records``, and steps have no masks.
        """
        first = self.length
        positions = torch.arange(first, first + count, device=device)
        column = positions[:, None]
        layout = StepLayout(positions, first + count, {}, slots=positions, is_prompt=True, kept=kept)
        layout.records = records and not self.masked
        if self._masks_prompts:
            layout.masks["full_attention"] = self._additive(torch.arange(first + count, device=device) <= column)
        if self._window is not None:
            # The tokens before the chunk that its first token sees.
            earlier = torch.arange(max(first - self._window + 1, 0), first, device=device)
            if self._masks_prompts:
                seen = torch.cat([earlier, positions])
                layout.masks["sliding_attention"] = self._additive((seen <= column) & (seen > column - self._window))
            layout.ring, layout.prefix = positions[-self.ring :] % self.ring, earlier % self.ring
        self.layout = layout
        # Leave room for one more step, so that buffers are rarely reallocated.
        self.reserve(first + count + self._spare + 1)

    def _additive(self, visible: Tensor) -> Tensor:
        return torch.zeros_like(visible, dtype=self._dtype).masked_fill_(~visible, -torch.inf)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store a layer's rows and return what its queries attend to.

        Args:
            keys: Shape (1, kv_heads, rows, head_dim).
            values: As ``keys``.
            layer_idx: The layer.

        Returns:
            Keys and values, shape (1, kv_heads, keys of the layout's mask, head_dim).
        """
        layout, slides = self.layout, self.windows[layer_idx] is not None
        buffers = self._buffers_of(layer_idx, keys, keys.shape[1], keys.shape[3])
        if slides and layout.prefix is not None:
            # The prefix is read before the chunk's rows overwrite it.
            seen = [
                torch.cat([buffer.index_select(2, layout.prefix), rows], dim=2)
                for buffer, rows in zip(buffers, (keys, values), strict=True)
            ]
            self.keep(layer_idx, seen[0], seen[1])
            return seen[0], seen[1]
        slots = self.slots_of(layer_idx)
        for buffer, rows in zip(buffers, (keys, values), strict=True):
            # In place: captured graphs hold the buffers' addresses.
            buffer.index_copy_(2, slots, rows)
        return self.attended(layer_idx)

    def make_buffers(self, layer_idx: int, like: Tensor, kv_heads: int, head_dim: int) -> None:
        """Make sure that a layer has buffers; ``like`` is of their device and dtype."""
        self._buffers_of(layer_idx, like, kv_heads, head_dim)

    def places(self, layer_idx: int) -> Tensor:
        """Where the KV of a layer with buffers lies: int64, (1, 3), addresses of keys and values, and their slots."""
        return self.table()[layer_idx][None]

    def table(self) -> Tensor:
        """The ``places`` of all layers, (layers, 3), on the device; what layers without buffers have is not used."""
        if self._moved:
            nothing = (0, 0, 0)
            rows = [nothing] * len(self.windows)
            for layer, (keys, values) in self._buffers.items():
                rows[layer] = keys.data_ptr(), values.data_ptr(), keys.shape[2]
                device = keys.device
            table = torch.tensor(rows, device=device)
            # In place: what has been captured reads it.
            self._table = table if self._table is None else self._table.copy_(table)
            self._moved = False
        assert self._table is not None
        return self._table

    def prompt_room(self, layer_idx: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a chunk's rows of a layer see, for a kernel that stores them there; then ``keep`` it.

        Returns:
            Keys and values, (1, kv_heads, keys, head_dim), the rows' own at the end; their place, as in ``places``,
            and the slot of each row.
        """
        layout = self.layout
        assert layout.slots is not None
        keys, values = self._buffers[layer_idx]
        if self.windows[layer_idx] is None:
            return keys[:, :, : layout.span], values[:, :, : layout.span], self.places(layer_idx), layout.slots
        assert layout.prefix is not None
        earlier, count = len(layout.prefix), len(layout.positions)
        shape = (1, kv_heads, earlier + count, head_dim)
        if layout.room is None or layout.room[0].shape != shape:
            room = keys.new_empty(shape), values.new_empty(shape)
            place = torch.tensor([[room[0].data_ptr(), room[1].data_ptr(), shape[2]]], device=keys.device)
            layout.room = *room, place
        for part, buffer in zip(layout.room[:2], (keys, values), strict=True):
            part[:, :, :earlier] = buffer.index_select(2, layout.prefix)
        return *layout.room, layout.slots - (layout.span - count - earlier)

    def keep(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Store what the next chunks and steps see of a chunk whose rows are the last of ``keys`` and ``values``."""
        ring = self.layout.ring
        if self.windows[layer_idx] is not None and ring is not None:
            for buffer, rows in zip(self._buffers[layer_idx], (keys, values), strict=True):
                buffer.index_copy_(2, ring, rows[:, :, -len(ring) :])

    def _buffers_of(self, layer_idx: int, like: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
        if layer_idx not in self._buffers:
            self._moved, self.made = True, next(_MADE)
            size = self.capacity + self._spare if self.windows[layer_idx] is None else self.ring
            self._buffers[layer_idx] = (
                self._empty(like, kv_heads, size, head_dim),
                self._empty(like, kv_heads, size, head_dim),
            )
        return self._buffers[layer_idx]

    def slots_of(self, layer_idx: int) -> Tensor:
        """Where a step's rows of a layer are stored: int64, (rows,)."""
        slots = self.layout.slots if self.windows[layer_idx] is None else self.layout.ring
        assert slots is not None
        return slots

    @property
    def each(self) -> tuple[KvCache]:
        """The caches of the sequences whose rows run: this one."""
        return (self,)

    def window_of(self, layer_idx: int) -> int | None:
        """The sliding window of a layer; None with full attention."""
        return self.windows[layer_idx]

    def attended(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer whose rows are stored; layers that share its KV ask for them again."""
        keys, values = self._buffers[layer_idx]
        span = self.layout.span
        if span == -1 or self.windows[layer_idx] is not None:
            return keys, values
        return keys.narrow(2, 0, span), values.narrow(2, 0, span)

    def seen(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer that stores KV: what the step that is laid out attends to, its own rows included."""
        return {layer: self.attended(layer) for layer in self._buffers}

    def stand_in(self, layout: StepLayout, seen: dict[int, tuple[Tensor, Tensor]]) -> KvCache:
        """Become another cache of the same model, as far as a step needs it: with its layout and what is ``seen``."""
        self.layout, self._buffers = layout, seen
        return self

    def reserve(self, tokens: int) -> None:
        """Give the full layers room for so many tokens; captured steps with masks over smaller buffers are dropped."""
        if tokens <= self.capacity:
            return
        if self.masked:
            self._captured.clear()
            self._grow(capacity_at(tokens - 1))
        else:
            quantum = max(_FIRST_CAPACITY, 1 << max(tokens.bit_length() - 5, 0))  # at most a 16th too many
            self._grow(-(-tokens // quantum) * quantum)

    def span_at(self, position: int) -> int:
        """The span of a captured or fixed step at a position; it attends by positions, and needs none, or has masks."""
        if self.masked:
            return capacity_at(position)
        self.reserve(position + 1)
        return 0

    def _grow(self, capacity: int) -> None:
        self._moved, self.made = True, next(_MADE)
        # Rings keep their size: only full layers grow.
        for layer, old in self._buffers.items():
            if self.windows[layer] is None:
                _, kv_heads, _, head_dim = old[0].shape
                size = capacity + self._spare
                grown = (
                    self._empty(old[0], kv_heads, size, head_dim),
                    self._empty(old[1], kv_heads, size, head_dim),
                )
                for new, kept in zip(grown, old, strict=True):
                    new[:, :, : kept.shape[2]] = kept
                self._buffers[layer] = grown
        self.capacity = capacity
        if self._table is not None:
            self.table()  # what has been captured reads it without asking

    @staticmethod
    def _empty(like: Tensor, kv_heads: int, slots: int, head_dim: int) -> Tensor:
        return like.new_zeros((1, kv_heads, slots, head_dim))

    def wrote(self, end: int) -> None:
        """Slots of positions up to ``end`` may have been written, by rejected drafts or padding, too."""
        self._written = max(self._written, end)

    def go_back(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = length
        if length == 0:
            self._written = 0

    def reaches(self, length: int) -> bool:
        """As ``SavedKv.reaches``."""
        return SavedKv(self.length, self._written, {}, self._window, self.ring).reaches(length)

    @property
    def num_bytes(self) -> int:
        """Size of the buffers."""
        return sum(buffer.nbytes for buffers in self._buffers.values() for buffer in buffers)

    def saved(self) -> SavedKv:
        """A copy of what is stored, without room for more."""
        rows = {
            layer: (
                keys[:, :, : self.length].clone() if self.windows[layer] is None else keys.clone(),
                values[:, :, : self.length].clone() if self.windows[layer] is None else values.clone(),
            )
            for layer, (keys, values) in self._buffers.items()
        }
        return SavedKv(self.length, self._written, rows, self._window, self.ring)

    def restore(self, saved: SavedKv) -> None:
        """Store what another cache of the same model had stored; this one is empty."""
        self.reserve(saved.length + self._spare + 1)
        for layer, rows in saved.rows.items():
            _, kv_heads, _, head_dim = rows[0].shape
            for buffer, kept in zip(self._buffers_of(layer, rows[0], kv_heads, head_dim), rows, strict=True):
                buffer[:, :, : kept.shape[2]] = kept
        self.length, self._written = saved.length, saved.written

    def clear(self) -> None:
        """Reset for reuse. Masked slots still enter the product with weight 0, and 0 x NaN is NaN: zero the buffers."""
        self.length = self._written = 0
        with torch.inference_mode():
            for buffers in self._buffers.values():
                for buffer in buffers:
                    buffer.zero_()

    def zero(self, first: int, count: int) -> None:
        """Zero the slots of ``count`` positions that hold nothing: what ran there may have left NaN (see ``clear``)."""
        for layer, buffers in self._buffers.items():
            size = buffers[0].shape[2]
            positions = torch.arange(first, first + count, device=buffers[0].device)
            slots = positions.clamp(max=size - 1) if self.windows[layer] is None else positions % size
            for buffer in buffers:
                buffer.index_fill_(2, slots, 0.0)

    def captured_names(self, span: int) -> list[Any]:
        """The names of what is captured for ``span`` slots."""
        return [name for name, _, own_span in self._captured if own_span == span]

    def captured(
        self, name: Hashable, span: int, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
    ) -> Captured:
        """``function`` as captured over these buffers for ``span`` slots and inputs of these shapes.

        It is captured now if it was not before, or if the buffers have moved since.
        """
        self.reserve(span)
        key = (name, inputs[0].shape, span)
        if key not in self._captured:
            neighbour = next(iter(self._captured.values()), None)
            self._captured[key] = Captured(function, inputs, neighbour)
        return self._captured[key]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens stored; part of Transformers' interface."""
        return self.length
