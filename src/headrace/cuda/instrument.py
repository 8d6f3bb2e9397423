"""Times a step on a GPU kernel by kernel: :class:`headrace.instrument.Instrument`.

Kernels compiled with TIMED note the device's global clock when their first block went on and when
their last one ended (kernels/primitives.cuh). A kernel's time runs from the end of the one before
to its own end; of it, what passed until its first block went on was spent between the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from headrace.backend import Batch, DecodeRow
from headrace.cuda import launchers
from headrace.cuda.decode import DecodeGraphs, await_choices
from headrace.cuda.device import DeviceArray, Graph, Launch, read_bandwidth
from headrace.cuda.executor import Executor
from headrace.cuda.lowering import Step, runs
from headrace.instrument import Ceilings, Formats, Part, Span, Work
from headrace.model.operations import (
    Attend,
    Embed,
    FeedForwardIn,
    FeedForwardOut,
    Head,
    Operation,
    ProjectOut,
    ProjectQKV,
)
from headrace.sampling import SamplingParams

DOTS, FMAS = "int8 dot products", "float32 multiply-adds"

_QUANTISED_BYTES = 1.5
"""An int8, and its sixteenth of the eight bytes that go with sixteen."""

_MOST_KERNELS = 2
"""Of one operation."""

_GREEDY = SamplingParams(temperature=0)


@dataclass
class _Plan:
    """A step as a graph, plain and with time stamps."""

    parts: list[Part]
    plain: Graph
    timed: Graph


class CUDAInstrument:
    clock = "the GPU's global timer"

    def __init__(self, executor: Executor, graphs: DecodeGraphs) -> None:
        self._executor, self._graphs = executor, graphs
        self._device, self._decoder = executor.device, executor.decoder
        self.max_rows = executor.max_rows
        quantised = None if executor.lowering.floats else _QUANTISED_BYTES
        self.formats = Formats(quantised=quantised, cached=2.0)
        self._plans: dict[Step, _Plan] = {}
        self._last: _Plan | None = None
        n_launches = _MOST_KERNELS * (len(self._decoder.operations) + 1)
        address = self._device.allocate(16 * n_launches, "time stamps")
        self._stamps = DeviceArray(address, (n_launches, 2), np.dtype(np.uint64))

    def prepare(self, batch: Batch) -> None:
        """What a step needs of the host, which in decoding is done while the device works."""
        self._executor.bring(batch)
        row = DecodeRow([0], [0], 1, _GREEDY, 0)
        self._graphs.sampler.start([row], self._graphs.n_started)
        self._last = self._plan(batch)
        self._device.clear(self._stamps.address, self._stamps.n_bytes)
        self._device.synchronise()

    def plain_step(self, batch: Batch) -> int | None:
        return self._run(batch, timed=False)

    def timed_step(self, batch: Batch) -> int | None:
        return self._run(batch, timed=True)

    def spans(self) -> list[Span]:
        assert self._last is not None, "a timed step comes first"
        stamps = self._device.download(self._stamps)[: len(self._last.parts)]
        began, ended = ~stamps[:, 0], stamps[:, 1]
        spans, previous = [], int(began[0])
        for part, first, last in zip(self._last.parts, began.tolist(), ended.tolist(), strict=True):
            end = max(previous, last)
            waiting = min(max(0, first - previous), end - previous)
            spans.append(Span(part, previous / 1e9, end / 1e9, waiting / 1e9))
            previous = end
        return spans

    def ceilings(self) -> Ceilings:
        device = self._device
        sink = self._executor.lowering.arena["dense"].address
        rates = {}
        for kind, integer in ((DOTS, True), (FMAS, False)):
            launch, operations = launchers.peak(device, sink, integer=integer)
            device.launch(launch)
            rates[kind] = operations / min(self._seconds(launch) for _ in range(5))
        return Ceilings(read_bandwidth(device), rates)

    def close(self) -> None:
        for plan in self._plans.values():
            plan.plain.close()
            plan.timed.close()
        self._plans.clear()
        self._device.free(self._stamps.address)

    def _seconds(self, launch: Launch) -> float:
        return self._device.elapsed(lambda: self._device.launch(launch))

    def _run(self, batch: Batch, *, timed: bool) -> int | None:
        plan = self._last
        assert plan is not None, "prepare comes first"
        (plan.timed if timed else plan.plain).launch()
        if not len(batch.logit_rows):
            self._device.synchronise()
            return None
        self._graphs.n_started += 1
        sampler, step = self._graphs.sampler, self._graphs.n_started
        await_choices(self._device, sampler, step, 1)
        return sampler.choices(step, [DecodeRow([0], [0], 1, _GREEDY, 0)])[0].token

    def _plan(self, batch: Batch) -> _Plan:
        longest = max(64, 1 << int(batch.positions.max()).bit_length())
        step = Step(len(batch.tokens), longest, runs(batch.logit_rows.tolist()[-1:]))
        plan = self._plans.get(step)
        if plan is None:
            plan = self._plans[step] = self._capture(step)
        return plan

    def _capture(self, step: Step) -> _Plan:
        launches, parts = [], []
        for launch, part in self._lowered(step):
            launches.append(launch)
            parts.append(part)
        timed = [launchers.timed(x, self._stamps.row(i)) for i, x in enumerate(launches)]
        self._device.prepare(launch.spec for launch in [*launches, *timed])
        return _Plan(parts, self._graph(launches), self._graph(timed))

    def _graph(self, launches: list[Launch]) -> Graph:
        def record() -> None:
            for launch in launches:
                self._device.launch(launch)

        return self._device.capture(record)

    def _lowered(self, step: Step) -> Iterator[tuple[Launch, Part]]:
        lowering = self._executor.lowering
        for i, op in enumerate(self._decoder.operations):
            if isinstance(op, Head) and not step.logit_runs:
                continue
            launches = list(lowering.lower(op, step))
            for launch, (name, works) in zip(launches, kernels(op), strict=True):
                dots = Work.MATMUL in works and "FLOAT_ACTIVATIONS" in dict(launch.spec.macros)
                dots = dots and dict(launch.spec.macros)["FLOAT_ACTIVATIONS"] == "0"
                yield launch, Part(i, name, works, DOTS if dots else FMAS)
        if step.logit_runs:
            logits = lowering.arena["logits"]
            last = len(self._decoder.operations) - 1
            choice = Part(last, "choice", (Work.SAMPLE,), FMAS)
            yield self._graphs.sampler.launch(logits, 1, None, None), choice


def kernels(op: Operation) -> list[tuple[str, tuple[Work, ...]]]:
    """What each kernel that ``Lowering.lower`` makes of ``op`` does."""
    match op:
        case Embed():
            return [("embedding", (Work.EMBED, Work.QUANTISE))]
        case ProjectQKV() if op.q_norm or op.k_norm:
            return [
                ("norm, q/k/v matmul", (Work.NORM, Work.MATMUL)),
                ("norms, rotary, cache", (Work.HEAD_NORMS, Work.ROTARY, Work.CACHE)),
            ]
        case ProjectQKV():
            works = (Work.NORM, Work.MATMUL, Work.ROTARY, Work.CACHE)
            return [("norm, q/k/v matmul, rotary, cache", works)]
        case Attend():
            return [("attention", (Work.ATTENTION, Work.QUANTISE))]
        case FeedForwardIn():
            works = (Work.NORM, Work.MATMUL, Work.ACTIVATION, Work.QUANTISE)
            return [("norm, gate/up matmul, activation", works)]
        case ProjectOut() | FeedForwardOut():
            matmul = "output matmul" if isinstance(op, ProjectOut) else "down matmul"
            if op.post_norm is None:
                return [(f"{matmul}, residual", (Work.MATMUL, Work.RESIDUAL, Work.QUANTISE))]
            return [
                (matmul, (Work.MATMUL,)),
                ("post-norm, residual", (Work.POST_NORM, Work.RESIDUAL, Work.QUANTISE)),
            ]
        case Head():
            scaled = (Work.LOGITS,) if op.softcap is not None or op.logit_scale != 1.0 else ()
            return [("norm, vocabulary matmul", (Work.NORM, Work.MATMUL, *scaled))]
