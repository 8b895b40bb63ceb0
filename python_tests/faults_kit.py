"""What tests of faults and long lives share: a real model so small that a turn takes a millisecond.

Hidden 32, one sliding and one global layer, window 96 (less than a page, so pages are dropped
early), four experts, nano's tokenizer, sound but no pictures; three text tokens and eight injected
ones a tick.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from tml_core import Model, load_model
from tml_core.model.config import bundled_path

WAIT_S: Final = 300.0
WINDOW: Final = 96
NUM_SLOTS: Final = 12
MAX_POSITIONS: Final = 4096
INJECTED: Final = 8

_TEXT: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "swa_num_attention_heads": 1,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 32,
    "sliding_window_size": WINDOW,
    "d_rel": 4,
    "rel_extent": 64,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "mlp_layer_types": ["dense", "sparse"],
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}


def load_tiny(
    *, max_sequences: int = NUM_SLOTS, max_positions: int = MAX_POSITIONS, **more: Any
) -> Model:
    """A model of its own, with its own pages."""
    config = json.loads((bundled_path("nano") / "config.json").read_text())
    config["text_config"] |= _TEXT
    config["audio_config"]["text_hidden_size"] = _TEXT["hidden_size"]
    config["vision_config"]["text_hidden_size"] = _TEXT["hidden_size"]
    config["interaction"] |= {"max_text_per_tick": 3, "max_injected_per_tick": INJECTED}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        shutil.copy(bundled_path("nano") / "tokenizer.json", folder)
        return load_model(folder, max_sequences=max_sequences, max_positions=max_positions, **more)
