"""Write a GGUF file (version 3), tensor data streamed in chunks so that no model sits in memory."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from headrace.errors import GGUFError
from headrace.gguf.header import DEFAULT_ALIGNMENT, SCALAR_FORMATS, ValueType
from headrace.gguf.types import QuantType

Chunk = bytes | NDArray[Any]
Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""

_ARRAY_TYPES = {
    np.dtype(np.bool_ if value_type is ValueType.BOOL else format): value_type
    for value_type, format in SCALAR_FORMATS.items()
}


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write: ``shape`` in NumPy order, and packed data (C order) in chunks of any size.

    ``chunks`` is iterated once, when the tensor's turn comes; together the chunks must be exactly
    the bytes of the tensor.
    """

    name: str
    qtype: QuantType
    shape: tuple[int, ...]
    chunks: Iterable[Chunk]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64)) * self.qtype.row_bytes(self.shape[-1])


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorSource],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
    progress: Progress | None = None,
) -> None:
    """Write ``metadata`` and ``tensors`` to ``path``, which appears complete or not at all.

    Values: ``bool``; ``int`` (uint32, or int32 when negative, or uint64 / int64 when it needs it);
    ``float`` (float32); ``str``; a sequence of ``str``; a NumPy array or scalar (its own type).
    ``general.alignment`` is written from ``alignment`` when that is not the default.
    Raises GGUFError when a value cannot be stored, a tensor's bytes do not match its shape, or the
    file cannot be written.
    """
    path = Path(path)
    if alignment != DEFAULT_ALIGNMENT:
        metadata = {**metadata, "general.alignment": alignment}
    header = encode_header(metadata, tensors, alignment)
    total = len(header) + sum(_pad(t.n_bytes, alignment) for t in tensors)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(header)
            for tensor in tensors:
                _write_tensor(file, tensor, alignment, total, progress)
        partial.replace(path)
    except OSError as error:
        raise GGUFError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def encode_header(
    metadata: Mapping[str, Any], tensors: Sequence[TensorSource], alignment: int
) -> bytes:
    """Everything before the tensor data, padded to ``alignment``."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), encode_value(key, value)]
    offset = 0
    for tensor in tensors:
        if tensor.shape[-1] % tensor.qtype.block_size:
            raise GGUFError(
                f"tensor {tensor.name!r}: rows of {tensor.shape[-1]} are not a multiple of "
                f"{tensor.qtype.name}'s block of {tensor.qtype.block_size}"
            )
        n_dims = len(tensor.shape)
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{n_dims}Q", n_dims, *reversed(tensor.shape)))
        parts.append(struct.pack("<IQ", tensor.qtype, offset))
        offset += _pad(tensor.n_bytes, alignment)
    header = b"".join(parts)
    return header.ljust(_pad(len(header), alignment), b"\0")


def encode_value(key: str, value: Any) -> bytes:
    """A metadata value with its type, as stored. ``key`` is for the error."""
    if isinstance(value, str):
        return struct.pack("<I", ValueType.STRING) + _string(value)
    if isinstance(value, np.ndarray | np.generic) and value.dtype in _ARRAY_TYPES:
        element = _ARRAY_TYPES[value.dtype]
        if value.ndim == 0:
            return struct.pack("<I", element) + value.tobytes()
        return struct.pack("<IIQ", ValueType.ARRAY, element, value.size) + value.tobytes()
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        head = struct.pack("<IIQ", ValueType.ARRAY, ValueType.STRING, len(value))
        return head + b"".join(map(_string, value))
    if isinstance(value, bool | int | float):
        value_type = _scalar_type(value)
        if value_type is not None:
            return struct.pack("<I", value_type) + struct.pack(SCALAR_FORMATS[value_type], value)
    raise GGUFError(f"key {key!r}: {type(value).__name__} {value!r:.60} cannot be stored in GGUF")


def _scalar_type(value: bool | int | float) -> ValueType | None:
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, float):
        return ValueType.FLOAT32
    for value_type, low, high in (
        (ValueType.UINT32, 0, 2**32),
        (ValueType.INT32, -(2**31), 0),
        (ValueType.UINT64, 0, 2**64),
        (ValueType.INT64, -(2**63), 0),
    ):
        if low <= value < high:
            return value_type
    return None


def _write_tensor(
    file: BinaryIO, tensor: TensorSource, alignment: int, total: int, progress: Progress | None
) -> None:
    written = 0
    for chunk in tensor.chunks:
        data = chunk if isinstance(chunk, bytes) else np.ascontiguousarray(chunk).data
        written += file.write(data)
        if progress is not None:
            progress(file.tell(), total)
    if written != tensor.n_bytes:
        raise GGUFError(f"tensor {tensor.name!r}: {written} bytes given, {tensor.n_bytes} expected")
    file.write(bytes(_pad(written, alignment) - written))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pad(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
