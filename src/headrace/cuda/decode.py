"""Decoding of one sequence with the host behind, never in front.

One CUDA graph makes a token: embed, every layer, vocabulary, choice, and the next step's inputs.
The host only launches it again, some tokens ahead, and polls pinned memory for the ids: no blocking
synchronisation, one graph launch a token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from headrace.backend import PAGE_SIZE
from headrace.cuda.device import Graph
from headrace.cuda.lowering import Step
from headrace.cuda.runner import CUDARunner
from headrace.errors import ContextOverflowError, DeviceError

_RING = 4096
_POLLS_BEFORE_CHECK = 1 << 14


class GreedyDecode:
    """Greedy tokens of one sequence whose earlier positions are in the cache of ``runner``.

    Owns graphs (one for each power of two of the length) and the ring that ids arrive in. Using
    ``runner.step`` between tokens is allowed; :meth:`start` again afterwards.
    """

    def __init__(self, runner: CUDARunner, ahead: int = 4) -> None:
        self._runner, self._device = runner, runner.device
        self._ahead = ahead
        address, raw = self._device.allocate_pinned(_RING * 8)
        self._ring_address, self._ring = address, raw.view(np.uint64)
        self._graphs: dict[int, Graph] = {}
        # Steps are counted on, from start to start: a cancelled step that ends late writes a number
        # nobody waits for.
        self._launched = 0
        step = runner.lowering.arena["argmax step"]
        self._device.clear(step.address, step.n_bytes)
        self._generation = runner.cache_generation
        self._position = self._capacity = 0

    def start(self, token: int, position: int, pages: Sequence[int]) -> None:
        """The next step reads ``token`` at ``position``; position p lies in ``pages[p // 64]``."""
        if self._generation != self._runner.cache_generation:  # addresses have moved
            self._drop_graphs()
            self._generation = self._runner.cache_generation
        self._runner.set_row(token, position, pages)
        self._runner.lowering.clear()
        self._position, self._capacity = position, len(pages) * PAGE_SIZE

    def tokens(self, count: int) -> Iterator[int]:
        """The next ``count`` ids, each as soon as the device has made it.

        Raises ContextOverflowError, before anything runs, if the pages given do not hold them.
        """
        if self._position + count > self._capacity:
            raise ContextOverflowError(
                f"{count} tokens from position {self._position} do not fit "
                f"{self._capacity} positions"
            )
        first, last = self._launched + 1, self._launched + count
        for wanted in range(first, last + 1):
            while self._launched < min(last, wanted + self._ahead):
                self._graph(self._position + 1).launch()
                self._position += 1
                self._launched += 1
            yield self._poll(wanted)

    def _graph(self, length: int) -> Graph:
        longest = max(64, 1 << (length - 1).bit_length())
        if longest not in self._graphs:
            lowering = self._runner.lowering
            step = Step(1, longest, ((0, 1),))
            plan = [*lowering.launches(step), lowering.argmax(self._ring_address, _RING)]
            self._device.prepare(launch.spec for launch in plan)

            def record() -> None:
                for launch in plan:
                    self._device.launch(launch)

            self._graphs[longest] = self._device.capture(record)
        return self._graphs[longest]

    def _poll(self, step: int) -> int:
        cell = (step - 1) % _RING
        polls = 0
        while int(self._ring[cell]) >> 32 != step:
            polls += 1
            if polls % _POLLS_BEFORE_CHECK == 0:
                if self._device.idle() and int(self._ring[cell]) >> 32 != step:
                    raise DeviceError(f"the device is idle, and token {step} never came")
                time.sleep(0)
        return int(self._ring[cell]) & 0xFFFFFFFF

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def close(self) -> None:
        self._device.synchronise()
        self._drop_graphs()
        self._device.free(self._ring_address)
