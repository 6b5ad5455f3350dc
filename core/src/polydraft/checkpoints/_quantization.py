"""Names of quantizations, as engines write them: read from names, configs and headers, compared and ordered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polydraft.checkpoints.config import checkpoint_dtype, is_mlx, text_config

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "bits",
    "dtype_name",
    "is_quantized",
    "name_in_config",
    "name_in_file",
    "name_of_gguf",
    "normal",
    "stored_bits",
    "without_quantization",
]

_DTYPES = {
    **dict.fromkeys(("float32", "fp32", "f32"), "f32"),
    **dict.fromkeys(("float16", "fp16", "f16"), "f16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bf16"),
}
_FULL = {"none": 16, "bf16": 16, "f16": 16, "f32": 32}
_IN_FILE = re.compile(
    r"(?:^|[-_.])((?:ud[-_])?(?:bf16|f16|fp16|f32|fp32|i?q\d+(?:_(?:k|m|s|l|xs|xxs|xl|xxl|nl|\d+))*|tq\d+_\d+"
    r"|mxfp\d+(?:_moe)?|nvfp\d+))(?=$|[-_.])",
    re.IGNORECASE,
)
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_FILE_TYPES = {
    **dict(enumerate(("f32", "f16", "q4_0", "q4_1"))),
    **dict(enumerate(("q8_0", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m"), 7)),
    **dict(enumerate(("q5_k_s", "q5_k_m", "q6_k", "iq2_xxs", "iq2_xs", "q2_k_s", "iq3_xs", "iq3_xxs", "iq1_s"), 16)),
    **dict(enumerate(("iq4_nl", "iq3_s", "iq3_m", "iq2_s", "iq2_m", "iq4_xs", "iq1_m", "bf16"), 25)),
    **dict(enumerate(("tq1_0", "tq2_0", "mxfp4_moe", "nvfp4", "q1_0"), 36)),
}
"""``general.file_type`` -> its name (llama.cpp's ``llama_ftype``, in ``include/llama.h``)."""


def normal(name: str) -> str:
    """One spelling of a name, to compare by.

    >>> normal(" Q4_K_M"), normal("UD-Q4_K_XL"), normal("4-bit"), normal("bfloat16")
    ('q4_k_m', 'q4_k_xl', '4bit', 'bf16')
    """
    name = name.strip().lower().replace("-", "_").removeprefix("ud_")
    return _DTYPES.get(name, re.sub(r"^(\d+)_bits?$|^(\d+)bits$", r"\1\2bit", name))


def bits(name: str) -> int:
    """Bits of most weights by a quantization's name; 0 where it does not say.

    >>> bits("none"), bits("q6_k"), bits("mxfp4"), bits("f32"), bits("awq")
    (16, 6, 4, 32, 0)
    """
    name = normal(name)
    found = re.search(r"\d+", name)
    return _FULL.get(name) or (int(found[0]) if found else 0)


def is_quantized(name: str) -> bool:
    """Whether a name is that of a quantization: ``none`` and the dtypes of floats are not."""
    return normal(name) not in _FULL


def dtype_name(dtype: str) -> str:
    """A dtype by the short name that files have: ``bf16``; one that is not known as it is."""
    return _DTYPES.get(dtype, dtype)


def name_in_file(path: str) -> str:
    """The quantization that a file's name says, in lower case; empty if it says none.

    >>> name_in_file("BF16/gemma-4-31B-it-BF16-00001-of-00002.gguf"), name_in_file("gemma-4-E2B-it-UD-Q4_K_XL.gguf")
    ('bf16', 'ud-q4_k_xl')
    """
    stem = _PART.sub("", path.rpartition("/")[2].rpartition(".")[0])
    found = _IN_FILE.findall(stem)
    return found[-1].lower() if found else ""


def without_quantization(path: str) -> str:
    """A file's name without its quantization, part number and suffix."""
    return _IN_FILE.sub("", _PART.sub("", path.rpartition("/")[2].rpartition(".")[0]))


def name_of_gguf(path: Path, config: Mapping[str, Any]) -> str:
    """The quantization of a GGUF file: by the ``file_type`` of its header, else by its name; empty if neither says it.

    ``_xl`` mixtures say in the header what most of their weights are: there the name says more.
    """
    number, named = config.get("file_type"), name_in_file(path.name)
    known = _FILE_TYPES.get(number, "") if isinstance(number, int) else ""
    return named if named and (not known or bits(named) == bits(known)) else known


def name_in_config(config: Mapping[str, Any]) -> str:
    """The quantization of a checkpoint in the layout of Transformers or MLX, by its config; ``none`` if it has none."""
    text = text_config(config)
    given = config.get("quantization") if is_mlx(config) else text.get("quantization") if is_mlx(text) else None
    if isinstance(given, Mapping):
        count, mode = given.get("bits"), given.get("mode", "affine")
        return str(mode) if mode != "affine" else f"{count}bit"
    given = config.get("quantization_config") or text.get("quantization_config")
    if not isinstance(given, Mapping):
        return "none"
    method = str(given.get("quant_method") or given.get("quant_type") or "quantized").lower()
    count = given.get("bits")
    return f"{method}-{count}bit" if isinstance(count, int) and not isinstance(count, bool) else method


def stored_bits(config: Mapping[str, Any]) -> int:
    """Bits of a weight as an unquantized checkpoint stores it."""
    return _FULL.get(dtype_name(checkpoint_dtype(config)), 16)
