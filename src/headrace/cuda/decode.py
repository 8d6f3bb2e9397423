"""Decoding with the host behind, never in front.

One CUDA graph makes a token of every row: embed, all layers, vocabulary, choice, and the next
step's inputs. The host only launches it again, some steps ahead, and polls pinned memory for the
ids: no blocking synchronisation, one graph launch a step.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Self

import numpy as np

from headrace.backend import PAGE_SIZE, Batch, Choice, DecodeRow
from headrace.cuda.device import Device, Graph
from headrace.cuda.executor import Executor
from headrace.cuda.sampling import DeviceSampler
from headrace.cuda.steps import Step
from headrace.errors import ContextOverflowError, DeviceError

AHEAD = 4
"""Steps the host launches before it has seen the choices of an earlier one."""

_GRAPHS_KEPT = 32
_SHORTEST = 64


class DecodeGraphs:
    """The graphs of one cache: one for each number of rows and power of two of the length."""

    def __init__(self, executor: Executor, sampler: DeviceSampler) -> None:
        self.executor, self.sampler = executor, sampler
        self._graphs: OrderedDict[tuple[int, int], Graph] = OrderedDict()
        self.n_started = 0
        """Steps launched, from burst to burst: a step that ends late writes a number nobody waits
        for."""

    def launch(self, n_rows: int, longest: int) -> None:
        """Start the next step; ``longest``: a bound on position + 1 of its rows."""
        self.graph(n_rows, longest).launch()
        self.n_started += 1

    def graph(self, n_rows: int, longest: int) -> Graph:
        key = n_rows, max(_SHORTEST, 1 << (longest - 1).bit_length())
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= _GRAPHS_KEPT:
                self._graphs.popitem(last=False)[1].close()
            graph = self._graphs[key] = self._capture(*key)
        self._graphs.move_to_end(key)
        return graph

    def _capture(self, n_rows: int, longest: int) -> Graph:
        lowering, device = self.executor.lowering, self.executor.device
        inputs = lowering.require_inputs()
        launches = [
            *lowering.launches(Step(n_rows, longest, ((0, n_rows),))),
            self.sampler.launch(lowering.arena["logits"], n_rows, inputs.tokens, inputs.positions),
        ]
        device.prepare(launch.spec for launch in launches)

        def record() -> None:
            for launch in launches:
                device.launch(launch)

        return device.capture(record)

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()


class CUDABurst:
    """See :class:`headrace.backend.Burst`."""

    def __init__(self, graphs: DecodeGraphs, rows: Sequence[DecodeRow], n_steps: int) -> None:
        self._executor, self._graphs, self._rows = graphs.executor, graphs, rows
        self._longest = max(len(row.tokens) for row in rows)
        for i, row in enumerate(rows):
            room = len(row.pages) * PAGE_SIZE - len(row.tokens) + 1
            if n_steps > room:
                raise ContextOverflowError(
                    f"row {i}: {n_steps} tokens after {len(row.tokens)} do not fit "
                    f"{len(row.pages)} pages of {PAGE_SIZE} positions"
                )
        self._bring(rows)
        self._next = graphs.n_started + 1
        self._end = self._next + n_steps

    def _bring(self, rows: Sequence[DecodeRow]) -> None:
        """The first step's inputs, and every row's request, to the device."""
        n = len(rows)
        table = np.zeros((n, max(len(row.pages) for row in rows)), np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row.pages)] = row.pages
        numbers = np.arange(n, dtype=np.int32)
        tokens = np.array([row.tokens[-1] for row in rows], np.int32)
        positions = np.array([len(row.tokens) - 1 for row in rows], np.int32)
        batch = Batch(tokens, positions, numbers, table, numbers)
        self._ticket = self._executor.bring(batch, table.shape[1])
        self._executor.lowering.clear()
        self._graphs.sampler.start(rows, self._graphs.n_started)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Choice]:
        self._start_steps()
        if self._next > self._graphs.n_started:
            raise StopIteration
        await_choices(self._executor.device, self._graphs.sampler, self._next, len(self._rows))
        choices = self._graphs.sampler.choices(self._next, self._rows)
        self._next += 1
        self._start_steps()  # the device must not wait for what the caller does with these
        return choices

    def stop(self) -> None:
        self._end = min(self._end, self._graphs.n_started + 1)

    def _start_steps(self) -> None:
        if self._ticket != self._executor.ticket:
            raise DeviceError("another step ran on this runner before the burst had ended")
        graphs = self._graphs
        while graphs.n_started + 1 < min(self._end, self._next + AHEAD):
            graphs.launch(len(self._rows), self._longest)
            self._longest += 1


def await_choices(device: Device, sampler: DeviceSampler, step: int, n_rows: int) -> None:
    """Poll until the choices of ``step`` are here; DeviceError when they will never be."""
    while not sampler.arrived(step, n_rows):
        if device.idle() and not sampler.arrived(step, n_rows):
            raise DeviceError(f"the device is idle, and the choices of step {step} never came")
        time.sleep(0)  # let other threads of this process run
