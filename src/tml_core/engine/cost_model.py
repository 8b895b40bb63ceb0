"""What a model step costs, learnt from the steps that were run."""

from typing import Final

__all__ = ["CostModel"]

_FORGET: Final = 0.995  # weight of a step after the next; the memory is some 200 steps
_CLIP: Final = 3.0  # a residual counts for at most this many typical ones
_FIRST_STEPS: Final = 8
_MANY: Final = 1 << 30


class CostModel:
    """Seconds of a step as ``a + b * tokens + c * rows``: recursive least squares with forgetting.

    A step that took far longer than expected (the machine was busy elsewhere) pulls no more than
    one that was just out of the ordinary. Used by the engine thread; `step_s` may be called from
    any, for an estimate of any recent moment.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._weights = [0.0, 0.0, 0.0]
        self._spread = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
        self._typical_s = 0.0
        self._ratio = 1.0

    @property
    def is_learnt(self) -> bool:
        """Whether enough steps were seen for `step_s` to mean something."""
        return self.num_steps >= _FIRST_STEPS

    @property
    def tail(self) -> float:
        """How much longer than expected a step takes in the worst of a hundred, as a factor."""
        return self._ratio

    @property
    def weights(self) -> tuple[float, float, float]:
        """Seconds of any step, of a position more and of a sequence more."""
        a, b, c = self._weights
        return max(0.0, a), max(0.0, b), max(0.0, c)

    def step_s(self, num_tokens: int, num_rows: int) -> float:
        """Seconds of a step of ``num_tokens`` positions in ``num_rows`` sequences; 0 at first."""
        if not self.is_learnt:
            return 0.0
        a, b, c = self._weights
        return max(0.0, a + b * num_tokens + c * num_rows)

    def num_tokens(self, seconds: float, num_rows: int) -> int:
        """Positions that a step of ``num_rows`` sequences may have to take ``seconds``."""
        a, b, c = self._weights
        if not self.is_learnt or b <= 0.0:
            return _MANY
        return max(0, int((seconds - a - c * num_rows) / b))

    def learn(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        """Take in what a step took."""
        x = (1.0, float(num_tokens), float(num_rows))
        w, p = self._weights, self._spread
        error = seconds - (w[0] + w[1] * x[1] + w[2] * x[2])
        if self.is_learnt:
            expected = max(1e-9, seconds - error)
            # A quantile by steps: up by 99 where it was passed, down by 1 where it was not.
            step = 0.005 * self._ratio
            self._ratio += 0.99 * step if seconds > expected * self._ratio else -0.01 * step
            self._ratio = max(1.0, self._ratio)
            error = min(max(error, -_CLIP * self._typical_s), _CLIP * self._typical_s)
        self._typical_s += (abs(error) - self._typical_s) / min(self.num_steps + 1, 50)
        self._typical_s = max(self._typical_s, 0.01 * seconds)
        px = [row[0] + row[1] * x[1] + row[2] * x[2] for row in p]
        scale = 1.0 / (_FORGET + px[0] + px[1] * x[1] + px[2] * x[2])
        for i in range(3):
            gain = px[i] * scale
            w[i] += gain * error
            row = p[i]
            for j in range(3):
                row[j] = (row[j] - gain * px[j]) / _FORGET
        # Without variety in the steps the spread would grow for ever.
        if p[0][0] + p[1][1] + p[2][2] > 1e6:
            for row in p:
                for j in range(3):
                    row[j] *= 1e-3
        self.num_steps += 1
