"""A decoder resident on a CUDA device: :class:`headrace.backend.Runner`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.backend import PAGE_SIZE, Batch, DecodeRow
from headrace.cuda.arena import Arena
from headrace.cuda.decode import CUDABurst, DecodeGraphs
from headrace.cuda.device import Counters, Device, DeviceArray, Launch
from headrace.cuda.launchers import Tuning
from headrace.cuda.lowering import Inputs, LayerCache, Lowering, Step, runs
from headrace.cuda.sampling import DeviceSampler, can_sample
from headrace.cuda.weights import WeightIndex
from headrace.errors import DeviceError
from headrace.gguf.quants import dequantize
from headrace.model.decoder import Decoder
from headrace.model.operations import Head
from headrace.sampling import SamplingParams

_PLANS_KEPT = 64


class CUDARunner:
    """``device``: the first GPU unless given. ``max_rows``: rows of one pass over the weights; a
    longer step takes several. ``float_activations``: matmuls read float32 activations, not int8
    ones: slower, and closer to exact arithmetic.

    Raises DeviceError if there is no usable device, DeviceMemoryError if the model does not fit.
    """

    def __init__(
        self,
        decoder: Decoder,
        device: Device | None = None,
        *,
        max_rows: int = 64,
        float_activations: bool = False,
        tuning: Tuning | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        if device is None:
            from headrace.cuda.gpu import CUDADevice

            device = CUDADevice()
        self.decoder, self.device = decoder, device
        self._weights = WeightIndex(decoder)
        self._lowering = Lowering(
            decoder, device, self._weights, max_rows,
            floats=float_activations, tuning=tuning or Tuning(),
        )  # fmt: skip
        self._cache: Arena | None = None
        self._graphs: DecodeGraphs | None = None
        self.ticket = 0
        """Counts the batches brought: whoever brought the last one owns the inputs."""
        self._plans: dict[Step, list[Launch]] = {}
        self._closed = False
        try:
            self._weights.load(device, progress)
            self._lowering.arena.allocate(device)
            self._lowering.clear()
        except BaseException:
            self.close()
            raise

    @property
    def device_name(self) -> str:
        return self.device.name

    @property
    def counters(self) -> Counters:
        return self.device.counters

    @property
    def lowering(self) -> Lowering:
        return self._lowering

    def memory_plan(self) -> list[tuple[str, int]]:
        """(what, bytes) of everything this runner holds on the device."""
        plan = [("weights", self._weights.n_bytes), *self._lowering.arena.plan()]
        return plan + (self._cache.plan() if self._cache else [])

    def matrix_bytes(self) -> dict[int, int]:
        """Bytes of each matrix as the kernels read it, by its address."""
        return self._weights.matrix_bytes()

    def allocate_cache(self, n_pages: int) -> None:
        self._drop_cache()
        rows = self._lowering.max_rows
        cache = Arena("KV cache")
        # One upload brings a step's rows: they lie together, the page table last.
        cache.reserve("inputs", (3 * rows + rows * n_pages,), np.int32)
        for layer, shape in self._lowering.cache_shapes.items():
            cache.reserve(f"keys {layer}", (n_pages, shape.page_bytes()), np.uint8)
            cache.reserve(f"values {layer}", (n_pages, shape.page_bytes()), np.uint8)
        cache.allocate(self.device)
        self._cache = cache
        base = cache["inputs"].address

        def part(start: int, *shape: int) -> DeviceArray:
            return DeviceArray(base + 4 * start, shape, np.dtype(np.int32))

        self._lowering.inputs = Inputs(
            part(0, rows), part(rows, rows), part(2 * rows, rows), part(3 * rows, rows, n_pages)
        )
        self._lowering.caches = []
        for layer in self._lowering.cache_shapes:
            keys, values = cache[f"keys {layer}"], cache[f"values {layer}"]
            # Positions not yet written are masked, but dims that pad a head are read.
            self.device.clear(keys.address, keys.n_bytes)
            self.device.clear(values.address, values.n_bytes)
            self._lowering.caches.append(LayerCache(keys.address, values.address))

    def _drop_cache(self) -> None:
        self._plans.clear()
        self.ticket += 1
        if self._cache is not None:
            self.device.synchronise()
            if self._graphs is not None:
                self._graphs.close()
                self._graphs.sampler.close()
                self._graphs = None
            self._cache.free(self.device)
        self._cache, self._lowering.inputs, self._lowering.caches = None, None, []

    def step(self, batch: Batch) -> NDArray[np.float32]:
        logits = [self._pass(part) for part in _passes(batch, self._lowering.max_rows)]
        return np.concatenate(logits) if len(logits) > 1 else logits[0]

    def hidden(self, batch: Batch) -> NDArray[np.float32]:
        head = next(op for op in self.decoder.operations if isinstance(op, Head))
        tensor = self.decoder.weights[head.norm.weight]
        gain = dequantize(tensor.data, tensor.qtype).reshape(-1)
        rows = []
        for part in _passes(batch, self._lowering.max_rows):
            self._run(part, ())
            x = self.device.download(self._lowering.arena["x values"])[part.logit_rows]
            rows.append(x / np.sqrt(np.square(x).mean(-1, keepdims=True) + head.norm.eps) * gain)
        return np.concatenate(rows).astype(np.float32)

    def _pass(self, batch: Batch) -> NDArray[np.float32]:
        self._run(batch, runs(batch.logit_rows.tolist()))
        logits = self._lowering.arena["logits"]
        wanted = DeviceArray(logits.address, (len(batch.logit_rows), logits.shape[1]), logits.dtype)
        if not wanted.shape[0]:
            return np.empty(wanted.shape, np.float32)
        return self.device.download(wanted)

    def _run(self, batch: Batch, logit_runs: tuple[tuple[int, int], ...]) -> None:
        self.bring(batch)
        longest = int(batch.positions.max()) + 1
        step = Step(len(batch.tokens), 1 << (longest - 1).bit_length(), logit_runs)
        plan = self._plans.get(step)
        if plan is None:
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            plan = self._plans[step] = self._lowering.launches(step)
            self.device.prepare(launch.spec for launch in plan)
        for launch in plan:
            self.device.launch(launch)

    def bring(self, batch: Batch, n_table: int | None = None) -> int:
        """Rows and the pages of the slots they use, renumbered, in one copy; returns the ticket.

        ``n_table``: pages of each slot to bring, those of the positions alone unless given.
        """
        inputs = self._lowering.require_inputs()
        n, rows, n_pages = len(batch.tokens), *inputs.page_table.shape
        n_vocab = self.decoder.config.n_vocab
        if n == 0 or batch.tokens.min() < 0 or batch.tokens.max() >= n_vocab:
            raise DeviceError(f"{n} tokens, ids {batch.tokens} of a vocabulary of {n_vocab}")
        used, slots = np.unique(batch.slots, return_inverse=True)
        last = int(batch.positions.max()) // PAGE_SIZE
        if batch.positions.min() < 0 or last >= min(batch.page_table.shape[1], n_pages):
            raise DeviceError(
                f"position {int(batch.positions.max())} lies beyond the cache: "
                f"{batch.page_table.shape[1]} pages a slot, {n_pages} in all, of {PAGE_SIZE} each"
            )
        pages = batch.page_table[batch.slots, batch.positions // PAGE_SIZE]
        if pages.min() < 0 or pages.max() >= n_pages:
            raise DeviceError(f"pages {pages.min()} … {pages.max()} of a cache of {n_pages}")
        packed = np.zeros(3 * rows + len(used) * n_pages, np.int32)
        packed[:n], packed[rows : rows + n] = batch.tokens, batch.positions
        packed[2 * rows : 2 * rows + n] = slots
        columns = n_table or last + 1
        table = packed[3 * rows :].reshape(len(used), n_pages)
        table[:, :columns] = batch.page_table[used, :columns]
        self.device.upload(inputs.tokens.address, packed)
        self.ticket += 1
        return self.ticket

    def can_sample(self, params: SamplingParams) -> bool:
        return can_sample(params)

    def decode(self, rows: Sequence[DecodeRow], n_steps: int) -> CUDABurst:
        """See :class:`headrace.backend.DecodingRunner`."""
        if not 0 < len(rows) <= self._lowering.max_rows:
            raise DeviceError(f"{len(rows)} rows in a burst of 1 to {self._lowering.max_rows}")
        return CUDABurst(self, self._decode_graphs(), rows, n_steps)

    def _decode_graphs(self) -> DecodeGraphs:
        """Made with the first burst: whoever only runs steps needs no sampler."""
        if self._graphs is None:
            n_pages = self._lowering.require_inputs().page_table.shape[1]
            config = self.decoder.config
            capacity = min(n_pages * PAGE_SIZE, config.context_length)
            sampler = DeviceSampler(self.device, config.n_vocab, self._lowering.max_rows, capacity)
            self._graphs = DecodeGraphs(self, sampler)
        return self._graphs

    def copy_page(self, source: int, target: int) -> None:
        if self._cache is None:
            raise DeviceError("copy_page before allocate_cache")
        for layer, shape in self._lowering.cache_shapes.items():
            for name in (f"keys {layer}", f"values {layer}"):
                array = self._cache[name]
                self.device.copy(array.row(target), array.row(source), shape.page_bytes())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._drop_cache()
        self._lowering.arena.free(self.device)
        self._weights.close(self.device)
        self.device.close()


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
