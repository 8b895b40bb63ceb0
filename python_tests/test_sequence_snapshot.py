"""Snapshots: restored sequences go on as if nothing had happened; damage and mismatch are named."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sequence_fakes import Oracle, Rig
from tml_core import errors
from tml_core.contract import PAGE_LEN
from tml_core.media.dmel import DmelState
from tml_core.sequence import Carry, Retention, Sequence


def full_carry() -> Carry:
    rng = np.random.default_rng(0)
    return Carry(
        audio=DmelState(
            rng.random(800, np.float32).astype(np.float32),
            rng.random(33, np.float32).astype(np.float32),
        ),
        frame=rng.integers(0, 255, (5, 7, 3)).astype(np.uint8),
        num_sampled=11,
        num_noise=12,
        clock_ms=13_400,
    )


def written(
    rig: Rig, path: Path, tip: int = 700, retention: Retention | None = None
) -> tuple[Sequence, Oracle]:
    """A sequence with something in every part, and its snapshot."""
    sequence = Sequence(rig.store, seed=2**64 - 1, retention=retention)
    oracle = Oracle()
    while sequence.tip < tip:
        rig.boundary(sequence, oracle)
        rig.append(sequence, oracle, min(50, tip - sequence.tip))
    sequence.carry = full_carry()
    sequence.snapshot(path)
    return sequence, oracle


def same_carry(left: Carry, right: Carry) -> bool:
    assert left.audio is not None and right.audio is not None
    assert left.frame is not None and right.frame is not None
    return (
        (left.audio.context == right.audio.context).all()
        and (left.audio.pending == right.audio.pending).all()
        and (left.frame == right.frame).all()
        and (left.num_sampled, left.num_noise, left.clock_ms)
        == (right.num_sampled, right.num_noise, right.clock_ms)
    )


@pytest.mark.parametrize("tip", [0, 1, 127, 128, 300, 700])
def test_restored_sequence_goes_on(tmp_path: Path, tip: int) -> None:
    rig = Rig()
    sequence, oracle = written(rig, tmp_path / "a.tml", tip)
    other = Rig(num_slots=2, num_global_pages=16)  # another process, other page ids
    crowd, crowd_oracle = other.open()
    other.append(crowd, crowd_oracle, 200)
    restored = Sequence.restore(other.store, tmp_path / "a.tml")
    assert (restored.tip, restored.seed) == (tip, sequence.seed)
    assert restored.state_hash == sequence.state_hash
    assert restored.token_ids().tolist() == oracle.tokens
    assert same_carry(restored.carry, sequence.carry)
    other.store.audit()
    mark = restored.mark()
    other.append(restored, oracle.copy(), 300)
    restored.rewind(mark)
    other.append(restored, oracle, 300)
    other.append(crowd, crowd_oracle, 10)
    other.store.audit()


def test_empty_audio_rest_survives(tmp_path: Path) -> None:
    rig = Rig()
    sequence, _ = rig.open()
    empty = np.zeros(900, np.float32)[900:].copy()
    sequence.carry = Carry(audio=DmelState(np.zeros(800, np.float32), empty))
    sequence.snapshot(tmp_path / "a.tml")
    audio = Sequence.restore(rig.store, tmp_path / "a.tml").carry.audio
    assert audio is not None and (len(audio.context), len(audio.pending)) == (800, 0)


@pytest.mark.parametrize(("window", "prefix"), [(300, 0), (150, 130), (5000, 600)])
def test_retention_survives(tmp_path: Path, window: int, prefix: int) -> None:
    rig = Rig()
    sequence, oracle = written(rig, tmp_path / "a.tml", 1000, Retention(window, prefix))
    restored = Sequence.restore(rig.store, tmp_path / "a.tml")
    assert (restored.retention, restored.evicted) == (sequence.retention, sequence.evicted)
    assert restored.boundaries == sequence.boundaries
    twin = oracle.copy()
    for _ in range(10):
        rig.boundary(sequence, oracle)
        rig.boundary(restored, twin)
        rig.append(sequence, oracle, 60)
        rig.append(restored, twin, 60)
        assert restored.evicted == sequence.evicted
        rig.store.audit()


def test_file_is_a_function_of_the_state(tmp_path: Path) -> None:
    """Other pages, other neighbours, another way to the same place: the same bytes."""
    plain, busy = Rig(), Rig()
    written(plain, tmp_path / "a.tml", 300)
    other, other_oracle = busy.open()
    busy.append(other, other_oracle, 500)
    busy.random = np.random.default_rng(0)
    sequence, oracle = written(busy, tmp_path / "b.tml", 300)
    assert (tmp_path / "a.tml").read_bytes() == (tmp_path / "b.tml").read_bytes()
    mark = sequence.mark()
    busy.append(sequence, oracle, 60)
    sequence.rewind(mark)
    sequence.snapshot(tmp_path / "b.tml")
    assert (tmp_path / "a.tml").read_bytes() == (tmp_path / "b.tml").read_bytes()


def test_file_is_plain_safetensors(tmp_path: Path) -> None:
    rig = Rig()
    sequence, oracle = written(rig, tmp_path / "a.tml")
    tensors = load_file(tmp_path / "a.tml")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.tml"]
    assert tensors["global_pages"].shape[0] == 6
    assert tensors["sliding_pages"].shape[0] == sequence.slot.sliding.num_pages
    ids = tensors["log"].numpy().view("<i4")[:, 0]
    assert ids.tolist() == oracle.tokens
    assert torch.equal(tensors["conv_rows"], sequence.slot.conv)
    # V of the last page: position 700 and later are zero, not what the pool had there.
    last = tensors["global_pages"][-1, 0, 0, 1].view(PAGE_LEN, -1)
    assert (last[:60, 0] > 0).all() and (last[60:] == 0).all()


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    sequence, oracle = written(rig, tmp_path / "a.tml")
    before = (tmp_path / "a.tml").read_bytes()
    rig.append(sequence, oracle, 10)

    def no_space(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        sequence.snapshot(tmp_path / "a.tml")
    assert (tmp_path / "a.tml").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "a.tml"]
    with pytest.raises(FileNotFoundError):
        sequence.snapshot(tmp_path / "no" / "a.tml")


# Refusals. Every one leaves the store as it was.


def refused(
    rig: Rig, path: Path, match: str, error: type[Exception] = errors.SnapshotError
) -> None:
    rig.store.audit()  # sequences that went out of scope are gone first
    before = (rig.store.global_pool.free_pages, rig.store.sliding_pool.free_pages)
    sequences = rig.store.num_sequences
    with pytest.raises(error, match=match):
        Sequence.restore(rig.store, path)
    assert (rig.store.global_pool.free_pages, rig.store.sliding_pool.free_pages) == before
    assert rig.store.num_sequences == sequences
    rig.store.audit()


def with_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the file with a changed header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format", "other", "expected a snapshot of a sequence, got format 'other'"),
        ("format_version", "1", "format_version is 1, expected 3"),
        ("contract_version", "9", "contract_version is 9, expected 1"),
        ("page_len", "64", "page_len is 64, expected 128"),
        ("layout", "sm_90", "layout is sm_90, expected cpu"),
        ("dtype", "bfloat16", "dtype is bfloat16, expected float32"),
        ("model", "abc", "model is abc, expected fake"),
        ("model", None, "model is None, expected fake"),
        ("tip", "699", "do not match|must be"),
        ("tip", "-1", "tip must be an integer from 0 to 4096, got '-1'"),
        ("tip", "99999999", "tip must be an integer from 0 to 4096"),
        ("tip", None, "tip must be an integer from 0 to 4096, got ''"),
        ("seed", "1", "do not match its digest: the file is damaged"),
        ("clock_ms", "5", "do not match its digest"),
        ("global_floor", "3", "global_pages must be F32"),
        ("global_floor", "7", "global_floor must be an integer from 0 to 6"),
        ("retention_window", "0", "must be an integer|do not match"),
    ],
)
def test_changed_metadata_is_named(tmp_path: Path, key: str, value: str | None, match: str) -> None:
    rig = Rig()
    written(rig, tmp_path / "a.tml")

    def change(header: dict[str, Any]) -> None:
        header["__metadata__"].pop(key, None)
        if value is not None:
            header["__metadata__"][key] = value

    with_header(tmp_path / "a.tml", change)
    refused(rig, tmp_path / "a.tml", match)


def test_every_difference_is_named_at_once(tmp_path: Path) -> None:
    written(Rig(fingerprint="one"), tmp_path / "a.tml")
    rig = Rig(fingerprint="two", dtype=torch.bfloat16)
    refused(
        rig, tmp_path / "a.tml", "dtype is float32, expected bfloat16; model is one, expected t"
    )


def test_changed_tensors_are_named(tmp_path: Path) -> None:
    rig = Rig()
    sequence, _ = written(rig, tmp_path / "a.tml")

    def rename(header: dict[str, Any]) -> None:
        header["bog"] = header.pop("log")

    with_header(tmp_path / "a.tml", rename)
    refused(rig, tmp_path / "a.tml", r"expected the tensors \[.*'log'.*\], got \['audio.*'bog'")
    sequence.snapshot(tmp_path / "a.tml")

    def retype(header: dict[str, Any]) -> None:
        header["conv_rows"]["dtype"] = "I32"

    with_header(tmp_path / "a.tml", retype)
    refused(rig, tmp_path / "a.tml", r"conv_rows must be F32 \[3, 3, 12\], got I32")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9, 0.9999])
def test_truncated_file(tmp_path: Path, share: float) -> None:
    rig = Rig()
    path = tmp_path / "a.tml"
    written(rig, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(rig, path, "restore: .*a.tml cannot be read")


def test_no_file(tmp_path: Path) -> None:
    refused(Rig(), tmp_path / "none.tml", r"restore: .*none.tml cannot be read")


def test_flipped_bits_anywhere_are_found(tmp_path: Path) -> None:
    rig = Rig()
    path = tmp_path / "a.tml"
    written(rig, path, 300)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    random = np.random.default_rng(1)
    in_header = random.integers(8, 8 + length, 120).tolist()
    in_data = random.integers(8 + length, len(data), 40).tolist()
    for place in [*range(8), *in_header, *in_data, len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(random.integers(0, 8))
        if json_means_the_same(bytes(damaged), data):
            continue
        path.write_bytes(damaged)
        refused(rig, path, r"restore: .*a\.tml")


def json_means_the_same(left: bytes, right: bytes) -> bool:
    """Whether only the spelling of the header differs (a blank became a tab)."""
    try:
        headers = [
            json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]) for data in (left, right)
        ]
    except (ValueError, struct.error, MemoryError, OverflowError):
        return False
    return (
        bool(headers[0] == headers[1])
        and left[8:].split(b"}}", 1)[1:] == right[8:].split(b"}}", 1)[1:]
    )


def test_restore_without_room(tmp_path: Path) -> None:
    written(Rig(), tmp_path / "a.tml")
    exhausted = errors.PoolExhausted
    refused(
        Rig(num_global_pages=5),
        tmp_path / "a.tml",
        "global pages: restoring 700 positions needs 6 more, 5 of 5 are free",
        exhausted,
    )
    refused(Rig(num_sliding_pages=1), tmp_path / "a.tml", "sliding pages: restoring", exhausted)
    rig = Rig(num_slots=1)
    _held = rig.open()[0]
    refused(rig, tmp_path / "a.tml", "sequences: all 1 slots are in use", exhausted)
    refused(Rig(max_positions=640), tmp_path / "a.tml", "tip must be an integer from 0 to 640")
