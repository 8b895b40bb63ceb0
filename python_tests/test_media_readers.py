"""Audio and video files: written with soundfile and PyAV, read back; damage; bundled clips."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr

from tml_core.errors import InvalidArgument, InvalidType, MediaError
from tml_core.media import (
    VideoReader,
    audio_blocks,
    clips,
    read_audio,
    resample_blocks,
    write_wav,
)


def _tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    t_S = np.arange(round(seconds * rate)) / rate
    columns = [0.4 * np.sin(2 * np.pi * 300 * (c + 1) * t_S) for c in range(channels)]
    return np.stack(columns, axis=1).astype(np.float32)


def _write_video(path: Path, times_ms: list[int], codec: str = "libx264", **options) -> None:
    """A video whose picture i is a grey of 10 * i, shown from times_ms[i] on; 96 x 64."""
    rotation = options.pop("rotation", 0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=1000)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, time_ms in enumerate(times_ms):
            picture = np.full((64, 96, 3), 10 * i, np.uint8)
            picture[:32, :48] = 255  # the upper left corner is white
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _number(rgb_HWC: np.ndarray) -> int:
    """Which picture of _write_video this is, from a corner that stays grey."""
    return round(float(rgb_HWC[-16:, -16:].mean()) / 10)


# ---- audio -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", None)]
)
def test_read_audio_gives_the_samples_of_a_lossless_file(tmp_path, suffix, subtype):
    path = tmp_path / f"tone.{suffix}"
    tone_SC = np.round(_tone(0.7, 16000) * 32768) / np.float32(32768)
    soundfile.write(path, tone_SC, 16000, subtype=subtype)
    pcm_S = read_audio(path)
    assert pcm_S.dtype == np.float32
    assert np.array_equal(pcm_S, tone_SC[:, 0])
    assert np.array_equal(read_audio(str(path)), pcm_S)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_read_audio_averages_channels_then_resamples(tmp_path, rate, channels):
    path = tmp_path / "tone.wav"
    tone_SC = _tone(1.3, rate, channels)
    soundfile.write(path, tone_SC, rate, subtype="FLOAT")
    want_S = soxr.resample(tone_SC.mean(axis=1, dtype=np.float32), rate, 16000)
    assert np.array_equal(read_audio(path), want_S)
    assert len(want_S) == round(1.3 * 16000)


def test_read_audio_reads_ogg_and_the_audio_of_a_container(tmp_path):
    tone_SC = _tone(1.0, 48000, 2)
    want_S = soxr.resample(tone_SC.mean(axis=1), 48000, 16000)
    soundfile.write(tmp_path / "tone.ogg", tone_SC, 48000)
    with av.open(str(tmp_path / "tone.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(tone_SC.T.copy(), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for name in ("tone.ogg", "tone.mp4"):
        got_S = read_audio(tmp_path / name)
        assert abs(len(got_S) - len(want_S)) < 1024  # an AAC frame may be padded
        error_S = got_S[1000:15000] - want_S[1000:15000]
        assert np.sqrt((error_S**2).mean()) < 0.02  # lossy codecs, tone of 0.4


def test_read_audio_clips_what_is_too_loud_and_reads_an_empty_file(tmp_path):
    loud_S = np.array([0.5, 1.7, -3.0], np.float32)
    soundfile.write(tmp_path / "loud.wav", loud_S, 16000, subtype="FLOAT")
    assert read_audio(tmp_path / "loud.wav").tolist() == [0.5, 1.0, -1.0]
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    assert read_audio(tmp_path / "empty.wav").shape == (0,)


def test_audio_blocks_joined_are_the_recording(tmp_path):
    soundfile.write(tmp_path / "tone.flac", _tone(4.0, 44100), 44100)
    blocks = list(audio_blocks(tmp_path / "tone.flac", 8000))
    assert len(blocks) > 5
    assert np.array_equal(np.concatenate(blocks), read_audio(tmp_path / "tone.flac", 8000))


@pytest.mark.parametrize("block_len", [1, 160, 4801])
def test_resample_blocks_do_not_depend_on_the_cuts(block_len):
    tone_S = _tone(0.2, 48000)[:, 0]
    blocks = (tone_S[i : i + block_len] for i in range(0, len(tone_S), block_len))
    joined_S = np.concatenate(list(resample_blocks(blocks, 48000, 16000)))
    assert np.array_equal(joined_S, soxr.resample(tone_S, 48000, 16000))


def _cut(source: Path, target: Path, fraction: float) -> Path:
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * fraction)])
    return target


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_read_audio_refuses_a_truncated_file(tmp_path, suffix):
    noise_S = np.random.default_rng(0).uniform(-0.5, 0.5, 64000)
    soundfile.write(tmp_path / f"whole.{suffix}", noise_S, 16000)
    path = _cut(tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}", 0.6)
    with pytest.raises(MediaError, match=rf"audio: cannot read '.*cut.{suffix}': \w+"):
        read_audio(path)


def test_read_audio_takes_a_wav_of_unknown_size(tmp_path):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(160, 0.25, np.float32), 16000, format="WAV", subtype="FLOAT")
    data = bytearray(buffer.getvalue())
    size_at = data.index(b"data") + 4
    data[size_at : size_at + 4] = b"\xff\xff\xff\xff"  # as a program that writes to a pipe does
    (tmp_path / "pipe.wav").write_bytes(data)
    assert read_audio(tmp_path / "pipe.wav").tolist() == [0.25] * 160


def test_read_audio_refuses_what_it_cannot_read(tmp_path):
    (tmp_path / "junk.wav").write_bytes(b"no sound in here " * 20)
    _write_video(tmp_path / "mute.mp4", [0, 100])
    soundfile.write(tmp_path / "nan.wav", np.full(9, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(MediaError, match=r"'.*gone.wav': no such file"):
        read_audio(tmp_path / "gone.wav")
    with pytest.raises(MediaError, match=r"audio: cannot read '.*': it is not a file"):
        read_audio(tmp_path)
    with pytest.raises(MediaError, match=r"'.*junk.wav': Format not recognised"):
        read_audio(tmp_path / "junk.wav")
    with pytest.raises(MediaError, match=r"'.*mute.mp4': it has no audio stream"):
        read_audio(tmp_path / "mute.mp4")
    with pytest.raises(MediaError, match=r"'.*nan.wav': it holds NaN or infinity"):
        read_audio(tmp_path / "nan.wav")
    with pytest.raises(InvalidArgument, match="sample_rate: expected at least 1, got 0"):
        read_audio(clips().audio, sample_rate=0)


def test_write_wav_round_trip_and_refusals(tmp_path):
    pcm_S = _tone(0.3, 24000)[:, 0]
    write_wav(tmp_path / "out.wav", pcm_S, 24000)
    assert soundfile.info(tmp_path / "out.wav").samplerate == 24000
    # 16 bits: half a step, and one where the largest positive value is cut.
    assert np.abs(read_audio(tmp_path / "out.wav", 24000) - pcm_S).max() <= 1 / 32768
    with pytest.raises(InvalidArgument, match=r"pcm: expected samples in \[-1, 1\]"):
        write_wav(tmp_path / "out.wav", pcm_S * 4)
    with pytest.raises(MediaError, match=r"audio: cannot write '.*no such directory"):
        write_wav(tmp_path / "nowhere" / "out.wav", pcm_S)


# ---- video -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_video_reader_gives_pictures_and_times(tmp_path, suffix):
    times_ms = [0, 40, 100, 300, 333]
    _write_video(tmp_path / f"v.{suffix}", times_ms)
    with VideoReader(tmp_path / f"v.{suffix}") as reader:
        frames = list(reader)
    assert [time_ms for time_ms, _ in frames] == times_ms
    assert [_number(rgb) for _, rgb in frames] == [0, 1, 2, 3, 4]
    assert {(rgb.shape, str(rgb.dtype)) for _, rgb in frames} == {((64, 96, 3), "uint8")}


def test_video_times_count_from_the_first_frame(tmp_path):
    _write_video(tmp_path / "late.mkv", [700, 740, 900])
    assert [time_ms for time_ms, _ in VideoReader(tmp_path / "late.mkv")] == [0, 40, 200]


def test_frames_on_grid_give_the_last_picture_at_or_before(tmp_path):
    # 0..99: 0 then 1 from 40; picture 2 exactly at 100; 3 and 4 between 200 and 300; 5 at 620.
    _write_video(tmp_path / "v.mp4", [0, 40, 100, 220, 290, 620, 660])
    frames = list(VideoReader(tmp_path / "v.mp4").frames_on_grid(10))
    assert [time_ms for time_ms, _ in frames] == [0, 100, 200, 300, 400, 500, 600]
    assert [_number(rgb) for _, rgb in frames] == [0, 2, 2, 4, 4, 4, 4]
    assert frames[4][1] is frames[5][1]
    halves = list(VideoReader(tmp_path / "v.mp4").frames_on_grid(5))
    assert [(time_ms, _number(rgb)) for time_ms, rgb in halves] == [
        (0, 0),
        (200, 2),
        (400, 4),
        (600, 4),
    ]


def test_frames_on_grid_keep_to_a_rate_that_does_not_divide(tmp_path):
    _write_video(tmp_path / "v.mp4", [round(1000 * i / 25) for i in range(25)])
    frames = list(VideoReader(tmp_path / "v.mp4").frames_on_grid(3))
    assert [(time_ms, _number(rgb)) for time_ms, rgb in frames] == [(0, 0), (333, 8), (667, 16)]


def test_video_of_one_picture_has_one_grid_frame(tmp_path):
    _write_video(tmp_path / "still.mp4", [0])
    assert len(list(VideoReader(tmp_path / "still.mp4").frames_on_grid(10))) == 1


@pytest.mark.parametrize(
    ("max_edge", "shape"), [(48, (32, 48, 3)), (None, (64, 96, 3)), (500, (64, 96, 3))]
)
def test_video_reader_makes_pictures_smaller_never_larger(tmp_path, max_edge, shape):
    _write_video(tmp_path / "v.mp4", [0, 100])
    with VideoReader(tmp_path / "v.mp4", max_edge=max_edge) as reader:
        assert [rgb.shape for _, rgb in reader] == [shape, shape]


@pytest.mark.parametrize(
    ("rotation", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1)), (0, (0, 0))]
)
def test_video_reader_turns_pictures_upright(tmp_path, rotation, corner):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a rotation")
    _write_video(tmp_path / "v.mp4", [0, 100], rotation=rotation)
    _, rgb_HWC = next(iter(VideoReader(tmp_path / "v.mp4")))
    assert rgb_HWC.shape == ((64, 96, 3) if rotation % 180 == 0 else (96, 64, 3))
    # The white corner was the upper left one; a counterclockwise quarter turn takes it down.
    assert rgb_HWC[corner].min() > 200
    assert (rgb_HWC[[0, 0, -1, -1], [0, -1, 0, -1]].min(axis=-1) > 200).sum() == 1


@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}])
@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_video_reader_refuses_a_truncated_file(tmp_path, options, fraction):
    _write_video(tmp_path / "whole.mp4", [40 * i for i in range(25)], codec="mpeg4", **options)
    path = _cut(tmp_path / "whole.mp4", tmp_path / "cut.mp4", fraction)
    with pytest.raises(MediaError, match=r"video: cannot read '.*cut.mp4': \w+"):
        list(VideoReader(path))


def test_video_reader_refuses_a_file_cut_between_two_pictures(tmp_path):
    _write_video(tmp_path / "whole.mp4", [40 * i for i in range(10)], movflags="faststart")
    data = (tmp_path / "whole.mp4").read_bytes()
    with av.open(str(tmp_path / "whole.mp4")) as container:
        last = [packet for packet in container.demux(video=0) if packet.size][-1]
        assert last.pos + last.size == len(data)
    (tmp_path / "cut.mp4").write_bytes(data[: last.pos])
    with pytest.raises(MediaError, match=r"'.*cut.mp4': truncated, 9 of 10 packets"):
        list(VideoReader(tmp_path / "cut.mp4"))


def test_video_reader_refuses_what_it_cannot_read(tmp_path):
    (tmp_path / "junk.mp4").write_bytes(b"no picture in here " * 20)
    with pytest.raises(MediaError, match=r"video: cannot read '.*gone.mp4': no such file"):
        VideoReader(tmp_path / "gone.mp4")
    with pytest.raises(MediaError, match=r"video: cannot read '.*': it is not a file"):
        VideoReader(tmp_path)
    with pytest.raises(MediaError, match=r"'.*junk.mp4': Invalid data"):
        VideoReader(tmp_path / "junk.mp4")
    with pytest.raises(MediaError, match=r"'.*talk.flac': it has no video stream"):
        VideoReader(clips().audio)
    with pytest.raises(InvalidArgument, match="max_edge: expected at least 1, got 0"):
        VideoReader(clips().video, max_edge=0)
    with pytest.raises(InvalidType, match="fps: expected an int, got float"):
        list(VideoReader(clips().video).frames_on_grid(12.5))


def test_video_reader_is_read_once():
    reader = VideoReader(clips().video)
    next(iter(reader))
    with pytest.raises(MediaError, match=r"'.*scene.mp4': it was read or closed before"):
        next(iter(reader))
    reader.close()
    reader.close()
    closed = VideoReader(clips().video)
    closed.close()
    with pytest.raises(MediaError, match="it was read or closed before"):
        next(closed.frames_on_grid(10))


# ---- bundled clips -----------------------------------------------------------------------------


def test_clips_are_sixteen_seconds_of_speech_and_video():
    paths = clips()
    pcm_S = read_audio(paths.audio)
    assert len(pcm_S) == 16 * 16000
    assert soundfile.info(paths.audio).samplerate == 16000
    assert 0.2 < np.abs(pcm_S).max() < 1.0
    assert not pcm_S[:16000].any()
    with VideoReader(paths.video, max_edge=None) as reader:
        frames = list(reader.frames_on_grid(10))
    assert len(frames) == 160
    assert frames[0][1].shape == (240, 320, 3)
    assert any(
        np.abs(a.astype(int) - b).mean() > 5
        for (_, a), (_, b) in zip(frames, frames[20:], strict=False)
    )
    assert sum(path.stat().st_size for path in paths) < 400_000
    licences = (paths.audio.parent / "LICENSES.md").read_text(encoding="utf-8")
    assert all(path.name in licences for path in paths)
