"""Training: packed transcripts, a differentiable model with serving's bits, the proof of it.

What is learned from (packing, shards, sessions, feed, order), the model (module, op_set), the loop
(trainer, config, stages, loss, optimizer, checkpoint, run_lock, metrics), sampler against trainer
(align).
"""

from tml_core.train.config import TrainConfig
from tml_core.train.metrics import HeldOut, StepMetrics
from tml_core.train.module import ModelOutput, TrainableModel
from tml_core.train.packing import SAMPLED_STREAMS, PackedBatch, Transcript
from tml_core.train.sessions import read_sessions
from tml_core.train.shards import ShardReader, write_shards
from tml_core.train.stages import Stage, read_stages
from tml_core.train.trainer import Trainer, TrainingStopped, finished

__all__ = [
    "SAMPLED_STREAMS",
    "HeldOut",
    "ModelOutput",
    "PackedBatch",
    "ShardReader",
    "Stage",
    "StepMetrics",
    "TrainConfig",
    "TrainableModel",
    "Trainer",
    "TrainingStopped",
    "Transcript",
    "finished",
    "read_sessions",
    "read_stages",
    "write_shards",
]
