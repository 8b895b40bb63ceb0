"""Make the bundled clips from two Debian packages.

    apt-get download pocketsphinx-testdata opencv-doc
    python scripts/make_clips.py pocketsphinx-testdata_*.deb opencv-doc_*.deb

Sources (the digests of the files inside are checked):
  pocketsphinx-testdata 0.8+5prealpha+1-15: three sentences of a LibriVox reading, 16 kHz WAV.
  opencv-doc 4.6.0+dfsg-12: cup.mp4 of the OpenCV.js tutorials, 640 x 480, a hand moving a cup.
Results, both 16.0 s, in src/tml_core/assets/clips:
  talk.flac  the sentences with silence before, between and after them; samples unchanged.
  scene.mp4  the first 8 s of the cup, twice (it ends as it begins), 320 x 240, 15 pictures
             a second, H.264, no sound.
talk.flac decodes to the same samples on every machine; the bytes of scene.mp4 depend on the
version of the encoder.
"""

import argparse
import gzip
import hashlib
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

CLIPS = Path(__file__).resolve().parent.parent / "src" / "tml_core" / "assets" / "clips"
SAMPLE_RATE = 16000
DURATION_S = 16
FPS = 15

SPEECH_DIR = "usr/share/pocketsphinx/test/data/librivox"
SENTENCES = {  # file -> (where it begins in talk.flac in seconds, digest)
    "sense_and_sensibility_01_austen_64kb-0880.wav": (
        1.0,
        "fbec491ef00ee734a67f0ee318e98c51c157b479e1629ff4f4426861ecac0414",
    ),
    "sense_and_sensibility_01_austen_64kb-0890.wav": (
        5.0,
        "5793ffbdee55fb8bfd284943a6866864c832d9d4accf2661cabd39915c84ee10",
    ),
    "sense_and_sensibility_01_austen_64kb-0930.wav": (
        11.6,
        "954adbf0b56ac8a148cbe77b39ca18d76b5f2a1e1f405565bd786ce3e68a68b7",
    ),
}
VIDEO = "usr/share/doc/opencv-doc/opencv4/html/cup.mp4.gz"
VIDEO_SHA256 = "37db9cee98f70b1458985a15ad2e5b0183e90e24c281b534afcf812e5986154f"


def main() -> None:
    """Unpack both packages and write both clips."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("speech_deb", type=Path, help="pocketsphinx-testdata_*.deb")
    parser.add_argument("video_deb", type=Path, help="opencv-doc_*.deb")
    arguments = parser.parse_args()
    CLIPS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for package in (arguments.speech_deb, arguments.video_deb):
            subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        make_talk(Path(folder) / SPEECH_DIR, CLIPS / "talk.flac")
        make_scene(Path(folder) / VIDEO, CLIPS / "scene.mp4")


def make_talk(folder: Path, target: Path) -> None:
    """Lay the sentences out on silence and write them as 16-bit FLAC."""
    talk_S = np.zeros(DURATION_S * SAMPLE_RATE, np.int16)
    for name, (start_s, digest) in SENTENCES.items():
        check_digest(name, (folder / name).read_bytes(), digest)
        pcm_S, rate = soundfile.read(folder / name, dtype="int16")
        if rate != SAMPLE_RATE:
            raise SystemExit(f"{name}: expected {SAMPLE_RATE} Hz, got {rate}")
        start = round(start_s * SAMPLE_RATE)
        talk_S[start : start + len(pcm_S)] = pcm_S
    soundfile.write(target, talk_S, SAMPLE_RATE, subtype="PCM_16", compression_level=1.0)


def make_scene(packed: Path, target: Path) -> None:
    """Scale the cup down, play it twice, encode it with x264."""
    data = gzip.decompress(packed.read_bytes())
    check_digest(packed.name, data, VIDEO_SHA256)
    source = packed.with_suffix("")
    source.write_bytes(data)
    pictures = first_loop(source)
    with av.open(str(target), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        # One thread, so that the same encoder gives the same bytes.
        stream.options = {"crf": "25", "preset": "veryslow", "threads": "1", "g": "240"}
        for i in range(DURATION_S * FPS):
            frame = av.VideoFrame.from_ndarray(pictures[i % len(pictures)], format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def first_loop(path: Path) -> list[NDArray[np.uint8]]:
    """The pictures shown at i / FPS for the first half of the clip's duration."""
    pictures: list[NDArray[np.uint8]] = []
    with av.open(str(path)) as container:
        shown: av.VideoFrame | None = None
        for frame in container.decode(video=0):
            while shown is not None and Fraction(len(pictures), FPS) < frame.pts * frame.time_base:
                small = shown.reformat(width=320, height=240, format="rgb24", interpolation="AREA")
                pictures.append(small.to_ndarray())
            shown = frame
    return pictures[: DURATION_S * FPS // 2]


def check_digest(name: str, data: bytes, digest: str) -> None:
    """Stop if ``data`` is not the file the clips were made from."""
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise SystemExit(f"{name}: expected sha256 {digest}, got {found}")


if __name__ == "__main__":
    main()
