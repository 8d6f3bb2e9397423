"""The CPU backend: a decoder on packed weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.backend import PAGE_SIZE, Batch
from headrace.checks import check_batch, check_cache_memory, check_copy
from headrace.cpu import isa, matmul
from headrace.cpu.angles import Angles
from headrace.cpu.attention import SCORES, VALUES
from headrace.cpu.compile import attention_library, step_library
from headrace.cpu.layout import (
    CONTEXT,
    COUNTER_BYTES,
    ROWS_PER_BLOCK,
    attention_scratch_bytes,
    head_stride,
)
from headrace.cpu.plan import Plan
from headrace.cpu.team import Team, default_threads
from headrace.errors import DeviceError
from headrace.gguf.quants import dequantize
from headrace.instrument import Instrument
from headrace.model.decoder import Decoder
from headrace.model.operations import Embed, Head, Rope

MAX_ROWS = 256
"""Rows of one compiled call: enough to share each weight's unpacking; longer steps are split."""

MAX_THREADS_PER_CORE = 4
"""More only wait for each other: members of a team spin."""

MAX_LOGIT_ROWS = 32
"""Rows of one pass of the vocabulary matmul beside a full step."""


class CPURunner:
    """See :class:`headrace.backend.Runner`. ``threads`` defaults to the cores available.

    ``instruction_set`` names one of ``isa.INSTRUCTION_SETS`` instead of the best one.
    """

    def __init__(
        self, decoder: Decoder, threads: int | None = None, instruction_set: str | None = None
    ) -> None:
        cores = default_threads()
        if threads is not None and not 1 <= threads <= MAX_THREADS_PER_CORE * cores:
            raise DeviceError(
                f"threads must be from 1 to {MAX_THREADS_PER_CORE * cores} "
                f"({MAX_THREADS_PER_CORE} for each of the {cores} cores here), not {threads}"
            )
        self.decoder = decoder
        self._isa = isa.choose(instruction_set)
        self._n_threads = threads or cores
        self._plan = Plan(decoder, self._isa, MAX_ROWS, self._n_threads)
        self._attention = attention_library(self._isa)
        self._take_part = step_library().function("take_part", 5)
        ropes = self._plan.ropes
        self._angles = Angles(ropes, [self._inverse_frequencies(rope) for rope in ropes])
        self._n_rows = 0  # of the last pass
        embed = next(o for o in decoder.operations if isinstance(o, Embed))
        self._embedding, self._embedding_scale = decoder.weights[embed.weight], embed.scale
        self._head = next(o for o in decoder.operations if isinstance(o, Head))
        self._context = np.zeros(1, CONTEXT)
        self._arrays: dict[str, NDArray[Any]] = {}
        self._describe()
        self._team: Team | None = None
        self._instrument: Instrument | None = None

    prompt_rows = MAX_ROWS

    @property
    def device_name(self) -> str:
        return f"CPU ({self._isa.name}, {self._n_threads} threads)"

    def allocate_cache(self, n_pages: int) -> None:
        c = self.decoder.config
        page = head_stride(c.head_dim) * PAGE_SIZE
        # A page of all layers together: they are used together, and the system brings memory in
        # pieces of two megabytes, which a first token would otherwise need for every layer.
        shape = (n_pages, c.n_layers, c.n_kv_heads, page)
        self._drop_cache()
        check_cache_memory(n_pages, 2 * math.prod(shape) * np.dtype(np.uint16).itemsize)
        for name in ("keys", "values"):
            # Zeros from the system: untouched pages take no memory.
            self._share(name, np.zeros(shape, np.uint16))
        for name, value in (("n_pages", n_pages), ("n_layers", c.n_layers), ("page_halves", page)):
            self._context[name] = value

    def step(self, batch: Batch) -> NDArray[np.float32]:
        logits = np.empty((len(batch.logit_rows), self.decoder.config.n_vocab), np.float32)
        self._run(batch, logits, None)
        if self._head.logit_scale != 1.0:
            logits *= np.float32(self._head.logit_scale)
        if self._head.softcap is not None:
            np.tanh(logits / self._head.softcap, out=logits)
            logits *= np.float32(self._head.softcap)
        return logits

    def hidden(self, batch: Batch) -> NDArray[np.float32]:
        hidden = np.empty((len(batch.logit_rows), self.decoder.config.d_model), np.float32)
        self._run(batch, None, hidden)
        return hidden

    def instrument(self) -> Instrument:
        """Times the steps of this runner part by part. Raises DeviceError where it cannot."""
        if self._instrument is None:  # one, that lives as long as the threads that write to it
            from headrace.cpu.instrument import CPUInstrument

            self._instrument = CPUInstrument(
                self.decoder, self.step, self._context,
                isa=self._isa, n_threads=self._n_threads, max_rows=MAX_ROWS,
            )  # fmt: skip
        return self._instrument

    def copy_page(self, source: int, target: int) -> None:
        check_copy(source, target, self._n_pages())
        for name in ("keys", "values"):
            self._arrays[name][target] = self._arrays[name][source]

    def close(self) -> None:
        if self._team is not None:
            self._context["closing"] = 1
            self._team.close()
            self._team = None
            self._context["closing"] = 0
        self._drop_cache()

    # One step

    def _run(
        self,
        batch: Batch,
        logits: NDArray[np.float32] | None,
        hidden: NDArray[np.float32] | None,
    ) -> None:
        """Rows in passes of MAX_ROWS, each pass's wanted rows straight into the result."""
        check_batch(batch, self.decoder.config.n_vocab, self._n_pages())
        self._fit_page_table(batch.page_table.shape[1])
        done = 0
        for start in range(0, len(batch.tokens), MAX_ROWS):
            stop = min(start + MAX_ROWS, len(batch.tokens))
            inside = (batch.logit_rows >= start) & (batch.logit_rows < stop)
            wanted = batch.logit_rows[inside] - np.int32(start)
            self._begin_pass(batch, slice(start, stop))
            layers = len(self._plan.operations) - 1
            if logits is not None and 0 < len(wanted) <= MAX_LOGIT_ROWS:
                self._run_head(wanted, logits[done : done + len(wanted)], first=0)
            else:
                self._run_operations(0, layers)
                for at in range(0, len(wanted), MAX_LOGIT_ROWS):
                    part = wanted[at : at + MAX_LOGIT_ROWS]
                    to = slice(done + at, done + at + len(part))
                    if logits is not None:
                        self._run_head(part, logits[to], first=layers)
                    elif hidden is not None:
                        hidden[to] = self._normed(part)
            done += len(wanted)

    def _begin_pass(self, batch: Batch, rows: slice) -> None:
        """Embeddings, positions, page tables and rotary angles of the pass's rows."""
        arrays, buffers = self._arrays, self._plan.buffers
        tokens, positions = batch.tokens[rows], batch.positions[rows]
        slots = batch.slots[rows]
        n, d = len(tokens), self.decoder.config.d_model
        x = dequantize(self._embedding.data[tokens], self._embedding.qtype)
        buffers.x[: n * d] = (x * np.float32(self._embedding_scale)).reshape(-1)
        arrays["positions"][:n] = positions
        table = batch.page_table
        arrays["pages"][:n, : table.shape[1]] = table[slots if n > 1 else slots[0]]
        self._angles.fill(positions, buffers.cos, buffers.sin)
        if n == self._n_rows == 1:  # a token after a token: the rest is as it was
            return
        self._n_rows = n
        blocks = _attention_blocks(slots)
        arrays["blocks"][: len(blocks)] = blocks
        self._context["n_rows"], self._context["n_blocks"] = n, len(blocks)
        self._plan.matmuls["t"] = n

    def _run_head(self, rows: NDArray[np.int32], logits: NDArray[np.float32], first: int) -> None:
        head = self._plan.matmuls[-1:]
        self._arrays["logit_rows"][: len(rows)] = rows
        self._context["n_logit_rows"] = len(rows)
        head["t"], head["y"] = len(rows), logits.ctypes.data
        self._run_operations(first, len(self._plan.operations))

    def _run_operations(self, first: int, last: int) -> None:
        self._context["first"], self._context["last"] = first, last
        self._arrays["counters"][:] = 0
        team = self._started_team()
        try:
            team.start_step()
            self._take_part(0, team.n_threads, team.shared, 0, self._context.ctypes.data)
        except BaseException:
            # Ctrl-C between the two: the members have begun and wait for this thread.
            if team.ticket() != self._context["finished"]:
                team.wake()
                self._take_part(0, team.n_threads, team.shared, 0, self._context.ctypes.data)
            raise

    def _normed(self, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """The final norm of rows of the residual stream."""
        d = self.decoder.config.d_model
        weight = self._plan.vector(self._head.norm.weight)
        x = self._plan.buffers.x.reshape(-1, d)[rows]
        scale = 1 / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + self._head.norm.eps)
        return np.asarray(x * scale * weight, np.float32)

    def _n_pages(self) -> int:
        if "values" not in self._arrays:
            raise DeviceError("no KV cache: call allocate_cache before the first step")
        return int(self._context["n_pages"][0])

    # Set-up

    def _inverse_frequencies(self, rope: Rope) -> NDArray[np.float64]:
        frequencies = rope.freq_scale * rope.base ** (-2.0 * np.arange(rope.dim // 2) / rope.dim)
        if rope.freq_factors is not None:
            frequencies = frequencies / self._plan.vector(rope.freq_factors)
        return np.asarray(frequencies, np.float64)

    def _share(self, name: str, array: NDArray[Any]) -> None:
        """Keep an array alive and give compiled code its address."""
        self._arrays[name] = array
        self._context[name] = array.ctypes.data

    def _describe(self) -> None:
        """Everything a step needs but the cache."""
        c, context = self.decoder.config, self._context
        self._plan.describe(context)
        for name in ("positions", "logit_rows"):
            self._share(name, np.zeros(MAX_ROWS, np.int32))
        self._share("all_rows", np.arange(MAX_ROWS, dtype=np.int32))
        self._share("blocks", np.zeros((MAX_ROWS, 2), np.int32))
        self._fit_page_table(1)
        counters = len(self._plan.operations) * COUNTER_BYTES
        self._share("counters", np.zeros(counters // 8, np.int64))
        attention = attention_scratch_bytes(c.n_heads // c.n_kv_heads, c.head_dim)
        scratch = (max(attention, matmul.scratch_bytes(MAX_ROWS)) + 63) // 64 * 64
        self._share("scratch", np.zeros((self._n_threads, scratch), np.uint8))
        context["scratch_bytes"] = scratch
        context["scores_kernel"] = self._attention.address(SCORES)
        context["values_kernel"] = self._attention.address(VALUES)

    def _fit_page_table(self, max_pages: int) -> None:
        if max_pages > self._context["max_pages"]:
            self._share("pages", np.zeros((MAX_ROWS, max_pages), np.int32))
            self._context["max_pages"] = max_pages

    def _drop_cache(self) -> None:
        for name in ("keys", "values"):
            self._arrays.pop(name, None)

    def _started_team(self) -> Team:
        if self._team is None:
            take_part, n_threads = self._take_part, self._n_threads
            context = self._context.ctypes.data

            def serve(member: int, shared: int, ticket: int) -> int:
                return take_part(member, n_threads, shared, ticket, context)

            self._team = Team(n_threads, serve)
        return self._team


def _attention_blocks(slots: NDArray[np.int32]) -> list[tuple[int, int]]:
    """(first row, rows) of runs of one sequence, at most ROWS_PER_BLOCK long."""
    edges = np.flatnonzero(np.diff(slots)) + 1
    starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(slots)]
    return [
        (at, min(ROWS_PER_BLOCK, stop - at))
        for start, stop in zip(starts, stops, strict=True)
        for at in range(start, stop, ROWS_PER_BLOCK)
    ]
