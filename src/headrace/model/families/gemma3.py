"""Gemma 3 (GGUF architecture ``gemma3``), text only.

Gemma Team 2025 (arXiv:2503.19786): five layers of local attention to one of global, each with its
own rotary base; norms on q and k and after each half-layer; scaled embeddings; a tied head. GGUF
norm weights already hold the paper's ``1 + w``.
"""

from __future__ import annotations

import math

from headrace.model.decoder import Config
from headrace.model.hyperparameters import (
    MAX_LAYERS,
    MAX_POSITIONS,
    read_config,
    read_eps,
    read_rope,
)
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
    Rope,
)
from headrace.model.source import Source

_27B_LAYERS = 62
"""Only the 27B scales attention by d_model / n_heads; no metadata key says so."""


def gemma3(source: Source) -> tuple[Config, list[Operation]]:
    c = read_config(source)
    eps = read_eps(source)
    global_rope = read_rope(source, c, Pairing.HALF, default_base=None)
    # Files hold neither the local base nor, mostly, the pattern: the defaults are the paper's.
    local_base = source.number("rope.freq_base_swa", 10_000.0)
    local_rope = Rope(local_base, global_rope.dim, Pairing.HALF)
    window = source.integer("attention.sliding_window", high=MAX_POSITIONS)
    period = source.integer("attention.sliding_window_pattern", 6, high=MAX_LAYERS)
    head_width = c.d_model / c.n_heads if c.n_layers == _27B_LAYERS else c.head_dim
    d, n_q, n_kv = c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim

    embedding = source.tensor("token_embd.weight", c.n_vocab, d)
    operations: list[Operation] = [Embed(embedding, scale=math.sqrt(d))]
    for i in range(c.n_layers):
        blk = f"blk.{i}"
        is_local = i % period < period - 1
        operations += [
            ProjectQKV(
                layer=i,
                norm=source.norm(f"{blk}.attn_norm", d, eps),
                q=source.linear(f"{blk}.attn_q", n_q, d),
                k=source.linear(f"{blk}.attn_k", n_kv, d),
                v=source.linear(f"{blk}.attn_v", n_kv, d),
                q_norm=source.norm(f"{blk}.attn_q_norm", c.head_dim, eps),
                k_norm=source.norm(f"{blk}.attn_k_norm", c.head_dim, eps),
                rope=local_rope if is_local else global_rope,
                n_heads=c.n_heads,
                n_kv_heads=c.n_kv_heads,
                head_dim=c.head_dim,
            ),
            Attend(
                layer=i,
                n_heads=c.n_heads,
                n_kv_heads=c.n_kv_heads,
                head_dim=c.head_dim,
                scale=1 / math.sqrt(head_width),
                window=window if is_local else None,
            ),
            ProjectOut(
                layer=i,
                out=source.linear(f"{blk}.attn_output", d, n_q),
                post_norm=source.norm(f"{blk}.post_attention_norm", d, eps),
            ),
            FeedForwardIn(
                layer=i,
                norm=source.norm(f"{blk}.ffn_norm", d, eps),
                gate=source.linear(f"{blk}.ffn_gate", c.d_ff, d),
                up=source.linear(f"{blk}.ffn_up", c.d_ff, d),
                activation=Activation.GELU_TANH,
            ),
            FeedForwardOut(
                layer=i,
                down=source.linear(f"{blk}.ffn_down", d, c.d_ff),
                post_norm=source.norm(f"{blk}.post_ffw_norm", d, eps),
            ),
        ]
    output = "output" if source.has("output") else "token_embd"
    operations.append(Head(source.norm("output_norm", d, eps), source.linear(output, c.n_vocab, d)))
    return c, operations
