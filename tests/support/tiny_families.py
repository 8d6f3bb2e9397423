"""Tiny random models of every family, in the Hugging Face layout and as GGUF files.

``tiny_model(name)`` makes the configuration and weights that :mod:`naive_transformer` runs;
``write_tiny(model, path)`` stores the same values as a GGUF file, following what llama.cpp's
``convert_hf_to_gguf.py`` does to keys, names, Q/K row order, norm weights and rotary factors.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants
from headrace.gguf.types import QuantType
from headrace.gguf.writer import TensorSource, write_gguf

_BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 70,
    "max_position_embeddings": 512,
    "rms_norm_eps": float(np.float32(1e-5)),
    "rope_theta": 10000.0,
}
_LLAMA = {**_BASE, "model_type": "llama"}
_QWEN3 = {**_BASE, "model_type": "qwen3", "head_dim": 32, "rope_theta": 1e6}
_GEMMA3 = {
    **_BASE,
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": float(np.float32(1e-6)),
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 5,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 32,
    "tie_word_embeddings": True,
}
_GEMMA2 = {
    **_BASE,
    "model_type": "gemma2",
    "head_dim": 32,
    "sliding_window": 5,
    "query_pre_attn_scalar": 32,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 2.0,
    "tie_word_embeddings": True,
}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama3": {**_LLAMA, "rope_scaling": _LLAMA3_SCALING, "tie_word_embeddings": True},
    "llama-linear": {**_LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-biases": {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_LLAMA, "head_dim": 32, "sliding_window": 7, "rope_theta": 1e6},
    "qwen2": {**_BASE, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": _QWEN3,
    "gemma2": _GEMMA2,
    "gemma2-27b": {
        **_GEMMA2,
        "num_hidden_layers": 46,
        "intermediate_size": 32,
        "query_pre_attn_scalar": 64 / 4,
    },
    "phi3": {**_BASE, "model_type": "phi3"},
    "phi3-partial": {
        **_BASE,
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "sliding_window": 7,
        "tie_word_embeddings": True,
    },
    "gemma3": _GEMMA3,
    "gemma3-scaled": {
        **_GEMMA3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
    },
    "gemma3-27b": {
        **_GEMMA3,
        "num_hidden_layers": 62,
        "intermediate_size": 32,
        "query_pre_attn_scalar": 64 / 4,
    },
}
"""One configuration for every branch of the family files, by name."""

# Quantisation types are dealt to the matrices in turn: every model mixes them.
_MATRIX_TYPES = [QuantType.Q8_0, QuantType.Q4_1, QuantType.F16, QuantType.Q5_0, QuantType.BF16]

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA = ("gemma2", "gemma3_text")
_GGUF_NAMES_GEMMA = {
    **_GGUF_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass
class TinyModel:
    """``weights``: Hugging Face name -> float32 values, exactly as the packed blocks decode."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    packed: dict[str, tuple[QuantType, np.ndarray]] = field(default_factory=dict)

    def add(self, name: str, values: np.ndarray, qtype: QuantType = QuantType.F32) -> None:
        theirs = GGMLQuantizationType(int(qtype))
        rows = np.atleast_2d(values.astype(np.float32))
        packed = gguf_quants.quantize(rows, theirs).view(np.uint8)
        self.packed[name] = (qtype, packed)
        self.weights[name] = gguf_quants.dequantize(packed, theirs).reshape(values.shape)


