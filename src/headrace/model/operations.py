"""The seven operations of a decoder.

A model family lists them with its parameters and GGML weight names; a backend says how they run;
nothing else knows about both. ``T`` below is the number of token rows in a step (see
:class:`headrace.backend.Batch`), ``d`` the width of the residual stream.

    Embed                      token ids -> residual stream [T, d]
    for each layer:
      ProjectQKV               norm, q/k/v matmuls (+bias, +q/k norm), rotary, KV write
      Attend                   grouped-query attention over the cache (+window, +softcap)
      ProjectOut               output matmul, (+post-norm), residual add
      FeedForwardIn            norm, gate and up matmuls, activation product
      FeedForwardOut           down matmul, (+post-norm), residual add
    Head                       final norm, vocabulary matmul (+softcap)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Pairing(StrEnum):
    """Which two values of a head a rotary angle turns: (2i, 2i+1) or (i, i + dim/2)."""

    INTERLEAVED = "interleaved"
    HALF = "half"


class Activation(StrEnum):
    SILU = "silu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True)
class Norm:
    """RMS norm: ``x / sqrt(mean(x²) + eps) * weight``."""

    weight: str
    eps: float


@dataclass(frozen=True)
class Linear:
    """``y = W x (+ bias)`` with ``W`` of shape ``[n, k]``, by GGML tensor name."""

    weight: str
    n: int
    k: int
    bias: str | None = None


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first ``dim`` values of each head.

    Pair ``i`` at position ``p`` turns by ``p * inv_freq[i]`` where
    ``inv_freq = freq_scale * base^(-2i/dim) / factors``; ``factors`` (length ``dim/2``) comes from
    the tensor ``freq_factors`` when named (llama3 scaling), else 1. ``freq_scale`` is 1/factor for
    linear scaling. Cos and sin are multiplied by ``magnitude``.
    """

    base: float
    dim: int
    pairing: Pairing
    freq_scale: float = 1.0
    freq_factors: str | None = None
    magnitude: float = 1.0


@dataclass(frozen=True)
class Embed:
    weight: str
    scale: float = 1.0


@dataclass(frozen=True)
class ProjectQKV:
    layer: int
    norm: Norm
    q: Linear
    k: Linear
    v: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    rope: Rope
    n_heads: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Attend:
    """Row at position p sees positions max(0, p - window + 1) … p of its own slot."""

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class ProjectOut:
    layer: int
    out: Linear
    post_norm: Norm | None = None


@dataclass(frozen=True)
class FeedForwardIn:
    layer: int
    norm: Norm
    gate: Linear
    up: Linear
    activation: Activation


@dataclass(frozen=True)
class FeedForwardOut:
    layer: int
    down: Linear
    post_norm: Norm | None = None


@dataclass(frozen=True)
class Head:
    norm: Norm
    out: Linear
    softcap: float | None = None
    logit_scale: float = 1.0


Operation = Embed | ProjectQKV | Attend | ProjectOut | FeedForwardIn | FeedForwardOut | Head
