"""The vocabulary of a GGUF file: checked metadata, token types, special ids.

Keys and type numbers: the GGUF specification, section "Tokenizer". Where the specification is
silent (default special ids, which tokens end a generation), llama.cpp's ``llama-vocab.cpp`` is
followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import TokenizerError


class TokenType(IntEnum):
    """Values of ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Texts that end a turn or a document in some published vocabulary (llama.cpp's list). The first
# set cannot be ordinary text, so such a token is a control token whatever type the converter
# wrote; the second can be (Gemma's "</s>" is an HTML tag), so only its control tokens count.
_END_TEXTS = {
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("<end_of_turn>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
    *("<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
}
_END_TEXTS_IF_CONTROL = {
    *("</s>", "<eos>", "<EOT>", "_<EOT>", "<|EOT|>", "[EOT]", "[EOS]"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
}


@dataclass(frozen=True)
class Vocabulary:
    """Checked tokeniser metadata. ``tokens`` and ``types`` have one entry an id; ``ids`` inverts
    ``tokens`` and leaves the empty ones out."""

    model: str
    pre: str
    tokens: Sequence[str]
    types: NDArray[np.int32]
    ids: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    end_ids: frozenset[int]
    add_bos: bool
    add_space_prefix: bool

    def of_type(self, *types: TokenType) -> list[int]:
        """Ids of the tokens with one of these types, ascending."""
        found: list[int] = np.flatnonzero(np.isin(self.types, types)).tolist()
        return found


def read_vocabulary(metadata: Mapping[str, Any], *, pre: str, adds_bos: bool) -> Vocabulary:
    """Check the metadata and gather it. ``adds_bos`` is the default where the file does not say.

    Raises TokenizerError naming the key, the id and the sizes.
    """
    model = metadata["tokenizer.ggml.model"]
    tokens = string_list(metadata, "tokenizer.ggml.tokens")
    if not tokens:
        raise TokenizerError("tokenizer.ggml.tokens is empty: the file has no vocabulary")
    ids = _index(tokens)
    types = _types(metadata, len(tokens))
    for text in _END_TEXTS & ids.keys():
        types[ids[text]] = TokenType.CONTROL
    _check_bytes(tokens, types)

    is_llama = model == "llama"
    bos_id = _special_id(metadata, "bos", len(tokens), default=1 if is_llama else None)
    eos_id = _special_id(metadata, "eos", len(tokens), default=2 if is_llama else None)
    unknown_id = _special_id(metadata, "unknown", len(tokens), default=0 if is_llama else None)
    turn_ids = [_special_id(metadata, name, len(tokens)) for name in ("eot", "eom")]
    add_bos = _flag(metadata, "tokenizer.ggml.add_bos_token", adds_bos and bos_id is not None)
    if add_bos and bos_id is None:
        raise TokenizerError(
            "tokenizer.ggml.add_bos_token is true but tokenizer.ggml.bos_token_id is missing"
        )
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=types,
        ids=ids,
        bos_id=bos_id,
        eos_id=eos_id,
        unknown_id=unknown_id,
        end_ids=_end_ids(ids, types, [eos_id, *turn_ids]),
        add_bos=add_bos,
        add_space_prefix=_flag(metadata, "tokenizer.ggml.add_space_prefix", is_llama),
    )


def string_list(metadata: Mapping[str, Any], key: str) -> list[str]:
    """The list of strings under ``key``; TokenizerError if it is missing or something else."""
    value = metadata.get(key)
    if value is None:
        raise TokenizerError(f"{key} is missing: this file holds no complete tokeniser")
    if not isinstance(value, list) or set(map(type, value)) - {str}:
        raise TokenizerError(f"{key} must be an array of strings")
    return value


def number_array(
    metadata: Mapping[str, Any], key: str, length: int, dtype: type[np.number[Any]]
) -> NDArray[Any] | None:
    """The numeric array under ``key`` as a fresh array of ``dtype``; None where it is missing.

    Raises TokenizerError unless it has ``length`` entries, all finite.
    """
    value = metadata.get(key)
    if value is None:
        return None
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise TokenizerError(f"{key} must be an array of numbers")
    if len(array) != length:
        raise TokenizerError(f"{key} has {len(array)} entries for {length} tokens")
    if not np.isfinite(array).all():
        raise TokenizerError(f"{key} holds a value that is not finite")
    return array.astype(dtype)


def _index(tokens: list[str]) -> dict[str, int]:
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) + max(tokens.count("") - 1, 0) != len(tokens):
        first: dict[str, int] = {}
        for i, text in enumerate(tokens):
            if text and first.setdefault(text, i) != i:
                raise TokenizerError(f"ids {first[text]} and {i} are both the token {text!r}")
    ids.pop("", None)  # an empty token can be generated (as nothing) but never matches text
    return ids


def _types(metadata: Mapping[str, Any], length: int) -> NDArray[np.int32]:
    key = "tokenizer.ggml.token_type"
    types = number_array(metadata, key, length, np.int32)
    if types is None:
        return np.full(length, TokenType.NORMAL, np.int32)
    if wrong := np.flatnonzero((types < 0) | (types > max(TokenType))).tolist():
        raise TokenizerError(f"{key}[{wrong[0]}] is {types[wrong[0]]}: no such token type")
    return types


def _check_bytes(tokens: list[str], types: NDArray[np.int32]) -> None:
    for i in np.flatnonzero(types == TokenType.BYTE).tolist():
        byte_value(tokens[i], i)


def byte_value(text: str, token_id: int) -> int:
    """The byte that a token of type BYTE stands for: ``<0x0A>`` is 10."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            pass
    raise TokenizerError(f"token {token_id} has type BYTE but its text is {text!r}, not '<0xNN>'")


def _special_id(
    metadata: Mapping[str, Any], name: str, length: int, default: int | None = None
) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return default if default is not None and default < length else None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TokenizerError(f"{key} must be an integer, not {type(value).__name__}")
    if not 0 <= value < length:
        raise TokenizerError(f"{key} is {value}, outside the vocabulary of {length} tokens")
    return int(value)


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, (bool, np.bool_)):
        raise TokenizerError(f"{key} must be true or false, not {value!r}")
    return bool(value)


def _end_ids(
    ids: Mapping[str, int], types: NDArray[np.int32], named: Sequence[int | None]
) -> frozenset[int]:
    ends = {i for i in named if i is not None}
    for text in (_END_TEXTS | _END_TEXTS_IF_CONTROL) & ids.keys():
        if types[ids[text]] == TokenType.CONTROL:
            ends.add(ids[text])
    # In the "harmony" vocabularies <|end|> closes one message of an answer, not the answer.
    if {"<|return|>", "<|call|>"} <= ids.keys() or {"<|flush|>", "<|calls|>"} <= ids.keys():
        ends.discard(ids.get("<|end|>", -1))
    return frozenset(ends)
