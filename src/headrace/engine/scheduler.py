"""Which rows run in the next step, and which pages they need. Bookkeeping only: no device, no text.

The order is fair and simple. Sequences run in the order in which they were added. Each one that is
generating gets its one row in every step; what is left of the step goes to the oldest prompt not
yet complete, then to the next. A prompt waits until all of its pages are there. When a generating
sequence needs a page and none is left, the sequence added last gives up all of its own and waits
for its turn again, so the oldest always gets on, and everything finishes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.backend import PAGE_SIZE, Batch
from headrace.engine.pages import PagePool
from headrace.engine.sequence import Sequence

CopyPage = Callable[[int, int], None]
Fail = Callable[[Sequence, Exception], None]


def pages_for(n_positions: int) -> int:
    """Pages that hold ``n_positions``."""
    return -(-n_positions // PAGE_SIZE)


@dataclass(frozen=True)
class Chunk:
    """The next ``n_rows`` pending tokens of a sequence, as rows of a step."""

    sequence: Sequence
    n_rows: int

    @property
    def wants_logits(self) -> bool:
        """It ends with the sequence's last known token, so the next one can be sampled."""
        return self.n_rows == self.sequence.n_pending


class Scheduler:
    """Sequences waiting and running, over one pool of pages.

    max_sequences: most that run at once. chunk: most prompt rows in a step; chunk_beside: the same
    while others generate, whose next token waits for that step. Rows of a prompt go two or more at
    a time: a device may round a row alone, which is how tokens are generated, in another way, and a
    text must not depend on where its prompt was cut or what was cached of it. ``copy_page``
    continues a page that is known in part; should it raise, ``fail(sequence, error)`` is called for
    that sequence alone.
    Planning allocates; only :meth:`advance` moves sequences on, so that a step that failed can be
    run again.
    """

    def __init__(
        self,
        pool: PagePool,
        copy_page: CopyPage,
        fail: Fail,
        *,
        max_pages: int,
        max_sequences: int,
        chunk: int,
        chunk_beside: int,
    ) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.n_preempted = 0
        self._copy_page, self._fail = copy_page, fail
        self._chunk, self._chunk_beside = chunk, chunk_beside
        self.page_table: NDArray[np.int32] = np.zeros((max_sequences, max_pages), np.int32)
        self._free_slots = list(range(max_sequences - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def plan(self) -> list[Chunk]:
        """The next step's chunks, oldest sequence first."""
        chunks: list[Chunk] = []
        n_preempted = self.n_preempted
        beside = any(sequence.n_pending == 1 for sequence in self.running)
        budget = self._chunk_beside if beside else self._chunk
        for sequence in list(self.running):
            n_rows = _rows(sequence.n_pending, budget, bool(chunks))
            if n_rows and self._reserve(sequence, sequence.n_computed + n_rows):
                budget -= n_rows if sequence.n_pending > 1 else 0
                chunks.append(Chunk(sequence, n_rows))
        while budget and self.waiting and self.n_preempted == n_preempted:
            if (admitted := self._admit()) is None:
                break
            if admitted.finished:  # copying a page for it failed
                continue
            if not (n_rows := _rows(admitted.n_pending, budget, bool(chunks))):
                break
            budget -= n_rows
            chunks.append(Chunk(admitted, n_rows))
        return chunks

    def batch(self, chunks: list[Chunk]) -> Batch:
        """The rows of ``chunks``; logits are wanted of each chunk that ends its sequence."""
        tokens: list[int] = []
        positions: list[NDArray[np.int32]] = []
        logit_rows: list[int] = []
        for chunk in chunks:
            start = chunk.sequence.n_computed
            tokens += chunk.sequence.tokens[start : start + chunk.n_rows]
            positions.append(np.arange(start, start + chunk.n_rows, dtype=np.int32))
            if chunk.wants_logits:
                logit_rows.append(len(tokens) - 1)
        slots = [chunk.sequence.slot for chunk in chunks]
        return Batch(
            tokens=np.array(tokens, np.int32),
            positions=np.concatenate(positions),
            slots=np.repeat(np.array(slots, np.int32), [chunk.n_rows for chunk in chunks]),
            page_table=self.page_table,
            logit_rows=np.array(logit_rows, np.int32),
        )

    def advance(self, chunk: Chunk) -> None:
        """The chunk's keys and values are in the cache."""
        chunk.sequence.advance(chunk.n_rows, self.pool)

    def reserve_ahead(self, sequences: list[Sequence], n_steps: int) -> int:
        """Pages for ``n_steps`` more tokens of each, as far as free ones go; returns the number of
        steps they last, at least the one that :meth:`plan` provided for."""
        for sequence in sequences:
            wanted = pages_for(sequence.n_computed + n_steps)
            while sequence.slot is not None and len(sequence.pages) < wanted and self.pool.n_free:
                self._append_page(sequence, sequence.slot, self.pool.allocate())
        room = (len(s.pages) * PAGE_SIZE - s.n_computed for s in sequences)
        return min(n_steps, *room)

    def remove(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Forget a sequence and release its pages; ``keep`` lets others continue the last one."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._stop(sequence, sequence.slot, keep=keep)

    def _stop(self, sequence: Sequence, slot: int, *, keep: bool = True) -> None:
        self.running.remove(sequence)
        sequence.release_pages(self.pool, keep=keep)
        sequence.slot = None
        self._free_slots.append(slot)

    def _reserve(self, sequence: Sequence, n_positions: int) -> bool:
        """Pages for ``n_positions``, at the cost of younger sequences; False when it lost its own.

        A sequence alone always fits: the engine admits none that is larger than the pool.
        """
        while sequence.slot is not None and len(sequence.pages) < pages_for(n_positions):
            if self.pool.n_available:
                self._append_page(sequence, sequence.slot, self.pool.allocate())
            else:
                self._preempt()
        return sequence.slot is not None

    def _preempt(self) -> None:
        """The sequence added last gives its pages up and waits in front of all that wait."""
        victim = self.running[-1]
        if victim.slot is not None:
            self._stop(victim, victim.slot)
        self.waiting.appendleft(victim)
        self.n_preempted += 1

    def _append_page(self, sequence: Sequence, slot: int, page: int) -> None:
        self.page_table[slot, len(sequence.pages)] = page
        sequence.pages.append(page)

    def _admit(self) -> Sequence | None:
        """Start the first waiting sequence, if a slot and pages for all its tokens are there."""
        sequence = self.waiting[0]
        if not self._free_slots:
            return None
        match = self.pool.match(sequence.tokens[:-2])  # the last one's logits are wanted: run it
        n_new = pages_for(len(sequence.tokens)) - len(match.pages)
        # Every sequence generating soon needs a page: leave one for each, lest they take turns.
        n_wanted = n_new + len(self.running)
        source = match.partial
        if source is not None and n_wanted > self.pool.n_available:
            self.pool.release(source)  # no room for a copy of it
            source = None
        if n_wanted > self.pool.n_available:
            for page in reversed(match.pages):
                self.pool.release(page)
            return None
        self.waiting.popleft()
        self.running.append(sequence)
        slot = sequence.slot = self._free_slots.pop()
        for page in [*match.pages, *(self.pool.allocate() for _ in range(n_new))]:
            self._append_page(sequence, slot, page)
        sequence.clock.started = sequence.clock.started or time.perf_counter()
        sequence.advance(len(match.pages) * PAGE_SIZE, self.pool)
        if source is not None:
            self._continue_copy(sequence, source, match.n_partial)
        if sequence.n_cached is None:  # what was found the first time, if it was ever preempted
            sequence.n_cached = sequence.n_computed
        return sequence

    def _continue_copy(self, sequence: Sequence, source: int, n_known: int) -> None:
        """Copy ``source``, known in part, into the sequence's next page; fails it if that does."""
        try:
            self._copy_page(source, sequence.pages[sequence.n_computed // PAGE_SIZE])
            sequence.advance(n_known, self.pool)
        except Exception as error:
            self._fail(sequence, error)
        finally:
            self.pool.release(source)


def _rows(n_pending: int, budget: int, beside: bool) -> int:
    """Of the pending tokens, how many to run: not one of several, nor all but one, where that can
    be helped. ``beside``: others have rows in the step already, so that these may wait."""
    if n_pending == 1:
        return 1
    n_rows = min(n_pending, budget)
    if n_pending - n_rows == 1 and n_rows > 2:
        n_rows -= 1
    return 0 if n_rows == 1 and beside else n_rows
