"""Sound and pictures to what a model takes, and back to files; no model code.

PCM to dMel levels (dmel) and to the finer frames a model speaks in (mel), those back to PCM
(vocoder), pictures to patches (patches), files (audio_file, video_file), 200 ms
pieces (micro_turns), the pieces of a sequence (segments), bundled clips (clips).
"""

from tml_core.media.audio_file import (
    SAMPLE_RATE,
    audio_blocks,
    read_audio,
    resample_blocks,
    write_wav,
)
from tml_core.media.clips import Clips, clips
from tml_core.media.dmel import DmelConfig, DmelState, DmelStream, dmel_bins
from tml_core.media.mel import Mel, MelConfig, MelState, MelStream, dmel_of_mel, mel_frames
from tml_core.media.micro_turns import TICK_MS, TICK_SAMPLES, MicroTurn, micro_turns
from tml_core.media.patches import PATCH_SIZE, image_patches, num_patches
from tml_core.media.segments import Audio, Block, Image, OwnAudio, Segment, Tokens
from tml_core.media.video_file import DEFAULT_MAX_EDGE, VideoReader, fit_frame
from tml_core.media.vocoder import GriffinLim, Vocoder, VocoderState

__all__ = [
    "DEFAULT_MAX_EDGE",
    "PATCH_SIZE",
    "SAMPLE_RATE",
    "TICK_MS",
    "TICK_SAMPLES",
    "Audio",
    "Block",
    "Clips",
    "DmelConfig",
    "DmelState",
    "DmelStream",
    "GriffinLim",
    "Image",
    "Mel",
    "MelConfig",
    "MelState",
    "MelStream",
    "MicroTurn",
    "OwnAudio",
    "Segment",
    "Tokens",
    "VideoReader",
    "Vocoder",
    "VocoderState",
    "audio_blocks",
    "clips",
    "dmel_bins",
    "dmel_of_mel",
    "fit_frame",
    "image_patches",
    "mel_frames",
    "micro_turns",
    "num_patches",
    "read_audio",
    "resample_blocks",
    "write_wav",
]
