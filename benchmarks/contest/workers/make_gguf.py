"""A Llama checkpoint as a GGUF file with float32 weights, beside the checkpoint.

llama.cpp insists on an end token and forbids it where a request ignores it, which would change
what greedy decoding finds. So the vocabulary grows by a few tokens without a meaning, whose logits
are 0, and one of them is the end.

Owns: nothing.  Thread-safety: one process writes a file at a time; it appears whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

NUM_EXTRA = 8
FIRST_BYTE_TOKEN = 3
NUM_BYTES = 256


def convert(model: Path) -> Path:
    """The GGUF file of the checkpoint in folder ``model``, written if it is not there."""
    target = model / "model-f32.gguf"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        write(model, partial)
        partial.rename(target)
    return target


def write(model: Path, target: Path) -> None:
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    add_config(writer, config, gguf)
    add_vocabulary(writer, config["vocab_size"], gguf)
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name, tensor in load_file(model / "model.safetensors").items():
        writer.add_tensor(gguf_name(name), reshaped(name, tensor, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_config(writer: Any, config: dict[str, Any], gguf: Any) -> None:
    writer.add_name("random")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"] + NUM_EXTRA)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def add_vocabulary(writer: Any, vocab_size: int, gguf: Any) -> None:
    """Tokens that nobody reads: bytes, as the format wants them, and numbered ones."""
    kinds = gguf.TokenType
    tokens, types = [], []
    for token in range(vocab_size + NUM_EXTRA):
        byte = token - FIRST_BYTE_TOKEN
        if 0 <= byte < NUM_BYTES:
            tokens.append(f"<0x{byte:02X}>")
            types.append(kinds.BYTE)
        else:
            tokens.append(f"<{token}>")
            types.append(kinds.NORMAL if token < vocab_size else kinds.CONTROL)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    writer.add_bos_token_id(vocab_size)
    writer.add_eos_token_id(vocab_size + 1)
    writer.add_unk_token_id(vocab_size + 2)
    writer.add_add_bos_token(False)


def gguf_name(name: str) -> str:
    """transformers' name of a tensor in llama.cpp's words."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    if name in fixed:
        return fixed[name]
    layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{layer}.{parts[part]}.weight"


def reshaped(name: str, tensor: Any, heads: tuple[int, int]) -> Any:
    """Rows of Q and K in the order of llama.cpp's rotary embedding; rows for the extra tokens."""
    import numpy as np

    if ".q_proj." in name or ".k_proj." in name:
        rows, columns = tensor.shape
        num_heads = heads[0] if ".q_proj." in name else heads[1]
        halves = tensor.reshape(num_heads, 2, rows // num_heads // 2, columns)
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return np.pad(tensor, ((0, NUM_EXTRA), (0, 0)))
    return tensor
