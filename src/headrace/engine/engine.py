"""Many completions at once over one runner: the loop behind generate, chat and the server.

A step has three parts that know nothing of each other: the scheduler plans rows, the runner runs
them, and each sequence samples its token and adds its text. Requests come and go between steps.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as TokenIds
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from headrace.backend import Batch, Choice, DecodingRunner, Runner
from headrace.engine.burst import RunningBurst, burst_rows
from headrace.engine.pages import PagePool
from headrace.engine.request import FinishReason, Request
from headrace.engine.scheduler import Chunk, Scheduler, pages_for
from headrace.engine.sequence import Event, Sequence, Sink
from headrace.errors import (
    ContextOverflowError,
    DeviceError,
    DeviceMemoryError,
    HeadraceError,
    RequestError,
)
from headrace.sampling import Logits, check_integer
from headrace.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT = 8192
"""Positions of a context when none is asked for, unless the model's own is shorter."""


class Engine:
    """Runs requests on ``runner``, which belongs to the engine from here on.

    context: most tokens of one sequence, prompt and answer. n_pages: KV pages for all sequences
    together (default: one context's worth). max_sequences: most that run at once; the others wait.
    chunk: most prompt rows in one step (default: as many as run best on the device); chunk_beside:
    the same while other sequences generate (default: a quarter of them).

    :meth:`add`, :meth:`cancel` and :meth:`step` may be called from any thread; steps take turns.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        context: int | None = None,
        n_pages: int | None = None,
        max_sequences: int = 16,
        chunk: int | None = None,
        chunk_beside: int | None = None,
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        config = runner.decoder.config
        self.n_vocab = config.n_vocab
        self.context = choose_context(context, config.context_length)
        n_pages = pages_for(self.context) if n_pages is None else n_pages
        check_integer("n_pages", n_pages, pages_for(self.context), 2**31 - 1)
        check_integer("max_sequences", max_sequences, 1, 2**16)
        chunk = runner.prompt_rows if chunk is None else chunk
        chunk_beside = -(-chunk // 4) if chunk_beside is None else chunk_beside
        self.chunk = check_integer("chunk", chunk, 1, 2**20)
        runner.allocate_cache(n_pages)
        self.pool = PagePool(n_pages)
        self.scheduler = Scheduler(
            self.pool,
            runner.copy_page,
            self._fail,
            max_pages=pages_for(self.context),
            max_sequences=max_sequences,
            chunk=chunk,
            chunk_beside=check_integer("chunk_beside", chunk_beside, 1, 2**20),
        )
        self._lock = threading.Lock()  # over all but the two queues below
        self._added: deque[Sequence] = deque()
        self._cancelled: deque[Sequence] = deque()
        self._burst: RunningBurst | None = None

    def add(self, request: Request, sink: Sink) -> Sequence:
        """Queue ``request``; its events go to ``sink``, the last one with a ``finish_reason``.

        Raises RequestError or ContextOverflowError before anything is done.
        """
        max_tokens = request.checked_limit(self.n_vocab, self.context)
        sequence = Sequence(request, max_tokens, self.tokenizer, sink)
        self._added.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End ``sequence`` and free its pages: now, or when the step that is running ends."""
        if not sequence.finished:
            self._cancelled.append(sequence)
            self._end_cancelled()

    def step(self) -> bool:
        """Run one step; False when there was nothing to run.

        An error in it ends the sequences that cause it, with an ``"error"`` event, and no others.
        """
        with self._lock:
            if self._take_added() and self._burst is not None:
                self._burst.stop()
            ran = self._continue_burst()
            if not ran and (chunks := self.scheduler.plan()):
                ran = True
                if not self._start_burst(chunks):
                    self._run(chunks)
        self._end_cancelled()
        return ran

    @property
    def n_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def n_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self._added)

    def logits(self, tokens: TokenIds[int]) -> Logits:
        """Logits after each of ``tokens``, float32 [len(tokens), n_vocab]; the cache is not used.

        Raises RequestError for bad ids, ContextOverflowError when there are more than ``context``,
        DeviceMemoryError when running sequences leave too few pages.
        """
        ids = self._checked_ids(tokens)
        logits = np.empty((len(ids), self.n_vocab), np.float32)
        with self._lock:
            self._end_burst()
            pages = self._allocate(pages_for(len(ids)))
            try:
                for batch in _batches(ids, pages, self.chunk):
                    logits[batch.positions] = self.runner.step(batch)
            finally:
                self._release(pages)
        return logits

    def hidden(self, tokens: TokenIds[int], chunk: int = 64) -> Iterator[NDArray[np.float32]]:
        """Final normed hidden states of ``tokens``, float32 [at most ``chunk``, d_model] a piece.

        Sequences go on between the pieces. Pages are held until it ends or is closed. Raises what
        :meth:`logits` does, at the first piece.
        """
        ids = self._checked_ids(tokens)
        with self._lock:
            pages = self._allocate(pages_for(len(ids)))
        try:
            for batch in _batches(ids, pages, chunk):
                with self._lock:
                    self._end_burst()
                    states = self.runner.hidden(batch)
                yield states
        finally:
            with self._lock:
                self._release(pages)

    def close(self) -> None:
        """Cancel everything and release the device. Idempotent."""
        with self._lock:
            self._burst = None
            self._take_added()
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
                self._finish(sequence, "cancelled", Event(sequence))
            self.runner.close()

    def _checked_ids(self, tokens: TokenIds[int]) -> list[int]:
        if not tokens:
            raise RequestError("tokens is empty: give at least one")
        if len(tokens) > self.context:
            raise ContextOverflowError(
                f"{len(tokens)} tokens do not fit the context of {self.context}: "
                "give fewer, or load with a larger context"
            )
        return [check_integer("token", token, 0, self.n_vocab - 1) for token in tokens]

    def _allocate(self, n_pages: int) -> list[int]:
        """``n_pages`` pages; DeviceMemoryError when there are not as many, and none is taken."""
        pages: list[int] = []
        try:
            while len(pages) < n_pages:
                pages.append(self.pool.allocate())
        except DeviceMemoryError:
            self._release(pages)
            raise
        return pages

    def _release(self, pages: list[int]) -> None:
        for page in pages:
            self.pool.release(page)

    def _take_added(self) -> bool:
        """Hand new sequences to the scheduler; whether there were any."""
        any_added = bool(self._added)
        while self._added:
            self.scheduler.add(self._added.popleft())
        return any_added

    def _end_cancelled(self) -> None:
        """Whoever holds the lock ends all that are cancelled, and looks again after releasing it:
        so none is missed, and a canceller never waits for a step."""
        while self._cancelled and self._lock.acquire(blocking=False):
            try:
                self._take_added()
                while self._cancelled:
                    sequence = self._cancelled.popleft()
                    if not sequence.finished:
                        self._finish(sequence, "cancelled", Event(sequence))
            finally:
                self._lock.release()

    def _start_burst(self, chunks: list[Chunk]) -> bool:
        """Let the device choose the next tokens, if it can for all of ``chunks``."""
        runner = self.runner
        if not isinstance(runner, DecodingRunner):
            return False
        if (planned := burst_rows(runner, self.scheduler, chunks)) is None:
            return False
        rows, n_steps = planned
        sequences = [chunk.sequence for chunk in chunks]
        try:
            self._burst = RunningBurst(sequences, runner.decode(rows, n_steps))
        except Exception as error:
            for sequence in sequences:
                self._fail(sequence, error)
            return True
        return self._continue_burst()

    def _continue_burst(self) -> bool:
        """Take one step's choices from the device; False when no burst is running (any more)."""
        burst = self._burst
        if burst is None:
            return False
        try:
            choices = burst.next()
        except Exception as error:
            self._burst = None
            for sequence in burst.sequences:
                if not sequence.finished:
                    self._fail(sequence, error)
            return True
        if choices is None:
            self._burst = None
            return False
        for sequence, choice in zip(burst.sequences, choices, strict=True):
            if not sequence.finished:
                self.scheduler.advance(Chunk(sequence, 1))
                sequence.sampler.accept(choice.token)
                self._take(sequence, choice)
        return True

    def _end_burst(self) -> None:
        """Take what the device has under way, so that other work may run on it."""
        while self._burst is not None:
            self._burst.stop()
            self._continue_burst()

    def _run(self, chunks: list[Chunk]) -> None:
        """Run the chunks in one step; should it fail, one by one, to find whose fault it is.

        A step writes the same keys and values each time it is run, so running it again is safe.
        """
        try:
            logits = self.runner.step(self.scheduler.batch(chunks))
        except Exception as error:
            if len(chunks) == 1:
                self._fail(chunks[0].sequence, error)
                return
            for chunk in chunks:
                self._run([chunk])
            return
        rows = iter(logits)
        for chunk in chunks:
            wants_logits = chunk.wants_logits
            self.scheduler.advance(chunk)
            if wants_logits:
                self._sample(chunk.sequence, next(rows))

    def _sample(self, sequence: Sequence, logits: Logits) -> None:
        """Choose the next token of ``sequence`` from its logits."""
        try:
            choice = Choice(*sequence.sampler.sample(logits, sequence.request.tokens))
        except Exception as error:
            self._fail(sequence, error)
            return
        self._take(sequence, choice)

    def _take(self, sequence: Sequence, choice: Choice) -> None:
        """Add a chosen token to ``sequence`` and tell its sink."""
        try:
            sequence.clock.tick()
            ends = sequence.ends_with(choice.token)
            text = "" if ends else sequence.append(*choice)
        except Exception as error:
            self._fail(sequence, error)
            return
        event = Event(sequence) if ends else Event(sequence, text, *choice)
        if ends or sequence.stopped:
            self._finish(sequence, "stop", event)
        elif sequence.n_generated == sequence.max_tokens:
            self._finish(sequence, "length", event)
        else:
            self._tell(event)

    def _finish(self, sequence: Sequence, reason: FinishReason, last: Event) -> None:
        """End ``sequence``, release its pages, and send what text was held back."""
        self.scheduler.remove(sequence)
        sequence.finish_reason = reason
        self._tell(replace(last, text=last.text + sequence.flush(), finish_reason=reason))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End ``sequence`` with ``error``; its part-full page is not trusted."""
        if not isinstance(error, HeadraceError):
            cause = error
            error = DeviceError(f"{type(cause).__name__} in a step of the model: {cause}")
            error.__cause__ = cause
        self.scheduler.remove(sequence, keep=False)
        sequence.finish_reason, sequence.error = "error", error
        self._tell(Event(sequence, finish_reason="error", error=error))

    def _tell(self, event: Event) -> None:
        """Hand an event over. A sink that fails ends its own request, not the step."""
        try:
            event.sequence.sink(event)
        except Exception:
            logger.exception("the sink of a request failed; the request is cancelled")
            event.sequence.sink = _ignore
            self._cancelled.append(event.sequence)


def _batches(ids: list[int], pages: list[int], chunk: int) -> Iterator[Batch]:
    """A sequence alone in ``pages``, ``chunk`` rows at a time, every row's result wanted."""
    table = np.array([pages], np.int32)
    for start in range(0, len(ids), chunk):
        some = np.array(ids[start : start + chunk], np.int32)
        rows = np.arange(len(some), dtype=np.int32)
        yield Batch(some, rows + np.int32(start), np.zeros_like(rows), table, rows)


def choose_context(wanted: int | None, model_context: int) -> int:
    """The context length to use: ``wanted``, or DEFAULT_CONTEXT or the model's if shorter.

    RequestError when ``wanted`` is more than the model was made for.
    """
    if wanted is None:
        return min(DEFAULT_CONTEXT, model_context)
    return check_integer("context", wanted, 1, model_context)


def _ignore(event: Event) -> None:
    """Takes the place of a sink that failed."""
