"""The Inkling backbone: configuration, weights, tokenizer and the reference forward."""

from tml_core.model.config import (
    CONTROL_TOKEN_NAMES,
    AudioConfig,
    ControlTokens,
    InteractionConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
    bundled_path,
)
from tml_core.model.reference import reference_logits
from tml_core.model.tokenizer import control_token_ids, load_tokenizer, special_id, special_ids
from tml_core.model.weights import expected_shapes, load_weights, random_weights, save_weights

__all__ = [
    "CONTROL_TOKEN_NAMES",
    "AudioConfig",
    "ControlTokens",
    "InteractionConfig",
    "ModelConfig",
    "TextConfig",
    "VisionConfig",
    "bundled_path",
    "control_token_ids",
    "expected_shapes",
    "load_tokenizer",
    "load_weights",
    "random_weights",
    "reference_logits",
    "save_weights",
    "special_id",
    "special_ids",
]
