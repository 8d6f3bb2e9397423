"""What is written is read back, by this reader and by the ``gguf`` package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf import GGUFReader
from headrace.errors import GGUFError
from headrace.gguf import QuantType, open_gguf
from headrace.gguf.writer import TensorSource, write_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "int": 7,
    "negative": -7,
    "large": 2**40,
    "large.negative": -(2**40),
    "float": 0.5,
    "double": np.float64(0.1),
    "small": np.uint8(3),
    "yes": True,
    "no": np.bool_(False),
    "words": ["a", "né", "", "日本"],
    "none": [],
    "bytes": np.arange(5, dtype=np.uint8),
    "longs": np.array([-1, 2**62]),
    "flags": np.array([True, False]),
}


def sources() -> list[TensorSource]:
    floats = np.arange(15, dtype=np.float32)
    q8 = np.arange(2 * 3 * 34, dtype=np.uint8).reshape(6, 34)
    halves = np.arange(6, dtype=np.float16).reshape(2, 3)
    return [
        TensorSource("vector", QuantType.F32, (15,), [floats[:7], floats[7:]]),
        TensorSource("cube", QuantType.Q8_0, (2, 3, 32), (row.tobytes() for row in q8)),
        TensorSource("strided", QuantType.F16, (3, 2), [halves.T]),
    ]


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_round_trip(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "out.gguf"
    seen: list[tuple[int, int]] = []
    write_gguf(path, METADATA, sources(), alignment=alignment, progress=lambda *p: seen.append(p))
    with open_gguf(path) as file:
        for key, value in METADATA.items():
            got = file.metadata[key]
            if isinstance(value, np.ndarray):
                assert got.dtype == value.dtype
                assert got.tolist() == value.tolist()
            else:
                assert got == value
                assert type(got) is (type(value.item()) if hasattr(value, "item") else type(value))
        tensors = file.tensors
        assert tensors["vector"].data.view(np.float32).tolist() == [list(range(15))]
        assert tensors["cube"].data.ravel().tolist() == list(range(204))
        assert tensors["cube"].shape == (2, 3, 32)
        assert tensors["strided"].data.view(np.float16).tolist() == [[0, 3], [1, 4], [2, 5]]
        assert file.alignment == alignment
    assert [path] == list(tmp_path.iterdir())
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {path.stat().st_size}


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    write_gguf(path, METADATA, sources())
    reader = GGUFReader(path)
    for key, value in METADATA.items():
        want = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        assert reader.fields[key].contents() == want, key
    ours = open_gguf(path).tensors
    for tensor in reader.tensors:
        assert tensor.data.tobytes() == ours[tensor.name].data.tobytes()
        assert tuple(reversed(tensor.shape.tolist())) == ours[tensor.name].shape


@pytest.mark.parametrize(
    "value", [None, 2**64, -(2**63) - 1, [1, 2], np.array([1j]), np.array(["a"]), {"a": 1}, b"x"]
)
def test_values_that_cannot_be_stored(tmp_path: Path, value: object) -> None:
    with pytest.raises(GGUFError, match=r"key 'bad': .* cannot be stored"):
        write_gguf(tmp_path / "out.gguf", {"bad": value}, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 15, 17])
def test_wrong_size_of_data_leaves_no_file(tmp_path: Path, size: int) -> None:
    bad = TensorSource("t", QuantType.F32, (4,), [bytes(size)])
    with pytest.raises(GGUFError, match=f"'t': {size} bytes given, 16 expected"):
        write_gguf(tmp_path / "out.gguf", {}, [bad])
    assert not list(tmp_path.iterdir())


def test_rows_must_be_whole_blocks(tmp_path: Path) -> None:
    bad = TensorSource("t", QuantType.Q4_K, (1, 250), [])
    with pytest.raises(GGUFError, match=r"'t': rows of 250 .* block of 256"):
        write_gguf(tmp_path / "out.gguf", {}, [bad])


def test_failing_source_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    write_gguf(path, METADATA, [])
    before = path.read_bytes()

    def chunks() -> Iterator[bytes]:
        yield bytes(8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, {}, [TensorSource("t", QuantType.F32, (4,), chunks())])
    assert path.read_bytes() == before
    assert [path] == list(tmp_path.iterdir())


def test_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="cannot be written: No such file or directory"):
        write_gguf(tmp_path / "no" / "out.gguf", {}, [])
