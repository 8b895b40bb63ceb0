"""One ragged step of the turns that have work: compose it, run it, draw from it, recover from it.

A step takes every turn that has work: some bring the input half of a tick or a block of the sound
they make, others the one token drawn last; then all rows that need a token are sampled together,
and all that go on speaking get their blocks together. What fails for one turn ends that turn alone.
"""

import contextlib
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Final, NamedTuple, ParamSpec, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tml_core.engine.cost_model import CostModel
from tml_core.engine.job import Job
from tml_core.engine.runner import Singles, StepInput
from tml_core.engine.sampler import RowBuffers, signed
from tml_core.engine.scheduler import compose
from tml_core.engine.seat import Seat
from tml_core.engine.stats import EngineCounters
from tml_core.engine.token_feed import MAX_AHEAD, FedToken
from tml_core.errors import PoolExhausted, TmlError
from tml_core.layout.sound import Heard
from tml_core.layout.state import TokenRun
from tml_core.media.segments import Block, Image, Segment
from tml_core.model.backbone import Backbone
from tml_core.model.flow import FlowHead
from tml_core.model.kv_store import KvStore
from tml_core.model.step_batch import StepBatch
from tml_core.model.token_loop import TokenLoop
from tml_core.ops.lm_head import SampleRows
from tml_core.sequence.sequence import Sequence
from tml_core.sequence.store import SequenceStore

__all__ = ["Progress", "StepModel", "Stepper", "guarded"]

P = ParamSpec("P")

# Where turns only draw tokens, steps are made without Python for so long: so late a reader may see
# a token, and the engine a cancel or a new turn. With 0 every step is looked at.
RUN_S: Final = 0.01


class Progress(NamedTuple):
    """What `Stepper.advance` did: steps, and how many positions of how many sequences each had."""

    num_tokens: int
    num_rows: int
    num_steps: int = 1


class _Backbone(Protocol):
    @property
    def flow(self) -> FlowHead | None: ...

    def embed_ids(self, ids_T: Tensor, *, out_TD: Tensor | None = None) -> Tensor: ...

    def step(
        self, x_TD: Tensor, batch: StepBatch, kv: KvStore, *, out_TD: Tensor | None = None
    ) -> Tensor: ...

    def sample(
        self, h_BD: Tensor, rows: SampleRows, *, out_B: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]: ...


class _Runner(Protocol):
    @property
    def max_step_tokens(self) -> int: ...

    @property
    def kernel_s(self) -> float: ...

    def run(self, inputs: SequenceOf[StepInput]) -> list[Tensor]: ...

    def run_beside(
        self, inputs: SequenceOf[StepInput], singles: Singles
    ) -> tuple[list[Tensor], Tensor]: ...


class StepModel(Protocol):
    """What the engine needs of a model."""

    @property
    def backbone(self) -> _Backbone:
        """Samples one token a row: ids int64 [B], log-probabilities fp32 [B]; its ``flow`` draws
        blocks of sound, None where it has no such head."""

    @property
    def runner(self) -> _Runner:
        """Appends all inputs or none; returns the hidden states [T, D] of each."""

    @property
    def vocab_size(self) -> int:
        """Tokens there are."""

    @property
    def encoder_s(self) -> float:
        """Time in the encoders so far."""

    @property
    def store(self) -> SequenceStore:
        """The memory of its sequences."""

    def restore_sequence(self, path: Path) -> Sequence:
        """The sequence that a snapshot holds."""

    def prepare(self, sequence: Sequence, segments: SequenceOf[Segment | Block]) -> StepInput:
        """Embed what a sequence is about to append."""


