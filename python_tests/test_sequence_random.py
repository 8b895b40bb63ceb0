"""Random lives of several sequences: every number against the oracle, an audit after each act."""

import gc
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sequence_fakes import Oracle, Rig, StepFailed, step_input
from tml_core import errors
from tml_core.sequence import Carry, Mark, Retention, Sequence

COUNTS = st.one_of(st.integers(1, 20), st.sampled_from([100, 127, 128, 129, 256, 300]))
PICK = st.integers(0, 1000)


class Lives(RuleBasedStateMachine):
    """Sequences and marks are picked by number modulo how many there are."""

    @initialize(seed=st.integers(0, 2**32 - 1), max_step_tokens=st.sampled_from([64, 200, 512]))
    def begin(self, seed: int, max_step_tokens: int) -> None:
        # Small pools: running out is part of life.
        self.rig = Rig(
            num_slots=3,
            max_positions=2000,
            num_global_pages=24,
            num_sliding_pages=18,
            max_step_tokens=max_step_tokens,
        )
        self.rig.random = np.random.default_rng(seed)
        self.lives: list[tuple[Sequence, Oracle]] = []
        self.marks: list[tuple[Mark, Oracle, Carry]] = []

    @rule(window=st.sampled_from([0, 100, 300]), prefix=st.sampled_from([0, 50, 200]))
    def open(self, window: int, prefix: int) -> None:
        retention = Retention(window, prefix) if window else None
        try:
            self.lives.append(self.rig.open(retention))
        except errors.PoolExhausted:
            assert self.rig.store.num_sequences == 3  # marks keep dropped ones open

    @precondition(lambda self: self.lives)
    @rule(pick=PICK, count=COUNTS, block=st.tuples(st.integers(0, 300), st.integers(1, 300)))
    def append(self, pick: int, count: int, block: tuple[int, int]) -> None:
        sequence, oracle = self.life(pick)
        start, length = block
        blocks = ((start, min(count, start + length)),) if start < count else ()
        self.attempt([(sequence, oracle, count, blocks)])

    @precondition(lambda self: len(self.lives) > 1)
    @rule(counts=st.lists(COUNTS, min_size=3, max_size=3))
    def append_together(self, counts: list[int]) -> None:
        self.attempt([(s, o, n, ()) for (s, o), n in zip(self.lives, counts, strict=False)])

    @precondition(lambda self: self.lives)
    @rule(counts=st.lists(COUNTS, min_size=3, max_size=3), step=st.integers(1, 3))
    def fail(self, counts: list[int], step: int) -> None:
        before = [self.shown(s) for s, _ in self.lives]
        self.rig.fake.fail_in = step
        inputs = [
            step_input(s, self.rig.tokens(n), carry=Carry(clock_ms=-1))
            for (s, _), n in zip(self.lives, counts, strict=False)
        ]
        try:
            with self.rig.runner.stage(inputs):
                raise StepFailed("the body failed")
        except (StepFailed, errors.PoolExhausted):
            pass
        self.rig.fake.fail_in = None
        assert [self.shown(s) for s, _ in self.lives] == before

    @precondition(lambda self: self.lives)
    @rule(pick=PICK)
    def mark(self, pick: int) -> None:
        sequence, oracle = self.life(pick)
        sequence.carry = Carry(clock_ms=int(self.rig.random.integers(1 << 30)))
        self.marks.append((sequence.mark(), oracle.copy(), sequence.carry))

    @precondition(lambda self: self.marks)
    @rule(pick=PICK)
    def rewind(self, pick: int) -> None:
        mark, then, carry = self.marks[pick % len(self.marks)]
        if mark.sequence.is_closed:
            return
        try:
            mark.sequence.rewind(mark)
        except errors.InvalidArgument as error:
            # left behind, or evicted
            assert not mark.is_live or "evicted" in str(error)
            return
        assert mark.sequence.carry is carry
        self.lives = [
            (s, then.copy() if s is mark.sequence else oracle) for s, oracle in self.lives
        ]

    @precondition(lambda self: self.marks)
    @rule(pick=PICK, is_released=st.booleans())
    def drop_mark(self, pick: int, is_released: bool) -> None:
        mark, _, _ = self.marks.pop(pick % len(self.marks))
        if is_released:
            mark.release()

    @precondition(lambda self: self.lives)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        sequence, oracle = self.life(pick)
        try:
            child = sequence.fork()
        except errors.PoolExhausted:
            return
        assert child.state_hash == sequence.state_hash
        self.lives.append((child, oracle.copy()))

    @precondition(lambda self: self.marks)
    @rule(pick=PICK)
    def fork_at_mark(self, pick: int) -> None:
        mark, then, carry = self.marks[pick % len(self.marks)]
        if not mark.is_live:
            return
        try:
            child = mark.sequence.fork(at=mark, seed=3)
        except errors.PoolExhausted:
            return
        except errors.InvalidArgument as error:
            assert "evicted" in str(error)
            return
        assert child.carry is carry
        self.lives.append((child, then.copy()))

    @precondition(lambda self: self.lives)
    @rule(pick=PICK)
    def boundary(self, pick: int) -> None:
        self.rig.boundary(*self.life(pick))

    @precondition(lambda self: self.lives)
    @rule(pick=PICK)
    def move(self, pick: int) -> None:
        """Snapshot, close, restore."""
        sequence, oracle = self.life(pick)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "life.tml"
            sequence.snapshot(path)
            state_hash = sequence.state_hash
            sequence.close()
            self.lives = [(s, o) for s, o in self.lives if s is not sequence]
            try:
                restored = Sequence.restore(self.rig.store, path)
            except errors.PoolExhausted:
                return
        assert restored.state_hash == state_hash
        self.lives.append((restored, oracle))

    @precondition(lambda self: self.lives)
    @rule(pick=PICK, is_dropped=st.booleans())
    def close(self, pick: int, is_dropped: bool) -> None:
        sequence, _ = self.lives.pop(pick % len(self.lives))
        if not is_dropped:
            sequence.close()

    @invariant()
    def audit(self) -> None:
        if not hasattr(self, "rig"):
            return
        kept = {id(mark.sequence) for mark, _, _ in self.marks if not mark.sequence.is_closed}
        kept |= {id(sequence) for sequence, _ in self.lives}
        assert self.rig.store.audit().num_sequences == len(kept)
        for sequence, oracle in self.lives:
            assert sequence.tip == len(oracle.tokens)
            assert sequence.token_ids().tolist() == oracle.tokens

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.marks.clear()
            for sequence, _ in self.lives:
                sequence.close()
            gc.collect()
            report = self.rig.store.audit()
            assert (report.global_pages_held, report.sliding_pages_held) == (0, 0)

    def life(self, pick: int) -> tuple[Sequence, Oracle]:
        return self.lives[pick % len(self.lives)]

    def shown(self, sequence: Sequence) -> tuple[object, ...]:
        slot = sequence.slot
        rows = slot.global_.row.tolist(), slot.sliding.row.tolist(), slot.conv.tolist()
        return sequence.tip, sequence.state_hash, sequence.carry.clock_ms, rows

    def attempt(
        self, appends: list[tuple[Sequence, Oracle, int, tuple[tuple[int, int], ...]]]
    ) -> None:
        before = [self.shown(sequence) for sequence, *_ in appends]
        drawn = [self.rig.tokens(count) for _, _, count, _ in appends]
        inputs = [
            step_input(sequence, list(tokens), blocks)
            for (sequence, _, _, blocks), tokens in zip(appends, drawn, strict=True)
        ]
        try:
            results = self.rig.runner.run(inputs)
        except errors.PoolExhausted:
            assert [self.shown(sequence) for sequence, *_ in appends] == before
            return
        for (_, oracle, _, blocks), tokens, h in zip(appends, drawn, results, strict=True):
            assert (h == oracle.append(tokens, blocks)).all()


Lives.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestLives = Lives.TestCase
