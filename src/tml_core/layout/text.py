"""Text to token ids and token ids to bytes, for byte-level tokenizers."""

from collections.abc import Iterable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tml_core.errors import CheckpointError, InvalidArgument, InvalidType

__all__ = ["TextCodec", "bitmask"]


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(rest)})
    return alphabet


_BYTE_OF: Final = _byte_alphabet()


class TextCodec:
    """The text side of a vocabulary: which ids are text, and what bytes they stand for.

    ``num_ids``: the unpadded vocabulary size. Special tokens are never text: not in `encode`, even
    where the text spells one, and not in `is_text`.
    Raises `CheckpointError` if the tokenizer is not byte-level or has ids the model does not.
    """

    def __init__(self, tokenizer: Tokenizer, num_ids: int) -> None:
        # A copy, for it is set to read "<|tick|>" typed by a user as seven characters of text.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self.num_ids = num_ids
        self._bytes: list[bytes] = [b""] * num_ids
        is_text = np.zeros(num_ids, np.bool_)
        added = tokenizer.get_added_tokens_decoder()
        for content, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
            if token_id >= num_ids:
                raise CheckpointError(
                    f"tokenizer: expected ids below {num_ids}, got {token_id} for {content!r}"
                )
            if token_id in added:
                if not added[token_id].special:
                    self._bytes[token_id], is_text[token_id] = content.encode(), True
                continue
            try:
                self._bytes[token_id] = bytes(_BYTE_OF[char] for char in content)
            except KeyError:
                raise CheckpointError(
                    f"tokenizer: expected a byte-level vocabulary, got token {content!r}"
                ) from None
            is_text[token_id] = True
        is_text.flags.writeable = False
        self.is_text: NDArray[np.bool_] = is_text

    def encode(self, text: str) -> tuple[int, ...]:
        """The token ids of ``text``; none of them is special. Raises for text that is not UTF-8."""
        if not isinstance(text, str):
            raise InvalidType(f"text: expected str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"text: expected valid Unicode, got {error.reason}") from None
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if not all(self.is_text[token] for token in ids):
            raise InvalidArgument("text: expected text the tokenizer can spell without specials")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of whole ``ids``; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._bytes[token] for token in ids).decode("utf-8", "replace")

    def feed(self, pending: bytes, token_id: int) -> tuple[str, bytes]:
        """The characters complete after one more token, and the bytes that still wait."""
        data = pending + self._bytes[token_id]
        tail = _unfinished(data)
        return data[: len(data) - tail].decode("utf-8", "replace"), data[len(data) - tail :]


def bitmask(is_allowed_V: NDArray[np.bool_]) -> torch.Tensor:
    """Allowed ids as int32 [ceil(V / 32)]: id i is bit i % 32 (lowest first) of word i // 32."""
    words = -(-len(is_allowed_V) // 32)
    padded = np.zeros(words * 32, np.bool_)
    padded[: len(is_allowed_V)] = is_allowed_V
    packed = np.packbits(padded, bitorder="little").view("<i4")
    return torch.from_numpy(packed.astype(np.int32))


def _unfinished(data: bytes) -> int:
    """How many bytes at the end begin a character whose rest has not come."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        need = 2 if 0xC2 <= byte < 0xE0 else 3 if byte & 0xF0 == 0xE0 else 4
        if byte < 0xC2 or byte > 0xF4 or need <= back:
            return 0
        # What cannot become a character any more (overlong, surrogate, too high) does not wait.
        try:
            data[-back:].decode("utf-8")
        except UnicodeDecodeError as error:
            return back if error.reason == "unexpected end of data" else 0
    return 0
