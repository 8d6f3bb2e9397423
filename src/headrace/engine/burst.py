"""When a device chooses tokens by itself: which sequences, and for how many steps.

A burst runs while nothing changes: all sequences generate, none joins, none ends. Its steps are
under way before their predecessors' tokens are known here, so when one does end, the few steps
started too many are ignored: their keys and values lie beyond what the sequence claims to hold.
"""

from __future__ import annotations

from headrace.backend import Burst, Choice, DecodeRow, DecodingRunner
from headrace.engine.scheduler import Chunk, Scheduler
from headrace.engine.sequence import Sequence

MAX_STEPS = 64
"""Steps of one burst: pages are set aside for as many."""


class RunningBurst:
    """A burst and the sequences that its rows are."""

    def __init__(self, sequences: list[Sequence], burst: Burst) -> None:
        self.sequences = sequences
        self._burst = burst

    def next(self) -> list[Choice] | None:
        """One step's choices; None at the end. Starts no further step once a sequence is done."""
        if any(sequence.finished for sequence in self.sequences):
            self.stop()
        return next(iter(self._burst), None)

    def stop(self) -> None:
        self._burst.stop()


def burst_rows(
    runner: DecodingRunner, scheduler: Scheduler, chunks: list[Chunk]
) -> tuple[list[DecodeRow], int] | None:
    """The rows of a burst of ``chunks`` and its steps, or None where the host has to sample."""
    sequences = [chunk.sequence for chunk in chunks]
    if len(sequences) > runner.max_burst_rows:
        return None
    for sequence in sequences:
        request = sequence.request
        if sequence.n_pending != 1 or request.mask or not runner.can_sample(request.sampling):
            return None
    n_steps = min(MAX_STEPS, *(s.max_tokens - s.n_generated for s in sequences))
    n_steps = scheduler.reserve_ahead(sequences, n_steps)
    rows = [
        DecodeRow(tuple(s.tokens), tuple(s.pages), s.n_prompt, s.request.sampling, s.sampler.seed)
        for s in sequences
    ]
    return rows, n_steps
