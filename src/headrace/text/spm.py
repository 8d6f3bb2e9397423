"""SentencePiece BPE (``tokenizer.ggml.model = "llama"``) by the ``sentencepiece`` library.

GGUF keeps pieces, scores and types; the library wants its own ``ModelProto`` (protobuf, field
numbers from ``sentencepiece_model.proto``), which is written here directly: a quarter of a million
pieces through the protobuf package would take seconds.

The encoder gets plain runs of text only: control and user-defined tokens have been cut out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from headrace.errors import TokenizerError
from headrace.text.vocabulary import TokenType, Vocabulary, byte_value

_SPACE = "▁"
_CONTROL, _UNKNOWN = 3, 2  # SentencePiece's own numbers, which GGUF took over
_SHORT = 128 - 9


def token_text_bytes(text: str) -> bytes:
    """The bytes a normal token stands for."""
    return text.replace(_SPACE, " ").encode()


def build_sentencepiece(
    vocabulary: Vocabulary, scores: NDArray[np.float32]
) -> Callable[[str], list[int]]:
    """An encoder of plain text; float32 ``scores`` [n_vocab], higher merges first.

    Raises TokenizerError if the vocabulary has no unknown token or the library refuses it.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(_model_proto(vocabulary, scores))
    except RuntimeError as error:
        raise TokenizerError(
            f"the vocabulary does not make a SentencePiece model: {error}"
        ) from None
    encode: Callable[[str], list[int]] = processor.EncodeAsIds
    return encode


def _model_proto(vocabulary: Vocabulary, scores: NDArray[np.float32]) -> bytes:
    tokens, types = vocabulary.tokens, vocabulary.types.tolist()
    unknown = vocabulary.unknown_id
    if TokenType.UNKNOWN in types and (unknown is None or types[unknown] != TokenType.UNKNOWN):
        unknown = types.index(TokenType.UNKNOWN)
    if unknown is None:
        raise TokenizerError(
            "the vocabulary has no unknown token (tokenizer.ggml.unknown_token_id)"
        )
    byte_tokens = {byte_value(tokens[i], i) for i in vocabulary.of_type(TokenType.BYTE)}
    byte_fallback = len(byte_tokens) == 256
    # What must not come out of plain text is CONTROL to the library: it never matches. That
    # includes user-defined tokens, which have been found before, and bytes if some are missing.
    kinds = {
        TokenType.NORMAL: 1,
        TokenType.BYTE: 6 if byte_fallback else _CONTROL,
        TokenType.UNUSED: 5,
        TokenType.UNDEFINED: 5,
    }
    packed = np.ascontiguousarray(scores, "<f4").tobytes()
    tails = [b"\x18" + bytes([kinds.get(TokenType(t), _CONTROL)]) for t in range(len(TokenType))]
    # A piece is a message (field 1) of text (1), score (2, fixed32) and type (3): 9 bytes more than
    # the text, while both lengths fit in a byte. Written out, for this loop is most of loading.
    heads = [bytes([1 << 3 | 2, n + 9, 1 << 3 | 2, n]) for n in range(_SHORT)]
    parts = []
    for i, text in enumerate(tokens):
        name, tail = text.encode(), tails[types[i]]
        if not name:
            name, tail = b"\x01empty%d" % i, tails[TokenType.CONTROL]  # "" would be refused
        if i == unknown:
            tail = b"\x18" + bytes([_UNKNOWN])
        score = packed[4 * i : 4 * i + 4]
        if len(name) < _SHORT:
            parts.append(heads[len(name)] + name + b"\x15" + score + tail)
        else:
            parts.append(_bytes_field(1, _bytes_field(1, name) + b"\x15" + score + tail))
    trainer = b"\x18\x02" + b"\x98\x02" + bytes([byte_fallback])  # model_type BPE, byte_fallback
    # The identity, but spaces are escaped; no dummy prefix (llama.cpp adds its own).
    normaliser = _bytes_field(1, b"identity") + b"\x18\x00" + b"\x20\x00" + b"\x28\x01"
    return b"".join([*parts, _bytes_field(2, trainer), _bytes_field(3, normaliser)])


def _bytes_field(number: int, payload: bytes) -> bytes:
    length = len(payload)
    head = bytearray([number << 3 | 2])
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    head.append(length)
    return bytes(head) + payload
