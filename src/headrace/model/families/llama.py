"""LLaMA: Llama 1–3.x, Mistral, SmolLM and their like (GGUF architecture ``llama``).

Touvron et al. 2023 (arXiv:2302.13971, 2307.09288); Jiang et al. 2023 (Mistral, 2310.06825) adds
the attention window; Llama 3.1 adds the rotary factors of ``rope_freqs.weight``. GGUF files store
Q and K with their rows permuted so that rotary pairs are adjacent.
"""

from __future__ import annotations

import dataclasses
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
from headrace.model.source import Bias, Source


def llama(source: Source) -> tuple[Config, list[Operation]]:
    c = read_config(source)
    eps = read_eps(source)
    rope = read_rope(source, c, Pairing.INTERLEAVED)
    if source.has("rope_freqs"):
        rope = dataclasses.replace(rope, freq_factors=source.factors("rope_freqs", rope.dim // 2))
    window = source.integer("attention.sliding_window", 0, low=0, high=MAX_POSITIONS) or None
    d, n_q, n_kv = c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim

    operations: list[Operation] = [Embed(source.tensor("token_embd.weight", c.n_vocab, d))]
    for i in range(c.n_layers):
        blk = f"blk.{i}"
        operations += [
            ProjectQKV(
                layer=i,
                norm=source.norm(f"{blk}.attn_norm", d, eps),
                q=source.linear(f"{blk}.attn_q", n_q, d, Bias.OPTIONAL),
                k=source.linear(f"{blk}.attn_k", n_kv, d, Bias.OPTIONAL),
                v=source.linear(f"{blk}.attn_v", n_kv, d, Bias.OPTIONAL),
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
            ProjectOut(
                layer=i,
                out=source.linear(f"{blk}.attn_output", d, n_q, Bias.OPTIONAL),
            ),
            FeedForwardIn(
                layer=i,
                norm=source.norm(f"{blk}.ffn_norm", d, eps),
                gate=source.linear(f"{blk}.ffn_gate", c.d_ff, d, Bias.OPTIONAL),
                up=source.linear(f"{blk}.ffn_up", c.d_ff, d, Bias.OPTIONAL),
                activation=Activation.SILU,
            ),
            FeedForwardOut(
                layer=i,
                down=source.linear(f"{blk}.ffn_down", d, c.d_ff, Bias.OPTIONAL),
            ),
        ]
    output = "output" if source.has("output") else "token_embd"
    operations.append(Head(source.norm("output_norm", d, eps), source.linear(output, c.n_vocab, d)))
    return c, operations
