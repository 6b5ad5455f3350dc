"""Reading ``config.json``: the text model's part, and the fields that a drafter depends on. No engine is needed."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft.errors import ModelFormatError
from polydraft.files import read_json, system_errors

if TYPE_CHECKING:
    from pathlib import Path

    from polydraft.contract.records import DrafterKind

__all__ = [
    "KVShape",
    "checkpoint_dtype",
    "drafter_kind",
    "eos_token_ids",
    "family",
    "has_experts",
    "is_assistant",
    "is_mlx",
    "kv_shapes",
    "layer_config",
    "layer_shape",
    "layer_types",
    "model_types",
    "names_dtype",
    "read_config",
    "text_config",
]

_ASSISTANT = "_assistant"
_MOST_LAYERS = 10_000
_SPECULATORS: dict[str, DrafterKind] = {"eagle3": "eagle3", "dflash": "dflash"}


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape of one layer's keys and values: heads and the width of one head."""

    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads} KV head{'s' if self.heads != 1 else ''} of {self.head_dim}"


def eos_token_ids(config: Mapping[str, Any], folder: Path | None = None) -> frozenset[int]:
    """The model's end-of-sequence ids: the list of its ``generation_config.json``, else that of its config.

    Args:
        config: The parsed ``config.json``.
        folder: Where ``generation_config.json`` may lie.

    Raises:
        ModelFormatError: ``generation_config.json`` cannot be read, or lists something other than token ids.
    """
    listed: Any = None
    if folder is not None and (file := folder / "generation_config.json").is_file():
        listed = read_config(file, str(folder)).get("eos_token_id")
    for part in (config, text_config(config)):
        listed = part.get("eos_token_id") if listed is None else listed
    if listed is None:
        return frozenset()
    token_ids = listed if isinstance(listed, list) else [listed]
    if not all(_is_count(token_id) for token_id in token_ids):
        raise ModelFormatError(
            f"eos_token_id of the model is {reprlib.repr(listed)}, not a token id or a list of them.",
            "Fix its generation_config.json or config.json, or download or save the model again.",
        )
    return frozenset(token_ids)


def read_config(path: Path, name: str) -> dict[str, Any]:
    """Parse a ``config.json``, or a file like it, of the model that messages call ``name``.

    Raises:
        ModelFormatError: The file cannot be read, is not JSON, is not an object, or a field of it that is read here is
            of a wrong type.
    """
    try:
        with system_errors(f"{path.name} of {name} cannot be read"):
            data = read_json(path)
    except json.JSONDecodeError as error:
        raise ModelFormatError(
            f"{path.name} of {name} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.",
            "Download or save the model again.",
        ) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ModelFormatError(f"{path.name} of {name} cannot be read: {why}.", f"Check the file {path}.") from error
    if not isinstance(data, dict):
        raise ModelFormatError(
            f"{path.name} of {name} holds a {type(data).__name__}, not an object.", "Download or save the model again."
        )
    _check_fields(data, path.name, name)
    return data


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def _is_layers(value: Any) -> bool:
    return _is_count(value) and value <= _MOST_LAYERS  # lists of that length are made


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # some configs have -1 for none


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MOST: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "num_kv_shared_layers"), 1024),
    **dict.fromkeys(("head_dim", "global_head_dim", "num_attention_heads", "num_key_value_heads"), 1 << 16),
    **dict.fromkeys(_EXPERTS, 1 << 16),
    **dict.fromkeys(
        ("hidden_size", "hidden_size_per_layer_input", "intermediate_size", "moe_intermediate_size"), 1 << 24
    ),
    "vocab_size": 1 << 21,
}
"""No model has more: an engine would build layers for minutes before it looks at the weights."""

