"""Synthetic models: GGUF files of a known shape and recipe with random weights, complete enough to
load, tokenise and decode anywhere. For benchmarks and tests where nothing can be downloaded: speed
depends on shapes and types, not on what the weights mean.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ModelError
from headrace.gguf.random_blocks import random_weights
from headrace.gguf.recipes import RECIPES, Recipe, tensor_type
from headrace.gguf.types import QuantType
from headrace.gguf.writer import Progress, TensorSource, write_gguf


@dataclass(frozen=True)
class Shape:
    """What a model is made of. ``rope_factor``: llama3 scaling, as ``rope_freqs.weight``."""

    architecture: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    context_length: int
    rope_theta: float
    eps: float = 1e-6
    tied: bool = True
    rope_factor: float | None = None
    window: int | None = None


SHAPES: dict[str, Shape] = {
    # Llama-3.2-1B, Llama-3.1-8B
    "llama-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 5e5, 1e-5, True, 32.0),
    "llama-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, 5e5, 1e-5, False, 8.0),
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 4864, 14, 2, 64, 151936, 32768, 1e6),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960, 1e6),
    "gemma3-1b": Shape("gemma3", 26, 1152, 6912, 4, 1, 256, 262144, 32768, 1e6, window=512),
    # Small enough for a test, wide enough for K-quants; gemma3 has one global layer among seven.
    "llama-tiny": Shape("llama", 3, 256, 512, 4, 2, 64, 512, 2048, 5e5, 1e-5, False, 8.0),
    "qwen2-tiny": Shape("qwen2", 3, 256, 512, 4, 2, 64, 512, 2048, 1e6),
    "qwen3-tiny": Shape("qwen3", 3, 256, 512, 4, 2, 128, 512, 2048, 1e6),
    "gemma3-tiny": Shape("gemma3", 7, 256, 512, 2, 1, 256, 512, 2048, 1e6, window=16),
}

_PRE = {"llama": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2", "gemma3": "default"}
"""The pre-tokeniser named in the file, by architecture."""

_CONTROL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
_NORMAL, _CONTROL = 1, 3

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_synthetic(
    path: str | Path,
    shape: str | Shape,
    recipe: str,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write a GGUF with random weights: the same arguments give the same bytes.

    ``shape``: a name in :data:`SHAPES`, or a Shape of one of their architectures. ``recipe``: a
    name in :data:`headrace.gguf.recipes.RECIPES`, such as ``"Q4_K_M"``. ``progress`` is called with
    (bytes written, bytes in all). Raises ModelError for an unknown name, GGUFError when the file
    cannot be written.
    """
    name = shape if isinstance(shape, str) else f"{shape.architecture}-custom"
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ModelError(f"unknown shape {shape!r}: use one of {', '.join(SHAPES)}")
        shape = SHAPES[shape]
    if shape.architecture not in _PRE:
        raise ModelError(f"unknown architecture {shape.architecture!r}: use one of {list(_PRE)}")
    if recipe not in RECIPES:
        raise ModelError(f"unknown recipe {recipe!r}: use one of {', '.join(RECIPES)}")
    metadata = {
        "general.architecture": shape.architecture,
        "general.type": "model",
        "general.name": f"{name} {recipe}, random weights",
        "general.file_type": RECIPES[recipe].file_type,
        "general.quantization_version": 2,
        **_hyperparameters(shape),
        **synthetic_tokenizer(shape.n_vocab, _PRE[shape.architecture]),
    }
    write_gguf(path, metadata, synthetic_tensors(shape, RECIPES[recipe], seed), progress=progress)


