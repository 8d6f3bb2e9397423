"""Sampling on the device: what a row's request looks like there, and how its choices come back.

``headrace.sampling`` is the reference for all of it; ``kernels/sample.cu`` says how it is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.backend import Choice, DecodeRow
from headrace.cuda import arguments as c
from headrace.cuda.arena import Arena
from headrace.cuda.device import Device, DeviceArray, Launch
from headrace.cuda.launchers import MAX_BIAS, REPORT_WORDS, SampleShape, sample
from headrace.errors import DeviceError
from headrace.sampling import SamplingParams, TokenLogprob

RING = 16
"""Steps whose choices the host may not have read yet."""

NOT_FINITE = 0xFFFFFFFF
"""What the kernel writes for an id when the largest logit is NaN or infinite."""


def can_sample(params: SamplingParams) -> bool:
    """Whether the kernel does all that ``params`` ask for."""
    return len(params.logit_bias) <= MAX_BIAS


def has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    )


def request(row: DecodeRow, n_vocab: int, step: int) -> c.Request:
    """The kernel's struct of one row; ``step``: choices made before its next one."""
    p = row.params
    n_logprobs = -1 if p.logprobs is None else min(p.logprobs, n_vocab)
    return c.Request(
        p.temperature, p.top_p, math.log(p.min_p) if p.min_p > 0 else -math.inf,
        p.repetition_penalty, p.presence_penalty, p.frequency_penalty,
        p.top_k, p.repeat_last_n, row.n_prompt, len(row.tokens),
        len(p.logit_bias), n_logprobs,
        (row.seed & 0xFFFFFFFF, row.seed >> 32), step & 0xFFFFFFFF, 0,
    )  # fmt: skip


def plan(shape: SampleShape, max_rows: int, capacity: int) -> Arena:
    """The sampler's buffers; ``capacity``: tokens of a row's history."""
    arena = Arena("sampling")
    arena.reserve("shaped", (max_rows, shape.n_vocab), np.float32)
    arena.reserve("peaks", (max_rows, 2, shape.subs), np.uint32)
    arena.reserve("sums", (max_rows, shape.blocks, 2), np.float32)
    arena.reserve("arrived", (max_rows,), np.uint32)
    arena.reserve("requests", (max_rows, 16), np.uint32)
    arena.reserve("history", (max_rows, capacity), np.int32)
    arena.reserve("bias_ids", (max_rows, MAX_BIAS), np.int32)
    arena.reserve("bias", (max_rows, MAX_BIAS), np.float32)
    return arena


class DeviceSampler:
    """The sampler's buffers for ``max_rows`` rows, and the pinned ring its choices arrive in.

    ``capacity``: tokens of a row's history, which only penalties look at.
    """

    def __init__(self, device: Device, n_vocab: int, max_rows: int, capacity: int) -> None:
        self._device, self._max_rows = device, max_rows
        self.shape = shape = SampleShape(n_vocab)
        self._arena = arena = plan(shape, max_rows, capacity)
        arena.allocate(device)
        try:
            self._ring, ring = device.allocate_pinned(RING * max_rows * 8)
        except BaseException:
            arena.free(device)
            raise
        self._choices = ring.view(np.uint64)
        try:
            self._reports, reports = device.allocate_pinned(RING * max_rows * REPORT_WORDS * 4)
        except BaseException:
            device.free(self._ring)
            arena.free(device)
            raise
        self._words = reports.view(np.uint32).reshape(-1, REPORT_WORDS)

    def plan(self) -> list[tuple[str, int]]:
        return [(f"sampling {name}", n_bytes) for name, n_bytes in self._arena.plan()]

    def start(self, rows: Sequence[DecodeRow], step: int) -> None:
        """Bring the rows' requests, biases and, for penalties, histories to the device."""
        device, arena = self._device, self._arena
        arrived = arena["arrived"]
        device.clear(arrived.address, arrived.n_bytes)
        packed = b"".join(bytes(request(row, self.shape.n_vocab, step)) for row in rows)
        device.upload(arena["requests"].address, np.frombuffer(packed, np.uint8))
        for i, row in enumerate(rows):
            if has_penalties(row.params):
                device.upload(arena["history"].row(i), np.array(row.tokens, np.int32))
            if row.params.logit_bias:
                self._upload_bias(i, row.params.logit_bias)

    def _upload_bias(self, i: int, bias: Mapping[int, float]) -> None:
        self._device.upload(self._arena["bias_ids"].row(i), np.fromiter(bias.keys(), np.int32))
        self._device.upload(self._arena["bias"].row(i), np.fromiter(bias.values(), np.float32))

    def launch(
        self,
        logits: DeviceArray,
        n_rows: int,
        tokens: DeviceArray | None,
        positions: DeviceArray | None,
    ) -> Launch:
        """Choose from rows 0 … of ``logits``; ``tokens`` and ``positions`` become the next ones."""
        if n_rows > self._max_rows:
            raise DeviceError(f"{n_rows} rows for a sampler of {self._max_rows}")
        arena, history = self._arena, self._arena["history"]
        names = ("shaped", "peaks", "sums", "arrived", "requests", "history", "bias_ids", "bias")
        arguments = c.Sample(
            logits.address, *(arena[name].address for name in names),
            tokens.address if tokens else 0, positions.address if positions else 0,
            self._ring, self._reports, history.shape[1], RING,
        )  # fmt: skip
        return sample(self.shape, arguments, n_rows)

    def arrived(self, step: int, n_rows: int) -> bool:
        """Whether the choices of ``step`` (counted from 1), of all ``n_rows`` rows, are here."""
        return bool((self._cells(step, n_rows) >> np.uint64(32) == step & 0xFFFFFFFF).all())

    def choices(self, step: int, rows: Sequence[DecodeRow]) -> list[Choice]:
        """The choices of a step that has arrived."""
        ids = (self._cells(step, len(rows)) & np.uint64(0xFFFFFFFF)).tolist()
        if NOT_FINITE in ids:
            raise DeviceError(
                f"row {ids.index(NOT_FINITE)}: the model's largest logit is not finite: "
                "the weights or cache are bad"
            )
        first = (step - 1) % RING * len(rows)
        return [
            Choice(id_, self._report(id_, first + i, row.params.logprobs))
            for i, (id_, row) in enumerate(zip(ids, rows, strict=True))
        ]

    def _cells(self, step: int, n_rows: int) -> NDArray[np.uint64]:
        first = (step - 1) % RING * n_rows
        return self._choices[first : first + n_rows]

    def _report(self, token: int, cell: int, wanted: int | None) -> TokenLogprob | None:
        if wanted is None:
            return None
        words = self._words[cell]
        values = words.view(np.float32)
        top = range(1, 1 + 2 * min(wanted, self.shape.n_vocab), 2)
        return TokenLogprob(
            token, float(values[0]), tuple((int(words[i]), float(values[i + 1])) for i in top)
        )

    def close(self) -> None:
        self._arena.free(self._device)
        for address in (self._ring, self._reports):
            self._device.free(address)
