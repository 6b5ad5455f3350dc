"""A checkpoint folder in the layout of Transformers: its config and its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from polydraft.checkpoints.config import read_config, text_config
from polydraft.checkpoints.safetensors import check_folder, header, weight_files
from polydraft.errors import ModelFormatError

__all__ = ["Checkpoint"]

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json, tokenizer.json and safetensors."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        return read_config(self.folder / "config.json", str(self.folder))

    @property
    def text(self) -> Mapping[str, Any]:
        """The text model's part of the config."""
        return text_config(self.config)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.text["num_hidden_layers"])

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """The parsed tokenizer.json.

        Raises:
            ModelFormatError: It is missing or cannot be read.
        """
        return read_config(self.folder / "tokenizer.json", str(self.folder))

    def tensor_names(self) -> set[str]:
        """Names of all tensors."""
        return {name for path in weight_files(self.folder) for name in header(path)} - {"__metadata__"}

    def tensors(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Name and values of every float tensor, as float32; others (index tables) are left out.

        Raises:
            ModelFormatError: A file is missing or damaged, or a tensor is not in float32, float16 or bfloat16.
        """
        check_folder(self.folder)
        for path in weight_files(self.folder):
            entries = header(path)
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
            data = np.memmap(path, np.uint8, "r")
            for name, entry in entries.items():
                if name == "__metadata__" or entry["dtype"].startswith(("I", "U", "BOOL")):
                    continue
                if entry["dtype"] not in _DTYPES:
                    raise ModelFormatError(
                        f"The tensor {name} of {self.folder} has dtype {entry['dtype']}.",
                        "Convert from a checkpoint in float32, float16 or bfloat16.",
                    )
                first, last = entry["data_offsets"]
                values = data[start + first : start + last].view(_DTYPES[entry["dtype"]])
                if entry["dtype"] == "BF16":
                    values = (values.astype(np.uint32) << 16).view(np.float32)
                yield name, np.ascontiguousarray(values.astype(np.float32).reshape(entry["shape"]))
