"""The registry of pairs: which drafter belongs to which target.

Entries come from the user's own file (``POLYDRAFT_PAIRS``, then ``pairs.toml`` in the platform's config folder), then
from plugins, then from the core's list; the first that fits is taken. A file looks like this::

    [[pair]]
    target = "my-org/big"
    drafter = "my-org/small"
    kind = "draft-model"
    num_speculative_tokens = { "*" = 5 }
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polydraft._registry.tables import core_table, expand, read_pairs
from polydraft.contract.records import PairRecord, Record
from polydraft.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from polydraft._plugins import PluginHost

__all__ = ["DEFAULT_K", "PairRegistry", "RegisteredPair", "base_name", "user_files"]

_VARIABLE = "POLYDRAFT_PAIRS"
DEFAULT_K = 4

# Parts of a name that describe quantization and packing, not the model.
_VARIANT = re.compile(
    r"[-_.](?:[2-8]bit|bf16|fp16|f16|fp8|int[48]|mxfp[48]|nvfp4|w\d+a\d+|q\d_(?:0|1|k(?:_[sml])?)|awq|gptq|bnb|hqq|exl[23]|"
    r"autoround|dynamic|quantized|unsloth|qat|gguf|mlx|optiq|dwq|ud)(?=$|[-_.])",
    re.IGNORECASE,
)


class RegisteredPair(Record):
    """A pair of concrete ids, and where it comes from."""

    pair: PairRecord
    origin: Literal["user", "plugin", "core"]
    source: str
    """The user's file, the plugin's name, or ``polydraft``."""
    variant: bool = False
    """Whether the target that was looked up is another packing of ``pair.target``."""

    def num_speculative_tokens(self, backend: str) -> int | None:
        """The recommended k for a backend; None if the entry has none."""
        k = self.pair.num_speculative_tokens
        return k.get(backend, k.get("*"))


class PairRegistry:
    """All known pairs, of concrete ids; of several that fit, the first is taken."""

    def __init__(self, entries: Iterable[RegisteredPair]) -> None:
        self.entries = tuple(entries)
        self._by_target: dict[str, list[RegisteredPair]] = {}
        for entry in self.entries:
            self._by_target.setdefault(entry.pair.target.lower(), []).append(entry)

    @classmethod
    def of(cls, host: PluginHost, *, environ: Mapping[str, str] | None = None) -> PairRegistry:
        """The user's pairs, those of plugins, and the core's.

        Raises:
            InvalidRequestError: The user's file is broken; the sentence names file, line and field.
        """
        entries: list[RegisteredPair] = []
        for path in user_files(environ):
            for pair in read_pairs(path):
                entries += _registered(pair, "user", str(path))
        for plugin, pair in host.pairs():
            entries += _registered(pair, "plugin", plugin)
        return cls([*entries, *_core_pairs()])

    def find(self, target: str, *, format: str | None = None) -> list[RegisteredPair]:
        """The pairs of a target, best first.

        Letter case does not matter. An id that is not listed but is, by its name, another packing of a listed target
        (``someone/gemma-4-E4B-it-AWQ`` of ``google/gemma-4-E4B-it``) gets that target's pairs of the same format,
        marked as ``variant``.

        Args:
            target: Hub id, or ``builtin:<name>``.
            format: Weight format of the target; None: any.
        """
        found = self._by_target.get(target.lower(), [])
        # Other packings only where the id itself is not listed.
        if not found and not target.startswith("builtin:"):
            base = base_name(target)
            variants: dict[tuple[str | None, ...], RegisteredPair] = {}
            for entry in self.entries:
                if base_name(entry.pair.target) == base and not entry.pair.target.startswith("builtin:"):
                    key = (entry.pair.drafter, entry.pair.drafter_file, entry.pair.kind, entry.pair.format)
                    # Several packings of a model may list one drafter, which is offered once, where it came first.
                    variants.setdefault(key, entry.model_copy(update={"variant": True}))
            found = list(variants.values())
        return [entry for entry in found if format is None or entry.pair.format == format]

    def formats(self) -> dict[str, str]:
        """Hub id -> weight format, of every target and drafter."""
        found: dict[str, str] = {}
        for entry in self.entries:
            for name in (entry.pair.target, entry.pair.drafter):
                if name and not name.startswith("builtin:"):
                    found.setdefault(name, entry.pair.format)
        return found


def base_name(target: str) -> str:
    """The model's name alone: without organization, quantization and packing; in lower case.

    >>> base_name("mlx-community/gemma-4-e2b-it-4bit"), base_name("unsloth/gemma-4-E2B-it-qat-GGUF")
    ('gemma-4-e2b-it', 'gemma-4-e2b-it')
    """
    name = target.rpartition("/")[2].partition(":")[0]
    # Suffixes come in several parts, as in ``-qat-GGUF``.
    while (shorter := _VARIANT.sub("", name)) != name:
        name = shorter
    return name.lower()


def user_files(environ: Mapping[str, str] | None = None) -> list[Path]:
    """The user's files that exist: that of ``POLYDRAFT_PAIRS``, then the config folder's ``pairs.toml``.

    Raises:
        InvalidRequestError: ``POLYDRAFT_PAIRS`` names a file that does not exist.
    """
    found: list[Path] = []
    named = (os.environ if environ is None else environ).get(_VARIABLE, "").strip()
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise InvalidRequestError(
                f"{_VARIABLE} names {named}, which is not a file.", "Fix the path, or unset the variable."
            )
        found.append(path)
    from platformdirs import user_config_path

    default = user_config_path("polydraft") / "pairs.toml"
    if default.exists() and default not in found:
        found.append(default)
    return found


def _registered(pair: PairRecord, origin: Literal["user", "plugin", "core"], source: str) -> list[RegisteredPair]:
    return [
        RegisteredPair(
            pair=pair.model_copy(update={"target": target, "drafter": drafter, "drafter_file": file}),
            origin=origin,
            source=source,
        )
        for target, drafter, file in expand(pair.target, pair.drafter, pair.drafter_file)
    ]


@cache
def _core_pairs() -> tuple[RegisteredPair, ...]:
    return tuple(
        entry
        for table in core_table("pair")
        for entry in _registered(PairRecord.model_validate({"drafter": None, **table}), "core", "polydraft")
    )