class Stepper:
    """Takes the turns of an engine through the model; used by the engine thread alone.

    ``make_room``: gives up memory that can be done without, but not that of the seat it is given;
    False if there is none.
    """

    def __init__(
        self,
        model: StepModel,
        counters: EngineCounters,
        make_room: Callable[[Seat | None], bool],
    ) -> None:
        self._model = model
        self._counters = counters
        self._make_room = make_room
        self._other_kernel_s = 0.0  # beside what the model and its runner note themselves
        # Rows of a step of single tokens, in fixed memory.
        num_slots = model.store.kv.num_slots
        self._rows = StepBatch(num_slots, num_slots)
        self._ids_B = torch.zeros(num_slots, dtype=torch.int64)
        self._token_ids: NDArray[np.int64] = self._ids_B.numpy()
        self._samples = RowBuffers(num_slots, -(-model.vocab_size // 32))
        # What the last step of single tokens and the last draw returned: the next of as many rows
        # writes there.
        self._x_BD: Tensor | None = None
        self._h_BD: Tensor | None = None
        self._drawn_B: tuple[Tensor, Tensor] | None = None
        # What only the model on the CPU can do.
        self._cpu = model.backbone if isinstance(model.backbone, Backbone) else None
        self._loop: TokenLoop | None = None
        if self._cpu is not None:
            self._loop = self._cpu.token_loop(model.store.kv, num_slots, MAX_AHEAD)

    @property
    def kernel_s(self) -> float:
        """Time in the model, its encoders and the sampler so far."""
        return self._model.encoder_s + self._model.runner.kernel_s + self._other_kernel_s

    def advance(self, jobs: list[Job], costs: CostModel, begin_s: float) -> Progress:
        """One step of these turns, or several where all of them only draw tokens.

        Those that bring the one token drawn last go in together, in fixed memory; inputs beside
        them. If that fails, all is brought as inputs, which can be told apart.
        """
        others = [job for job in jobs if not job.is_decoding]
        talking = [job for job in jobs if job.is_decoding] if others else jobs
        try:
            for job in talking:
                job.feed.make_room()
        except Exception:
            return self._bring(jobs, costs, begin_s)
        runs = None if others else self._runs(talking)
        ahead = self._feed(talking)
        if not ahead:
            return self._bring(others, costs, begin_s) if others else Progress(0, 0, 0)
        if runs is not None and len(ahead) == len(runs):
            return self._talk(talking, ahead, runs, costs, begin_s)
        pieces = self._pieces([*talking, *others], costs, begin_s) if others else []
        done: list[tuple[Job, Tensor]] = []
        try:
            slots, positions, token_ids = zip(*ahead, strict=True)
            inputs = [job.piece(count) for job, count in pieces]
            self._token_ids[: len(ahead)] = token_ids
            if not inputs:
                self._rows.fill_single(slots, positions)
                begin_kernel_s = time.perf_counter()
                h_BD = self._step_single(len(ahead))
                self._other_kernel_s += time.perf_counter() - begin_kernel_s
            else:
                x_BD = self._model.backbone.embed_ids(self._ids_B[: len(ahead)])
                singles = Singles(slots, positions, x_BD)
                hidden, h_BD = self._model.runner.run_beside(inputs, singles)
                done = list(zip((job for job, _ in pieces), hidden, strict=True))
        except Exception:
            # Nobody knows how far it got, or because of whom.
            for job, _ in pieces:
                job.prepare(None)
            behind = [job for job in talking if guarded(job, job.catch_up)]
            left = [job for job in others if not job.is_done]
            return self._bring([*behind, *left], costs, begin_s)
        return self._end_step(done, talking, h_BD, costs)

    def _runs(self, talking: list[Job]) -> list[TokenRun] | None:
        """How far each may go without Python; None if one of them may not."""
        if self._loop is None or RUN_S <= 0.0:
            return None
        try:
            runs = [job.run_ahead() for job in talking]
        except Exception:
            return None  # whose fault it is turns out where it is asked step by step
        known = [run for run in runs if run is not None]
        if len(known) < len(runs) or any(run.table is not known[0].table for run in known):
            return None
        return known

    def _talk(
        self,
        talking: list[Job],
        ahead: list[FedToken],
        runs: list[TokenRun],
        costs: CostModel,
        begin_s: float,
    ) -> Progress:
        """Draw on for these turns until they need to be looked at."""
        assert self._loop is not None  # there are runs
        rows = self._loop.rows
        for row, (job, (slot, position, token_id), run) in enumerate(
            zip(talking, ahead, runs, strict=True)
        ):
            seat = job.seat
            params = seat.sampling
            # The token that is fed has its room already.
            rows[row] = (
                position,
                token_id,
                signed(seat.sequence.seed),
                slot,
                run.phase,
                run.num_text,
                1 + job.feed.room,
                params.temperature,
                params.top_p,
                params.top_k,
                0,
            )
        num_rows = len(talking)
        begin_kernel_s = time.perf_counter()
        try:
            drawn = self._loop.run(num_rows, runs[0].table, RUN_S)
        except Exception:
            behind = [job for job in talking if guarded(job, job.catch_up)]
            return self._bring(behind, costs, begin_s)
        self._other_kernel_s += time.perf_counter() - begin_kernel_s
        self._counters.steps += drawn.num_steps
        self._counters.step_tokens += drawn.num_tokens
        for job, (token_ids, logprobs) in zip(talking, drawn.rows, strict=True):
            try:
                job.accept_run(token_ids, logprobs, num_rows)
            except Exception as error:
                job.fail(error)
        mean = round(drawn.num_tokens / drawn.num_steps)
        return Progress(mean, mean, drawn.num_steps)

    def _step_single(self, num_rows: int) -> Tensor:
        """The hidden states [B, D] of the tokens in ``_ids_B``, at the rows' positions; they stand
        until the next call."""
        backbone, kv = self._model.backbone, self._model.store.kv
        x_BD = _of_len(self._x_BD, num_rows)
        self._x_BD = x_BD = backbone.embed_ids(self._ids_B[:num_rows], out_TD=x_BD)
        h_BD = _of_len(self._h_BD, num_rows)
        self._h_BD = h_BD = backbone.step(x_BD, self._rows, kv, out_TD=h_BD)
        return h_BD

    def _bring(self, jobs: list[Job], costs: CostModel, begin_s: float) -> Progress:
        """`advance` with everything as inputs."""
        step = self._pieces(jobs, costs, begin_s)
        return self._end_step(self._append(step) if step else [], [], None, costs)

    def _feed(self, talking: list[Job]) -> list[FedToken]:
        """The tokens drawn last; a turn that fails to give its own leaves the list."""
        ahead = []
        for job in list(talking):
            try:
                ahead.append(job.feed_one())
            except Exception as error:
                job.fail(error)
                talking.remove(job)
        return ahead

    def _pieces(self, jobs: list[Job], costs: CostModel, begin_s: float) -> list[tuple[Job, int]]:
        """What of the inputs goes into this step, beside the tokens that are fed already."""
        self._encode_pictures(jobs)
        entries = [job for job in jobs if job.is_fed or guarded(job, self._prepare, job)]
        step = compose(entries, self._model.runner.max_step_tokens, costs, begin_s)
        return [(job, count) for job, count in step if not job.is_fed]

    def _encode_pictures(self, jobs: list[Job]) -> None:
        """Encode the pictures of several turns together; if they cannot be, each is by itself,
        which tells whose fault it is."""
        new = [job for job in jobs if not (job.is_fed or job.is_prepared)]
        images = [one for job in new for one in job.segments if isinstance(one, Image)]
        if len(images) < 2 or self._cpu is None:
            return
        begin_s = time.perf_counter()
        with contextlib.suppress(Exception):
            self._cpu.encode_together(images)
        self._other_kernel_s += time.perf_counter() - begin_s

    def _end_step(
        self,
        done: list[tuple[Job, Tensor]],
        talking: list[Job],
        h_BD: Tensor | None,
        costs: CostModel,
    ) -> Progress:
        """Go on with what a step gave: ``done`` inputs, and the fed tokens of ``talking``."""
        num_rows = len(done) + len(talking)
        if not num_rows:
            return Progress(0, 0, 0)
        num_tokens = sum(h_TD.shape[0] for _, h_TD in done) + len(talking)
        self._counters.steps += 1
        self._counters.step_tokens += num_tokens
        wanting, rows = [], []
        for job, h_TD in done:
            if guarded(job, job.end_step, h_TD, costs, num_rows):
                wanting.append(job)
                rows.append(job.hidden)
        kept = []
        for row, job in enumerate(talking):
            if guarded(job, job.end_token, num_rows):
                wanting.append(job)
                kept.append(row)
        if wanting:
            if h_BD is not None and len(kept) < len(talking):
                h_BD = h_BD[kept]
            parts = [torch.stack(rows)] if rows else []
            if h_BD is not None and kept:
                parts.append(h_BD)
            h_BD = parts[0] if len(parts) == 1 else torch.cat(parts)
            self._draw_all(wanting, h_BD, costs, num_rows)
        return Progress(num_tokens, num_rows)

    def _prepare(self, job: Job) -> bool:
        job.bring_drawn()
        if not job.is_prepared:
            job.prepare(self._model.prepare(job.seat.sequence, job.segments))
        return True

    def _append(self, step: SequenceOf[tuple[Job, int]]) -> list[tuple[Job, Tensor]]:
        """Append what the turns bring. If they cannot go together, each goes alone, so that an
        error ends only the turn it belongs to."""
        try:
            pieces = [job.piece(count) for job, count in step]
            hidden = self._model.runner.run(pieces)
            return list(zip((job for job, _ in step), hidden, strict=True))
        except PoolExhausted as error:
            if not self._make_room(None) and len(step) == 1:
                step[0][0].fail(error)
                return []
        except Exception as error:
            if len(step) == 1:
                step[0][0].fail(error)
                return []
        found = []
        for job, count in step:
            job.prepare(None)
            if guarded(job, self._prepare, job):
                found += self._append([(job, count)])
        return found

    def _draw_all(self, jobs: list[Job], h_BD: Tensor, costs: CostModel, batch_size: int) -> None:
        """Draw what each of the turns wants, a token or a block of sound."""
        speaking = [row for row, job in enumerate(jobs) if job.wants_sound]
        if not speaking:
            self._draw(jobs, h_BD, costs, batch_size)
            return
        writing = [row for row, job in enumerate(jobs) if not job.wants_sound]
        for rows, draw in ((speaking, self._say), (writing, self._draw)):
            if rows:
                draw([jobs[row] for row in rows], h_BD[rows], costs, batch_size)

    def _say(self, jobs: list[Job], h_BD: Tensor, costs: CostModel, batch_size: int) -> None:
        """Draw a block of sound for each of the turns, from its row of hidden states."""
        try:
            flow = self._model.backbone.flow
            if flow is None:
                raise TmlError("turn: it is to go on speaking, but this model has no head for it")
            before, seeds, positions = zip(*(job.sound_request for job in jobs), strict=True)
            begin_s = time.perf_counter()
            mel_BFM = flow.draw(h_BD, torch.stack(before), seeds, positions)
            self._other_kernel_s += time.perf_counter() - begin_s
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].fail(error)
                return
            for row, job in enumerate(jobs):
                self._say([job], h_BD[row : row + 1], costs, batch_size)
            return
        for job, mel_FM, heard in zip(jobs, mel_BFM, _made_heard(jobs, mel_BFM), strict=True):
            try:
                job.accept_sound(mel_FM, heard, costs, batch_size)
            except Exception as error:
                job.fail(error)

    def _draw(self, jobs: list[Job], h_BD: Tensor, costs: CostModel, batch_size: int) -> None:
        """Draw a token for each of the turns, from its row of hidden states."""
        try:
            rows = self._samples.fill([job.request for job in jobs])
            out_B = self._drawn_B
            if out_B is None or len(out_B[0]) != len(jobs):
                out_B = None
            begin_s = time.perf_counter()
            self._drawn_B = self._model.backbone.sample(h_BD, rows, out_B=out_B)
            self._other_kernel_s += time.perf_counter() - begin_s
            tokens, logprobs = self._drawn_B
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].fail(error)
                return
            for row, job in enumerate(jobs):
                self._draw([job], h_BD[row : row + 1], costs, batch_size)
            return
        for job, token_id, logprob in zip(jobs, tokens.tolist(), logprobs.tolist(), strict=True):
            try:
                job.accept(token_id, logprob, costs, batch_size)
            except Exception as error:
                job.fail(error)


