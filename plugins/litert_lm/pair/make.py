"""Convert the built-in pair tiny-e2b to one ``.litertlm`` file.

    nox -s litertlm        # installs requirements.txt into an environment of its own, and runs this

The target is exported by litert-torch, with the signature ``verify`` for k + 1 tokens; the drafter by ``drafter.py``,
as litert-torch has none. Weights stay float32, so that tokens are those of Transformers. What is written is compressed:
the lower half of each float32 is zero, since the checkpoint is bfloat16.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from drafter import convert_drafter
from litert_lm_builder import litertlm_builder
from litert_lm_builder.runtime.proto import llm_metadata_pb2
from litert_torch.generative.export_hf import export
from litert_torch.generative.export_hf.model_ext.gemma4 import exportable_module as gemma4

K = 4
CACHE = 1152
"""Rows of the KV cache: the suite's prompts of 1,024 tokens, and their outputs."""
PREFILL = (128,)
"""Lengths in which LiteRT-LM runs a prompt; each makes the file larger."""

REPOSITORY = Path(__file__).parents[3]
PAIRS = REPOSITORY / "builtin_pairs/src/polydraft_builtin_pairs/data"
OUTPUT = Path(__file__).parents[1] / "src/polydraft_litert_lm/data/tiny-e2b-litertlm"
_PARTS = {
    "model.tflite": litertlm_builder.TfLiteModelType.PREFILL_DECODE,
    "embedder.tflite": litertlm_builder.TfLiteModelType.EMBEDDER,
    "per_layer_embedder.tflite": litertlm_builder.TfLiteModelType.PER_LAYER_EMBEDDER,
}
"""What litert-torch writes for the target."""
_METADATA = {
    "Authors": "The polydraft developers",  # required by the builder
    "uuid": "a080c2d9-2aec-44be-97bb-1f357ceeca16",
    "creation_timestamp": "2026-11-27T09:52:59.064645+00:00",
}
"""The last two are those of the file that is checked in: another conversion gives the same bytes."""


