"""Single tokens on their way into a sequence: the model gets them before the books know of them."""

from typing import Final, NamedTuple

from tml_core.contract import PAGE_LEN
from tml_core.engine.seat import Seat
from tml_core.sequence.token_log import text_records

__all__ = ["MAX_AHEAD", "FedToken", "TokenFeed"]

# Tokens that are given to the model before the sequence's books are brought up to date.
MAX_AHEAD: Final = 16


class FedToken(NamedTuple):
    """A token that the next step takes in."""

    slot: int
    position: int
    token_id: int


class TokenFeed:
    """Gives single tokens of one seat's sequence to the model.

    Room is reserved for several at once, and they become part of the sequence together, with
    `flush`: so a token does not cost what keeping a sequence in order costs.
    """

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._token_ids: list[int] = []  # given to the model, not yet in the sequence
        self._num_reserved = 0  # room for so many of them
        self._tip = self._slot = 0  # of the sequence without them

    @property
    def room(self) -> int:
        """Tokens that can be fed without `make_room`."""
        return self._num_reserved - len(self._token_ids)

    @property
    def next_position(self) -> int:
        """Where the next token goes."""
        return self._seat.sequence.tip + len(self._token_ids)

    def make_room(self) -> None:
        """Have room for one more token. Raises PoolExhausted without; nothing has changed then."""
        if self._num_reserved == len(self._token_ids):
            self.flush()
            sequence = self._seat.sequence
            tip = sequence.tip
            num_reserved = min(PAGE_LEN - tip % PAGE_LEN, MAX_AHEAD)
            sequence.reserve(num_reserved)
            self._num_reserved, self._tip, self._slot = num_reserved, tip, sequence.slot.index

    def feed(self, token_id: int) -> FedToken:
        """Count a token as given to the model, and say where it goes; there must be room for it."""
        position = self._tip + len(self._token_ids)
        self._token_ids.append(token_id)
        return FedToken(self._slot, position, token_id)

    def flush(self) -> None:
        """Make the tokens part of the sequence."""
        if not self._num_reserved:
            return
        token_ids, self._token_ids, self._num_reserved = self._token_ids, [], 0
        sequence = self._seat.sequence
        if token_ids:
            sequence.commit(text_records(token_ids))
        else:
            sequence.abort()

    def drop(self) -> None:
        """Forget the tokens: nobody knows whether the model has taken them in."""
        self._token_ids.clear()
        self.flush()
