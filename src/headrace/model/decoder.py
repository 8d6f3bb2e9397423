"""A decoder: frozen configuration, the seven operations in order, and the weights they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.gguf.types import Tensor
from headrace.model.operations import Operation


@dataclass(frozen=True)
class Config:
    """What a model is, in the field's terms. All counts are of values, not bytes."""

    architecture: str
    name: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    context_length: int


@dataclass(frozen=True)
class Decoder:
    """``operations`` in execution order; ``weights`` holds exactly the tensors they name."""

    config: Config
    operations: tuple[Operation, ...]
    weights: Mapping[str, Tensor]
