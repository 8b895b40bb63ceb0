"""Which layout a checkpoint speaks."""

from functools import lru_cache

from tokenizers import Tokenizer

from tml_core.layout.chat_template import ChatLayout
from tml_core.layout.micro_turn import MicroTurnLayout
from tml_core.media.mel import MelConfig
from tml_core.media.vocoder import GriffinLim
from tml_core.model.config import ModelConfig

__all__ = ["layout_for"]


def layout_for(config: ModelConfig, tokenizer: Tokenizer | None) -> MicroTurnLayout | ChatLayout:
    """Micro-turn layout v1 for a checkpoint with an ``interaction`` block, else the chat template.

    It is that of sessions: what a model with an audio-out head says becomes sound.

    Raises `CheckpointError` without a byte-level tokenizer that has the special tokens.
    """
    if config.interaction is None:
        return ChatLayout(config, tokenizer)
    head = config.interaction.audio_out
    vocoder = None if head is None else _vocoder(head.mel)
    return MicroTurnLayout(config, tokenizer, vocoder=vocoder)


@lru_cache(maxsize=8)
def _vocoder(config: MelConfig) -> GriffinLim:
    """One for all sessions, so that what they say can be made heard together."""
    return GriffinLim(config)
