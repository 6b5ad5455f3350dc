"""GGUF files of Gemma 4 E2B's real shape with random Q8_0 weights (5 GB), to measure costs where no weights are."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

VOCABULARY = 262144
HIDDEN, LAYERS, OWNERS, HEADS, PER_LAYER = 1536, 35, 15, 8, 256
HEAD, FULL_HEAD, WIDE, WINDOW = 256, 512, 6144, 512
DRAFT_HIDDEN, DRAFT_LAYERS, DRAFT_WIDE, DRAFT_HEADS = 256, 4, 2048, 4
_TILE = 1 << 20


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Write target and assistant, unless they are there.

    Returns:
        Their files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, drafter = folder / "e2b-shape-Q8_0.gguf", folder / "mtp-e2b-shape-Q8_0.gguf"
    if not target.is_file():
        _target(target)
    if not drafter.is_file():
        _drafter(drafter)
    return target, drafter


class _Writer:
    def __init__(self, path: Path, arch: str, seed: int) -> None:
        self.path, self.arch = path, arch
        self.writer = gguf.GGUFWriter(str(path), arch, use_temp_file=True)
        self._random = np.random.default_rng(seed)
        self._tile = gguf.quantize(
            (self._random.standard_normal((_TILE // 32, 32)) * 0.02).astype(np.float32), gguf.GGMLQuantizationType.Q8_0
        ).reshape(-1)

    def matrix(self, name: str, rows: int, columns: int) -> None:
        """A random matrix: one tile of quantized blocks, repeated from a random place."""
        size = rows * columns // 32 * 34
        start = int(self._random.integers(0, len(self._tile) // 34)) * 34
        repeated = np.resize(np.roll(self._tile, -start), size).reshape(rows, columns // 32 * 34)
        self.writer.add_tensor(name, repeated, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def ones(self, name: str, size: int) -> None:
        self.writer.add_tensor(name, np.ones(size, np.float32))

    def metadata(self, layers: int, hidden: int, heads: int, wide: int | list[int], shared: int) -> None:
        writer, arch = self.writer, self.arch
        writer.add_context_length(8192)
        writer.add_embedding_length(hidden)
        writer.add_block_count(layers)
        writer.add_head_count(heads)
        writer.add_head_count_kv([1] * layers)
        writer.add_feed_forward_length(wide)
        writer.add_key_length(FULL_HEAD)
        writer.add_value_length(FULL_HEAD)
        writer.add_uint32(f"{arch}.attention.key_length_swa", HEAD)
        writer.add_uint32(f"{arch}.attention.value_length_swa", HEAD)
        writer.add_rope_dimension_count(FULL_HEAD)
        writer.add_uint32(f"{arch}.rope.dimension_count_swa", HEAD)
        writer.add_rope_freq_base(1e6)
        writer.add_float32(f"{arch}.rope.freq_base_swa", 1e4)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_sliding_window(WINDOW)
        writer.add_array(f"{arch}.attention.sliding_window_pattern", [not _is_full(i, layers) for i in range(layers)])
        writer.add_uint32(f"{arch}.attention.shared_kv_layers", shared)
        writer.add_final_logit_softcapping(30.0 if arch == "gemma4" else 0.0)
        writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q8_0))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([f"t{index}" for index in range(VOCABULARY)])
        writer.add_token_types([1] * VOCABULARY)
        writer.add_token_merges(["t 1"])
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(1)
        writer.add_tensor("rope_freqs.weight", np.array([1.0] * 64 + [1e30] * 192, np.float32))

    def layer(self, layer: int, layers: int, hidden: int, heads: int, wide: int, *, owns: bool) -> None:
        head, name = (FULL_HEAD if _is_full(layer, layers) else HEAD), f"blk.{layer}"
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            self.ones(f"{name}.{norm}.weight", hidden)
        self.ones(f"{name}.layer_output_scale.weight", 1)
        self.ones(f"{name}.attn_q_norm.weight", head)
        self.matrix(f"{name}.attn_q.weight", heads * head, hidden)
        self.matrix(f"{name}.attn_output.weight", hidden, heads * head)
        if owns:
            self.ones(f"{name}.attn_k_norm.weight", head)
            self.matrix(f"{name}.attn_k.weight", head, hidden)
            self.matrix(f"{name}.attn_v.weight", head, hidden)
        self.matrix(f"{name}.ffn_gate.weight", wide, hidden)
        self.matrix(f"{name}.ffn_up.weight", wide, hidden)
        self.matrix(f"{name}.ffn_down.weight", hidden, wide)

    def finish(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def _is_full(layer: int, layers: int) -> bool:
    return layer % 5 == 4 if layers == LAYERS else layer == layers - 1


def _target(path: Path) -> None:
    out = _Writer(path, "gemma4", 1)
    widths = [WIDE if layer < OWNERS else 2 * WIDE for layer in range(LAYERS)]
    out.metadata(LAYERS, HIDDEN, HEADS, widths, LAYERS - OWNERS)
    out.writer.add_uint32("gemma4.embedding_length_per_layer_input", PER_LAYER)
    out.matrix("token_embd.weight", VOCABULARY, HIDDEN)
    out.matrix("per_layer_token_embd.weight", VOCABULARY, PER_LAYER * LAYERS)
    out.matrix("per_layer_model_proj.weight", PER_LAYER * LAYERS, HIDDEN)
    out.ones("per_layer_proj_norm.weight", PER_LAYER)
    out.ones("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        out.layer(layer, LAYERS, HIDDEN, HEADS, widths[layer], owns=layer < OWNERS)
        out.matrix(f"blk.{layer}.inp_gate.weight", PER_LAYER, HIDDEN)
        out.matrix(f"blk.{layer}.proj.weight", HIDDEN, PER_LAYER)
        out.ones(f"blk.{layer}.post_norm.weight", HIDDEN)
    out.finish()


def _drafter(path: Path) -> None:
    out = _Writer(path, "gemma4-assistant", 2)
    out.metadata(DRAFT_LAYERS, DRAFT_HIDDEN, DRAFT_HEADS, DRAFT_WIDE, DRAFT_LAYERS)
    out.writer.add_uint32("gemma4-assistant.embedding_length_out", HIDDEN)
    out.writer.add_uint32("gemma4-assistant.nextn_predict_layers", DRAFT_LAYERS)
    out.matrix("token_embd.weight", VOCABULARY, DRAFT_HIDDEN)
    out.matrix("nextn.pre_projection.weight", DRAFT_HIDDEN, 2 * HIDDEN)
    out.matrix("nextn.post_projection.weight", HIDDEN, DRAFT_HIDDEN)
    out.ones("output_norm.weight", DRAFT_HIDDEN)
    for layer in range(DRAFT_LAYERS):
        out.layer(layer, DRAFT_LAYERS, DRAFT_HIDDEN, DRAFT_HEADS, DRAFT_WIDE, owns=False)
    out.finish()
