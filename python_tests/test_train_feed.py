"""Where a run's transcripts come from: streams without end, and several sources in one order."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tml_core import errors
from tml_core.media.segments import Tokens
from tml_core.model.config import ModelConfig
from tml_core.train import Trainer, Transcript, write_shards
from tml_core.train.config import DataConfig
from tml_core.train.feed import Place, open_feed
from tml_core.train.order import BatchOrder
from train_kit import make_checkpoint, make_run, random_transcripts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("text"), "text")


def numbered(index: int) -> Transcript:
    """Of 1 to 4 tokens, and its number."""
    ids = torch.tensor([index] * (1 + index % 4))
    return Transcript([Tokens(ids)], ids, torch.ones(len(ids), dtype=torch.uint8))


def endless(start: int) -> Iterator[Transcript]:
    return map(numbered, itertools.count(start))


def stream_feed(model: Path, source: Any, **changed: Any) -> Any:
    config = DataConfig("", batch_tokens=9, buffer=7, seed=5, **changed)
    return open_feed(config, model, ModelConfig.from_path(model), source)


def numbers(transcripts: list[Transcript]) -> list[int]:
    return [int(one.targets[0]) for one in transcripts]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_goes_on_from_any_place(model: Path, shuffle: bool) -> None:
    feed = stream_feed(model, endless, shuffle=shuffle)
    draws = list(itertools.islice(feed.draws(0, None), 40))
    seen = [number for draw in draws for number in numbers(draw.transcripts)]
    assert sorted(seen[:70]) == list(range(70)) and (seen[:70] == list(range(70))) != shuffle
    for buffer in range(10):  # what is held at a time is seven transcripts
        assert sorted(seen[7 * buffer : 7 * buffer + 7]) == list(range(7 * buffer, 7 * buffer + 7))
    assert all(sum(one.num_tokens for one in draw.transcripts) <= 9 for draw in draws)
    for done, draw in enumerate(draws[:20], start=1):
        again = itertools.islice(feed.draws(done, draw.next_place), 20)
        expected = [numbers(one.transcripts) for one in draws[done : done + 20]]
        assert [numbers(one.transcripts) for one in again] == expected


def test_a_stream_is_asked_for_what_is_needed(model: Path) -> None:
    starts, read = [], []

    def source(start: int) -> Iterator[Transcript]:
        starts.append(start)
        for index in itertools.count(start):
            read.append(index)
            yield numbered(index)

    feed = stream_feed(model, source)
    assert read == [0]  # to know which stream it is
    next(feed.draws(9, Place(14, 1)))
    assert starts == [0, 14] and read == [0, *range(14, 21)]


def test_a_plain_iterable_is_a_stream_from_its_beginning(model: Path) -> None:
    whole = stream_feed(model, endless)
    for source in (endless(0), map(numbered, range(1000))):
        feed = stream_feed(model, source)
        assert feed.fingerprint == whole.fingerprint
        got = itertools.islice(feed.draws(0, Place(14, 2)), 9)
        expected = itertools.islice(whole.draws(0, Place(14, 2)), 9)
        assert [numbers(a.transcripts) for a in got] == [numbers(b.transcripts) for b in expected]


def test_a_stream_that_cannot_go_on_says_so(model: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="data: expected at least one transcript"):
        stream_feed(model, iter([]))
    with pytest.raises(errors.InvalidType, match=r"data: expected transcripts or a function.*int"):
        stream_feed(model, 3)
    with pytest.raises(errors.InvalidType, match=r"transcripts\[0\]: expected Transcript, got str"):
        stream_feed(model, iter(["x"]))
    feed = stream_feed(model, map(numbered, range(1, 10)))
    with pytest.raises(errors.InvalidArgument, match="data: the stream ended after 9 transcripts"):
        list(feed.draws(0, None))
    feed = stream_feed(model, map(numbered, range(1, 10)), max_positions=3)
    with pytest.raises(errors.InvalidArgument, match=r"transcripts\[2\]: expected 1 to 3 posit"):
        list(feed.draws(0, None))


def test_a_run_over_a_stream_resumes_with_the_same_bits(model: Path, tmp_path: Path) -> None:
    transcripts = random_transcripts(ModelConfig.from_path(model), 60)

    def source(start: int) -> Iterator[Transcript]:
        return iter(transcripts[start:])

    changed: dict[str, Any] = {"data": {"buffer": 5}, "run": {"save_every": 100}}
    with Trainer(make_run(tmp_path / "whole", model, **changed), source) as whole:
        whole.run()
        expected = whole.model.state_dict()
    assert whole._progress.place is not None and whole._progress.place.first >= 10
    config = make_run(tmp_path / "broken", model, **changed)
    for stop_at in range(1, 7):
        # A new iterator each time, as in a new process.
        data: Any = source if stop_at % 2 else iter(transcripts)
        with Trainer(config, data) as trainer:
            assert trainer.step == stop_at - 1
            trainer.run(should_stop=lambda t=trainer, end=stop_at: t.step == end)  # type: ignore[misc]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(errors.CheckpointError, match=r"dataset = 'stream-.*, this run has 'stream"):
        Trainer(config, iter(transcripts[1:]))


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 3)), min_size=1, max_size=4))
def test_every_source_comes_as_often_as_it_weighs(passes: list[tuple[int, float]]) -> None:
    total = sum(count for count, _ in passes)
    order = BatchOrder([1] * total, 4, seed=2, passes=passes)
    seen: Counter[int] = Counter()
    for epoch in range(10):
        seen.update(itertools.chain(*order.epoch(epoch)))
    first = 0
    for count, weight in passes:
        own = [seen[index] for index in range(first, first + count)]
        assert sum(own) == round(10 * weight * count)
        assert max(own) - min(own) <= 1
        first += count


def test_a_source_of_weight_one_is_one_of_no_weight() -> None:
    plain = BatchOrder(range(1, 20), 30, seed=2)
    weighed = BatchOrder(range(1, 20), 30, seed=2, passes=[(7, 1.0), (12, 1.0)])
    assert [plain.epoch(one) for one in range(3)] == [weighed.epoch(one) for one in range(3)]
    unshuffled = BatchOrder([1] * 5, 9, seed=2, shuffle=False, passes=[(3, 1.0), (2, 1.5)])
    assert unshuffled.epoch(0) == [[0, 1, 2, 3, 4, 3]]
    assert unshuffled.epoch(1) == [[0, 1, 2, 4, 3, 4]]


def test_several_folders_make_one_run(model: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_path(model)
    transcripts = random_transcripts(config, 9)
    write_shards(transcripts[:4], tmp_path / "a", config)
    write_shards(transcripts[4:], tmp_path / "b", config)
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    joined = Trainer(make_run(tmp_path / "joined", model, data={"path": paths}))
    whole = Trainer(make_run(tmp_path / "whole", model))  # the same nine
    assert [joined.train_step().loss for _ in range(3)] == [
        whole.train_step().loss for _ in range(3)
    ]
    joined.save()
    joined.close()
    other = {"path": paths, "weights": [1.0, 2.0]}
    with pytest.raises(errors.CheckpointError, match=r"data.weights = \[\], this run has \[1.0"):
        Trainer(make_run(tmp_path / "joined", model, data=other))
    with pytest.raises(errors.CheckpointError, match="dataset = "):
        Trainer(make_run(tmp_path / "joined", model, data={"path": paths[::-1]}))
