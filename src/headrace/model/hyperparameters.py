"""The hyperparameters every family shares, read from metadata with sane limits.

Key names and defaults: the GGUF specification (ggml/docs/gguf.md) and llama.cpp.
"""

from __future__ import annotations

from headrace.errors import ModelError
from headrace.model.decoder import Config
from headrace.model.operations import Pairing, Rope
from headrace.model.source import Source

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_HEADS = 4096
MAX_HEAD_DIM = 1024
MAX_POSITIONS = (1 << 31) - 1


def read_config(source: Source) -> Config:
    """The sizes of the model. ``n_vocab`` is the number of embedding rows.

    Raises ModelError for sizes that are missing, out of range or do not divide.
    """
    d_model = source.integer("embedding_length", high=MAX_WIDTH)
    n_heads = source.integer("attention.head_count", high=MAX_HEADS)
    n_kv_heads = source.integer("attention.head_count_kv", n_heads, high=MAX_HEADS)
    if n_heads % n_kv_heads:
        raise source.error(
            "attention.head_count_kv", f"{n_kv_heads} does not divide head_count {n_heads}"
        )
    if source.value("attention.key_length") is None and d_model % n_heads:
        raise source.error(
            "attention.head_count", f"{n_heads} does not divide embedding_length {d_model}"
        )
    head_dim = source.integer("attention.key_length", d_model // n_heads, high=MAX_HEAD_DIM)
    value_length = source.integer("attention.value_length", head_dim, high=MAX_HEAD_DIM)
    if value_length != head_dim:
        raise source.error(
            "attention.value_length", f"{value_length} differs from key_length {head_dim}"
        )
    n_vocab = source.rows("token_embd")
    tokens = source.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list | tuple) and len(tokens) != n_vocab:
        raise ModelError(
            f"tokenizer.ggml.tokens has {len(tokens)} entries, 'token_embd.weight' {n_vocab} rows"
        )
    name = source.metadata.get("general.name")
    return Config(
        architecture=source.architecture,
        name=name if isinstance(name, str) else source.architecture,
        n_layers=source.integer("block_count", high=MAX_LAYERS),
        d_model=d_model,
        d_ff=source.integer("feed_forward_length", high=MAX_WIDTH),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        n_vocab=n_vocab,
        context_length=source.integer("context_length", high=MAX_POSITIONS),
    )


def read_eps(source: Source) -> float:
    return source.number("attention.layer_norm_rms_epsilon", high=1.0)


def read_rope(
    source: Source, config: Config, pairing: Pairing, default_base: float | None = 10_000.0
) -> Rope:
    """The rotary embedding, with linear scaling where the file asks for it.

    A factor without a type means linear, as in llama.cpp. Raises ModelError for other kinds of
    scaling (yarn, longrope, …), and for a missing base if there is no default.
    """
    dim = source.integer("rope.dimension_count", config.head_dim, high=config.head_dim)
    if dim % 2:
        raise source.error("rope.dimension_count", f"is {dim}: rotary values come in pairs")
    kind = source.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise source.error(
            "rope.scaling.type", f"is {kind!r}: headrace supports 'none', 'linear' and rope_freqs"
        )
    legacy_factor = source.number("rope.scale_linear", 1.0)
    factor = source.number("rope.scaling.factor", legacy_factor)
    return Rope(
        base=source.number("rope.freq_base", default_base),
        dim=dim,
        pairing=pairing,
        freq_scale=1.0 / factor if kind == "linear" else 1.0,
    )
