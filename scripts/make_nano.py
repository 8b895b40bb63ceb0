"""Write the start of the bundled model ``nano``: its config.json and tokenizer.json.

    python scripts/make_nano.py [directory]

``nano`` is a small interaction model at the released encoders' interfaces, with a word of
`tml_core.data` a token. It holds no weights: its config names the seed of a fixed random
initialisation and says that it is not trained. Needs the extra ``train``.
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tml_core.data import vocabulary
from tml_core.model.config import (
    CONTROL_TOKEN_NAMES,
    AudioConfig,
    ControlTokens,
    InteractionConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)

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
VOCAB_SIZE = 2304  # bytes, words and their parts, and the special tokens, which come last
NUM_LAYERS = 6


def special_id(name: str) -> int:
    """Special tokens are the last of the vocabulary."""
    return VOCAB_SIZE - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(name)


def nano_config() -> ModelConfig:
    """The configuration of ``nano``."""
    tokens = {field: special_id(name) for field, name in CONTROL_TOKEN_NAMES.items()}
    return ModelConfig(
        text=TextConfig(
            vocab_size=VOCAB_SIZE,
            unpadded_vocab_size=VOCAB_SIZE,
            hidden_size=256,
            num_layers=NUM_LAYERS,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            swa_num_heads=4,
            swa_num_kv_heads=2,
            swa_head_dim=64,
            window=128,
            d_rel=16,
            rel_extent=1024,
            log_scaling_floor=128000,
            log_scaling_alpha=0.1,
            layer_is_sliding=tuple(layer % 3 != 2 for layer in range(NUM_LAYERS)),
            layer_is_dense=tuple(layer == 0 for layer in range(NUM_LAYERS)),
            dense_width=768,
            expert_width=192,
            num_experts=8,
            top_k=2,
            num_shared=1,
            route_scale=8.0,
            mup=1.0,
            rms_eps=1e-6,
            max_positions=1 << 20,
        ),
        audio=AudioConfig(num_mel_bins=80, num_levels=16, min_log10=-7.0, max_log10=2.0),
        vision=VisionConfig(patch_size=40, num_layers=2),
        interaction=InteractionConfig(
            tokens=ControlTokens(**tokens), max_text_per_tick=8, max_injected_per_tick=64
        ),
        eos_token_ids=(special_id("<|content_model_end_sampling|>"),),
        image_token_id=special_id("<|image_placeholder|>"),
        audio_token_id=special_id("<|audio_placeholder|>"),
        is_trained=False,
        init_seed=7,
    )


def nano_tokenizer() -> Tokenizer:
    """A byte-level BPE that has every word of the scripts as one token, with a space before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [f" {word}" for word in (*vocabulary(), *map(str, range(100)))]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    )
    return tokenizer


def main(directory: Path) -> None:
    """Write both files into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "config": json.dumps(nano_config().to_dict(), indent=2),
        "tokenizer": nano_tokenizer().to_str(pretty=True),
    }
    for name, text in files.items():
        (directory / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else root / "src/tml_core/assets/nano")
