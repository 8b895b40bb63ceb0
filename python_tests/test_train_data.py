"""Transcripts on disk and the order in which steps take them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from byte_model import BYTE_MODEL
from tml_core import errors
from tml_core.layout import Stream
from tml_core.media.patches import image_patches
from tml_core.media.segments import Audio, Image, Tokens
from tml_core.model.config import ModelConfig
from tml_core.model.tokenizer import load_tokenizer
from tml_core.train import PackedBatch, ShardReader, Transcript, read_sessions, write_shards
from tml_core.train import shards as shards_module
from tml_core.train.order import BatchOrder, epoch_order
from train_kit import make_checkpoint, random_transcripts


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig.from_path(make_checkpoint(tmp_path_factory.mktemp("mixed")))


def assert_same(one: Transcript, other: Transcript, config: ModelConfig) -> None:
    a, b = PackedBatch.pack([one], config), PackedBatch.pack([other], config)
    assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    assert [type(piece) for piece in one.segments] == [type(piece) for piece in other.segments]


def test_transcripts_come_back_as_they_were(config: ModelConfig, tmp_path: Path) -> None:
    transcripts = random_transcripts(config, 7)
    assert write_shards(iter(transcripts), tmp_path / "d", config, shard_bytes=3000) == 7
    names = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert names[0] == "dataset.json" and len(names) > 2
    reader = ShardReader(tmp_path / "d", config)
    assert len(reader) == 7 and reader.lengths == [one.num_tokens for one in transcripts]
    for index in (6, 0, 3, 3, 5):
        assert_same(reader[index], transcripts[index], config)
    for one, other in zip(reader[1:4], transcripts[1:4], strict=True):
        assert_same(one, other, config)


def test_levels_share_bytes_and_pictures_stay_if_asked(tmp_path: Path) -> None:
    nano = ModelConfig.from_path(BYTE_MODEL)
    assert nano.audio is not None and nano.audio.num_levels == 16
    generator = torch.Generator().manual_seed(1)
    bins = torch.randint(0, 16, (40, 80), generator=generator, dtype=torch.int32)
    pixels = torch.randint(0, 256, (60, 50, 3), generator=generator, dtype=torch.uint8)
    segments = [Audio(bins=bins), Image(patches=image_patches(pixels)), Tokens([3, 4])]
    length = 42 + len(image_patches(pixels))
    one = Transcript.next_tokens(segments, [Stream.INPUT] * (length - 1) + [Stream.TEXT])
    for name, quality in (("jpeg", 92), ("whole", None)):
        write_shards([one, one], tmp_path / name, nano, jpeg_quality=quality)
    sizes = {
        name: (tmp_path / name / "shard-00000.safetensors").stat().st_size
        for name in ("jpeg", "whole")
    }
    assert sizes["jpeg"] < sizes["whole"] / 5
    with safe_open(tmp_path / "jpeg" / "shard-00000.safetensors", "pt") as file:
        assert list(file.get_slice("bins").get_shape()) == [80, 40]
    kept = ShardReader(tmp_path / "whole", nano)[1]
    assert_same(kept, one, nano)
    packed = PackedBatch.pack([ShardReader(tmp_path / "jpeg", nano)[1]], nano)
    assert torch.equal(packed.bins, bins) and packed.patches.shape == (4, 2, 40, 40, 3)


def test_shards_take_turns_in_memory(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_MAX_OPEN", 2)
    transcripts = random_transcripts(config, 6)
    write_shards(transcripts, tmp_path, config, shard_bytes=900)
    assert len(list(tmp_path.glob("shard-*"))) > 3
    reader = ShardReader(tmp_path, config)
    for index in (0, 5, 2, 0, 3, 5, 1, 4):
        assert_same(reader[index], transcripts[index], config)
    whole = (tmp_path / "shard-00001.safetensors").read_bytes()
    (tmp_path / "shard-00001.safetensors").write_bytes(whole[:20])  # after it was checked
    with pytest.raises(errors.CheckpointError, match=r"data: shard .*00001.* cannot be read"):
        list(reader)


def test_a_damaged_shard_is_named_and_skipped_if_asked(config: ModelConfig, tmp_path: Path) -> None:
    transcripts = random_transcripts(config, 7)
    write_shards(transcripts, tmp_path, config, shard_bytes=3000)
    index = json.loads((tmp_path / "dataset.json").read_text())
    whole = ShardReader(tmp_path, config)
    shard = tmp_path / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(errors.CheckpointError, match=r"shard-00001.* its checksum differs"):
        ShardReader(tmp_path, config)
    shard.write_bytes(content[:-1])
    with pytest.raises(errors.CheckpointError, match=r"shard-00001.* expected \d+ bytes, got"):
        ShardReader(tmp_path, config)
    shard.unlink()
    with pytest.raises(errors.CheckpointError, match=r"shard-00001.* cannot be read"):
        ShardReader(tmp_path, config)
    reader = ShardReader(tmp_path, config, skip_corrupt=True)
    assert reader.skipped == ["shard-00001.safetensors"]
    num_lost = len(index["shards"][1]["lengths"])
    assert len(reader) == 7 - num_lost and reader.fingerprint != whole.fingerprint
    first = len(index["shards"][0]["lengths"])
    assert_same(reader[first], transcripts[first + num_lost], config)


def test_what_is_no_dataset_is_refused(config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointError, match=r"dataset.json is no dataset index"):
        ShardReader(tmp_path, config)
    write_shards(random_transcripts(config, 1), tmp_path, config)
    with pytest.raises(errors.InvalidArgument, match="holds a dataset already"):
        write_shards(random_transcripts(config, 1), tmp_path, config)
    nano = ModelConfig.from_path(BYTE_MODEL)
    with pytest.raises(errors.InvalidArgument, match="with vocab_size 128, this one has 320"):
        ShardReader(tmp_path, nano)
    file = tmp_path / "dataset.json"
    file.write_text(file.read_text().replace('"version": 2', '"version": 9'))
    with pytest.raises(errors.CheckpointError, match=r"must be tml-transcripts 2, got .* 9"):
        ShardReader(tmp_path, config)
    (tmp_path / "shard-00000.safetensors").unlink()
    file.write_text(file.read_text().replace('"version": 9', '"version": 2'))
    with pytest.raises(errors.CheckpointError, match=r"every shard of .* is damaged"):
        ShardReader(tmp_path, config, skip_corrupt=True)


def test_what_the_model_cannot_take_is_not_written(config: ModelConfig, tmp_path: Path) -> None:
    good = random_transcripts(config, 1)[0]
    label = torch.tensor([999])
    bad = Transcript([Tokens([1])], label, torch.ones(1, dtype=torch.uint8))
    with pytest.raises(errors.InvalidArgument, match=r"transcripts\[1\]: labels must be in"):
        write_shards([good, bad], tmp_path / "a", config)
    assert not (tmp_path / "a" / "dataset.json").exists()
    with pytest.raises(errors.InvalidArgument, match="transcripts: expected at least one, got"):
        write_shards([], tmp_path / "b", config)


@given(st.integers(1, 200), st.integers(0, 2**64), st.integers(0, 50))
def test_an_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    order = epoch_order(count, seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, epoch_order(count, seed, epoch))


def test_orders_differ_by_seed_and_epoch() -> None:
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    # Frozen: a checkpoint resumes in the order it was made with.
    assert epoch_order(8, 1, 0).tolist() == [7, 0, 1, 6, 3, 4, 5, 2]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 80), st.integers(0, 30)
)
def test_any_start_continues_the_same_batches(lengths: list[int], room: int, start: int) -> None:
    order = BatchOrder(lengths, room, seed=4)
    whole = list(itertools.islice(order.batches(), start + 5))
    assert list(itertools.islice(order.batches(start), 5)) == whole[start:]
    plan = order.epoch(0)
    assert sorted(itertools.chain(*plan)) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= room


def test_an_unshuffled_order_is_the_datas() -> None:
    order = BatchOrder([3, 3, 9, 1], 6, seed=4, shuffle=False)
    assert order.epoch(0) == order.epoch(1) == [[0, 1], [2], [3]]
    with pytest.raises(errors.InvalidArgument, match="data: expected at least one transcript"):
        BatchOrder([], 6, seed=4)


def nano_sessions(folder: Path, *lines: object) -> list[Transcript]:
    directory = BYTE_MODEL
    file = folder / "sessions.jsonl"
    file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
    return read_sessions(file, ModelConfig.from_path(directory), load_tokenizer(directory))


def test_sessions_become_transcripts(tmp_path: Path) -> None:
    call = {"name": "look", "args": {"at": 3}}
    one, other = nano_sessions(
        tmp_path,
        {"system": "be kind", "ticks": {"1": {"text": "hi", "say": "hello, twelve"}}},
        "",
        {"ticks": {"0": {"call": call}}, "num_ticks": 3},
    )
    tokenizer = load_tokenizer(BYTE_MODEL)
    assert tokenizer is not None

    def said(transcript: Transcript, stream: Stream) -> str:
        return tokenizer.decode(transcript.targets[transcript.streams == int(stream)].tolist())

    assert said(one, Stream.TEXT) == "hello, twelve"
    # Ticks 0 and after the text are silent; the text takes two ticks of eight tokens at most.
    assert int((one.streams == int(Stream.SILENCE)).sum()) == 1
    assert '"name":"look"' in said(other, Stream.CALL)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 1: Expecting property name"),
        ([], "line 1: session: expected an object, got list"),
        ({"tick": {}}, "line 1: session: unknown key 'tick'"),
        ({"ticks": {"0": {"sat": "x"}}}, r"line 1: ticks\[0\]: unknown key 'sat'"),
        ({"ticks": {"x": {}}}, "line 1: invalid literal for int"),
        ({"audio": "none.wav"}, "line 1: .*none.wav"),
        (
            {"ticks": {"0": {"say": "longer than one tick"}, "1": {"say": "x"}}},
            r"line 1: ticks\[1\]: expected a tick without output, for the last one needs 2 more",
        ),
    ],
)
def test_a_wrong_session_is_named(line: object, match: str, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=match):
        nano_sessions(tmp_path, line)


def test_a_missing_file_of_sessions_is_named(tmp_path: Path) -> None:
    directory = BYTE_MODEL
    config = ModelConfig.from_path(directory)
    with pytest.raises(errors.InvalidArgument, match=r"data: .*none.jsonl cannot be read"):
        read_sessions(tmp_path / "none.jsonl", config, load_tokenizer(directory))