def main() -> None:
    """Convert, and write the file with its config and checksum."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--target", type=Path, default=PAIRS / "tiny-e2b")
    parser.add_argument("--drafter", type=Path, default=PAIRS / "tiny-e2b-assistant")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        file = convert(given.target, given.drafter, work)
        write(file, given.target, given.output)


def convert(target: Path, drafter: Path, work: Path) -> Path:
    """The ``.litertlm`` file of a pair, in an empty folder."""
    config = json.loads((target / "config.json").read_text("utf-8"))
    # litert-torch exports embeddings for each layer only in the layout of published checkpoints.
    layout = work / "conditional"
    command = [sys.executable, "-m", "training.conditional", str(target), str(layout)]
    subprocess.run(command, check=True, cwd=REPOSITORY / "builtin_pairs")
    patch_converter()
    export.export(
        str(layout),
        str(work / "target"),
        keep_temporary_files=True,
        quantization_recipe="none",  # None would mean int8
        cache_length=CACHE,
        prefill_lengths=list(PREFILL),
        assistant_model=str(drafter),
        mtp_verifier_step=K + 1,
        use_jinja_template=True,
        moe_exports_implementation="eager",  # else it asks for an implementation that its own model refuses
        externalize_embedder=True,  # which LiteRT-LM needs for drafts
    )
    convert_drafter(drafter, last_layers(config), CACHE, work / "drafter.tflite")
    file = work / "pair.litertlm"
    bundle(target, work / "target", work / "drafter.tflite", file)
    return file


def patch_converter() -> None:
    """Mend what litert-torch exports of a target with embeddings for each layer, where LiteRT-LM drafts with it."""
    target = gemma4.LiteRTExportableModuleForDecoderOnlyLMGenerateExternalEmbedder
    sample_inputs = target.get_sample_inputs

    def with_float_mask(module: Any, *args: Any, **kwargs: Any) -> Any:
        found = sample_inputs(module, *args, **kwargs)
        # A mask of bools, as litert-torch has it here only, makes LiteRT-LM verify wrongly.
        found["verify"][0]["mask"] = found["verify"][0]["mask"].float()
        return found

    target.forward = forward_with_activations
    target.get_sample_inputs = with_float_mask


def forward_with_activations(
    module: Any, embeddings: Any, per_layer_embeddings: Any, input_pos: Any, kv_cache: Any, mask: Any, **kwargs: Any
) -> dict[str, Any]:
    """A step of the target that also gives the last hidden states, which the drafter needs.

    litert-torch gives them for other models, but not where there are embeddings for each layer.
    """
    kwargs.update(module.composite_flags())
    inputs = module.adapt_inputs(None, embeddings, per_layer_embeddings, input_pos, kv_cache, mask, **kwargs)
    config = module.model.config.text_config
    inputs["past_key_values"] = inputs["past_key_values"].insert_dummy_cache_layers(config)
    found = module.model.model.language_model(**inputs, **module.attention_kwargs())
    return {
        "kv_cache": found.past_key_values.remove_dummy_cache_layers(config),
        "logits": module.model.lm_head(found.last_hidden_state),
        "activations": found.last_hidden_state,
    }


def last_layers(config: dict[str, Any]) -> dict[str, int]:
    """Kind of attention -> the last layer of that kind that stores keys and values."""
    storing = config["num_hidden_layers"] - (config.get("num_kv_shared_layers") or 0)
    return {kind: index for index, kind in enumerate(config["layer_types"][:storing])}


def bundle(target: Path, parts: Path, drafter: Path, output: Path) -> None:
    """Put the parts of target and drafter into one file."""
    builder = litertlm_builder.LitertLmFileBuilder()
    for key, value in _METADATA.items():
        builder.add_system_metadata(
            litertlm_builder.Metadata(key=key, value=value, dtype=litertlm_builder.DType.STRING)
        )
    litertlm_builder.populate_system_metadata = list  # its own puts in another uuid and time for each file
    for name, kind in _PARTS.items():
        if (parts / name).is_file():  # not every target has embeddings for each layer
            builder.add_tflite_model(str(parts / name), kind)
    builder.add_tflite_model(str(drafter), litertlm_builder.TfLiteModelType.MTP_DRAFTER)
    builder.add_hf_tokenizer(str(target / "tokenizer.json"))
    said = output.with_suffix(".pb")
    said.write_bytes(metadata(target).SerializeToString())
    builder.add_llm_metadata(str(said))
    with output.open("wb") as file:
        builder.build(file)


def metadata(target: Path) -> llm_metadata_pb2.LlmMetadata:
    """What LiteRT-LM is told of the model."""
    generation = json.loads((target / "generation_config.json").read_text("utf-8"))
    found = llm_metadata_pb2.LlmMetadata(max_num_tokens=CACHE)
    found.start_token.token_ids.ids.append(generation["bos_token_id"])
    for token_id in generation["eos_token_id"]:
        found.stop_tokens.add().token_ids.ids.append(token_id)
    found.jinja_prompt_template = (target / "chat_template.jinja").read_text("utf-8")
    found.llm_model_type.gemma4.SetInParent()
    return found


def write(file: Path, target: Path, output: Path) -> None:
    """Write the file, its config and the checksum of what is checked in."""
    output.mkdir(parents=True, exist_ok=True)
    packed = lzma.compress(file.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    (output / "model.litertlm.xz").write_bytes(packed)
    digest = hashlib.sha256(packed).hexdigest()
    (output / "SHA256SUMS").write_text(f"{digest}  model.litertlm.xz\n", "utf-8")
    given = json.loads((target / "config.json").read_text("utf-8"))
    config = {
        **{name: given[name] for name in ("model_type", "sliding_window", "vocab_size")},
        "max_position_embeddings": CACHE,
        "polydraft_drafter": {"kind": "mtp", "num_speculative_tokens": K},
    }
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