def synthetic_tokenizer(n_vocab: int, pre: str) -> dict[str, Any]:
    """Metadata of a byte-level BPE tokeniser: every byte, then letter pairs and pairs of pairs,
    each reached by one merge, then the control tokens. ``n_vocab`` from 260 to about 450,000."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [a + b for a, b in product(letters, repeat=2)]
    merged = chain(
        product(letters, repeat=2), product("Ġ", [*letters, *pairs]), product(pairs, pairs)
    )
    n_merges = n_vocab - 256 - len(_CONTROL_TOKENS)
    merges = [pair for pair, _ in zip(merged, range(n_merges), strict=False)]
    if len(merges) != n_merges:
        raise ModelError(f"a synthetic vocabulary has 260 to 459,964 tokens, not {n_vocab}")
    tokens = [*_byte_characters(), *(a + b for a, b in merges), *_CONTROL_TOKENS]
    kinds = np.full(n_vocab, _NORMAL, np.int32)
    kinds[-len(_CONTROL_TOKENS) :] = _CONTROL
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin_of_text|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|end_of_text|>"),
        "tokenizer.ggml.add_bos_token": pre == "llama-bpe",
        "tokenizer.chat_template": _CHAT_TEMPLATE,
    }


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself when printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _hyperparameters(shape: Shape) -> dict[str, Any]:
    values: dict[str, Any] = {
        "block_count": shape.n_layers,
        "context_length": shape.context_length,
        "embedding_length": shape.d_model,
        "feed_forward_length": shape.d_ff,
        "attention.head_count": shape.n_heads,
        "attention.head_count_kv": shape.n_kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": shape.eps,
        "rope.freq_base": shape.rope_theta,
    }
    if shape.architecture == "llama":
        values |= {"rope.dimension_count": shape.head_dim, "vocab_size": shape.n_vocab}
    if shape.window is not None:
        values["attention.sliding_window"] = shape.window
    return {f"{shape.architecture}.{key}": value for key, value in values.items()}


def _tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shape (NumPy order) of every tensor, by GGML name, in the file's order."""
    d, head_dim = shape.d_model, shape.head_dim
    q, kv = shape.n_heads * head_dim, shape.n_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.n_vocab, d)}
    if shape.rope_factor is not None:
        shapes["rope_freqs.weight"] = (head_dim // 2,)
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (d,),
        "attn_q.weight": (q, d),
        "attn_k.weight": (kv, d),
        "attn_v.weight": (kv, d),
        "attn_output.weight": (d, q),
        "ffn_norm.weight": (d,),
        "ffn_gate.weight": (shape.d_ff, d),
        "ffn_up.weight": (shape.d_ff, d),
        "ffn_down.weight": (d, shape.d_ff),
    }
    if shape.architecture == "qwen2":
        layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if shape.architecture in ("qwen3", "gemma3"):
        layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    if shape.architecture == "gemma3":
        layer |= {"post_attention_norm.weight": (d,), "post_ffw_norm.weight": (d,)}
    for index in range(shape.n_layers):
        shapes |= {f"blk.{index}.{name}": dims for name, dims in layer.items()}
    shapes["output_norm.weight"] = (d,)
    if not shape.tied:
        shapes["output.weight"] = (shape.n_vocab, d)
    return shapes


def synthetic_tensors(shape: Shape, recipe: Recipe, seed: int) -> list[TensorSource]:
    """Every tensor of the model, its weights made only when they are iterated."""
    n_gqa = shape.n_heads // shape.n_kv_heads
    sources = []
    for name, dims in _tensor_shapes(shape).items():
        qtype = tensor_type(
            recipe, name, dims, n_layers=shape.n_layers, n_gqa=n_gqa, tied=shape.tied
        )
        sources.append(TensorSource(name, qtype, dims, _chunks(shape, name, qtype, dims, seed)))
    return sources


def _chunks(
    shape: Shape, name: str, qtype: QuantType, dims: tuple[int, ...], seed: int
) -> Iterator[NDArray[Any]]:
    """The packed weights of one tensor. Matrices keep the size of what they multiply."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    if name == "rope_freqs.weight":
        yield llama3_rope_factors(shape.head_dim, shape.rope_theta, shape.rope_factor or 1.0)
    elif name.endswith("norm.weight"):
        yield _gain(shape, name) * (1 + 0.1 * rng.standard_normal(dims, np.float32))
    elif name.endswith(".bias"):
        yield 0.2 * rng.standard_normal(dims, np.float32)
    else:
        std = _gain(shape, name) / math.sqrt(dims[-1])
        yield from random_weights(rng, qtype, math.prod(dims), std)


_GAINS = {
    "attn_q.weight": 2.0,  # attention that prefers some positions
    "attn_q_norm.weight": 2.0,
    # Attention is much the same from one token to the next, the feed-forward is not: were they
    # equal, greedy decoding would repeat one token.
    "attn_output.weight": 0.5,
    "post_attention_norm.weight": 0.3,
    "ffn_down.weight": 2.0,
}


def _gain(shape: Shape, name: str) -> float:
    """The size of a tensor's output, for an input of size one."""
    if name == "token_embd.weight" and shape.architecture == "gemma3":
        return 0.3  # scaled by sqrt(d) and tied: a larger one would only repeat its input
    return _GAINS.get(name.split(".", 2)[-1], 1.0)


def llama3_rope_factors(head_dim: int, theta: float, factor: float) -> NDArray[np.float32]:
    """Divisors of the rotary frequencies, float32 [head_dim / 2], as Llama 3.1 and 3.2 have them.

    Source: ``rope_scaling`` of type llama3 in the models' configuration (low 1, high 4, original
    context 8192): wavelengths under a quarter of that stay, those over it are stretched by
    ``factor``, those between are interpolated.
    """
    original, low, high = 8192, 1.0, 4.0
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = original * frequency / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