def _made_heard(jobs: list[Job], mel_BFM: Tensor) -> list[Heard | None]:
    """The sounds that are whole with these blocks, made together. None where there is none or it
    cannot be made with the others: then its turn makes it, and finds out why."""
    found: list[Heard | None] = [None] * len(jobs)
    try:
        whole = [job.completed_by(mel_FM) for job, mel_FM in zip(jobs, mel_BFM, strict=True)]
        unheard = [(row, one) for row, one in enumerate(whole) if one is not None]
        for vocoder in {id(one.vocoder): one.vocoder for _, one in unheard}.values():
            own = [(row, one) for row, one in unheard if one.vocoder is vocoder]
            mel_RFM = np.stack([one.mel_FM for _, one in own])
            pcm_RS, states = vocoder.push_together([one.state for _, one in own], mel_RFM)
            for (row, _), pcm_S, state in zip(own, pcm_RS, states, strict=True):
                found[row] = Heard(pcm_S.copy(), state)
    except Exception:
        return [None] * len(jobs)
    return found


def guarded(job: Job, act: Callable[P, bool | None], *args: P.args, **kwargs: P.kwargs) -> bool:
    """Run one turn's own part; its error ends that turn alone, and counts as False."""
    try:
        return bool(act(*args, **kwargs))
    except Exception as error:
        job.fail(error)
        return False


def _of_len(kept_BD: Tensor | None, num_rows: int) -> Tensor | None:
    return None if kept_BD is None or len(kept_BD) != num_rows else kept_BD
