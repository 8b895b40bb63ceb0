"""Persistent sequences: pages, marks, forks, retention, snapshots."""

from tml_core.sequence.pages import PagePool
from tml_core.sequence.sequence import Extender, Mark, Sequence
from tml_core.sequence.store import AuditReport, SequenceStore
from tml_core.sequence.token_log import AUDIO_ID, IMAGE_ID
from tml_core.sequence.values import Carry, Evicted, Retention

__all__ = [
    "AUDIO_ID",
    "IMAGE_ID",
    "AuditReport",
    "Carry",
    "Evicted",
    "Extender",
    "Mark",
    "PagePool",
    "Retention",
    "Sequence",
    "SequenceStore",
]
