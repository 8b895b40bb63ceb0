"""What an evaluation found: scores, every item's mark, and how it was made."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tml_core.evals.suite import Mark, Score

__all__ = ["Record", "Report"]


@dataclass(frozen=True)
class Record:
    """One item: what was done, and its mark in each suite that has it."""

    key: str
    phrasing: str
    voice: str
    said: tuple[tuple[int, str], ...]
    expected: tuple[tuple[int, str], ...]
    marks: Mapping[str, Mark]


@dataclass(frozen=True)
class Report:
    """``scores`` and ``records``: the same bits for the same player, seed, split and speech
    ``engines``. ``wall_s`` and ``media_s``: how long it played, without the time to make the items,
    and how long they are."""

    player: str
    split: str
    typed: float
    seed: int
    num_items: int
    engines: tuple[str, ...]
    scores: Mapping[str, Score]
    records: tuple[Record, ...]
    wall_s: float
    media_s: float

    @property
    def items_per_s(self) -> float:
        """Items played in a second."""
        return len(self.records) / self.wall_s if self.wall_s else 0.0

    @property
    def times_real_time(self) -> float:
        """Seconds played in a second."""
        return self.media_s / self.wall_s if self.wall_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            **{
                name: getattr(self, name)
                for name in ("player", "split", "typed", "seed", "num_items")
            },
            "engines": list(self.engines),
            "scores": {name: score.to_dict() for name, score in self.scores.items()},
            "wall_s": round(self.wall_s, 3),
            "media_s": round(self.media_s, 3),
            "items_per_s": round(self.items_per_s, 3),
            "records": [asdict(one) for one in self.records],
        }

    def write(self, path: Path) -> None:
        """Write it as JSON, one record a line."""
        whole = self.to_dict()
        records = ",\n".join(json.dumps(one, ensure_ascii=False) for one in whole.pop("records"))
        head = json.dumps(whole, indent=1, ensure_ascii=False)
        path.write_text(f'{head[:-2]},\n "records": [\n{records}\n]}}\n', encoding="utf-8")
