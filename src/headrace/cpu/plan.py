"""The plan of a step: a decoder's operations as tables of numbers and addresses.

Built once at load. The compiled step (``step.py``) walks it without touching Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.cpu import matmul
from headrace.cpu.compile import matmul_library
from headrace.cpu.isa import InstructionSet
from headrace.cpu.layout import (
    ATTEND,
    FEED_FORWARD_IN,
    FEED_FORWARD_OUT,
    HEAD,
    MATMUL,
    OPERATION,
    PROJECT_OUT,
    PROJECT_QKV,
    Buffers,
)
from headrace.cpu.tiles import PLAIN_BLOCK, block_bytes
from headrace.cpu.unpack import UNPACKERS
from headrace.cpu.weights import Weights
from headrace.errors import DeviceError
from headrace.gguf.quants import dequantize
from headrace.model.decoder import Decoder
from headrace.model.operations import (
    Activation,
    Attend,
    Embed,
    FeedForwardIn,
    FeedForwardOut,
    Head,
    Linear,
    Norm,
    Operation,
    Pairing,
    ProjectOut,
    ProjectQKV,
    Rope,
)


def allocate_buffers(decoder: Decoder, max_rows: int, ropes: Sequence[Rope]) -> Buffers:
    c = decoder.config
    heads, kv_heads = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    widest = max(c.d_model, heads, c.d_ff)

    def floats(width: int) -> NDArray[np.float32]:
        return np.zeros(max_rows * width, np.float32)

    angles = (len(ropes), max_rows, max(r.dim for r in ropes) // 2)
    return Buffers(
        x=floats(c.d_model),
        normed=floats(c.d_model),
        q=floats(heads),
        k=floats(kv_heads),
        v=floats(kv_heads),
        attended=floats(heads),
        gate=floats(c.d_ff),
        up=floats(c.d_ff),
        branch=floats(c.d_model),
        quantised=np.zeros(max_rows * widest, np.int8),
        records=np.zeros(max_rows * widest // matmul.GROUP + 1, matmul.GROUP_RECORD),
        cos=np.zeros(angles, np.float32),
        sin=np.zeros(angles, np.float32),
    )


class Plan:
    """``operations`` [n] of OPERATION and ``matmuls`` of MATMUL, and the distinct ``ropes``."""

    def __init__(
        self, decoder: Decoder, isa: InstructionSet, max_rows: int, threads: int = 1
    ) -> None:
        self.decoder, self.isa = decoder, isa
        self._weights = Weights(isa.lanes)
        for linear in _linears(decoder):
            self._check(linear)
            self._weights.reserve(decoder.weights[linear.weight])
        self._weights.load(threads)
        self.ropes = list(
            dict.fromkeys(o.rope for o in decoder.operations if isinstance(o, ProjectQKV))
        )
        self.buffers = allocate_buffers(decoder, max_rows, self.ropes)
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self._operations: list[dict[str, Any]] = []
        self._matmuls: list[dict[str, int]] = []
        self._libraries: list[Any] = []
        self._activation = Activation.SILU
        for operation in decoder.operations:
            self._add(operation)
        self.operations = _table(self._operations, OPERATION)
        self.matmuls = _table(self._matmuls, MATMUL)

    def describe(self, context: NDArray[Any]) -> None:
        """Fill the fields of a ``layout.CONTEXT`` that are fixed at load."""
        buffers = self.buffers
        context["operations"] = self.operations.ctypes.data
        context["matmuls"] = self.matmuls.ctypes.data
        context["d_model"] = self.decoder.config.d_model
        for name in Buffers._fields:
            context[name] = getattr(buffers, name).ctypes.data
        context["max_rows"], context["max_angles"] = buffers.cos.shape[1:]

    def _add(self, operation: Operation) -> None:
        buffers = self.buffers
        first = len(self._matmuls)
        row: dict[str, Any]
        match operation:
            case Embed():
                return
            case ProjectQKV(layer, norm, q, k, v, q_norm, k_norm, rope):
                for linear, y in ((q, buffers.q), (k, buffers.k), (v, buffers.v)):
                    self._add_matmul(linear, buffers.normed, y)
                row = {
                    "kind": PROJECT_QKV,
                    "layer": layer,
                    "width": q.k,
                    "rope": self.ropes.index(rope),
                    "rope_dim": rope.dim,
                    "interleaved": rope.pairing is Pairing.INTERLEAVED,
                    **_heads(operation),
                    **self._norm("norm", "eps", norm),
                    **self._norm("q_norm", "q_eps", q_norm),
                    **self._norm("k_norm", "k_eps", k_norm),
                }
            case Attend(layer, scale=scale, window=window, softcap=softcap):
                row = {
                    "kind": ATTEND,
                    "layer": layer,
                    "scale": scale,
                    "window": window or 0,
                    "softcap": softcap or 0.0,
                    **_heads(operation),
                }
            case ProjectOut(layer, out, post_norm):
                self._add_branch(out, buffers.attended, post_norm)
                row = {"kind": PROJECT_OUT, "layer": layer, "width": out.k}
                row |= self._norm("post_norm", "post_eps", post_norm)
            case FeedForwardIn(layer, norm, gate, up, activation):
                self._add_matmul(gate, buffers.normed, buffers.gate)
                self._add_matmul(up, buffers.normed, buffers.up)
                self._activation = activation  # computed as FeedForwardOut quantises its input
                row = {
                    "kind": FEED_FORWARD_IN,
                    "layer": layer,
                    "width": gate.k,
                    **self._norm("norm", "eps", norm),
                }
            case FeedForwardOut(layer, down, post_norm):
                self._add_branch(down, buffers.gate, post_norm)
                row = {"kind": FEED_FORWARD_OUT, "layer": layer, "width": down.k}
                row["gelu"] = self._activation is Activation.GELU_TANH
                row |= self._norm("post_norm", "post_eps", post_norm)
            case Head(norm, out, softcap, logit_scale):
                self._add_matmul(out, buffers.normed, None)
                row = {
                    "kind": HEAD,
                    "width": out.k,
                    "softcap": softcap or 0.0,
                    "scale": logit_scale,
                    **self._norm("norm", "eps", norm),
                }
        row |= {"first_matmul": first, "last_matmul": len(self._matmuls)}
        self._operations.append(row)

    def _check(self, linear: Linear) -> None:
        tensor = self.decoder.weights[linear.weight]
        if tensor.data.shape[1] % block_bytes(tensor.qtype):
            multiple = PLAIN_BLOCK // tensor.qtype.block_bytes
            raise DeviceError(
                f"{linear.weight}: rows of {linear.k} {tensor.qtype.name} weights are not a "
                f"multiple of {multiple}, which the CPU kernels need; use --device reference"
            )

    def _add_branch(self, linear: Linear, x: NDArray[np.float32], post_norm: Norm | None) -> None:
        """A projection back to the residual stream: added to it, or normed first."""
        if post_norm is None:
            self._add_matmul(linear, x, self.buffers.x, residual=True)
        else:
            self._add_matmul(linear, x, self.buffers.branch)

    def _add_matmul(
        self,
        linear: Linear,
        x: NDArray[np.float32],
        y: NDArray[np.float32] | None,
        residual: bool = False,
    ) -> None:
        tensor = self.decoder.weights[linear.weight]
        is_float = tensor.qtype not in UNPACKERS
        library = matmul_library(tensor.qtype, linear.k, self.isa)
        self._libraries.append(library)
        self._matmuls.append(
            {
                "kernel": library.address(matmul.kernel_name(tensor.qtype, linear.k)),
                "n_tiles": -(-linear.n // self.isa.lanes),
                "tile_bytes": self.isa.lanes * tensor.qtype.row_bytes(linear.k),
                "float_input": is_float,
                "bias": self._address(linear.bias),
                "weights": self._weights.address(tensor.name),
                "n": linear.n,
                "x": (x if is_float else self.buffers.quantised).ctypes.data,
                "records": self.buffers.records.ctypes.data,
                "y": 0 if y is None else y.ctypes.data,
                "y_stride": 4 * linear.n,
                "residual": residual,
                "accumulate": residual or linear.bias is not None,
            }
        )

    def _norm(self, address: str, eps: str, norm: Norm | None) -> dict[str, Any]:
        return {} if norm is None else {address: self._address(norm.weight), eps: norm.eps}

    def vector(self, name: str) -> NDArray[np.float32]:
        """A vector weight as float32, kept alive here."""
        if name not in self._vectors:
            tensor = self.decoder.weights[name]
            values = dequantize(tensor.data, tensor.qtype).reshape(-1)
            self._vectors[name] = np.ascontiguousarray(values, np.float32)
        return self._vectors[name]

    def _address(self, name: str | None) -> int:
        return 0 if name is None else self.vector(name).ctypes.data


def _linears(decoder: Decoder) -> Iterator[Linear]:
    for operation in decoder.operations:
        for field in fields(operation):
            if isinstance(value := getattr(operation, field.name), Linear):
                yield value


def _heads(operation: ProjectQKV | Attend) -> dict[str, int]:
    return {name: getattr(operation, name) for name in ("n_heads", "n_kv_heads", "head_dim")}


def _table(rows: Sequence[dict[str, Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    table = np.zeros(len(rows), dtype)
    for i, row in enumerate(rows):
        for field, value in row.items():
            table[field][i] = value
    return table
