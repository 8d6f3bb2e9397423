"""Synthetic models: real shapes and mixtures, weights that behave, the same seed the same file."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gguf import GGUFReader
from headrace.errors import ModelError
from headrace.gguf import QuantType, check_finite, dequantize, open_gguf
from headrace.gguf.quants import BLOCK_DTYPES, k_scales_mins
from headrace.gguf.random_blocks import pack_k_scales_mins, random_weights
from headrace.gguf.recipes import RECIPES, tensor_type
from headrace.synth import SHAPES, Shape, synthetic_tensors, write_synthetic

TINY = [name for name in SHAPES if name.endswith("-tiny")]


@pytest.mark.parametrize("qtype", QuantType, ids=lambda q: q.name)
def test_random_weights_have_the_wanted_spread(qtype: QuantType) -> None:
    rng = np.random.default_rng(1)
    n = 1 << 20
    packed = np.concatenate([*random_weights(rng, qtype, n, 0.02)])
    weights = dequantize(packed.reshape(-1, qtype.row_bytes(4096)), qtype)
    assert np.isfinite(weights).all()
    assert weights.std() == pytest.approx(0.02, rel=0.03)
    assert abs(weights.mean()) < 0.02 * 0.05
    assert len(np.unique(weights, axis=0)) == len(weights)
    if qtype in BLOCK_DTYPES:
        blocks = packed.view(BLOCK_DTYPES[qtype])
        for name in {"d", "m", "dmin", "scales"} & set(blocks.dtype.names):
            assert len(np.unique(blocks[name], axis=0)) > 50, name


def test_scales_and_mins_pack_to_what_unpacks() -> None:
    rng = np.random.default_rng(2)
    scales, mins = rng.integers(0, 64, (2, 100, 8))
    got = k_scales_mins(pack_k_scales_mins(scales, mins))
    np.testing.assert_array_equal(got, (scales, mins))


@pytest.mark.parametrize(
    ("shape", "gigabytes", "types"),
    [
        # Tensors by type as llama.cpp prints them for the published files.
        ("llama-1b", 0.80, {"F32": 34, "Q4_K": 96, "Q6_K": 17}),
        ("llama-8b", 4.92, {"F32": 66, "Q4_K": 193, "Q6_K": 33}),
    ],
)
def test_published_q4_k_m_mixtures(shape: str, gigabytes: float, types: dict[str, int]) -> None:
    tensors = synthetic_tensors(SHAPES[shape], RECIPES["Q4_K_M"], seed=0)
    assert Counter(t.qtype.name for t in tensors) == types
    assert sum(t.n_bytes for t in tensors) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_which_layers_have_more_bits() -> None:
    """The first and last eighth, and every third between, for both roles."""
    tensors = {t.name: t for t in synthetic_tensors(SHAPES["llama-1b"], RECIPES["Q4_K_M"], seed=0)}
    for role in ("attn_v", "ffn_down"):
        types = [tensors[f"blk.{layer}.{role}.weight"].qtype for layer in range(16)]
        more = [layer for layer, qtype in enumerate(types) if qtype is QuantType.Q6_K]
        assert more == [0, 1, 4, 7, 10, 13, 14, 15]


@pytest.mark.real_model
def test_the_recipe_of_a_real_file(gemma3_path: Path) -> None:
    """K of 640 forces the fall-backs too."""
    for tensor in open_gguf(gemma3_path).tensors.values():
        want = tensor_type(
            RECIPES["Q4_K_M"], tensor.name, tensor.shape, n_layers=18, n_gqa=4, tied=True
        )
        assert tensor.qtype is want, tensor.name


@pytest.mark.parametrize(
    ("recipe", "types"),
    [
        ("Q2_K", {"attn_v": "Q3_K", "ffn_down": "Q3_K", "attn_output": "Q3_K", "ffn_up": "Q2_K"}),
        ("Q3_K_M", {"attn_v": "Q5_K", "ffn_down": "Q4_K", "attn_output": "Q4_K", "ffn_up": "Q3_K"}),
        ("Q5_K_M", {"attn_v": "Q5_K", "ffn_down": "Q5_K", "attn_output": "Q5_K", "ffn_up": "Q5_K"}),
        ("Q8_0", {"attn_v": "Q8_0", "ffn_down": "Q8_0", "attn_output": "Q8_0", "ffn_up": "Q8_0"}),
        ("F16", {"attn_v": "F16", "ffn_down": "F16", "attn_output": "F16", "ffn_up": "F16"}),
    ],
)
def test_mixtures_of_a_layer(recipe: str, types: dict[str, str]) -> None:
    tensors = {t.name: t for t in synthetic_tensors(SHAPES["llama-tiny"], RECIPES[recipe], 0)}
    got = {role: tensors[f"blk.0.{role}.weight"].qtype.name for role in types}
    assert got == types


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_writes_a_usable_file(tmp_path: Path, recipe: str) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic(path, "llama-tiny", recipe)
    with open_gguf(path) as file:
        assert file.metadata["general.file_type"] == RECIPES[recipe].file_type
        for tensor in file.tensors.values():
            check_finite(tensor)
        base = RECIPES[recipe].base
        assert any(t.qtype is base for t in file.tensors.values())


@pytest.mark.parametrize("shape", TINY)
def test_every_family_writes_a_complete_file(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic(path, shape, "Q4_K_M")
    reader = GGUFReader(path)
    names = {t.name for t in reader.tensors}
    with open_gguf(path) as file:
        architecture = file.require("general.architecture", str)
        tokens = file.require("tokenizer.ggml.tokens", list)
        merges = file.require("tokenizer.ggml.merges", list)
        assert architecture == SHAPES[shape].architecture
        assert len(tokens) == len(set(tokens)) == SHAPES[shape].n_vocab
        known = set(tokens)
        for merge in merges:
            left, right = merge.split(" ")
            assert {left, right, left + right} <= known
        for role in ("bos", "eos", "padding"):
            assert tokens[file.require(f"tokenizer.ggml.{role}_token_id", int)].startswith("<|")
    extra = {
        "llama": {"rope_freqs.weight", "output.weight"},
        "qwen2": {"blk.0.attn_q.bias", "blk.2.attn_v.bias"},
        "qwen3": {"blk.0.attn_q_norm.weight"},
        "gemma3": {"blk.6.post_ffw_norm.weight", "blk.0.attn_k_norm.weight"},
    }
    assert extra[architecture] <= names


def test_the_same_seed_writes_the_same_file(tmp_path: Path) -> None:
    contents = []
    for index, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{index}.gguf"
        write_synthetic(path, "qwen3-tiny", "Q4_K_M", seed=seed)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_weights_are_made_in_chunks(tmp_path: Path) -> None:
    """Peak memory is a few chunks, whatever the size of the file (here 76 MB)."""
    path = tmp_path / "model.gguf"
    shape = Shape("llama", 1, 2048, 8192, 4, 4, 64, 512, 2048, 1e4)
    tracemalloc.start()
    write_synthetic(path, shape, "Q8_0")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 50e6
    assert peak < 25e6


def test_llama3_factors_stretch_only_the_long_waves(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic(path, "llama-tiny", "F32")
    factors = open_gguf(path).tensors["rope_freqs.weight"].data.view(np.float32)[0]
    assert factors[0] == 1
    assert factors[-1] == 8
    assert (np.diff(factors) >= 0).all()
    waves = 2 * math.pi * 5e5 ** (np.arange(32) / 32)
    np.testing.assert_array_equal(factors == 1, waves <= 8192 / 4)


@pytest.mark.parametrize(
    ("shape", "recipe", "message"),
    [
        ("gpt-5", "Q4_K_M", "unknown shape 'gpt-5': use one of llama-1b"),
        ("llama-tiny", "Q4_K_XL", "unknown recipe 'Q4_K_XL': use one of F32"),
        (Shape("rwkv", 1, 256, 256, 4, 4, 64, 512, 64, 1e4), "F32", "unknown architecture 'rwkv'"),
        (Shape("llama", 1, 256, 256, 4, 4, 64, 200, 64, 1e4), "F32", "not 200"),
    ],
)
def test_unknown_names(tmp_path: Path, shape: str | Shape, recipe: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        write_synthetic(tmp_path / "model.gguf", shape, recipe)
