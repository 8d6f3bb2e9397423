"""What a valid file opens to, how fast, and what the typed getters say."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import forge
import numpy as np
import pytest

from headrace.errors import GGUFError
from headrace.gguf import QuantType, check_finite, dequantize, open_gguf
from headrace.gguf.writer import TensorSource, write_gguf
from headrace.synth import synthetic_tokenizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "valid.gguf"
    path.write_bytes(forge.Forged().bytes())
    return path


def test_metadata_and_tensors(path: Path) -> None:
    with open_gguf(path) as file:
        assert (file.version, file.alignment, file.n_bytes) == (3, 32, path.stat().st_size)
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["flag"] is True
        assert file.metadata["tokens"] == ["a", "né", ""]
        assert file.metadata["scores"].tolist() == [0, -1, -2]
        assert file.metadata["flags"].dtype == np.bool_
        assert not file.metadata["scores"].flags.writeable
        shapes = {t.name: (t.qtype, t.shape, t.data.shape) for t in file.tensors.values()}
        assert shapes == {
            "norm": (QuantType.F32, (8,), (1, 32)),
            "w4": (QuantType.Q4_K, (2, 256), (2, 144)),
            "w8": (QuantType.Q8_0, (2, 1, 32), (2, 34)),
        }
        packed = b"".join(t.data.tobytes() for t in file.tensors.values())
        assert packed == forge.DATA[:388]
        assert not file.tensors["w4"].data.flags.writeable


def test_version_2_is_the_same_layout(path: Path) -> None:
    path.write_bytes(forge.Forged(version=struct.pack("<I", 2)).bytes())
    assert open_gguf(path).version == 2


def test_tensors_are_views_that_outlive_close(path: Path) -> None:
    file = open_gguf(path)
    tensor = file.tensors["w4"]
    file.close()
    file.close()
    assert tensor.data.tobytes() == forge.DATA[32:320]
    with pytest.raises(GGUFError, match="closed"):
        _ = file.tensors


def test_getters(path: Path) -> None:
    file = open_gguf(path)
    assert file.require("llama.block_count", int, minimum=1, maximum=2) == 2
    assert file.get("llama.rope.freq_base", float, 1.0) == 10000.0
    assert file.get("missing", int, None) is None
    assert file.require("tokens", list) == ["a", "né", ""]
    assert file.require("scores", np.ndarray).dtype == np.float32
    for key, kind, bounds, message in (
        ("missing", int, {}, "key 'missing' is missing"),
        ("general.architecture", int, {}, "offset 56: is str, expected int"),
        ("flag", int, {}, "is bool, expected int"),
        ("llama.block_count", float, {}, "is int, expected float"),
        ("llama.block_count", int, {"minimum": 3}, r"2 is out of range \(3 to inf\)"),
        ("llama.block_count", int, {"maximum": 1}, r"2 is out of range \(-inf to 1\)"),
    ):
        with pytest.raises(GGUFError, match=message):
            file.require(key, kind, **bounds)
    with pytest.raises(GGUFError, match="is bool"):
        file.get("flag", int, 7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_float_must_be_finite(path: Path, value: float) -> None:
    bad = forge.key("eps", forge.FLOAT32, struct.pack("<f", value))
    path.write_bytes(forge.Forged(keys=(*forge.KEYS, bad)).bytes())
    with pytest.raises(GGUFError, match=r"'eps' .* is not finite"):
        open_gguf(path).require("eps", float)


def test_truncated_while_mapped_is_an_error_not_a_crash(path: Path) -> None:
    file = open_gguf(path)
    file.check_unchanged()
    os.truncate(path, 100)
    for use in (file.check_unchanged, lambda: file.tensors):
        with pytest.raises(GGUFError, match="truncated from 848 to 100 bytes"):
            use()


def test_replacing_the_file_by_rename_is_safe(path: Path) -> None:
    file = open_gguf(path)
    other = path.with_name("new")
    other.write_bytes(b"GGUF")
    other.replace(path)
    assert file.tensors["w4"].data.tobytes() == forge.DATA[32:320]


def test_a_real_size_vocabulary_opens_in_half_a_second(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    tokenizer = synthetic_tokenizer(128_256, "llama-bpe")
    merges = tokenizer["tokenizer.ggml.merges"]
    tokenizer["tokenizer.ggml.merges"] = (merges * 3)[:280_000]
    write_gguf(path, tokenizer, [])
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        file = open_gguf(path)
        best = min(best, time.process_time() - start)
    assert len(file.require("tokenizer.ggml.merges", list)) == 280_000
    assert file.metadata["tokenizer.ggml.tokens"] == tokenizer["tokenizer.ggml.tokens"]
    assert best < 0.5


def test_check_finite_is_cheap(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    n = 32 << 20  # weights: 21 MB of the layout with the most scales per byte
    source = TensorSource("w", QuantType.Q4_1, (n // 1024, 1024), [np.ones(n // 32 * 20, np.uint8)])
    write_gguf(path, {}, [source])
    tensor = open_gguf(path).tensors["w"]
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        check_finite(tensor)
        best = min(best, time.process_time() - start)
    assert best < 0.1 * tensor.n_bytes / 100e6 * 2  # 0.1 s per 100 MB, twice over for slow machines


def test_import_is_light() -> None:
    code = "import sys, headrace.gguf; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.real_model
def test_a_real_file_agrees_with_the_gguf_package(smollm2_path: Path) -> None:
    from gguf.quants import dequantize as oracle

    from gguf import GGUFReader

    reader = GGUFReader(smollm2_path)
    file = open_gguf(smollm2_path)
    assert [t.name for t in reader.tensors] == list(file.tensors)
    for want in reader.tensors[:12]:
        got = file.tensors[want.name]
        check_finite(got)
        np.testing.assert_array_equal(
            dequantize(got.data, got.qtype).ravel(), oracle(want.data, want.tensor_type).ravel()
        )
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert file.metadata["tokenizer.ggml.tokens"] == tokens.contents()