def tiny_model(name: str) -> TinyModel:
    """The model ``CONFIGS[name]``, its weights random but always the same."""
    config = CONFIGS[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    model = TinyModel(config)
    d, ff, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    gemma, phi = config["model_type"] in _GEMMA, config["model_type"] == "phi3"

    def matrix(name: str, n: int, k: int, bias: bool = False, gain: float = 1.0) -> None:
        qtype = _MATRIX_TYPES[len(model.packed) % len(_MATRIX_TYPES)]
        model.add(name + ".weight", gain * rng.standard_normal((n, k)) / math.sqrt(k), qtype)
        if bias:
            model.add(name + ".bias", 0.5 * rng.standard_normal(n))

    def norm(name: str, n: int, gain: float = 1.0) -> None:
        offset = 1.0 if gemma else 0.0  # Gemma's weights are stored as w of (1 + w)
        model.add(name + ".weight", gain * (1 + 0.3 * rng.standard_normal(n)) - offset)

    matrix("model.embed_tokens", config["vocab_size"], d)
    qkv_bias = config["model_type"] == "qwen2" or config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        norm(layer + "input_layernorm", d)
        # A gain above 1 on q and k makes attention choose, so that a wrong score shows.
        if phi:
            matrix(layer + "self_attn.qkv_proj", q + 2 * kv, d, gain=1.5)
        else:
            matrix(layer + "self_attn.q_proj", q, d, qkv_bias, gain=2.0)
            matrix(layer + "self_attn.k_proj", kv, d, qkv_bias, gain=2.0)
            matrix(layer + "self_attn.v_proj", kv, d, qkv_bias)
        matrix(layer + "self_attn.o_proj", d, q, config.get("attention_bias", False))
        if config["model_type"] in ("gemma3_text", "qwen3"):
            norm(layer + "self_attn.q_norm", head_dim, gain=2.0)
            norm(layer + "self_attn.k_norm", head_dim, gain=2.0)
        norm(layer + "post_attention_layernorm", d)
        if gemma:
            norm(layer + "pre_feedforward_layernorm", d)
            norm(layer + "post_feedforward_layernorm", d)
        if phi:
            matrix(layer + "mlp.gate_up_proj", 2 * ff, d, gain=1.5)
        else:
            matrix(layer + "mlp.gate_proj", ff, d, mlp_bias, gain=2.0)
            matrix(layer + "mlp.up_proj", ff, d, mlp_bias)
        matrix(layer + "mlp.down_proj", d, ff, mlp_bias)
    norm("model.norm", d)
    if not config.get("tie_word_embeddings"):
        matrix("lm_head", config["vocab_size"], d, gain=3.0)
    return model


def write_tiny(model: TinyModel, path: Path) -> Path:
    """Store ``model`` as a GGUF file without a tokeniser."""
    write_gguf(path, gguf_metadata(model.config), gguf_tensors(model))
    return path


def gguf_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes."""
    architecture = {"gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    keys: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        keys["attention.key_length"] = keys["attention.value_length"] = config["head_dim"]
    if architecture == "llama":
        keys |= {"vocab_size": config["vocab_size"], "rope.dimension_count": config["head_dim"]}
    if config["model_type"] == "phi3":
        rotary = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))
        keys["rope.dimension_count"] = rotary
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if name in config:
            keys[name] = config[name]
    if "sliding_window" in config:
        keys["attention.sliding_window"] = config["sliding_window"]
    if config.get("sliding_window_pattern", 6) != 6:
        keys["attention.sliding_window_pattern"] = config["sliding_window_pattern"]
    if config.get("rope_scaling", {}).get("rope_type") == "linear":
        keys["rope.scaling.type"] = "linear"
        keys["rope.scaling.factor"] = config["rope_scaling"]["factor"]
    general = {"general.architecture": architecture, "general.name": f"tiny {architecture}"}
    return general | {f"{architecture}.{key}": value for key, value in keys.items()}


def gguf_tensors(model: TinyModel) -> list[TensorSource]:
    """The tensors under their GGUF names, rows permuted and norms shifted as the converter does."""
    config = model.config
    gemma = config["model_type"] in _GEMMA
    heads = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }
    tensors = []
    for name, (qtype, packed) in model.packed.items():
        values = model.weights[name]
        stem, kind = name.rsplit(".", 1)
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        gguf_name = prefix + (_GGUF_NAMES_GEMMA if gemma else _GGUF_NAMES)[stem] + "." + kind
        if config["model_type"] == "llama" and stem in heads:
            if kind == "bias":
                values = packed.view(np.float32)[0][_permutation(values.shape[0], heads[stem])]
                packed = values[None].view(np.uint8)
            else:
                packed = packed[_permutation(values.shape[0], heads[stem])]
        if gemma and stem.endswith("norm"):
            packed = (values + np.float32(1)).astype(np.float32)[None].view(np.uint8)
        tensors.append(TensorSource(gguf_name, qtype, values.shape, [packed]))
    if config.get("rope_scaling", {}).get("rope_type") == "llama3":
        factors = _llama3_factors(config)
        tensors.append(TensorSource("rope_freqs.weight", QuantType.F32, factors.shape, [factors]))
    return tensors


def _permutation(n_rows: int, n_heads: int) -> list[int]:
    """Row order of Q and K in llama.cpp's LLaMA files: the halves of a head interleaved."""
    size = n_rows // n_heads
    order = []
    for head in range(n_heads):
        for i in range(size // 2):
            order += [head * size + i, head * size + i + size // 2]
    return order


def _llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """What the converter stores as ``rope_freqs.weight``: divisors of the frequencies."""
    scaling = config["rope_scaling"]
    low_wavelength = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high_wavelength = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    factors = []
    for i in range(0, config["head_dim"], 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (i / config["head_dim"])
        if wavelength < high_wavelength:
            factors.append(1.0)
        elif wavelength > low_wavelength:
            factors.append(scaling["factor"])
        else:
            smooth = (
                scaling["original_max_position_embeddings"] / wavelength
                - scaling["low_freq_factor"]
            ) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)
