"""Shape S as a GGUF file, and a filled context as a llama.cpp slot file.

llama.cpp has no Inkling. Its EXAONE-MoE is the same model but for the short convolutions and the
relative bias: pre-norm layers, RMS norm per head, five sliding layers to one global, a sigmoid
router with a selection bias, shared experts. So it is given our tensors, and reads the same bytes.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from shape_s import NUM_EXPERTS, NUM_LAYERS, TEXT_CONFIG, TOP_K, VOCAB_SIZE

__all__ = ["write_gguf", "write_slot"]

_ARCH = "exaone-moe"
_NUM_SPECIAL = 3 + 256  # unknown, begin, end, and the bytes a SentencePiece vocabulary must have
_SLIDING_CELLS = 640  # the server reuses a context that holds more than the window of 512


def write_gguf(path: Path, weights: dict[str, Tensor]) -> None:
    """Write shape S (2.6 GB); ``weights`` under canonical names.

    bf16 tensors go as fp16, the same bytes: the wheels of llama.cpp have no bf16 instructions, and
    turn fp16 into fp32 faster.
    """
    writer = gguf.GGUFWriter(path, _ARCH)
    _add_config(writer)
    tensors = dict(_tensors(weights))
    for name, value in tensors.items():
        dtype = np.dtype(np.float16 if value.dtype == torch.bfloat16 else np.float32)
        writer.add_tensor_info(name, value.shape, dtype, value.numel() * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for value in tensors.values():
        stored = value.half() if value.dtype == torch.bfloat16 else value
        writer.write_tensor_data(stored.contiguous().numpy())
    writer.close()


def write_slot(path: Path, template: bytes, tokens: list[int]) -> None:
    """Write a slot file of these tokens whose K and V are noise.

    ``template`` is a slot file the same server saved: the format is private to a version, so all
    but the tokens, the cells and the rows is taken from it. Raises ValueError if it does not have
    the parts we know.
    """
    words = np.frombuffer(template[: len(template) // 4 * 4], np.uint32)
    num_saved = int(words[2])
    # The saved tokens stand between three words and one.
    before, after = words[3:6].copy(), words[3 + num_saved - 1 : 3 + num_saved]
    if int(before[2]) != num_saved - 4:
        raise ValueError("the slot file has another layout of tokens than we know")
    before[2] = len(tokens)
    offset = 3 + num_saved
    noise = np.random.default_rng(3)
    with path.open("wb") as file:
        file.write(struct.pack("<3I", *map(int, words[:2]), len(tokens) + 4))
        file.write(before.tobytes() + np.asarray(tokens, np.uint32).tobytes() + after.tobytes())
        for num_cells in (len(tokens), min(len(tokens), _SLIDING_CELLS)):
            num_streams, saved_cells = map(int, words[offset : offset + 2])
            offset += 2 + 3 * saved_cells
            _, num_layers = map(int, words[offset : offset + 2])
            if num_streams != 1 or num_layers not in (2, 10):
                raise ValueError("the slot file has another layout of caches than we know")
            cells = np.zeros((num_cells, 3), np.uint32)
            cells[:, 0] = np.arange(len(tokens) - num_cells, len(tokens))
            cells[:, 1] = 1  # one sequence, which is number 0
            file.write(struct.pack("<2I", 1, num_cells) + cells.tobytes())
            file.write(words[offset : offset + 4].tobytes())
            offset += 4
            for _ in range(2 * num_layers):
                # Rows, or with the matrix of V transposed its columns: element size, elements.
                row_bytes = int(words[offset + 1]) * (int(words[offset + 2]) or 1)
                if row_bytes != 512:
                    raise ValueError(f"the slot file has rows of {row_bytes} bytes, expected 512")
                file.write(words[offset : offset + 3].tobytes())
                file.write(noise.standard_normal((num_cells, 256)).astype(np.float16).tobytes())
                offset += 3 + saved_cells * row_bytes // 4
    if offset != len(words):
        raise ValueError("the slot file has more parts than we know")


def _add_config(writer: gguf.GGUFWriter) -> None:
    config = TEXT_CONFIG
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(config["sliding_window_size"])
    writer.add_sliding_window_pattern(6)
    writer.add_leading_dense_block_count(0)
    writer.add_expert_count(NUM_EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(
        config["n_shared_experts"] * config["moe_intermediate_size"]
    )
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(2.0)
    writer.add_vocab_size(VOCAB_SIZE)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"t{i}" for i in range(VOCAB_SIZE - _NUM_SPECIAL)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.NORMAL] * (VOCAB_SIZE - _NUM_SPECIAL)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCAB_SIZE)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def _tensors(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    model = "model.language_model."
    yield "token_embd.weight", weights[model + "embed_tokens.weight"]
    yield "output_norm.weight", weights[model + "norm.weight"].float()
    yield "output.weight", weights["lm_head.weight"]
    for layer in range(NUM_LAYERS):
        ours, theirs = f"{model}layers.{layer}.", f"blk.{layer}."
        for name, part in (
            ("attn_norm", "input_layernorm"),
            ("attn_q_norm", "self_attn.q_norm"),
            ("attn_k_norm", "self_attn.k_norm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            yield f"{theirs}{name}.weight", weights[f"{ours}{part}.weight"].float()
        for name, part in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")):
            yield f"{theirs}attn_{name}.weight", weights[f"{ours}self_attn.{part}_proj.weight"]
        mlp = ours + "mlp."
        yield theirs + "ffn_gate_inp.weight", weights[mlp + "gate.weight"][:NUM_EXPERTS].float()
        yield theirs + "exp_probs_b.bias", weights[mlp + "gate.e_score_correction_bias"].float()
        gate, up = weights[mlp + "experts.gate_up_proj"].chunk(2, dim=1)
        yield theirs + "ffn_gate_exps.weight", gate
        yield theirs + "ffn_up_exps.weight", up
        yield theirs + "ffn_down_exps.weight", weights[mlp + "experts.down_proj"]
        shared = mlp + "shared_experts."
        yield theirs + "ffn_gate_shexp.weight", weights[shared + "gate_proj"].flatten(0, 1)
        yield theirs + "ffn_up_shexp.weight", weights[shared + "up_proj"].flatten(0, 1)
        down = weights[shared + "down_proj"]
        yield theirs + "ffn_down_shexp.weight", down.permute(1, 0, 2).flatten(1)
