from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byte_model import BYTE_MODEL
from tml_core.errors import CheckpointError
from tml_core.model.config import CONTROL_TOKEN_NAMES, ModelConfig
from tml_core.model.tokenizer import control_token_ids, load_tokenizer, special_id, special_ids

NANO = load_tokenizer(BYTE_MODEL)


@given(st.text(st.characters(exclude_categories=("Cs",))).filter(lambda text: "<|" not in text))
def test_nano_tokenizer_is_the_bytes(text: str) -> None:
    assert NANO is not None
    ids = NANO.encode(text).ids
    assert ids == list(text.encode())
    assert NANO.decode(ids) == text


def test_nano_tokenizer_has_the_special_tokens() -> None:
    assert NANO is not None
    config = ModelConfig.from_path(BYTE_MODEL)
    assert config.interaction is not None
    assert control_token_ids(NANO) == config.interaction.tokens
    assert config.eos_token_ids == (special_id(NANO, "<|content_model_end_sampling|>"),)
    assert config.image_token_id == special_id(NANO, "<|image_placeholder|>")
    assert config.audio_token_id == special_id(NANO, "<|audio_placeholder|>")
    template = ["begin_of_text", "message_user", "message_model", "message_system", "message_tool"]
    template += ["content_text", "content_image", "content_audio_input", "audio_end"]
    template += ["content_model_end_sampling", "content_invoke_tool_json", "end_message"]
    template += ["content_thinking", "content_xml"]
    ids = special_ids(NANO, [f"<|{name}|>" for name in template])
    assert len(set(ids.values())) == len(template)
    assert all(256 <= token_id < config.text.unpadded_vocab_size for token_id in ids.values())
    assert NANO.get_vocab_size() == config.text.unpadded_vocab_size
    assert config.text.vocab_size == 320


def test_nano_tokenizer_reads_special_tokens_in_text() -> None:
    assert NANO is not None
    names = list(CONTROL_TOKEN_NAMES.values())
    assert (
        NANO.encode("a".join(names)).ids
        == [token_id for name in names for token_id in (special_id(NANO, name), ord("a"))][:-1]
    )
    ids = NANO.encode("hi<|tick|>").ids
    assert NANO.decode(ids) == "hi"
    assert NANO.decode(ids, skip_special_tokens=False) == "hi<|tick|>"


def test_special_id_refuses_unknown_names() -> None:
    assert NANO is not None
    with pytest.raises(CheckpointError, match=r"no special token is called '<\|nothing\|>'"):
        special_id(NANO, "<|nothing|>")
    with pytest.raises(CheckpointError, match=r"no special token is called 'a'"):
        special_id(NANO, "a")  # a token, but not a special one


def test_load_tokenizer_without_a_file(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_load_tokenizer_refuses_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"load_tokenizer: .*tokenizer.json is not a tokeniz"):
        load_tokenizer(tmp_path)
