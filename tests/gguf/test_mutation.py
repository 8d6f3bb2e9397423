"""Any change to a valid file ends in GGUFError or in a file that can be used throughout."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from forge import Forged
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import GGUFError
from headrace.gguf import check_finite, dequantize, open_gguf
from headrace.synth import Shape, write_synthetic

FORGED = Forged().bytes()
HEADER = len(Forged().header())
EXTREMES = (0, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutation") / "mutant.gguf"


@pytest.fixture(scope="module")
def model(path: Path) -> bytes:
    """A whole small model, tokeniser included."""
    shape = Shape("qwen2", 1, 256, 256, 4, 2, 64, 272, 64, 1e4)
    write_synthetic(path, shape, "Q4_K_M")
    return path.read_bytes()


def use(path: Path, content: bytes) -> None:
    """Open, and touch everything: only GGUFError may come of it."""
    path.write_bytes(content)
    try:
        file = open_gguf(path)
    except GGUFError:
        return
    assert file.n_bytes == len(content)
    for tensor in file.tensors.values():
        assert 0 < tensor.n_bytes <= len(content)
        with contextlib.suppress(GGUFError):
            check_finite(tensor)
        with np.errstate(all="ignore"):
            weights = dequantize(tensor.data, tensor.qtype)
        assert weights.size == np.prod(tensor.shape)


@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize("format", ["<I", "<Q"])
def test_every_field_replaced_by_an_extreme(path: Path, format: str, value: int) -> None:
    field = struct.pack(format, value & (2 ** (8 * struct.calcsize(format)) - 1))
    for position in range(HEADER - len(field)):
        use(path, FORGED[:position] + field + FORGED[position + len(field) :])


def test_every_header_byte_flipped(path: Path) -> None:
    for position in range(HEADER):
        for flip in (0x01, 0x80, 0xFF):
            mutant = bytearray(FORGED)
            mutant[position] ^= flip
            use(path, bytes(mutant))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_model(path: Path, model: bytes, data: st.DataObject) -> None:
    """Several bytes and fields changed, pieces cut out, repeated or the end cut off."""
    mutant = bytearray(model)
    header_end = 8192
    position = st.integers(0, header_end) | st.integers(0, len(model) - 9)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(position)
        match data.draw(st.sampled_from(["byte", "field", "cut", "repeat", "truncate"])):
            case "byte":
                mutant[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "field":
                mutant[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from(EXTREMES)))
            case "cut":
                del mutant[at : at + data.draw(st.integers(1, 64))]
            case "repeat":
                mutant[at:at] = mutant[at : at + data.draw(st.integers(1, 64))]
            case "truncate":
                del mutant[at:]
    use(path, bytes(mutant))


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(max_size=200))
def test_noise_after_a_valid_start(path: Path, noise: bytes) -> None:
    use(path, FORGED[:24] + noise)
