"""The reference backend: the seven operations as written, over dequantised weights.

Slow and obvious. Every other backend is tested against it; activations are never quantised here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from headrace.backend import PAGE_SIZE, Batch
from headrace.checks import check_batch, check_cache_memory, check_copy
from headrace.errors import DeviceError
from headrace.gguf.quants import round_q8_0
from headrace.instrument import Instrument
from headrace.model.decoder import Decoder
from headrace.model.operations import (
    Attend,
    Embed,
    FeedForwardIn,
    FeedForwardOut,
    Head,
    Linear,
    Norm,
    Operation,
    ProjectOut,
    ProjectQKV,
    Rope,
)
from headrace.reference import operations as ops
from headrace.reference.instrument import Observer, ReferenceInstrument
from headrace.reference.weights import DequantisedWeights

Array = NDArray[Any]

DEFAULT_WEIGHT_BUDGET = 4 << 30


class ReferenceRunner:
    """A decoder in NumPy, with a paged cache of keys and values in the same dtype; with
    ``cache_type`` q8_0 they are rounded as a cache of that type would round them.

    ``dtype`` is float32, or float64 to measure the rounding error of other backends; logits come
    back in it. ``weight_budget`` bounds the bytes of dequantised weights kept. ``observe(operation,
    output)`` is called after every operation: the residual stream [T, d] after Embed, ProjectOut
    and FeedForwardOut; q | k | v as cached, [T, (n_heads + 2 n_kv_heads) head_dim], after
    ProjectQKV; [T, n_heads head_dim] after Attend; [T, d_ff] after FeedForwardIn; logits [R,
    n_vocab] after Head.
    """

    def __init__(
        self,
        decoder: Decoder,
        dtype: DTypeLike = np.float32,
        weight_budget: int = DEFAULT_WEIGHT_BUDGET,
        observe: Observer | None = None,
        cache_type: str = "f16",
    ) -> None:
        self.decoder = decoder
        self._rounds = cache_type == "q8_0"
        self.observe = observe
        self._dtype = np.dtype(dtype)
        self._weights = DequantisedWeights(decoder.weights, self._dtype, weight_budget)
        self._inv_freq: dict[Rope, NDArray[np.float64]] = {}
        # [n_layers, 2 (k, v), n_pages, PAGE_SIZE, n_kv_heads, head_dim]
        self._cache: Array | None = None

    prompt_rows = 256

    @property
    def device_name(self) -> str:
        return f"reference (NumPy {self._dtype.name})"

    def allocate_cache(self, n_pages: int) -> None:
        c = self.decoder.config
        shape = (c.n_layers, 2, n_pages, PAGE_SIZE, c.n_kv_heads, c.head_dim)
        self._cache = None
        check_cache_memory(n_pages, math.prod(shape) * self._dtype.itemsize)
        self._cache = np.zeros(shape, self._dtype)

    def instrument(self) -> Instrument:
        """Times the steps of this runner operation by operation."""

        def observe(observer: Observer | None) -> Observer | None:
            before, self.observe = self.observe, observer
            return before

        return ReferenceInstrument(self.decoder, self.step, observe, self._dtype.itemsize)

    def copy_page(self, source: int, target: int) -> None:
        cache = self._allocated()
        check_copy(source, target, cache.shape[2])
        cache[:, :, target] = cache[:, :, source]

    def step(self, batch: Batch) -> Array:
        """Logits [R, n_vocab] of ``batch.logit_rows``, in the runner's dtype."""
        hidden = self.hidden(batch)
        head = self._head
        logits = self._linear(hidden, head.out) * head.logit_scale
        logits = ops.softcap(logits, head.softcap)
        self._show(head, logits)
        return logits

    def hidden(self, batch: Batch) -> Array:
        check_batch(batch, self.decoder.config.n_vocab, self._allocated().shape[2])
        x = np.empty(0, self._dtype)  # the residual stream [T, d]
        y = x  # what the last half-operation hands to the next
        for op in self.decoder.operations:
            match op:
                case Embed():
                    x = self._weights.rows(op.weight, batch.tokens) * op.scale
                    self._show(op, x)
                case ProjectQKV():
                    y = self._project_qkv(op, x, batch)
                case Attend():
                    y = self._attend(op, y, batch)
                    self._show(op, y)
                case ProjectOut():
                    x = x + self._post_norm(self._linear(y, op.out), op.post_norm)
                    self._show(op, x)
                case FeedForwardIn():
                    normed = self._norm(x, op.norm)
                    gate, up = self._linear(normed, op.gate), self._linear(normed, op.up)
                    y = ops.activate(gate, op.activation) * up
                    self._show(op, y)
                case FeedForwardOut():
                    x = x + self._post_norm(self._linear(y, op.down), op.post_norm)
                    self._show(op, x)
                case Head():
                    x = self._norm(x[batch.logit_rows], op.norm)
        return x

    def close(self) -> None:
        self._cache = None
        self._weights = DequantisedWeights(self.decoder.weights, self._dtype, 0)

    def _project_qkv(self, op: ProjectQKV, x: Array, batch: Batch) -> Array:
        """Returns q [T, n_heads, head_dim], rotated; k and v go to the cache."""
        normed = self._norm(x, op.norm)
        q = self._linear(normed, op.q).reshape(len(x), op.n_heads, op.head_dim)
        k = self._linear(normed, op.k).reshape(len(x), op.n_kv_heads, op.head_dim)
        v = self._linear(normed, op.v).reshape(len(x), op.n_kv_heads, op.head_dim)
        if op.q_norm is not None:
            q = self._norm(q, op.q_norm)
        if op.k_norm is not None:
            k = self._norm(k, op.k_norm)
        inv_freq = self._inverse_frequencies(op.rope)
        q = ops.rotate(q, batch.positions, op.rope, inv_freq)
        k = ops.rotate(k, batch.positions, op.rope, inv_freq)
        if self._rounds:
            k, v = round_q8_0(k), round_q8_0(v)
        pages = batch.page_table[batch.slots, batch.positions // PAGE_SIZE]
        offsets = batch.positions % PAGE_SIZE
        keys, values = self._allocated()[op.layer]
        keys[pages, offsets], values[pages, offsets] = k, v
        self._show(op, np.concatenate([q, k, v], axis=1).reshape(len(x), -1))
        return q

    def _attend(self, op: Attend, q: Array, batch: Batch) -> Array:
        """q [T, n_heads, head_dim] -> [T, n_heads * head_dim], one slot after the other."""
        keys, values = self._allocated()[op.layer]
        out = np.empty_like(q)
        for slot in np.unique(batch.slots):
            rows = batch.slots == slot
            positions = batch.positions[rows]
            length = int(positions[-1]) + 1
            pages = batch.page_table[slot, : -(-length // PAGE_SIZE)]
            k = keys[pages].reshape(-1, op.n_kv_heads, op.head_dim)[:length]
            v = values[pages].reshape(-1, op.n_kv_heads, op.head_dim)[:length]
            out[rows] = ops.attention(q[rows], k, v, positions, op.scale, op.window, op.softcap)
        return out.reshape(len(q), -1)

    def _linear(self, x: Array, op: Linear) -> Array:
        """x [T, k] -> [T, n]."""
        blocks = [ops.linear(x, block) for block in self._weights.row_blocks(op.weight)]
        y = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
        return y if op.bias is None else y + self._weights.vector(op.bias)

    def _norm(self, x: Array, norm: Norm) -> Array:
        return ops.rms_norm(x, self._weights.vector(norm.weight), norm.eps)

    def _post_norm(self, x: Array, norm: Norm | None) -> Array:
        return x if norm is None else self._norm(x, norm)

    def _inverse_frequencies(self, rope: Rope) -> NDArray[np.float64]:
        if rope not in self._inv_freq:
            factors = self._weights.vector(rope.freq_factors) if rope.freq_factors else None
            self._inv_freq[rope] = ops.inverse_frequencies(rope, factors)
        return self._inv_freq[rope]

    @property
    def _head(self) -> Head:
        head = self.decoder.operations[-1]
        if not isinstance(head, Head):
            raise DeviceError(f"the last operation is {type(head).__name__}, should be Head")
        return head

    def _show(self, op: Operation, output: Array) -> None:
        if self.observe is not None:
            self.observe(op, output)

    def _allocated(self) -> Array:
        if self._cache is None:
            raise DeviceError("no KV cache: call allocate_cache before the first step")
        return self._cache
