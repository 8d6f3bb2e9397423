"""Files that are not a complete, sane model of a known family end in a named error."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from tiny_families import CONFIGS, gguf_metadata, gguf_tensors, tiny_model

from headrace.errors import GGUFError, ModelError
from headrace.gguf.reader import open_gguf
from headrace.gguf.types import QuantType
from headrace.gguf.writer import TensorSource, write_gguf
from headrace.model import Decoder, load_decoder
from headrace.model.families import FAMILIES
from headrace.model.operations import (
    Attend,
    Embed,
    FeedForwardIn,
    FeedForwardOut,
    Head,
    Pairing,
    ProjectOut,
    ProjectQKV,
)

MODELS = {name: tiny_model(name) for name in CONFIGS if "-" not in name}


@pytest.fixture
def load(tmp_path):
    """Load a tiny model after changing keys (None deletes) and tensors (name -> source or None)."""

    def load(name="llama", keys=None, tensors=None) -> Decoder:
        metadata = gguf_metadata(MODELS[name].config)
        for key, value in (keys or {}).items():
            full = key if "." in key and key.split(".")[0] in ("general", "tokenizer") else None
            full = full or f"{metadata['general.architecture']}.{key}"
            metadata[full] = value
        sources = {source.name: source for source in gguf_tensors(MODELS[name])}
        sources |= tensors or {}
        path = tmp_path / "tiny.gguf"
        write_gguf(
            path,
            {key: value for key, value in metadata.items() if value is not None},
            [source for source in sources.values() if source is not None],
        )
        return load_decoder(open_gguf(path))

    return load


def f32(name: str, values: np.ndarray) -> TensorSource:
    return TensorSource(name, QuantType.F32, values.shape, [values.astype(np.float32)])


def test_operations_come_in_execution_order(load):
    decoder = load("gemma3")
    layer = [ProjectQKV, Attend, ProjectOut, FeedForwardIn, FeedForwardOut]
    assert [type(op) for op in decoder.operations] == [Embed, *layer * 7, Head]
    assert [op.layer for op in decoder.operations[1:-1]] == [i for i in range(7) for _ in range(5)]


def test_gemma3_alternates_local_and_global_layers(load):
    decoder = load("gemma3")
    windows = [op.window for op in decoder.operations if isinstance(op, Attend)]
    ropes = [op.rope for op in decoder.operations if isinstance(op, ProjectQKV)]
    assert windows == [5, 5, 5, 5, 5, None, 5]
    assert [rope.base for rope in ropes] == [1e4] * 5 + [1e6] + [1e4]
    assert load("gemma3", {"rope.freq_base_swa": 20000.0}).operations[1].rope.base == 20000


def test_families_pair_rotary_values_their_own_way(load):
    pairings = {name: load(name).operations[1].rope.pairing for name in ("llama", "qwen2", "qwen3")}
    assert pairings == {
        "llama": Pairing.INTERLEAVED,
        "qwen2": Pairing.HALF,
        "qwen3": Pairing.HALF,
    }


def test_the_head_is_tied_only_when_there_is_no_output_matrix(load):
    assert load("llama").operations[-1].out.weight == "output.weight"
    assert load("llama3").operations[-1].out.weight == "token_embd.weight"


def test_weights_are_exactly_those_the_operations_name(load):
    def names(value):
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from names(getattr(value, field.name))
        elif isinstance(value, str) and (".weight" in value or ".bias" in value):
            yield value

    for name in MODELS:
        decoder = load(name)
        named = {weight for op in decoder.operations for weight in names(op)}
        assert named == set(decoder.weights), name
        assert all(weight == tensor.name for weight, tensor in decoder.weights.items())
        n_bytes = sum(tensor.n_bytes for tensor in decoder.weights.values())
        assert n_bytes == sum(source.n_bytes for source in gguf_tensors(MODELS[name])), name


def test_descriptive_keys_and_old_tensors_are_ignored(load):
    load(keys={"tensor_data_layout": "Meta AI original pth", "expert_count": 0, "logit_scale": 1.0})
    load(tensors={"rope.freqs": f32("rope.freqs", np.ones(8))})


def test_another_architecture_is_named_with_those_that_run(load):
    with pytest.raises(ModelError) as error:
        load(keys={"general.architecture": "mamba"})
    assert "'mamba'" in str(error.value)
    assert all(name in str(error.value) for name in FAMILIES)


@pytest.mark.parametrize("value", [None, 7, True])
def test_an_architecture_is_needed(load, value):
    with pytest.raises(ModelError, match=r"general\.architecture"):
        load(keys={"general.architecture": value})


BAD_KEYS = [
    # missing
    ("llama", "block_count", None),
    ("llama", "context_length", None),
    ("llama", "embedding_length", None),
    ("llama", "feed_forward_length", None),
    ("llama", "attention.head_count", None),
    ("llama", "attention.layer_norm_rms_epsilon", None),
    ("gemma3", "attention.sliding_window", None),
    ("gemma3", "rope.freq_base", None),
    # of the wrong type
    ("llama", "block_count", "3"),
    ("llama", "block_count", 3.0),
    ("llama", "block_count", True),
    ("llama", "attention.head_count", np.array([4, 4, 4], np.uint32)),
    ("llama", "rope.freq_base", "10000"),
    ("llama", "rope.scaling.type", 1),
    # out of range
    ("llama", "block_count", 0),
    ("llama", "block_count", 1_000_000),
    ("llama", "block_count", 2**63),
    ("llama", "embedding_length", 2**40),
    ("llama", "attention.head_count", 0),
    ("llama", "attention.head_count", -4),
    ("llama", "attention.layer_norm_rms_epsilon", 0.0),
    ("llama", "attention.layer_norm_rms_epsilon", float("nan")),
    ("llama", "attention.layer_norm_rms_epsilon", float("inf")),
    ("llama", "attention.layer_norm_rms_epsilon", -1e-5),
    ("llama", "rope.freq_base", 0.0),
    ("llama", "rope.freq_base", float("nan")),
    ("llama", "rope.scaling.factor", 0.0),
    ("llama", "context_length", 0),
    ("llama", "context_length", 2**31),
    ("gemma3", "attention.sliding_window", 0),
    ("gemma3", "attention.sliding_window_pattern", 0),
    # that do not fit each other
    ("llama", "attention.head_count", 3),
    ("llama", "attention.head_count_kv", 3),
    ("llama", "attention.value_length", 32),
    ("llama", "rope.dimension_count", 15),
    ("llama", "rope.dimension_count", 18),
    # that change the mathematics in ways not supported
    ("llama", "rope.scaling.type", "yarn"),
    ("qwen2", "rope.scaling.type", "longrope"),
    ("llama", "expert_count", 8),
    ("llama", "logit_scale", 0.5),
    ("llama", "attention.scale", 0.1),
    ("llama", "attention.causal", False),
    ("llama", "rope.scaling.attn_factor", 1.2),
    ("llama", "some_new_key", 1),
    ("qwen3", "attention.sliding_window", 4096),
    ("gemma3", "final_logit_softcapping", 30.0),
    ("gemma2", "attn_logit_softcapping", 0.0),
    ("phi3", "rope.scaling.attn_factor", 1.19),
]


@pytest.mark.parametrize(("name", "key", "value"), BAD_KEYS)
def test_bad_hyperparameters_are_named(load, name, key, value):
    started = time.perf_counter()
    with pytest.raises(ModelError) as error:
        load(name, {key: value})
    assert key in str(error.value)
    assert time.perf_counter() - started < 2


def test_a_vocabulary_of_another_size_is_named(load):
    assert load(keys={"tokenizer.ggml.tokens": [f"t{i}" for i in range(70)]}).config.n_vocab == 70
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.tokens has 71"):
        load(keys={"tokenizer.ggml.tokens": [f"t{i}" for i in range(71)]})


@pytest.mark.parametrize("name", MODELS)
def test_every_missing_tensor_is_named(load, name):
    optional = {"output.weight", "rope_freqs.weight"}  # other models: tied, without factors
    for source in gguf_tensors(MODELS[name]):
        if source.name in optional or source.name.startswith("blk.1."):
            continue
        with pytest.raises(ModelError, match=repr(source.name)):
            load(name, tensors={source.name: None})


@pytest.mark.parametrize("name", MODELS)
def test_every_misshaped_tensor_is_named(load, name):
    for source in gguf_tensors(MODELS[name]):
        if source.name.startswith("blk.1."):
            continue
        shape = (source.shape[0] + 32, *source.shape[1:])
        if source.name == "token_embd.weight":
            shape = (source.shape[0], source.shape[1] + 32)
        with pytest.raises(ModelError, match=repr(source.name)):
            load(name, tensors={source.name: f32(source.name, np.ones(shape))})


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("llama", "blk.0.attn_q_norm.weight"),
        ("llama", "blk.3.attn_norm.weight"),
        ("qwen3", "blk.0.attn_q.bias"),
        ("qwen2", "rope_freqs.weight"),
        ("phi3", "rope_factors_long.weight"),
        ("gemma3", "output.bias"),
        ("llama", "blk.0.ffn_gate_inp.weight"),
    ],
)
def test_a_tensor_without_a_role_is_named(load, name, extra):
    with pytest.raises(ModelError, match=repr(extra)):
        load(name, tensors={extra: f32(extra, np.ones(16))})


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_rotary_factors_must_be_positive(load, value):
    factors = np.ones(8)
    factors[3] = value
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        load("llama3", tensors={"rope_freqs.weight": f32("rope_freqs.weight", factors)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "blk.2.ffn_up.weight"])
def test_weights_that_are_not_finite_are_named(load, name, value):
    shape = next(s.shape for s in gguf_tensors(MODELS["llama"]) if s.name == name)
    values = np.ones(shape)
    values[-1] = value
    with pytest.raises(GGUFError, match=name):
        load("llama", tensors={name: f32(name, values)})
