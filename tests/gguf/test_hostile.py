"""Hostile files end in GGUFError naming the place; time and memory are bounded by their size."""

from __future__ import annotations

import contextlib
import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from forge import (
    ARRAY,
    BOOL,
    DATA,
    FLOAT32,
    INT32,
    KEYS,
    STRING,
    TENSORS,
    UINT8,
    UINT32,
    Forged,
    array,
    key,
    string,
    tensor,
)

from headrace.errors import GGUFError
from headrace.gguf import check_finite, open_gguf

KEY_AT = len(Forged(tensors=()).header())
"""Where a key added to the valid file lies."""
HUGE = (2**31, 2**62, 2**63, 2**64 - 1)


def with_key(bad: bytes) -> bytes:
    return Forged(keys=(*KEYS, bad)).bytes()


def with_tensor(bad: bytes) -> bytes:
    return Forged(tensors=(*TENSORS, bad)).bytes()


def aligned(payload: bytes, value_type: int = UINT32) -> bytes:
    return Forged(keys=(KEYS[0], key("general.alignment", value_type, payload))).bytes()


CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "offset 0: the file is empty"),
    "wrong magic": (Forged(magic=b"GGML").bytes(), "offset 0: not a GGUF file"),
    "version 1": (Forged(version=struct.pack("<I", 1)).bytes(), "offset 4: version 1 is not"),
    "version 4": (Forged(version=struct.pack("<I", 4)).bytes(), "offset 4: version 4 is not"),
    "big-endian": (Forged(version=struct.pack(">I", 3)).bytes(), "offset 4: big-endian"),
    "nested array": (
        with_key(array("nest", ARRAY, 1, struct.pack("<IQ", UINT8, 0))),
        f"key 'nest' at offset {KEY_AT + 16}: nested arrays",
    ),
    "array element type": (with_key(array("odd", 13, 1, b"\0")), "'odd' .*unknown value type 13"),
    "value type": (with_key(key("odd", 99, b"\0")), "key 'odd' .*unknown value type 99"),
    "boolean of 2": (with_key(key("odd", BOOL, b"\2")), "key 'odd' .*a boolean of value 2"),
    "boolean of 2 in an array": (with_key(array("odd", BOOL, 2, b"\0\2")), "a boolean of value 2"),
    "zero dimensions": (with_tensor(tensor("t", (), 0, 0)), "tensor 't' .*0 dimensions"),
    "five dimensions": (with_tensor(tensor("t", (1,) * 5, 0, 0)), "tensor 't' .*5 dimensions"),
    "a zero dimension": (with_tensor(tensor("t", (4, 0), 0, 0)), "tensor 't' .*zero dimension"),
    "dimensions that wrap 2^64": (
        with_tensor(tensor("t", (2**32, 2**32), 0, 0)),
        "tensor 't' .*past 2\\^63",
    ),
    "dimensions that wrap to the right size": (
        with_tensor(tensor("t", (2**62 + 2, 4), 0, 0)),
        "tensor 't' .*past 2\\^63",
    ),
    "rows not whole blocks": (with_tensor(tensor("t", (250, 2), 12, 0)), "'t' .*block of 256"),
    "whole blocks only in all": (with_tensor(tensor("t", (16, 2), 8, 0)), "'t' .*block of 32"),
    "unaligned offset": (with_tensor(tensor("t", (1,), 0, 391)), "offset 391 is not aligned to 32"),
    "overlapping": (with_tensor(tensor("t", (4,), 0, 288)), "'t' .*overlaps tensor 'w4'"),
    "same place": (with_tensor(tensor("t", (8,), 0, 0)), "overlaps tensor"),
    "past the end": (with_tensor(tensor("t", (200,), 0, 416)), "'t' .*past the end of the file"),
    "starts past the end": (with_tensor(tensor("t", (1,), 0, 2**40)), "'t' .*past the end"),
    "offset near 2^64": (with_tensor(tensor("t", (8,), 0, 2**64 - 32)), "'t' .*past the end"),
    "data cut off": (Forged(data=DATA[:380]).bytes(), "'w8' .*past the end of the file"),
    "no data": (Forged(data=b"").bytes(), "tensor .*past the end of the file"),
    "alignment 0": (aligned(struct.pack("<I", 0)), "'general.alignment' at offset .*alignment 0"),
    "alignment 3": (aligned(struct.pack("<I", 3)), "'general.alignment' at offset .*alignment 3"),
    "alignment 24": (
        aligned(struct.pack("<I", 24)),
        "'general.alignment' at offset .*alignment 24",
    ),
    "alignment of int32": (aligned(struct.pack("<i", 32), INT32), "must be uint32, not int32"),
    "alignment of string": (aligned(string("32"), STRING), "must be uint32, not string"),
    "alignment of float": (aligned(struct.pack("<f", 32), FLOAT32), "must be uint32, not float32"),
    "alignment of 2^31": (aligned(struct.pack("<I", 2**31)), "'w4' .*not aligned to 2147483648"),
    "duplicate key": (with_key(KEYS[2]), "'llama.block_count' at offset .*appears twice"),
    "duplicate tensor": (with_tensor(tensor("w4", (1,), 0, 416)), "'w4' at offset .*appears twice"),
    "unknown tensor type": (with_tensor(tensor("t", (1,), 77, 0)), r"'t' .*unknown type \(77\)"),
    "unsupported tensor type": (with_tensor(tensor("t", (32,), 20, 0)), r"'t' .*IQ4_NL \(20\)"),
    "removed tensor type": (with_tensor(tensor("t", (32,), 4, 0)), r"'t' .*unknown type \(4\)"),
    "tensor type 2^32-1": (with_tensor(tensor("t", (1,), 2**32 - 1, 0)), "'t' .*unknown type"),
    "key not UTF-8": (
        with_key(key(b"a\xff", BOOL, b"\0")),
        f"key 8 of 9 at offset {KEY_AT + 9}: not",
    ),
    "string not UTF-8": (
        with_key(key("s", STRING, string(b"ab\xc3"))),
        "'s' at offset .*not UTF-8",
    ),
    "array string not UTF-8": (
        with_key(array("words", STRING, 2, string("ok") + string(b"\xed\xa0\x80"))),
        f"'words' at offset {KEY_AT + 47}: string 1 is not UTF-8",
    ),
    "tensor name not UTF-8": (with_tensor(tensor(b"\xff", (1,), 0, 416)), "tensor 3 .*not UTF-8"),
    "tensor name too long": (with_tensor(tensor("t" * 65, (1,), 0, 416)), "string of 65 bytes"),
    "key too long": (with_key(key("k" * 65536, BOOL, b"\0")), "string of 65536 bytes"),
    "too many tensors": (
        Forged(n_tensors=65537, data=bytes(65537 * 40)).bytes(),
        "tensor count 65537 is above the limit",
    ),
    **{f"{n} keys": (Forged(n_keys=n).bytes(), f"offset 16: key count {n} ") for n in HUGE},
    **{f"{n} tensors": (Forged(n_tensors=n).bytes(), f"8: tensor count {n} ") for n in HUGE},
    **{
        f"key of {n} bytes": (with_key(struct.pack("<Q", n) + b"k"), f"a string of {n} bytes")
        for n in HUGE
    },
    **{
        f"string of {n} bytes": (with_key(key("s", STRING, struct.pack("<Q", n))), f"'s' .*{n}")
        for n in HUGE
    },
    **{
        f"array of {n} {name}": (with_key(array("big", element, n, b"")), f"'big' .*length {n} ")
        for n in HUGE
        for name, element in (("bytes", UINT8), ("floats", FLOAT32), ("strings", STRING))
    },
    **{
        f"array string of {n} bytes": (
            with_key(array("words", STRING, 2, string("ok") + struct.pack("<Q", n))),
            "'words' at offset .*string 1 of 2 runs past the end",
        )
        for n in HUGE
    },
    **{
        f"dimension of {n}": (with_tensor(tensor("t", (n, 1), 0, 416)), "'t' at offset")
        for n in HUGE
    },
    **{f"offset of {n}": (with_tensor(tensor("t", (1,), 0, n)), "'t' at offset") for n in HUGE},
}


