"""Write the bundled model ``nano``: its config.json and tokenizer.json.

    python scripts/make_nano.py [directory]

``nano`` is a small interaction model at the released encoders' interfaces. It holds no weights:
its config names the seed of a fixed random initialisation and says that it is not trained.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tml_core.model.config import (
    CONTROL_TOKEN_NAMES,
    AudioConfig,
    ControlTokens,
    InteractionConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)

NUM_BYTES = 256
# The chat template's tokens as Inkling names them, two placeholders, then the control tokens.
CHAT_TOKENS = (
    "<|begin_of_text|>",
    "<|message_user|>",
    "<|message_model|>",
    "<|message_system|>",
    "<|message_tool|>",
    "<|content_text|>",
    "<|content_image|>",
    "<|content_audio_input|>",
    "<|audio_end|>",
    "<|content_thinking|>",
    "<|content_xml|>",
    "<|content_invoke_tool_json|>",
    "<|content_invoke_tool_text|>",
    "<|content_tool_error|>",
    "<|end_message|>",
    "<|content_model_end_sampling|>",
    "<|image_placeholder|>",
    "<|audio_placeholder|>",
)
SPECIAL_TOKENS = (*CHAT_TOKENS, *CONTROL_TOKEN_NAMES.values())
VOCAB_SIZE = 320
NUM_LAYERS = 6


def special_id(name: str) -> int:
    """Special tokens follow the 256 bytes."""
    return NUM_BYTES + SPECIAL_TOKENS.index(name)


def nano_config() -> ModelConfig:
    """The configuration of ``nano``."""
    tokens = {field: special_id(name) for field, name in CONTROL_TOKEN_NAMES.items()}
    return ModelConfig(
        text=TextConfig(
            vocab_size=VOCAB_SIZE,
            unpadded_vocab_size=NUM_BYTES + len(SPECIAL_TOKENS),
            hidden_size=256,
            num_layers=NUM_LAYERS,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            swa_num_heads=4,
            swa_num_kv_heads=2,
            swa_head_dim=64,
            window=512,
            d_rel=16,
            rel_extent=1024,
            log_scaling_floor=128000,
            log_scaling_alpha=0.1,
            layer_is_sliding=tuple(layer % 6 != 5 for layer in range(NUM_LAYERS)),
            layer_is_dense=tuple(layer == 0 for layer in range(NUM_LAYERS)),
            dense_width=512,
            expert_width=128,
            num_experts=8,
            top_k=2,
            num_shared=1,
            route_scale=8.0,
            mup=1.0,
            rms_eps=1e-6,
            max_positions=1 << 20,
        ),
        audio=AudioConfig(num_mel_bins=80, num_levels=16, min_log10=-7.0, max_log10=2.0),
        vision=VisionConfig(patch_size=40, num_layers=4),
        interaction=InteractionConfig(
            tokens=ControlTokens(**tokens), max_text_per_tick=8, max_injected_per_tick=64
        ),
        eos_token_ids=(special_id("<|content_model_end_sampling|>"),),
        image_token_id=special_id("<|image_placeholder|>"),
        audio_token_id=special_id("<|audio_placeholder|>"),
        is_trained=False,
        init_seed=7,
    )


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(NUM_BYTES + index) for index, byte in enumerate(others)}
    return [letters[byte] for byte in range(NUM_BYTES)]


def nano_tokenizer() -> dict[str, Any]:
    """A byte-level tokenizer without merges: the id of a byte is its value."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": special_id(name),
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name in SPECIAL_TOKENS
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {letter: byte for byte, letter in enumerate(byte_letters())},
            "merges": [],
        },
    }


def main(directory: Path) -> None:
    """Write both files into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", nano_config().to_dict()), ("tokenizer", nano_tokenizer())):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else root / "src/tml_core/assets/nano")
