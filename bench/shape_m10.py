"""Shape M10: a multimodal interaction model with 10 M active parameters, random weights.

Hidden 320, eight layers (every fourth one global), 5 query and 1 KV head of 64, window 512, 16
experts of width 320 (top 2) and one shared, nano's vocabulary and encoders. A token goes through
9.7 M parameters: attention 2.2 M, experts and router 7.4 M, head 0.1 M; the decoder holds 44 M.
Pictures cost beside that: each patch goes through the 28 M of their encoder. The model samples
noise and rarely falls silent: nearly every tick takes all its eight tokens, the most it can cost.

    python bench/shape_m10.py FOLDER     writes a checkpoint directory for --model
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tml_core.model.config import bundled_path

HIDDEN, NUM_LAYERS, WIDTH, NUM_EXPERTS, TOP_K = 320, 8, 320, 16, 2
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, D_REL = 5, 1, 64, 16


def config() -> dict[str, Any]:
    """The content of its config.json: nano's, in other sizes."""
    values: dict[str, Any] = json.loads((bundled_path("nano") / "config.json").read_text())
    values["text_config"] |= {
        "hidden_size": HIDDEN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "swa_num_attention_heads": NUM_HEADS,
        "swa_num_key_value_heads": NUM_KV_HEADS,
        "swa_head_dim": HEAD_DIM,
        "d_rel": D_REL,
        "layer_types": ["hybrid" if i % 4 == 3 else "hybrid_sliding" for i in range(NUM_LAYERS)],
        "mlp_layer_types": ["sparse"] * NUM_LAYERS,
        "moe_intermediate_size": WIDTH,
        "n_routed_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
    }
    values["audio_config"]["text_hidden_size"] = HIDDEN
    values["vision_config"]["text_hidden_size"] = HIDDEN
    return values


def active_parameters() -> int:
    """Parameters one token is multiplied with, head included, embedding and norms left out."""
    attention = HIDDEN * HEAD_DIM * (2 * NUM_HEADS + 2 * NUM_KV_HEADS) + HIDDEN * NUM_HEADS * D_REL
    experts = (TOP_K + 1) * 3 * HIDDEN * WIDTH + HIDDEN * (NUM_EXPERTS + 1)
    head = HIDDEN * int(config()["text_config"]["unpadded_vocab_size"])
    return NUM_LAYERS * (attention + experts) + head


def write(folder: Path) -> Path:
    """A checkpoint directory of it; the weights are drawn when it is loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(), indent=2) + "\n")
    shutil.copy(bundled_path("nano") / "tokenizer.json", folder)
    return folder


if __name__ == "__main__":
    sys.stdout.write(f"{write(Path(sys.argv[1]))}: {active_parameters() / 1e6:.2f} M active\n")
