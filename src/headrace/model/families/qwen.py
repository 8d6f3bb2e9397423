"""Qwen 2, 2.5 and 3, dense (GGUF architectures ``qwen2``, ``qwen3``).

Yang et al. 2024 (arXiv:2407.10671): LLaMA with biases on q, k and v. Qwen Team 2025
(arXiv:2505.09388): those biases give way to norms on q and k.
"""

from __future__ import annotations

import math

from headrace.model.decoder import Config
from headrace.model.hyperparameters import read_config, read_eps, read_rope
from headrace.model.operations import (
    Activation,
    Attend,
    Embed,
    FeedForwardIn,
    FeedForwardOut,
    Head,
    Operation,
    Pairing,
    ProjectOut,
    ProjectQKV,
)
from headrace.model.source import Bias, Source


def qwen2(source: Source) -> tuple[Config, list[Operation]]:
    return _qwen(source, qkv_bias=Bias.REQUIRED, qk_norm=False)


def qwen3(source: Source) -> tuple[Config, list[Operation]]:
    return _qwen(source, qkv_bias=Bias.NONE, qk_norm=True)


def _qwen(source: Source, qkv_bias: Bias, qk_norm: bool) -> tuple[Config, list[Operation]]:
    c = read_config(source)
    eps = read_eps(source)
    rope = read_rope(source, c, Pairing.HALF)
    d, n_q, n_kv = c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim

    operations: list[Operation] = [Embed(source.tensor("token_embd.weight", c.n_vocab, d))]
    for i in range(c.n_layers):
        blk = f"blk.{i}"
        operations += [
            ProjectQKV(
                layer=i,
                norm=source.norm(f"{blk}.attn_norm", d, eps),
                q=source.linear(f"{blk}.attn_q", n_q, d, qkv_bias),
                k=source.linear(f"{blk}.attn_k", n_kv, d, qkv_bias),
                v=source.linear(f"{blk}.attn_v", n_kv, d, qkv_bias),
                q_norm=source.norm(f"{blk}.attn_q_norm", c.head_dim, eps) if qk_norm else None,
                k_norm=source.norm(f"{blk}.attn_k_norm", c.head_dim, eps) if qk_norm else None,
                rope=rope,
                n_heads=c.n_heads,
                n_kv_heads=c.n_kv_heads,
                head_dim=c.head_dim,
            ),
            Attend(
                layer=i,
                n_heads=c.n_heads,
                n_kv_heads=c.n_kv_heads,
                head_dim=c.head_dim,
                scale=1 / math.sqrt(c.head_dim),
            ),
            ProjectOut(layer=i, out=source.linear(f"{blk}.attn_output", d, n_q)),
            FeedForwardIn(
                layer=i,
                norm=source.norm(f"{blk}.ffn_norm", d, eps),
                gate=source.linear(f"{blk}.ffn_gate", c.d_ff, d),
                up=source.linear(f"{blk}.ffn_up", c.d_ff, d),
                activation=Activation.SILU,
            ),
            FeedForwardOut(layer=i, down=source.linear(f"{blk}.ffn_down", d, c.d_ff)),
        ]
    output = "output" if source.has("output") else "token_embd"
    operations.append(Head(source.norm("output_norm", d, eps), source.linear(output, c.n_vocab, d)))
    return c, operations
