"""Write a checkpoint as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import gguf
import numpy as np
import numpy.typing as npt
from polydraft.errors import ModelFormatError, UnsupportedError

from polydraft_gguf.conversion import gemma4, llama
from polydraft_gguf.conversion.checkpoint import Checkpoint
from polydraft_gguf.conversion.vocabulary import add_vocabulary, unknown_tokenizer

__all__ = ["TYPES", "WeightType", "convert", "why_not"]

WeightType = Literal["f32", "f16", "bf16", "q8_0"]
TYPES: tuple[WeightType, ...] = get_args(WeightType)
_Q8_BLOCK = 32
_KNOWN = ("Gemma4ForCausalLM", "Gemma4AssistantForCausalLM", "LlamaForCausalLM")
_ELSEWHERE = (
    "Load a GGUF file of it (`polydraft pairs` lists published ones), or convert it with llama.cpp's own script."
)


def why_not(checkpoint: Checkpoint) -> str:
    """Why a checkpoint cannot be converted here, one sentence; empty if it can."""
    name = (checkpoint.config.get("architectures") or [""])[0]
    if name not in _KNOWN:
        return (
            f"{checkpoint.folder.name} is a {name or 'model of unknown architecture'}; only {', '.join(_KNOWN)} can be "
            "converted here."
        )
    family = llama if name == "LlamaForCausalLM" else gemma4
    reason = family.unknown(checkpoint) or unknown_tokenizer(checkpoint.tokenizer)
    return f"{checkpoint.folder.name} cannot be written as GGUF here: {reason}." if reason else ""


def convert(folder: Path, out: Path, weights: WeightType = "f32") -> None:
    """Write a checkpoint as one GGUF file; an existing one is replaced.

    Norms, scales and routers stay in float32, as in llama.cpp's own converter. With ``q8_0``, matrices whose rows are
    not a multiple of 32 long are written in float16.

    Raises:
        UnsupportedError: The architecture or tokenizer is of a kind that is not converted here.
        ModelFormatError: A file is missing or damaged.
    """
    checkpoint = Checkpoint(folder)
    if reason := why_not(checkpoint):
        raise UnsupportedError(reason, _ELSEWHERE)
    is_llama = checkpoint.config["architectures"][0] == "LlamaForCausalLM"
    family = llama if is_llama else gemma4
    name = "llama" if is_llama else gemma4.architecture(checkpoint)
    writer = gguf.GGUFWriter(str(out), name)
    try:
        writer.add_name(folder.name)
        family.add_metadata(writer, checkpoint)
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if weights == 'f32' else 'MOSTLY'}_{weights.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, checkpoint)
        for tensor, values in ({} if is_llama else gemma4.extra_tensors(checkpoint)).items():
            writer.add_tensor(tensor, values)
        names = gguf.get_tensor_name_map(
            gguf.MODEL_ARCH.LLAMA if is_llama else gguf.MODEL_ARCH.GEMMA4, checkpoint.layers
        )
        own_head = name == "gemma4-assistant" and "lm_head.weight" in checkpoint.tensor_names()
        for given, values in checkpoint.tensors():
            found = llama.tensor_name(given, names) if is_llama else gemma4.tensor_name(given, names, own_head=own_head)
            if found is not None:
                shaped = llama.arranged(found, values, checkpoint) if is_llama else values
                _add(writer, found, shaped, weights)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except KeyError as error:
        raise ModelFormatError(
            f"{folder} lacks the field {error.args[0]!r} of {name}, or has an unknown tensor of that name.", _ELSEWHERE
        ) from error
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, name: str, values: npt.NDArray[np.float32], weights: WeightType) -> None:
    kind = gguf.GGMLQuantizationType[weights.upper()]
    if values.ndim < 2 or not name.endswith(".weight") or name.endswith(("_norm.weight", "ffn_gate_inp.weight")):
        kind = gguf.GGMLQuantizationType.F32
    elif weights == "q8_0" and values.shape[-1] % _Q8_BLOCK:
        kind = gguf.GGMLQuantizationType.F16
    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    elif kind == gguf.GGMLQuantizationType.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
