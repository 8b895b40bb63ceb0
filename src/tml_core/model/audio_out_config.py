"""The ``audio_out`` block of an interaction model: how it speaks."""

from dataclasses import asdict, dataclass
from typing import Any, Final

from tml_core.errors import InvalidArgument
from tml_core.media.mel import MelConfig
from tml_core.model.config_block import Block, refuse

__all__ = ["BLOCK_MS", "AudioOutConfig", "audio_out_to_dict", "read_audio_out"]

BLOCK_MS: Final = 50
_BLOCK_LEN: Final = 800  # samples


@dataclass(frozen=True)
class AudioOutConfig:
    """The flow head: at an audio-out position, 50 ms of sound are ``num_frames`` mel frames.

    ``num_mel_bins``: channels, those of the audio encoder, for the model hears itself.
    ``mel_mean`` and ``mel_std``: of log10 frames of speech, which the head sees with mean 0 and
    deviation 1. ``width`` and ``num_layers`` of its network; ``num_steps`` of Euler from
    noise to sound.
    """

    width: int
    num_layers: int
    num_steps: int = 6
    num_frames: int = 4
    num_mel_bins: int = 80
    mel_mean: float = -2.2
    mel_std: float = 0.95

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_steps", "num_frames", "num_mel_bins"):
            if getattr(self, name) < 1:
                refuse("AudioOutConfig", f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.mel_std > 0.0:
            refuse("AudioOutConfig", f"mel_std must be above 0, got {self.mel_std}")
        try:
            self.mel  # noqa: B018  (refuses a hop that does not exist)
        except InvalidArgument as error:
            refuse("AudioOutConfig", str(error))

    @property
    def mel(self) -> MelConfig:
        """The frames: hops of a block's part, windows of four hops."""
        hop, rest = divmod(_BLOCK_LEN, self.num_frames)
        if rest:
            refuse("AudioOutConfig", f"num_frames must divide {_BLOCK_LEN}, got {self.num_frames}")
        return MelConfig(hop=hop, window=4 * hop, num_mel_bins=self.num_mel_bins)

    @property
    def block_size(self) -> int:
        """Numbers in one block."""
        return self.num_frames * self.num_mel_bins


def read_audio_out(raw: object, where: str, num_mel_bins: int | None) -> AudioOutConfig | None:
    """The block, or None where it is null. ``num_mel_bins``: of the audio encoder, None without.

    Raises `CheckpointError` naming the key that is missing, unknown or out of range.
    """
    if raw is None:
        return None
    block = Block(raw, where)
    config = AudioOutConfig(
        width=block.integer("width"),
        num_layers=block.integer("num_layers"),
        num_steps=block.integer("num_steps", 6),
        num_frames=block.integer("num_frames", 4),
        num_mel_bins=block.integer("num_mel_bins", 80),
        mel_mean=block.real("mel_mean", -2.2, is_positive=False),
        mel_std=block.real("mel_std", 0.95),
    )
    block.close()
    if config.num_mel_bins != num_mel_bins:
        refuse(
            where,
            "num_mel_bins must be that of the audio encoder, through which the model hears "
            f"itself: {num_mel_bins}, got {config.num_mel_bins}",
        )
    return config


def audio_out_to_dict(config: AudioOutConfig | None) -> dict[str, Any] | None:
    """As `read_audio_out` reads it."""
    return None if config is None else asdict(config)
