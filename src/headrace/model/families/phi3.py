"""Phi-3 and Phi-4 (GGUF architecture ``phi3``), without long-context rotary factors.

Abdin et al. 2024 (arXiv:2404.14219, 2412.08905): LLaMA with q, k and v in one matrix, and gate and
up in another. Every layer has the attention window, where the file gives one.
"""

from __future__ import annotations

import math

from headrace.model.decoder import Config
from headrace.model.hyperparameters import MAX_POSITIONS, read_config, read_eps, read_rope
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
from headrace.model.source import Source


def phi3(source: Source) -> tuple[Config, list[Operation]]:
    c = read_config(source)
    eps = read_eps(source)
    rope = read_rope(source, c, Pairing.HALF)
    window = source.integer("attention.sliding_window", 0, low=0, high=MAX_POSITIONS) or None
    d, n_q, n_kv = c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim

    operations: list[Operation] = [Embed(source.tensor("token_embd.weight", c.n_vocab, d))]
    for i in range(c.n_layers):
        blk = f"blk.{i}"
        q, k, v = source.split(f"{blk}.attn_qkv", d, n_q, n_kv, n_kv)
        gate, up = source.split(f"{blk}.ffn_up", d, c.d_ff, c.d_ff)
        operations += [
            ProjectQKV(
                layer=i,
                norm=source.norm(f"{blk}.attn_norm", d, eps),
                q=q,
                k=k,
                v=v,
                q_norm=None,
                k_norm=None,
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
                window=window,
            ),
            ProjectOut(layer=i, out=source.linear(f"{blk}.attn_output", d, n_q)),
            FeedForwardIn(
                layer=i,
                norm=source.norm(f"{blk}.ffn_norm", d, eps),
                gate=gate,
                up=up,
                activation=Activation.SILU,
            ),
            FeedForwardOut(layer=i, down=source.linear(f"{blk}.ffn_down", d, c.d_ff)),
        ]
    output = "output" if source.has("output") else "token_embd"
    operations.append(Head(source.norm("output_norm", d, eps), source.linear(output, c.n_vocab, d)))
    return c, operations
