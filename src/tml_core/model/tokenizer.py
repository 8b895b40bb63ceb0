"""The tokenizer of a checkpoint directory and the ids of its special tokens."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from tml_core.errors import CheckpointError
from tml_core.model.config import CONTROL_TOKEN_NAMES, ControlTokens

__all__ = ["control_token_ids", "load_tokenizer", "special_id", "special_ids"]


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The ``tokenizer.json`` of directory ``path``, or None when there is no such file.

    Raises `CheckpointError` when the file is not a tokenizer.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"load_tokenizer: {file} is not a tokenizer: {error}") from error


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """The vocabulary id of the special token ``name``.

    Raises `CheckpointError` when the tokenizer has no such special token.
    """
    return special_ids(tokenizer, [name])[name]


def special_ids(tokenizer: Tokenizer, names: Iterable[str]) -> dict[str, int]:
    """The vocabulary ids of several special tokens, by name; raises like `special_id`."""
    known = {
        token.content: token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    found = {}
    for name in names:
        if name not in known:
            raise CheckpointError(f"tokenizer: no special token is called {name!r}")
        found[name] = known[name]
    return found


def control_token_ids(tokenizer: Tokenizer) -> ControlTokens:
    """The control tokens of micro-turn layout v1, looked up by name; raises like `special_id`."""
    ids = special_ids(tokenizer, CONTROL_TOKEN_NAMES.values())
    return ControlTokens(**{field: ids[name] for field, name in CONTROL_TOKEN_NAMES.items()})
