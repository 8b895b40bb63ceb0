"""Training: packed transcripts, a differentiable model with serving's bits, the proof of it.

What is learned from (packing, shards, sessions), the model (module, op_set), the loop (trainer,
config, optimizer, order, checkpoint, metrics), sampler against trainer (align).
"""

from tml_core.train.config import TrainConfig
from tml_core.train.metrics import StepMetrics
from tml_core.train.module import ModelOutput, TrainableModel
from tml_core.train.packing import SAMPLED_STREAMS, PackedBatch, Transcript
from tml_core.train.sessions import read_sessions
from tml_core.train.shards import ShardReader, write_shards
from tml_core.train.trainer import Trainer, TrainingStopped

__all__ = [
    "SAMPLED_STREAMS",
    "ModelOutput",
    "PackedBatch",
    "ShardReader",
    "StepMetrics",
    "TrainConfig",
    "TrainableModel",
    "Trainer",
    "TrainingStopped",
    "Transcript",
    "read_sessions",
    "write_shards",
]
