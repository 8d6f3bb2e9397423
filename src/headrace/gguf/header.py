"""The structure of a GGUF file: header, metadata and tensor table, read with every bound checked.

Format: the GGUF specification (ggml's ``docs/gguf.md``), versions 2 and 3, little-endian. Nothing
is allocated on the word of a count or length that the bytes left in the file could not hold, so
time and memory stay in proportion to the file, whatever it declares.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from mmap import mmap
from typing import Any, NoReturn

import numpy as np

from headrace.errors import GGUFError
from headrace.gguf.types import QuantType

DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_KEY_BYTES = 65535
MAX_TENSOR_NAME_BYTES = 64
# Far above any real model; they keep the objects made for a huge hostile file few.
MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
MAX_STRINGS = 1 << 22

_MIN_KEY_RECORD = 8 + 4 + 1  # key length, value type, one-byte value
_MIN_TENSOR_RECORD = 8 + 4 + 8 + 4 + 8  # name length, dimensions, one dimension, type, offset


class ValueType(IntEnum):
    """Types of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALAR_FORMATS: dict[ValueType, str] = {
    ValueType.UINT8: "<B",
    ValueType.INT8: "<b",
    ValueType.UINT16: "<H",
    ValueType.INT16: "<h",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<B",
    ValueType.UINT64: "<Q",
    ValueType.INT64: "<q",
    ValueType.FLOAT64: "<d",
}
"""``struct`` format, which is also the NumPy dtype, of each fixed-size value."""

# Types that exist in GGML but not here, so that the error can call them by name.
_OTHER_GGML_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. ``shape`` is in NumPy order, ``offset`` counts from the file's start."""

    name: str
    qtype: QuantType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """All of a GGUF file but the weights. ``offsets`` says where each key's value lies."""

    version: int
    alignment: int
    metadata: Mapping[str, Any]
    offsets: Mapping[str, int]
    tensors: tuple[TensorInfo, ...]


def read_header(buffer: mmap, path: str) -> Header:
    """Parse and check the structure of a whole file. Raises GGUFError; ``path`` is for its text."""
    return _HeaderParser(buffer, path).parse()


