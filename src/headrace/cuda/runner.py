"""A decoder resident on a CUDA device: :class:`headrace.backend.Runner`, and its bursts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.backend import PAGE_SIZE, Batch, DecodeRow
from headrace.checks import check_batch
from headrace.cuda.ceilings import read_bandwidth
from headrace.cuda.decode import CUDABurst, DecodeGraphs
from headrace.cuda.device import Counters, Device, DeviceArray, Launch
from headrace.cuda.executor import Executor
from headrace.cuda.instrument import CUDAInstrument
from headrace.cuda.sampling import DeviceSampler, can_sample
from headrace.cuda.steps import Step, runs
from headrace.cuda.tuning import Tuning, tuning_for
from headrace.errors import DeviceError
from headrace.gguf.quants import dequantize
from headrace.model.decoder import Decoder
from headrace.model.operations import Head
from headrace.sampling import SamplingParams

MAX_ROWS = 64
"""Rows of one pass over the weights, unless more sequences are to generate at once."""

_PLANS_KEPT = 64


def best_options(
    device: Device, *, batch_invariant: bool = False, tuning: Tuning | None = None
) -> dict[str, Any]:
    """Options of :class:`CUDARunner` for the greatest speed on ``device``: tensor cores where they
    take bfloat16, and there are rows enough by ``tuning`` (None: the device's).
    ``batch_invariant``: for any number of rows, and by one kernel. docs/decisions/014 and 015 have
    what was measured."""
    if device.arch < 80:
        return {}
    tuning = tuning or tuning_for(device)
    options = {"tensor_rows": tuning.tensor_rows, "prompt_rows": tuning.prompt_rows}
    if batch_invariant:
        return options | {"tensor_rows": 1}
    return options | {"few_rows": tuning.few_rows}


class CUDARunner:
    """The whole model over an :class:`Executor`, whose options these are."""

    def __init__(self, decoder: Decoder, device: Device | None = None, **options: Any) -> None:
        self.executor = Executor(decoder, device, **options)
        self.decoder = decoder
        self._graphs: DecodeGraphs | None = None
        self._instrument: CUDAInstrument | None = None
        self._plans: dict[Step, list[Launch]] = {}

    @property
    def device_name(self) -> str:
        return self.executor.device.name

    @property
    def counters(self) -> Counters:
        return self.executor.counters

    @property
    def prompt_rows(self) -> int:
        return self.executor.lowering.most_rows

    @property
    def max_burst_rows(self) -> int:
        return self.executor.max_rows

    def memory_plan(self) -> list[tuple[str, int]]:
        """(what, bytes) of all it holds on the device."""
        plan = self.executor.memory_plan()
        return plan + (self._graphs.sampler.plan() if self._graphs else [])

    def read_bandwidth(self) -> float:
        """Bytes a second of a plain read kernel, now: the ceiling of decoding."""
        return read_bandwidth(self.executor.device)

    def allocate_cache(self, n_pages: int) -> None:
        self._drop()
        self.executor.allocate_cache(n_pages)

    def copy_page(self, source: int, target: int) -> None:
        self.executor.require_cache().copy_page(source, target)

    def close(self) -> None:
        self._drop()
        self.executor.close()

    def _drop(self) -> None:
        """Plans and graphs hold addresses of the cache."""
        self._plans.clear()
        if self._instrument is not None:
            self.executor.synchronise()
            self._instrument.close()
            self._instrument = None
        if self._graphs is not None:
            self.executor.synchronise()
            self._graphs.close()
            self._graphs.sampler.close()
            self._graphs = None

    # Steps

    def step(self, batch: Batch) -> NDArray[np.float32]:
        self._check(batch)
        logits = np.empty((len(batch.logit_rows), self.decoder.config.n_vocab), np.float32)
        for one in self._passes(batch):
            self._pass(one, logits)
        return logits

    def hidden(self, batch: Batch) -> NDArray[np.float32]:
        self._check(batch)
        executor = self.executor
        head = self._head
        tensor = self.decoder.weights[head.norm.weight]
        gain = dequantize(tensor.data, tensor.qtype).reshape(-1)
        states = np.empty((len(batch.logit_rows), len(gain)), np.float32)
        for one in self._passes(batch):
            self._run(one, ())
            x = executor.download(executor.lowering.arena["x values"])[one.batch.logit_rows]
            rms = np.sqrt(np.square(x).mean(-1, keepdims=True) + head.norm.eps)
            states[one.results] = x / rms * gain
        return states

    @property
    def _head(self) -> Head:
        return next(op for op in self.decoder.operations if isinstance(op, Head))

    def _check(self, batch: Batch) -> None:
        """The whole step, before any of its passes."""
        cache = self.executor.require_cache()
        check_batch(batch, self.decoder.config.n_vocab, cache.n_pages)

    def _passes(self, batch: Batch) -> list[_Pass]:
        """If prompts have kernels of their own, rows are a prompt's when their slot has several."""
        prompt_rows = self.executor.lowering.prompt_rows
        if not prompt_rows:
            return _pieces(batch, np.arange(len(batch.tokens)), self.executor.max_rows)
        many = np.bincount(batch.slots)[batch.slots] > 1
        return [
            *_pieces(batch, np.flatnonzero(many), prompt_rows, prompt=True),
            *_pieces(batch, np.flatnonzero(~many), self.executor.max_rows),
        ]

    def _pass(self, one: _Pass, logits: NDArray[np.float32]) -> None:
        """Run it, and fill its rows of ``logits``: at once where they fit, else piece by piece."""
        most, wanted = self.executor.max_rows, one.batch.logit_rows
        at_once = len(wanted) <= most
        step = self._run(one, runs(wanted.tolist()) if at_once else ())
        source = self.executor.lowering.arena["logits"]
        for start in range(0, len(wanted), most):
            piece = wanted[start : start + most]
            if not at_once:
                part = replace(step, logit_runs=runs(piece.tolist()))
                self.executor.run(list(self.executor.lowering.lower(self._head, part)))
            array = DeviceArray(source.address, (len(piece), source.shape[1]), source.dtype)
            logits[one.results[start : start + most]] = self.executor.download(array)

    def _run(self, one: _Pass, logit_runs: tuple[tuple[int, int], ...]) -> Step:
        batch = one.batch
        self.executor.bring(batch)
        longest = int(batch.positions.max()) + 1
        step = Step(len(batch.tokens), 1 << (longest - 1).bit_length(), logit_runs, one.prompt)
        plan = self._plans.get(step)
        if plan is None:
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            plan = self._plans[step] = self.executor.lowering.launches(step)
        self.executor.run(plan)
        return step

    def instrument(self) -> CUDAInstrument:
        """Times the steps of this runner kernel by kernel; its cache must be allocated."""
        if self._instrument is None:
            self._instrument = CUDAInstrument(self.executor, self._decode_graphs())
        return self._instrument

    # Bursts

    def can_sample(self, params: SamplingParams) -> bool:
        return can_sample(params)

    def decode(self, rows: Sequence[DecodeRow], n_steps: int) -> CUDABurst:
        """See :class:`headrace.backend.DecodingRunner`."""
        if not 0 < len(rows) <= self.max_burst_rows:
            raise DeviceError(f"{len(rows)} rows in a burst of 1 to {self.max_burst_rows}")
        return CUDABurst(self._decode_graphs(), rows, n_steps)

    def _decode_graphs(self) -> DecodeGraphs:
        """Made with the first burst: whoever only runs steps needs no sampler."""
        if self._graphs is None:
            executor, config = self.executor, self.decoder.config
            capacity = min(executor.require_cache().n_pages * PAGE_SIZE, config.context_length)
            sampler = DeviceSampler(executor.device, config.n_vocab, executor.max_rows, capacity)
            self._graphs = DecodeGraphs(executor, sampler)
        return self._graphs


@dataclass(frozen=True)
class _Pass:
    """Rows of a step that run together. results: which of the step's results theirs are."""

    batch: Batch
    prompt: bool
    results: NDArray[np.int64]


def _pieces(
    batch: Batch, rows: NDArray[np.int64], most: int, *, prompt: bool = False
) -> list[_Pass]:
    """Those rows of a batch, at most ``most`` together, in order."""
    passes = []
    for start in range(0, len(rows), most):
        some = rows[start : start + most]
        results = np.flatnonzero(np.isin(batch.logit_rows, some))
        logit_rows = np.searchsorted(some, batch.logit_rows[results]).astype(np.int32)
        piece = Batch(
            batch.tokens[some], batch.positions[some], batch.slots[some], batch.page_table,
            logit_rows,
        )  # fmt: skip
        passes.append(_Pass(piece, prompt, results))
    return passes
