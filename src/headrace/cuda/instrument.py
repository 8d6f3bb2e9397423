"""Times a step on a GPU kernel by kernel: :class:`headrace.instrument.Instrument`."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.backend import Batch, DecodeRow
from headrace.cuda.ceilings import flops_per_second, read_bandwidth
from headrace.cuda.decode import DecodeGraphs, await_choices
from headrace.cuda.device import Graph, Launch
from headrace.cuda.executor import Executor
from headrace.cuda.stamps import FMAS, Stamps, parts_of
from headrace.cuda.steps import Step, runs
from headrace.instrument import Ceilings, Formats, Part, Span, Work
from headrace.model.operations import Head
from headrace.sampling import SamplingParams

_MOST_KERNELS = 2
"""Of one operation."""

_ROW = DecodeRow([0], [0], 1, SamplingParams(temperature=0), 0)


@dataclass
class _Plan:
    """A step as a graph, plain and with time stamps."""

    parts: list[list[Part]]
    plain: Graph
    timed: Graph


class CUDAInstrument:
    clock = "the GPU's global timer"

    def __init__(self, executor: Executor, graphs: DecodeGraphs) -> None:
        self._executor, self._graphs = executor, graphs
        self._device, self._operations = executor.device, executor.decoder.operations
        self.max_rows = executor.lowering.prompt_rows or executor.max_rows
        self.formats: Formats = executor.formats
        self._plans: dict[Step, _Plan] = {}
        self._last: _Plan | None = None
        self._stamps = Stamps(self._device, _MOST_KERNELS * (len(self._operations) + 1))

    def prepare(self, batch: Batch) -> None:
        self._executor.bring(batch)
        self._graphs.sampler.start([_ROW], self._graphs.n_started)
        self._last = self._plan(batch)
        self._stamps.clear()
        self._device.synchronise()

    def plain_step(self, batch: Batch) -> int | None:
        return self._run(batch, timed=False)

    def timed_step(self, batch: Batch) -> int | None:
        return self._run(batch, timed=True)

    def spans(self) -> list[Span]:
        assert self._last is not None, "a timed step comes first"
        return self._stamps.spans(self._last.parts)

    def ceilings(self) -> Ceilings:
        rates = flops_per_second(self._device, self._executor.lowering.arena["dense"].address)
        return Ceilings(read_bandwidth(self._device), rates)

    def close(self) -> None:
        for plan in self._plans.values():
            plan.plain.close()
            plan.timed.close()
        self._plans.clear()
        self._stamps.close()

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
        return sampler.choices(step, [_ROW])[0].token

    def _plan(self, batch: Batch) -> _Plan:
        longest = max(64, 1 << int(batch.positions.max()).bit_length())
        n, wanted = len(batch.tokens), runs(batch.logit_rows.tolist()[-1:])
        step = Step(n, longest, wanted, n > 1 and self._executor.lowering.prompt_rows > 0)
        if step not in self._plans:
            self._plans[step] = self._capture(step)
        return self._plans[step]

    def _capture(self, step: Step) -> _Plan:
        lowering = self._executor.lowering
        launches: list[Launch] = []
        parts: list[list[Part]] = []
        done = 0
        for operations, made in lowering.plan(step):
            if step.logit_runs or not isinstance(operations[0], Head):
                launches += made
                parts += parts_of(done, operations, made)
            done += len(operations)
        if step.logit_runs:
            launches.append(self._graphs.sampler.launch(lowering.arena["logits"], 1, None, None))
            parts.append([Part(done - 1, "choice", (Work.SAMPLE,), FMAS)])
        timed = self._stamps.timed(launches, parts)
        self._device.prepare(launch.spec for launch in [*launches, *timed])
        return _Plan(parts, self._graph(launches), self._graph(timed))

    def _graph(self, launches: list[Launch]) -> Graph:
        def record() -> None:
            for launch in launches:
                self._device.launch(launch)

        return self._device.capture(record)
