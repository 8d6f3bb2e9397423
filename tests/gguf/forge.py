"""Bytes of GGUF files, right or wrong in exactly one place."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = range(11)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, value_type: int, payload: bytes) -> bytes:
    return string(name) + struct.pack("<I", value_type) + payload


def array(name: str, element: int, count: int, payload: bytes) -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", element, count) + payload)


def tensor(
    name: str | bytes, dims: tuple[int, ...], qtype: int, offset: int, n_dims: int | None = None
) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    head = string(name) + struct.pack("<I", count) + struct.pack(f"<{len(dims)}Q", *dims)
    return head + struct.pack("<IQ", qtype, offset)


KEYS = (
    key("general.architecture", STRING, string("llama")),
    key("general.alignment", UINT32, struct.pack("<I", 32)),
    key("llama.block_count", UINT32, struct.pack("<I", 2)),
    key("llama.rope.freq_base", FLOAT32, struct.pack("<f", 10000.0)),
    key("flag", BOOL, b"\1"),
    array("tokens", STRING, 3, string("a") + string("né") + string("")),
    array("scores", FLOAT32, 3, struct.pack("<3f", 0, -1, -2)),
    array("flags", BOOL, 2, b"\0\1"),
)
TENSORS = (
    tensor("norm", (8,), 0, 0),
    tensor("w4", (256, 2), 12, 32),
    tensor("w8", (32, 1, 2), 8, 320),
)
DATA = np.random.default_rng(0).integers(0, 60, 400, dtype=np.uint8).tobytes()


@dataclass(frozen=True)
class Forged:
    """A file in parts; ``bytes()`` joins them. The defaults make a valid one."""

    keys: tuple[bytes, ...] = KEYS
    tensors: tuple[bytes, ...] = TENSORS
    data: bytes = DATA
    magic: bytes = b"GGUF"
    version: bytes = field(default=struct.pack("<I", 3))
    n_tensors: int | None = None
    n_keys: int | None = None
    alignment: int = 32

    def header(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        counts = struct.pack("<QQ", n_tensors, n_keys)
        return b"".join((self.magic, self.version, counts, *self.keys, *self.tensors))

    def bytes(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data
