"""Training: packed transcripts, a differentiable model with serving's bits, the proof of it.

What is learned from (packing), the model (module), sampler against trainer (align).
"""

from tml_core.train.module import TrainableModel
from tml_core.train.packing import SAMPLED_STREAMS, PackedBatch, Transcript

__all__ = ["SAMPLED_STREAMS", "PackedBatch", "TrainableModel", "Transcript"]