class _HeaderParser:
    """A position in the file, and what is being read there (for the error)."""

    def __init__(self, buffer: mmap, path: str) -> None:
        self.buffer = buffer
        self.path = path
        self.end = len(buffer)
        self.position = 0
        self.subject = "header"

    def parse(self) -> Header:
        version = self._magic_and_version()
        n_tensors = self._count("tensor count", _MIN_TENSOR_RECORD, MAX_TENSORS)
        n_keys = self._count("key count", _MIN_KEY_RECORD, MAX_KEYS)
        metadata: dict[str, Any] = {}
        offsets: dict[str, int] = {}
        alignment = DEFAULT_ALIGNMENT
        for index in range(n_keys):
            self.subject = f"key {index} of {n_keys}"
            key = self._string(MAX_KEY_BYTES)
            self.subject = f"key {key!r}"
            if key in metadata:
                self._fail("appears twice")
            value_type = self._value_type()
            offsets[key] = self.position
            metadata[key] = self._value(value_type)
            if key == "general.alignment":
                alignment = self._alignment(value_type, metadata[key], offsets[key])
        tensors = self._tensors(n_tensors, alignment)
        return Header(version, alignment, metadata, offsets, tensors)

    def _magic_and_version(self) -> int:
        magic = self._take(4)
        if magic != b"GGUF":
            self._fail(f"not a GGUF file: it starts with {magic!r}", 0)
        version = self._scalar("<I")
        if version & 0xFFFF == 0:
            self._fail("big-endian files are not supported; convert it to little-endian", 4)
        if version not in (2, 3):
            self._fail(f"version {version} is not supported (only 2 and 3); convert it again", 4)
        return int(version)

    # --- metadata values

    def _value_type(self) -> ValueType:
        code = self._scalar("<I")
        try:
            return ValueType(code)
        except ValueError:
            self._fail(f"unknown value type {code}", self.position - 4)

    def _value(self, value_type: ValueType) -> Any:
        if value_type is ValueType.STRING:
            return self._string(self.end)
        if value_type is ValueType.ARRAY:
            return self._array()
        value = self._scalar(SCALAR_FORMATS[value_type])
        if value_type is ValueType.BOOL:
            if value > 1:
                self._fail(f"a boolean of value {value}", self.position - 1)
            return bool(value)
        return value

    def _array(self) -> Any:
        element = self._value_type()
        if element is ValueType.ARRAY:
            self._fail("nested arrays are not supported", self.position - 4)
        if element is ValueType.STRING:
            return self._strings(self._count("array length", 8, MAX_STRINGS))
        dtype = np.dtype(SCALAR_FORMATS[element])
        length = self._count("array length", dtype.itemsize)
        values = np.frombuffer(self.buffer, dtype, length, self.position).copy()
        if element is ValueType.BOOL:
            if length and values.max() > 1:
                self._fail(f"a boolean of value {values.max()} in an array")
            values = values.view(np.bool_)
        self.position += length * dtype.itemsize
        values.flags.writeable = False
        return values

    def _strings(self, count: int) -> list[str]:
        # The hot loop of opening a file: a vocabulary and its merges are 400,000 strings.
        buffer, position, end = self.buffer, self.position, self.end
        length_at = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        append = strings.append
        try:
            for _ in range(count):
                start = position + 8
                position = start + length_at(buffer, position)[0]
                if position > end:
                    self._fail(
                        f"string {len(strings)} of {count} runs past the end of the file "
                        f"({position - start} bytes, {end - start} left)",
                        start - 8,
                    )
                append(buffer[start:position].decode())
        except struct.error:
            self._fail(f"the file ends within string {len(strings)} of {count}", position)
        except UnicodeDecodeError as error:
            self._fail(f"string {len(strings)} is not UTF-8 ({error.reason})", start + error.start)
        self.position = position
        return strings

    def _alignment(self, value_type: ValueType, value: Any, offset: int) -> int:
        if value_type is not ValueType.UINT32:
            self._fail(f"must be uint32, not {value_type.name.lower()}", offset)
        if value < 8 or value & (value - 1):
            self._fail(f"alignment {value} is not a power of two of at least 8", offset)
        return int(value)

    # --- tensors

    def _tensors(self, count: int, alignment: int) -> tuple[TensorInfo, ...]:
        records: list[tuple[TensorInfo, int]] = []
        names: set[str] = set()
        for index in range(count):
            self.subject = f"tensor {index} of {count}"
            start = self.position
            info = self._tensor_record(alignment)
            if info.name in names:
                self._fail("appears twice", start)
            names.add(info.name)
            records.append((info, start))
        data_start = -(-self.position // alignment) * alignment
        placed = []
        previous_end, previous_name = 0, ""
        for info, start in sorted(records, key=lambda record: record[0].offset):
            self.subject = f"tensor {info.name!r}"
            if info.offset < previous_end:
                self._fail(f"its data at {info.offset} overlaps tensor {previous_name!r}", start)
            previous_end, previous_name = info.offset + info.n_bytes, info.name
            if data_start + previous_end > self.end:
                self._fail(
                    f"its data (bytes {data_start + info.offset} to {data_start + previous_end}) "
                    f"runs past the end of the file ({self.end} bytes); fetch it again",
                    start,
                )
            placed.append((start, info))
        return tuple(
            TensorInfo(t.name, t.qtype, t.shape, data_start + t.offset, t.n_bytes)
            for _, t in sorted(placed, key=lambda record: record[0])
        )

    def _tensor_record(self, alignment: int) -> TensorInfo:
        """One entry of the table; its ``offset`` still counts from the start of the data."""
        name = self._string(MAX_TENSOR_NAME_BYTES)
        self.subject = f"tensor {name!r}"
        n_dims = self._scalar("<I")
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            self._fail(f"{n_dims} dimensions (1 to {MAX_DIMENSIONS} allowed)", self.position - 4)
        at = self.position
        shape = tuple(self._scalar("<Q") for _ in range(n_dims))[::-1]
        if 0 in shape:
            self._fail(f"a zero dimension in {list(shape)}", at)
        n_weights = math.prod(shape)
        if n_weights >= 1 << 63:
            self._fail(f"{list(shape)} is {n_weights} weights, past 2^63", at)
        code = self._scalar("<I")
        if code not in QuantType.__members__.values():
            known = ", ".join(qtype.name for qtype in QuantType)
            kind = f"{_OTHER_GGML_TYPES.get(code, 'unknown type')} ({code})"
            self._fail(f"type {kind} is not supported; use one of {known}", self.position - 4)
        qtype = QuantType(code)
        if shape[-1] % qtype.block_size:
            self._fail(
                f"rows of {shape[-1]} are not a multiple of {qtype.name}'s block of "
                f"{qtype.block_size}",
                at,
            )
        offset = self._scalar("<Q")
        if offset % alignment:
            self._fail(f"offset {offset} is not aligned to {alignment}", self.position - 8)
        return TensorInfo(name, qtype, shape, offset, qtype.row_bytes(n_weights))

    # --- bytes

    def _take(self, size: int) -> bytes:
        if size > self.end - self.position:
            self._fail(f"the file ends here: {size} bytes wanted, {self.end - self.position} left")
        self.position += size
        return self.buffer[self.position - size : self.position]

    def _scalar(self, format: str) -> Any:
        return struct.unpack(format, self._take(struct.calcsize(format)))[0]

    def _count(self, what: str, record_bytes: int, limit: int = 1 << 64) -> int:
        """A count of records of at least ``record_bytes``, which the file must have room for."""
        count = int(self._scalar("<Q"))
        left = self.end - self.position
        if count > limit:
            self._fail(f"{what} {count} is above the limit of {limit}", self.position - 8)
        if count * record_bytes > left:
            self._fail(f"{what} {count} does not fit the {left} bytes left", self.position - 8)
        return count

    def _string(self, limit: int) -> str:
        length = self._scalar("<Q")
        if length > limit:
            self._fail(f"a string of {length} bytes (at most {limit})", self.position - 8)
        start = self.position
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            self._fail(f"not UTF-8 ({error.reason})", start + error.start)

    def _fail(self, message: str, offset: int | None = None) -> NoReturn:
        at = self.position if offset is None else offset
        raise GGUFError(f"{self.path}: {self.subject} at offset {at}: {message}") from None
