"""The weight index: every matrix in tiles and every vector in float32, resolved once at load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import lcm

import numpy as np
from numpy.typing import NDArray

from headrace.cuda.arena import Arena
from headrace.cuda.device import Device
from headrace.cuda.launchers import reorder
from headrace.cuda.layout import PADDED_ROWS, TileLayout, rotary_rows
from headrace.cuda.products import Matrix
from headrace.cuda.upload import SLOT_BYTES, Piece, Progress, upload
from headrace.errors import ModelError
from headrace.gguf.quants import check_finite, dequantize
from headrace.gguf.types import Tensor
from headrace.model.decoder import Decoder
from headrace.model.operations import (
    Embed,
    FeedForwardIn,
    FeedForwardOut,
    Head,
    Linear,
    Norm,
    Pairing,
    ProjectOut,
    ProjectQKV,
    Rope,
)
from headrace.stages import stage


@dataclass(frozen=True)
class RowOrder:
    """Rows permuted so that rotary pairs lie side by side; rope_dim 0: as in the file."""

    head_dim: int = 0
    rope_dim: int = 0

    def apply(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self.rope_dim:
            return values
        return values[rotary_rows(values.size, self.head_dim, self.rope_dim)]


FILE_ORDER = RowOrder()


def row_order(operation: ProjectQKV) -> RowOrder:
    """Of q and k: the kernels know interleaved pairs only."""
    if operation.rope.pairing is Pairing.INTERLEAVED:
        return FILE_ORDER
    return RowOrder(operation.head_dim, operation.rope.dim)


class WeightIndex:
    """Look-ups by (GGML name, row order), made at load; a decode step touches no name."""

    def __init__(self, decoder: Decoder) -> None:
        self._tensors = decoder.weights
        self._layouts: dict[tuple[str, RowOrder], TileLayout] = {}
        self._vectors: dict[tuple[str, RowOrder], int] = {}
        self._ropes: dict[Rope, None] = {}
        self._arena = Arena("weights")
        for operation in decoder.operations:
            for linear, order in _linears(operation):
                self._add_matrix(linear.weight, (linear.n, linear.k), order)
                if linear.bias is not None:
                    self._add_vector(linear.bias, linear.n, order)
            for norm, order in _norms(operation):
                self._add_vector(norm.weight, None, order)
            if isinstance(operation, Embed):
                self._add_matrix(operation.weight, None, FILE_ORDER)
            if isinstance(operation, ProjectQKV):
                self._ropes[operation.rope] = None
        for (name, order), layout in self._layouts.items():
            self._arena.reserve(_key("matrix", name, order), (layout.n_bytes,), np.uint8)
        for (name, order), size in self._vectors.items():
            self._arena.reserve(_key("vector", name, order), (size,), np.float32)
        for i, rope in enumerate(self._ropes):
            self._arena.reserve(f"rope {i}", (rope.dim // 2,), np.float64)

    @property
    def n_bytes(self) -> int:
        return self._arena.n_bytes

    def _tensor(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelError(f"the model has no tensor {name!r}") from None

    def _add_matrix(self, name: str, shape: tuple[int, int] | None, order: RowOrder) -> None:
        tensor = self._tensor(name)
        actual = (tensor.n_rows, tensor.k)
        if shape is not None and shape != actual:
            raise ModelError(
                f"{name}: {actual[0]} x {actual[1]} where {shape[0]} x {shape[1]} is expected"
            )
        self._layouts[name, order] = TileLayout(tensor.qtype, *actual)

    def _add_vector(self, name: str, size: int | None, order: RowOrder) -> None:
        tensor = self._tensor(name)
        n = tensor.n_rows * tensor.k
        if size is not None and size != n:
            raise ModelError(f"{name}: {n} values where {size} are expected")
        self._vectors[name, order] = n

    def load(self, device: Device, progress: Progress | None = None) -> None:
        """Copy and reorder everything; ``progress`` is told the bytes of each piece.

        Raises DeviceError, and GGUFError for weights that are not finite or no longer there.
        """
        matrices = {name for name, _ in self._layouts}
        check_finite(*(t for name, t in self._tensors.items() if name not in matrices))
        self._arena.allocate(device)
        n_bytes = sum(self._tensor(name).data.nbytes for name, _ in self._layouts)
        with stage("matrices on the device", n_bytes):
            upload(device, self._pieces(), self.staging_bytes, progress)
        for name, order in self._vectors:
            tensor = self._tensor(name)
            values = order.apply(
                dequantize(tensor.data, tensor.qtype).reshape(-1).astype(np.float32)
            )
            device.upload(self._arena[_key("vector", name, order)].address, values)
        for i, rope in enumerate(self._ropes):
            device.upload(self._arena[f"rope {i}"].address, self._turns(rope))

    @property
    def staging_bytes(self) -> int:
        """What :meth:`load` takes on the device besides, meanwhile."""
        tensors = [(self._tensor(name), order) for name, order in self._layouts]
        return max(_piece_rows(tensor, order) * _row_bytes(tensor) for tensor, order in tensors)

    def _pieces(self) -> Iterator[Piece]:
        for (name, order), layout in self._layouts.items():
            tensor, target = self._tensor(name), self._arena[_key("matrix", name, order)].address
            rows = _piece_rows(tensor, order)
            for first in range(0, layout.n, rows):
                n_rows = min(rows, layout.n - first)
                kernel = partial(
                    reorder, layout, target=target, first_row=first, rows=n_rows,
                    head_dim=order.head_dim, rope_dim=order.rope_dim,
                )  # fmt: skip
                yield Piece(tensor, first, n_rows, kernel)

    def _turns(self, rope: Rope) -> NDArray[np.float64]:
        """Turns per position of each rotary pair: inv_freq / 2π (see operations.Rope)."""
        frequencies = rope.freq_scale * rope.base ** (-2.0 * np.arange(rope.dim // 2) / rope.dim)
        if rope.freq_factors is not None:
            tensor = self._tensor(rope.freq_factors)
            frequencies /= dequantize(tensor.data, tensor.qtype).reshape(-1).astype(np.float64)
        return frequencies / (2 * np.pi)

    def matrix(self, name: str, order: RowOrder = FILE_ORDER, bias: str | None = None) -> Matrix:
        layout = self._layouts.get((name, order))
        if layout is None:
            raise self._not_here(name)
        address = self._arena[_key("matrix", name, order)].address
        return Matrix(address, layout, self.vector(bias, order) if bias else 0)

    def _not_here(self, name: str) -> ModelError:
        if any(name == known for known, _ in self._layouts):
            return ModelError(
                f"{name} lies with its rows in rotary order: use Executor.project_qkv for q and k"
            )
        if any(name == known for known, _ in self._vectors):
            return ModelError(f"{name} is a vector, not a matrix")
        return ModelError(f"the model has no matrix {name!r}")

    def linear(self, linear: Linear, order: RowOrder = FILE_ORDER) -> Matrix:
        return self.matrix(linear.weight, order, linear.bias)

    def vector(self, name: str, order: RowOrder = FILE_ORDER) -> int:
        """The address of the float32 values."""
        return self._arena[_key("vector", name, order)].address

    def turns(self, rope: Rope) -> int:
        return self._arena[f"rope {list(self._ropes).index(rope)}"].address

    def matrix_bytes(self) -> dict[int, int]:
        """Bytes of each matrix, by its address."""
        return {
            self.matrix(name, order).address: layout.n_bytes
            for (name, order), layout in self._layouts.items()
        }

    def close(self, device: Device) -> None:
        self._arena.free(device)


def _key(kind: str, name: str, order: RowOrder) -> str:
    return f"{kind} {name}" + (
        f" rotary {order.head_dim}/{order.rope_dim}" if order.rope_dim else ""
    )


def _linears(operation: object) -> Iterator[tuple[Linear, RowOrder]]:
    match operation:
        case ProjectQKV(q=q, k=k, v=v):
            order = row_order(operation)
            yield from ((q, order), (k, order), (v, FILE_ORDER))
        case ProjectOut(out=out) | Head(out=out):
            yield out, FILE_ORDER
        case FeedForwardIn(gate=gate, up=up):
            yield from ((gate, FILE_ORDER), (up, FILE_ORDER))
        case FeedForwardOut(down=down):
            yield down, FILE_ORDER


def _norms(operation: object) -> Iterator[tuple[Norm, RowOrder]]:
    match operation:
        case ProjectQKV(norm=norm, q_norm=q_norm, k_norm=k_norm):
            yield norm, FILE_ORDER
            yield from ((n, row_order(operation)) for n in (q_norm, k_norm) if n)
        case ProjectOut(post_norm=norm) | FeedForwardOut(post_norm=norm) if norm:
            yield norm, FILE_ORDER
        case FeedForwardIn(norm=norm) | Head(norm=norm):
            yield norm, FILE_ORDER


def _piece_rows(tensor: Tensor, order: RowOrder) -> int:
    """Rows that are reordered together: whole tiles and heads, in a slot if it has room for one."""
    unit = lcm(PADDED_ROWS, max(order.head_dim, 1))
    return min(max(unit, SLOT_BYTES // _row_bytes(tensor) // unit * unit), tensor.n_rows)


def _row_bytes(tensor: Tensor) -> int:
    return tensor.qtype.row_bytes(tensor.k)
