"""Reading one JSON object strictly: every key is taken once, what is left over is refused."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

from tml_core.errors import CheckpointError

__all__ = [
    "IGNORED_KEYS",
    "IGNORED_TEXT_KEYS",
    "IGNORED_VISION_KEYS",
    "REQUIRED",
    "Block",
    "refuse",
]

# Default of a key that is not guessed: the published implementations disagree on it.
REQUIRED: Final = object()

# Canonical key (transformers spelling): the other spellings seen in checkpoints.
_ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "conv_kernel_size": ("sconv_kernel_size",),
    "dmel_max_value": ("dmel_max",),
    "dmel_min_value": ("dmel_min",),
    "logits_mup_width_multiplier": ("embedding_multiplier",),
    "max_position_embeddings": ("model_max_length",),
    "mel_vocab_size": ("codebook_size",),
    "n_layers": ("num_hidden_layers",),
    "n_mel_bins": ("num_codebooks",),
    "n_routed_experts": ("num_local_experts",),
    "num_channels": ("n_channels",),
    "sliding_window_size": ("sliding_window",),
    "text_hidden_size": ("decoder_dmodel",),
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys that never reach the forward pass: bookkeeping of the writing library, generation defaults,
# training-only values, and the multi-token-prediction heads, which are not part of the backbone.
IGNORED_KEYS: Final = _words("""
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention
    architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
""")
IGNORED_TEXT_KEYS: Final = IGNORED_KEYS | _words("""
    attention_dropout chain_hidden_post_norm mtp_config mtp_hidden_states_first mtp_local_extent
    mtp_local_layer_ids mtp_swa_head_dim mtp_swa_num_attention_heads mtp_swa_num_key_value_heads
    num_mtp_layers num_nextn_predict_layers number_of_conv_states output_router_logits
    rms_norm_eps_moe_gate
""")
# The patch encoder is an MLP; transformers still writes the sizes of a transformer beside it.
IGNORED_VISION_KEYS: Final = IGNORED_KEYS | {"hidden_size", "num_attention_heads"}


def refuse(where: str, what: str) -> NoReturn:
    """Raise `CheckpointError` about the object called ``where``."""
    raise CheckpointError(f"{where}: {what}")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Block:
    """The keys of one JSON object that have not been read yet.

    Every method that takes a key raises `CheckpointError` naming the key, what was expected and
    what was found.
    """

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, Mapping):
            refuse(where, f"expected an object, got {_show(raw)}")
        self._left: dict[str, Any] = dict(raw)
        self.where = where

    def take(self, key: str, default: object = REQUIRED) -> Any:
        """The value under ``key`` or one of its other spellings, which must agree."""
        spellings = (key, *_ALIASES.get(key, ()))
        found = {name: self._left.pop(name) for name in spellings if name in self._left}
        if not found:
            if default is REQUIRED:
                self.refuse(f"{key} is missing and implementations differ on its default")
            return default
        value, *others = found.values()
        if any(other != value for other in others):
            self.refuse(f"spellings of one value disagree: {_show(found)}")
        return value

    def integer(self, key: str, default: object = REQUIRED, *, minimum: int = 1) -> int:
        """An integer of at least ``minimum`` (2.0 counts as 2)."""
        return self._integer(key, self.take(key, default), minimum)

    def optional_integer(self, key: str, default: object = None, *, minimum: int = 1) -> int | None:
        """An integer of at least ``minimum``, or null."""
        value = self.take(key, default)
        return None if value is None else self._integer(key, value, minimum)

    def real(self, key: str, default: object = REQUIRED, *, is_positive: bool = True) -> float:
        """A finite number."""
        value = self.take(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or (is_positive and value <= 0):
            kind = "a positive number" if is_positive else "a finite number"
            self.refuse(f"{key} must be {kind}, got {_show(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            self.refuse(f"{key} must be true or false, got {_show(value)}")
        return value

    def fixed(self, key: str, *allowed: object, is_required: bool = False) -> None:
        """A key of which only the ``allowed`` values are implemented; absent means the first."""
        value = self.take(key, REQUIRED if is_required else allowed[0])
        if not any(_is_same(value, one) for one in allowed):
            self.refuse(f"{key} must be {_show(allowed[0])}, got {_show(value)} (not supported)")

    def kinds(self, key: str, length: int, allowed: tuple[str, str]) -> tuple[bool, ...] | None:
        """A list with one of two words per layer, as "is the first word"; None if absent."""
        value = self.take(key, None)
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length:
            self.refuse(f"{key} must be a list of {length} entries, got {_show(value)}")
        for entry in value:
            if entry not in allowed:
                self.refuse(f"{key} entries must be one of {list(allowed)}, got {_show(entry)}")
        return tuple(entry == allowed[0] for entry in value)

    def indices(self, key: str, length: int) -> tuple[bool, ...] | None:
        """A list of distinct indices below ``length``, as flags per index; None if absent."""
        value = self.take(key, None)
        if value is None:
            return None
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_list or not all(type(i) is int and 0 <= i < length for i in value):
            self.refuse(f"{key} must list indices below {length}, got {_show(value)}")
        return tuple(i in value for i in range(length))

    def refuse(self, what: str) -> NoReturn:
        """Raise `CheckpointError` about this object."""
        refuse(self.where, what)

    def close(self, ignored: Iterable[str] = ()) -> None:
        """Refuse whatever was neither taken nor named in ``ignored``."""
        unknown = sorted(set(self._left) - set(ignored))
        if unknown:
            self.refuse(f"unknown key {unknown[0]} = {_show(self._left[unknown[0]])}")

    def _integer(self, key: str, value: object, minimum: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.refuse(f"{key} must be an integer of at least {minimum}, got {_show(value)}")
        return value


def _is_same(left: object, right: object) -> bool:
    # JSON's 1 and true compare equal in Python; a flag given as a number is not what was meant.
    return left == right and isinstance(left, bool) == isinstance(right, bool)
