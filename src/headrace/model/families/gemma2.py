"""Gemma 2 (GGUF architecture ``gemma2``).

Gemma Team 2024 (arXiv:2408.00118): local and global attention in turn; attention scores and logits
bounded by soft caps; norms after each half-layer; scaled embeddings; a tied head. GGUF norm weights
already hold the paper's ``1 + w``.
"""

from __future__ import annotations

import math

from headrace.model.decoder import Config
from headrace.model.hyperparameters import (
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
)
from headrace.model.source import Source

_27B_LAYERS = 46
"""Only the 27B scales attention by d_model / n_heads; no metadata key says so."""


def gemma2(source: Source) -> tuple[Config, list[Operation]]:
    c = read_config(source)
    eps = read_eps(source)
    rope = read_rope(source, c, Pairing.HALF)
    # Early files lack these keys: the defaults are the paper's.
    window = source.integer("attention.sliding_window", 4096, high=MAX_POSITIONS)
    attention_cap = source.number("attn_logit_softcapping", 50.0)
    logit_cap = source.number("final_logit_softcapping", 30.0)
    head_width = c.d_model / c.n_heads if c.n_layers == _27B_LAYERS else c.head_dim
    d, n_q, n_kv = c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim

    embedding = source.tensor("token_embd.weight", c.n_vocab, d)
    operations: list[Operation] = [Embed(embedding, scale=math.sqrt(d))]
    for i in range(c.n_layers):
        blk = f"blk.{i}"
        operations += [
            ProjectQKV(
                layer=i,
                norm=source.norm(f"{blk}.attn_norm", d, eps),
                q=source.linear(f"{blk}.attn_q", n_q, d),
                k=source.linear(f"{blk}.attn_k", n_kv, d),
                v=source.linear(f"{blk}.attn_v", n_kv, d),
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
                scale=1 / math.sqrt(head_width),
                window=window if i % 2 == 0 else None,
                softcap=attention_cap,
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
    head = source.linear("token_embd", c.n_vocab, d)
    operations.append(Head(source.norm("output_norm", d, eps), head, softcap=logit_cap))
    return c, operations
