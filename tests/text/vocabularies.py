"""Small vocabularies made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.text.bpe import BYTE_TO_CHAR


def llama_metadata(pieces: dict[str, float], **more: Any) -> dict[str, Any]:
    """A Llama-2-like vocabulary: <unk> <s> </s>, 256 bytes, then ``pieces`` with their scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + list(pieces.values()), np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces), np.int32),
        **more,
    }


def gpt2_metadata(
    merges: list[str], pre: str = "gpt-2", extra: dict[str, int] | None = None, **more: Any
) -> dict[str, Any]:
    """A byte-level vocabulary: the 256 bytes, the merges' results, ``extra`` (type by text)."""
    normal = [*BYTE_TO_CHAR.values(), *dict.fromkeys(m.replace(" ", "") for m in merges)]
    extra = extra or {}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*normal, *extra],
        "tokenizer.ggml.token_type": np.array([1] * len(normal) + list(extra.values()), np.int32),
        "tokenizer.ggml.merges": merges,
        **more,
    }
