"""A second, independent transformer: the model definitions spelt out value by value.

Written from the papers and the Hugging Face model definitions (``modeling_llama``,
``modeling_qwen2``, ``modeling_qwen3``, ``modeling_gemma2``, ``modeling_gemma3``, ``modeling_phi3``,
``modeling_rope_utils``), with their configuration keys, weight names and layouts, in float64 and
Python loops. It knows nothing of GGUF or headrace: that is its worth.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

GEMMA = ("gemma2", "gemma3_text")


def naive_logits(config: dict[str, Any], weights: dict[str, np.ndarray], tokens: list[int]):
    """Logits float64 [len(tokens), vocab_size], one token after the other."""
    caches: list[list[tuple[list, list]]] = [[] for _ in range(config["num_hidden_layers"])]
    return np.stack(
        [_token(config, weights, token, position, caches) for position, token in enumerate(tokens)]
    )


def _token(config, weights, token, position, caches):
    gemma = config["model_type"] in GEMMA
    x = weights["model.embed_tokens.weight"][token].astype(np.float64)
    if gemma:
        x = x * math.sqrt(config["hidden_size"])
    for layer, cache in enumerate(caches):

        def get(name, prefix=f"model.layers.{layer}."):
            return weights.get(prefix + name)

        def norm(x, name, get=get):
            return _rms_norm(x, get(name + ".weight"), config)

        h = _attention(config, get, norm(x, "input_layernorm"), position, layer, cache)
        if gemma:
            x = x + norm(h, "post_attention_layernorm")
            h = _mlp(config, get, norm(x, "pre_feedforward_layernorm"))
            x = x + norm(h, "post_feedforward_layernorm")
        else:
            x = x + h
            x = x + _mlp(config, get, norm(x, "post_attention_layernorm"))
    x = _rms_norm(x, weights["model.norm.weight"], config)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logits = _matvec(head, x)
    cap = config.get("final_logit_softcapping")
    return logits if cap is None else np.array([cap * math.tanh(y / cap) for y in logits])


def _matvec(matrix, x, bias=None):
    y = np.array([math.fsum(row * x) for row in matrix.astype(np.float64)])
    return y if bias is None else y + bias


def _rms_norm(x, weight, config):
    variance = math.fsum(x * x) / len(x)
    scale = weight + 1.0 if config["model_type"] in GEMMA else weight
    return x / math.sqrt(variance + config["rms_norm_eps"]) * scale


def _is_sliding(config, layer):
    if config["model_type"] == "gemma3_text":
        return (layer + 1) % config["sliding_window_pattern"] != 0
    if config["model_type"] == "gemma2":
        return layer % 2 == 0
    return config.get("sliding_window") is not None


def _attention(config, get, x, position, layer, cache):
    n_heads, n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["head_dim"]
    if config["model_type"] == "phi3":
        qkv = _matvec(get("self_attn.qkv_proj.weight"), x)
        n_q = n_heads * size
        q, k, v = qkv[:n_q], qkv[n_q : n_q + n_kv_heads * size], qkv[n_q + n_kv_heads * size :]
    else:
        q = _matvec(get("self_attn.q_proj.weight"), x, get("self_attn.q_proj.bias"))
        k = _matvec(get("self_attn.k_proj.weight"), x, get("self_attn.k_proj.bias"))
        v = _matvec(get("self_attn.v_proj.weight"), x, get("self_attn.v_proj.bias"))
    q_heads = [q[h * size : (h + 1) * size] for h in range(n_heads)]
    k_heads = [k[h * size : (h + 1) * size] for h in range(n_kv_heads)]
    v_heads = [v[h * size : (h + 1) * size] for h in range(n_kv_heads)]
    if get("self_attn.q_norm.weight") is not None:
        q_heads = [_rms_norm(head, get("self_attn.q_norm.weight"), config) for head in q_heads]
        k_heads = [_rms_norm(head, get("self_attn.k_norm.weight"), config) for head in k_heads]
    frequencies = _frequencies(config, layer)
    q_heads = [_rotate(head, position, frequencies) for head in q_heads]
    k_heads = [_rotate(head, position, frequencies) for head in k_heads]
    cache.append((k_heads, v_heads))

    scale = 1.0 / math.sqrt(config.get("query_pre_attn_scalar", size))
    mixed = []
    for h, query in enumerate(q_heads):
        kv = h // (n_heads // n_kv_heads)
        scores = {}
        for past in range(position + 1):
            if _is_sliding(config, layer) and position - past >= config["sliding_window"]:
                continue
            scores[past] = math.fsum(query * cache[past][0][kv]) * scale
            if cap := config.get("attn_logit_softcapping"):
                scores[past] = cap * math.tanh(scores[past] / cap)
        largest = max(scores.values())
        exponentials = {past: math.exp(score - largest) for past, score in scores.items()}
        total = math.fsum(exponentials.values())
        out = np.zeros(size)
        for past, e in exponentials.items():
            out += e / total * cache[past][1][kv]
        mixed.append(out)
    o = np.concatenate(mixed)
    return _matvec(get("self_attn.o_proj.weight"), o, get("self_attn.o_proj.bias"))


def _frequencies(config, layer):
    """``inv_freq`` of modeling_rope_utils: default, linear or llama3."""
    size = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))
    base = config["rope_theta"]
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    if config["model_type"] == "gemma3_text" and _is_sliding(config, layer):
        base, scaling = config["rope_local_base_freq"], {"rope_type": "default"}
    frequencies = [1.0 / base ** (i / size) for i in range(0, size, 2)]
    if scaling["rope_type"] == "linear":
        return [f / scaling["factor"] for f in frequencies]
    if scaling["rope_type"] == "llama3":
        return [_llama3(f, scaling) for f in frequencies]
    assert scaling["rope_type"] == "default"
    return frequencies


def _llama3(frequency, scaling):
    old_length = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    if wavelength > old_length / low:
        return frequency / scaling["factor"]
    if wavelength < old_length / high:
        return frequency
    smooth = (old_length / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency


def _rotate(head, position, frequencies):
    """``x * cos + rotate_half(x) * sin`` on the rotary part; the rest passes."""
    half = len(frequencies)
    out = head.copy()
    for i, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[i] = head[i] * cos - head[i + half] * sin
        out[i + half] = head[i + half] * cos + head[i] * sin
    return out


def _mlp(config, get, x):
    if config["model_type"] == "phi3":
        gate, up = np.split(_matvec(get("mlp.gate_up_proj.weight"), x), 2)
    else:
        gate = _matvec(get("mlp.gate_proj.weight"), x, get("mlp.gate_proj.bias"))
        up = _matvec(get("mlp.up_proj.weight"), x, get("mlp.up_proj.bias"))
    activation = _gelu_tanh if config["model_type"] in GEMMA else _silu
    product = np.array([activation(g) * u for g, u in zip(gate, up, strict=True)])
    return _matvec(get("mlp.down_proj.weight"), product, get("mlp.down_proj.bias"))


def _silu(x):
    return x / (1.0 + math.exp(-x))


def _gelu_tanh(x):
    return 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))
