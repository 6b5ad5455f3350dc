"""Packings: a target's weights in one format and quantization, as published, as found in a folder, or as converted."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polydraft.contract.records import Record

__all__ = ["Packing", "PackingRecord", "RejectedPacking"]


class PackingRecord(Record):
    """Published weights of a target in another format or quantization. Ids may contain one ``{A,B}`` group."""

    target: str = Field(description="Hub id of the model that these are weights of.")
    repo: str = Field(description="Hub id of the repository that holds them.")
    format: str = Field(description="Weight format: gguf, mlx, litertlm, ...")
    quantization: str = Field(
        default="", description="As engines write it: ``bf16``, ``8bit``, ``q4_0``. Empty: the names of its files tell."
    )
    file: str | None = Field(default=None, description="File or glob pattern inside the repository; None: all of them.")
    bytes: int | None = Field(default=None, ge=0, description="Size of the weights; None: the Hub's listing tells.")
    retrained: bool = Field(
        default=False,
        description="Quantization-aware training has changed the weights: its unquantized files are not the target's.",
    )
    note: str = ""


class RejectedPacking(Record):
    """A packing that was considered before the one that runs, and is less quantized or of a better format."""

    name: str
    source: str
    bytes: int | None = None
    why: str = Field(description="One sentence.")


class Packing(Record):
    """The weights that a session runs, of all packings of the target that was asked for."""

    name: str = Field(description="Quantization as engines write it: ``q4_0``, ``8bit``; ``none`` or a dtype: not.")
    source: str = Field(description="Whose weights: a Hub id (with the file), a folder or file, or ``builtin:<name>``.")
    of: str = Field(description="The target that was asked for; ``source`` may hold other weights of the same model.")
    format: str = Field(description="Weight format of ``source``.")
    bytes: int | None = Field(default=None, description="Size of the weights in ``source``; None: not known.")
    quantized: bool = False
    converted: bool = Field(default=False, description="Made of ``source`` on this machine, for this engine.")
    chosen_by: Literal["auto", "caller"] = Field(
        default="caller", description="``auto``: the least quantized that fits. ``caller``: named, or the only one."
    )
    rejected: tuple[RejectedPacking, ...] = Field(default=(), description="Those that come before it, and why not.")

    @property
    def note(self) -> str:
        """What the user should know: that other weights run than those of the given name, and why; may be empty."""
        if self.source == self.of and not self.rejected:
            return ""
        kind = f"quantized, {self.name}" if self.quantized else f"not quantized, {self.name}"
        made = " converted here" if self.converted else ""
        runs = f"The weights of {self.of} are {self.source}{made} ({kind})"
        if not self.rejected:
            return f"{runs}."
        first, *more = self.rejected
        others = f" {len(more)} more are in `running.packing.rejected`." if more else ""
        return f"{runs}. Not {first.name} of {first.source}: {first.why}{others}"