_FIELDS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("a text", lambda value: isinstance(value, str), ("model_type",)),
    ("a token id", _is_whole, ("bos_token_id",)),
    ("a list of texts", _is_names, ("architectures", "layer_types")),
    ("an object", lambda value: isinstance(value, dict), ("text_config", "per_layer_config")),
    (f"a whole number up to {_MOST_LAYERS}", _is_layers, ("num_hidden_layers", "num_kv_shared_layers")),
    ("a whole number below 2**32", _is_count, ("head_dim", "global_head_dim", "vocab_size", "hidden_size")),
    ("a whole number below 2**32", _is_count, ("max_position_embeddings",)),
    ("a whole number below 2**32", _is_count, ("num_key_value_heads", "num_global_key_value_heads")),
)


def _check_fields(data: Mapping[str, Any], file: str, name: str) -> None:
    """Refuse fields of a wrong type, of those that this module reads, and impossible sizes; null counts as missing."""
    for part in (data, text_config(data)):
        for kind, fits, fields in _FIELDS:
            for field in fields:
                value = part.get(field)
                if value is not None and not fits(value):
                    raise ModelFormatError(
                        f"{field} in {file} of {name} is {reprlib.repr(value)}, not {kind}.",
                        "Fix the file, or download or save the model again.",
                    )
        for field, most in _MOST.items():
            # Some models have one number per layer.
            values = part.get(field)
            sizes: list[Any] = values if isinstance(values, list) else [values]
            if any(_is_count(size) and size > most for size in sizes):
                raise _too_much(field, values, file, name)
        if len(part.get("layer_types") or ()) > _MOST["num_hidden_layers"]:
            raise _too_much("layer_types", part["layer_types"], file, name)


def _too_much(field: str, value: Any, file: str, name: str) -> ModelFormatError:
    return ModelFormatError(
        f"{field} in {file} of {name} is {reprlib.repr(value)}, more than any model has.",
        "Fix the file, or download or save the model again.",
    )


