"""Train a tiny model on a handful of sessions until it knows them, then talk to it live.

It learns to answer typed questions, to call a tool, and to tell a low tone from a high one; the
checkpoint is then served by a `Session`, which says what was learned. Run it (half a minute on two
cores): ``python examples/train_tiny.py [FOLDER]``; the run itself is
``tml-core train FOLDER/run.toml``.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from rich.console import Console

import tml_core as tml
from tml_core.cli.train import run_train
from tml_core.model.config import bundled_path

RUN = """
[model]
path = "start"        # config.json names an init_seed: training begins from scratch
[data]
path = "sessions.jsonl"
batch_tokens = 512
[optimizer]
learning_rate = 0.01
warmup_steps = 10
[run]
folder = "run"
num_steps = 120
save_every = 60
"""
RATE = 16_000
TYPED = {
    "what are you?": "a tiny model that learns five sessions by heart",
    "who is there?": "only me",
}
TONES = {"low": 220, "high": 1760}
CALL = {"name": "light", "args": {"on": True}}


def prepare(folder: Path) -> None:
    """A model to begin with, recordings, the sessions, and the run."""
    start = folder / "start"
    start.mkdir(parents=True, exist_ok=True)
    nano = bundled_path("nano")
    shutil.copy(nano / "tokenizer.json", start)
    config = json.loads((nano / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "swa_head_dim": 32,
        "layer_types": ["hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse"],
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
    }
    config["audio_config"]["text_hidden_size"] = 64
    config["vision_config"] |= {"text_hidden_size": 64, "n_layers": 1}
    (start / "config.json").write_text(json.dumps(config))
    # Two quiet seconds follow, so that it also learns to fall silent.
    quiet = {"num_ticks": 16}
    sessions = [
        {"ticks": {"1": {"text": asked, "say": said}}, **quiet} for asked, said in TYPED.items()
    ]
    sessions.append({"ticks": {"1": {"text": "light, please", "call": CALL}}, **quiet})
    for name, hertz in TONES.items():
        soundfile.write(folder / f"{name}.wav", tone(hertz), RATE)
        told = {"4": {"say": f"that was {name}"}}
        sessions.append({"audio": f"{name}.wav", "ticks": told, **quiet})
    (folder / "sessions.jsonl").write_text("\n".join(map(json.dumps, sessions)))
    (folder / "run.toml").write_text(RUN)


def tone(hertz: int) -> np.ndarray:
    """A second of it."""
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(RATE) / RATE)).astype(np.float32)


def answer(model: tml.Model, chunks: list[tml.Chunk]) -> str:
    """What the model says or calls while it hears ``chunks`` and the silence after them."""
    heard = []
    silence = [tml.Chunk(is_idle=True)] * 8
    with tml.Session(model, sampling=tml.SamplingParams(temperature=0.0)) as session:
        for chunk in [*chunks, *silence]:
            for event in session.append(chunk):
                if isinstance(event, tml.TextToken):
                    heard.append(event.text)
                elif isinstance(event, tml.ToolCall):
                    heard.append(f"{event.name} {dict(event.args)}")
    return "".join(heard)


def main(folder: Path) -> None:
    prepare(folder)
    checkpoint = run_train(folder / "run.toml", Console(highlight=False))
    idle = tml.Chunk(is_idle=True)
    asked = {text: [idle, tml.Chunk(text=text)] for text in (*TYPED, "light, please")}
    played = {
        name: [tml.Chunk(audio=one.audio) for one in tml.media.micro_turns(folder / f"{name}.wav")]
        for name in TONES
    }
    expected = {
        **TYPED,
        "light, please": f"light {CALL['args']}",
        **{name: f"that was {name}" for name in TONES},
    }
    model = tml.load_model(checkpoint)
    num_right = 0
    for name, chunks in {**asked, **played}.items():
        said = answer(model, chunks)
        num_right += said == expected[name]
        print(f"{name:>14}: {said}")
    print(f"{num_right} of {len(expected)} sessions are known by heart")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary) / "tiny")