@pytest.mark.parametrize("name", CASES)
def test_named_error(tmp_path: Path, name: str) -> None:
    content, message = CASES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=message) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(str(path))
    assert "offset" in str(caught.value)


def test_the_forged_file_is_otherwise_valid(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(Forged().bytes())
    for one in open_gguf(path).tensors.values():
        check_finite(one)


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    whole = Forged().bytes()
    path = tmp_path / "cut.gguf"
    needed = len(whole) - len(DATA) + 388
    for size in range(needed):
        path.write_bytes(whole[:size])
        with pytest.raises(GGUFError, match="offset"):
            open_gguf(path)
    path.write_bytes(whole[:needed])
    open_gguf(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(GGUFError, match=r"thing\.gguf: (not a regular file|cannot be opened)"):
        open_gguf(path)


def test_time_and_memory_of_lies(tmp_path: Path) -> None:
    """No small file, whatever it declares, costs more than a few milliseconds or 256 KB."""
    path = tmp_path / "bad.gguf"
    for name, (content, _) in CASES.items():
        if len(content) > 10_000:
            continue
        path.write_bytes(content)
        cpu, memory = cost_of_opening(path)
        assert cpu < 0.05, name
        assert memory < 256 << 10, name


LARGE: dict[str, bytes] = {
    "empty strings": Forged(keys=(array("s", STRING, 400_000, bytes(8 * 400_000)),)).bytes(),
    "short strings": Forged(
        keys=(array("s", STRING, 300_000, b"".join(string(f"{i:03}"[:3]) for i in range(300_000))),)
    ).bytes(),
    "cut in the last string": Forged(
        keys=(array("s", STRING, 300_001, bytes(8 * 300_000)),), tensors=(), data=b"", alignment=1
    ).bytes(),
    "many keys": Forged(
        keys=tuple(key(f"{i:05}", BOOL, b"\1") for i in range(60_000))
    ).bytes(),
    "many tensors": Forged(
        tensors=tuple(tensor(f"{i:05}", (8,), 0, 32 * i) for i in range(30_000)),
        data=bytes(30_000 * 32),
    ).bytes(),
    "many tensors in one place": Forged(
        tensors=tuple(tensor(f"{i:05}", (8,), 0, 0) for i in range(30_000))
    ).bytes(),
    "one string": Forged(keys=(key("s", STRING, string(b"x" * 4_000_000)),)).bytes(),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_time_and_memory_in_proportion(tmp_path: Path, name: str) -> None:
    """Large files made of the smallest parts: bounded by a constant times their size."""
    path = tmp_path / "large.gguf"
    path.write_bytes(LARGE[name])
    cpu, memory = cost_of_opening(path)
    megabytes = path.stat().st_size / 1e6
    assert cpu < 0.1 + 0.6 * megabytes
    assert memory < 24 * path.stat().st_size


def cost_of_opening(path: Path) -> tuple[float, int]:
    """Processor seconds, and peak bytes allocated (measured apart: tracing is slow)."""
    start = time.process_time()
    try_to_open(path)
    cpu = time.process_time() - start
    tracemalloc.start()
    try_to_open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return cpu, peak


def try_to_open(path: Path) -> None:
    with contextlib.suppress(GGUFError):
        open_gguf(path).close()