def checkpoint_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config says its weights are stored in, such as ``bfloat16``; ``float32`` where it names none.

    Transformers wrote ``torch_dtype`` before version 5; conditional-generation checkpoints may name it in the text
    model's part only.
    """
    return _named_dtype(config) or "float32"


def names_dtype(config: Mapping[str, Any]) -> bool:
    """Whether a config says in which dtype its weights are stored."""
    return bool(_named_dtype(config))


def _named_dtype(config: Mapping[str, Any]) -> str:
    text = text_config(config)
    named = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return str(named or "").removeprefix("torch.")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's part of a config: ``text_config`` where a checkpoint nests it, else the config itself.

    Conditional-generation checkpoints (text with vision or audio) and assistants nest it.
    """
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a mixture of experts."""
    return any(text_config(config).get(name) for name in _EXPERTS)


def model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """The ``model_type`` of the checkpoint and of its text model, without empty ones."""
    found = (str(part.get("model_type") or "") for part in (config, text_config(config)))
    return frozenset(name for name in found if name)


def is_assistant(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint is a drafter that attends to its target's KV cache (kind ``mtp``)."""
    return str(config.get("model_type") or "").endswith(_ASSISTANT)


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint was quantized by MLX: its ``quantization`` names a group size."""
    quantization = config.get("quantization")
    return isinstance(quantization, Mapping) and "group_size" in quantization


def family(config: Mapping[str, Any]) -> str:
    """The architecture without the role: ``gemma4`` for ``gemma4``, ``gemma4_text`` and ``gemma4_assistant``."""
    return str(config.get("model_type") or "").removesuffix(_ASSISTANT).removesuffix("_text")


def drafter_kind(config: Mapping[str, Any]) -> DrafterKind:
    """The kind of a drafter by its own config.

    ``*_assistant`` is ``mtp``; a config of the speculators library says ``speculators_model_type``; older EAGLE-3 and
    DFlash heads show it in the name of their architecture; everything else is a model that drafts on its own.
    """
    if is_assistant(config):
        return "mtp"
    named = _SPECULATORS.get(str(config.get("speculators_model_type") or "").lower())
    if named is not None:
        return named
    architectures = " ".join(str(name) for name in config.get("architectures") or ()).lower()
    return next((kind for word, kind in _SPECULATORS.items() if word in architectures), "draft-model")


# The rules below are those of Gemma4TextConfig.__post_init__ (transformers 5.22, configuration_gemma4.py): the
# defaults, the pattern of layer types, and which fields an old checkpoint (without per_layer_config) uses in
# full-attention layers.
_GEMMA4 = {"num_hidden_layers": 30, "num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512}
_SLIDING_PATTERN = 6


def layer_types(config: Mapping[str, Any]) -> list[str]:
    """The attention type of each layer of the text model; empty if the config does not distinguish them."""
    text = text_config(config)
    given = text.get("layer_types")
    if given:
        kinds = [str(kind) for kind in given]
    elif family(text) in {"gemma4", "gemma4_unified"}:
        count = int(text.get("num_hidden_layers") or _GEMMA4["num_hidden_layers"])
        kinds = ["full_attention" if (i + 1) % _SLIDING_PATTERN == 0 else "sliding_attention" for i in range(count)]
    else:
        return []
    if family(text).startswith("gemma4"):
        # Whatever the pattern says: Gemma 4's last layer has full attention.
        kinds[-1] = "full_attention"
    return kinds


def kv_shapes(config: Mapping[str, Any]) -> dict[str, KVShape]:
    """The shape of the keys and values that a drafter would share, by attention type.

    A target hands out the last layer of each type that stores its own keys and values, so that is the one described; an
    assistant stores none, and its last layer of each type is described. Both layouts of Gemma 4 configs are understood:
    ``per_layer_config`` (transformers 5.17 and later) and ``global_head_dim`` with ``num_global_key_value_heads``.

    Returns:
        Attention type -> shape; empty if the config does not give them all.
    """
    text = text_config(config)
    kinds = layer_types(config)
    if not kinds:
        return {}
    shared = 0 if is_assistant(config) else int(text.get("num_kv_shared_layers") or 0)
    shapes: dict[str, KVShape] = {}
    # Layers that share stand at the end. Of the others the last of each type overwrites those before it.
    for index, kind in enumerate(kinds[: len(kinds) - shared] or kinds):
        shape = layer_shape(text, index, kind)
        if shape is None:
            return {}
        shapes[kind] = shape
    return shapes


def layer_config(text: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """What a config's ``per_layer_config`` sets for a layer (from 0); empty if nothing.

    Keys are numbers as text, which Transformers pads with zeros to one width (``"05"`` beside ``"11"``), or, in a
    config made in Python, ints.
    """
    for key, layer in (text.get("per_layer_config") or {}).items():
        if str(key).isdecimal() and int(key) == index and isinstance(layer, Mapping):
            return layer
    return {}


def layer_shape(text: Mapping[str, Any], index: int, kind: str) -> KVShape | None:
    """The shape of the keys and values of one layer (from 0) of attention type ``kind``; None if a config has it not.

    ``text`` is the text model's part of the config.
    """
    gemma4 = family(text).startswith("gemma4")
    defaults = _GEMMA4 if gemma4 else {}
    values: dict[str, Any] = {
        name: text.get(name) if text.get(name) is not None else defaults.get(name)
        for name in ("num_key_value_heads", "head_dim")
    }
    if "per_layer_config" in text:
        layer = layer_config(text, index)
        values.update({name: layer[name] for name in values if layer.get(name)})
    elif gemma4 and kind == "full_attention":
        values["head_dim"] = text.get("global_head_dim") or defaults["global_head_dim"]
        # Where keys equal values, full-attention layers have another number of KV heads.
        if text.get("attention_k_eq_v") and text.get("num_global_key_value_heads") is not None:
            values["num_key_value_heads"] = text["num_global_key_value_heads"]
    if values["num_key_value_heads"] is None or values["head_dim"] is None:
        return None
    return KVShape(int(values["num_key_value_heads"]), int(values["head_dim"]))
