"""Small random models of architectures that are not ordinary targets: an encoder, and a recurrent model."""

import gguf
import numpy as np

TOKENS, WIDTH = 300, 32


def write(path, architecture):
    """Write ``bert`` or ``mamba``."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{index}" for index in range(TOKENS)])
    writer.add_token_merges(["t 1"])

    def add(name, *shape):
        writer.add_tensor(name, (random.standard_normal(shape) * 0.1).astype(np.float32))

    {"bert": bert, "mamba": mamba}[architecture](writer, add)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bert(writer, add):
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(False)
    writer.add_token_type_count(2)
    add("token_embd.weight", TOKENS, WIDTH)
    add("token_types.weight", 2, WIDTH)
    add("position_embd.weight", 512, WIDTH)
    add("token_embd_norm.weight", WIDTH)
    add("token_embd_norm.bias", WIDTH)
    for layer in ("blk.0", "blk.1"):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{layer}.{name}.weight", WIDTH, WIDTH)
            add(f"{layer}.{name}.bias", WIDTH)
        for name in ("attn_output_norm", "layer_output_norm"):
            add(f"{layer}.{name}.weight", WIDTH)
            add(f"{layer}.{name}.bias", WIDTH)
        add(f"{layer}.ffn_up.weight", 64, WIDTH)
        add(f"{layer}.ffn_down.weight", WIDTH, 64)


def mamba(writer, add):
    inner, state, rank, kernel = 2 * WIDTH, 16, 4, 4
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    add("token_embd.weight", TOKENS, WIDTH)
    add("output_norm.weight", WIDTH)
    for layer in ("blk.0", "blk.1"):
        add(f"{layer}.attn_norm.weight", WIDTH)
        add(f"{layer}.ssm_in.weight", 2 * inner, WIDTH)
        add(f"{layer}.ssm_conv1d.weight", inner, kernel)
        add(f"{layer}.ssm_conv1d.bias", inner)
        add(f"{layer}.ssm_x.weight", rank + 2 * state, inner)
        add(f"{layer}.ssm_dt.weight", inner, rank)
        add(f"{layer}.ssm_dt.bias", inner)
        add(f"{layer}.ssm_a", inner, state)
        add(f"{layer}.ssm_d", inner)
        add(f"{layer}.ssm_out.weight", WIDTH, inner)
