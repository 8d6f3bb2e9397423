"""A decoder resident on a CUDA device: :class:`headrace.backend.Runner`, and its bursts."""

from __future__ import annotations

from collections.abc import Sequence
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
from headrace.cuda.lowering import Step, runs
from headrace.cuda.sampling import DeviceSampler, can_sample
from headrace.errors import DeviceError
from headrace.gguf.quants import dequantize
from headrace.model.decoder import Decoder
from headrace.model.operations import Head
from headrace.sampling import SamplingParams

MAX_ROWS = 64
"""Rows of one pass over the weights, unless more sequences are to generate at once."""

_PLANS_KEPT = 64


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
        logits = [self._pass(part) for part in _passes(batch, self.executor.max_rows)]
        return np.concatenate(logits) if len(logits) > 1 else logits[0]

    def hidden(self, batch: Batch) -> NDArray[np.float32]:
        self._check(batch)
        executor = self.executor
        head = next(op for op in self.decoder.operations if isinstance(op, Head))
        tensor = self.decoder.weights[head.norm.weight]
        gain = dequantize(tensor.data, tensor.qtype).reshape(-1)
        rows = []
        for part in _passes(batch, executor.max_rows):
            self._run(part, ())
            x = executor.download(executor.lowering.arena["x values"])[part.logit_rows]
            rows.append(x / np.sqrt(np.square(x).mean(-1, keepdims=True) + head.norm.eps) * gain)
        return np.concatenate(rows).astype(np.float32)

    def _check(self, batch: Batch) -> None:
        """The whole step, before any of its passes."""
        cache = self.executor.require_cache()
        check_batch(batch, self.decoder.config.n_vocab, cache.n_pages)

    def _pass(self, batch: Batch) -> NDArray[np.float32]:
        self._run(batch, runs(batch.logit_rows.tolist()))
        logits = self.executor.lowering.arena["logits"]
        wanted = DeviceArray(logits.address, (len(batch.logit_rows), logits.shape[1]), logits.dtype)
        if not wanted.shape[0]:
            return np.empty(wanted.shape, np.float32)
        return self.executor.download(wanted)

    def _run(self, batch: Batch, logit_runs: tuple[tuple[int, int], ...]) -> None:
        self.executor.bring(batch)
        longest = int(batch.positions.max()) + 1
        step = Step(len(batch.tokens), 1 << (longest - 1).bit_length(), logit_runs)
        plan = self._plans.get(step)
        if plan is None:
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            plan = self._plans[step] = self.executor.lowering.launches(step)
        self.executor.run(plan)

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


def _passes(batch: Batch, max_rows: int) -> list[Batch]:
    """A batch in pieces of at most ``max_rows`` rows, in order."""
    if len(batch.tokens) <= max_rows:
        return [batch]
    parts = []
    for start in range(0, len(batch.tokens), max_rows):
        rows = slice(start, start + max_rows)
        inside = (batch.logit_rows >= start) & (batch.logit_rows < start + max_rows)
        parts.append(
            Batch(
                batch.tokens[rows], batch.positions[rows], batch.slots[rows], batch.page_table,
                (batch.logit_rows[inside] - start).astype(np.int32),
            )
        )  # fmt: skip
    return parts
