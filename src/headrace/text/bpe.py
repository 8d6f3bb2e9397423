"""Byte-level BPE (``tokenizer.ggml.model = "gpt2"``) by the ``tokenizers`` library.

The encoder gets plain runs of text only: control and user-defined tokens have been cut out.
"""

from __future__ import annotations

from collections.abc import Callable

from headrace.errors import TokenizerError
from headrace.text.pretokenizer import pre_tokenizer
from headrace.text.vocabulary import TokenType, Vocabulary


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte (``bytes_to_unicode`` in OpenAI's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = dict.fromkeys(printable, 0) | {byte: 0x100 + i for i, byte in enumerate(others)}
    return {byte: chr(stand_in or byte) for byte, stand_in in stand_ins.items()}


_LONG = 4096
"""Characters from which a text is encoded as a batch of one: that lets other threads run."""

BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def token_text_bytes(text: str) -> bytes:
    """The bytes a normal token stands for; a text outside the byte alphabet stands for itself."""
    try:
        return bytes([CHAR_TO_BYTE[char] for char in text])
    except KeyError:
        return text.encode()


def build_bpe(vocabulary: Vocabulary, merges: list[str]) -> Callable[[str], list[int]]:
    """An encoder of plain text. ``merges`` are "left right" pairs, best first.

    Raises TokenizerError for a malformed merge or one whose tokens do not exist.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    kind = pre_tokenizer(vocabulary.pre)
    n_vocab = len(vocabulary.tokens)
    # Merging must never make a control token out of plain text.
    ids = dict(vocabulary.ids)
    for i in vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN):
        ids.pop(vocabulary.tokens[i], None)
    # Some vocabularies lack rare bytes. llama.cpp emits nothing for such a byte but does not merge
    # across it, so it needs an id here, which is dropped from the result.
    for char in BYTE_TO_CHAR.values():
        if char not in ids:
            ids[char] = n_vocab
    pairs = _split_merges(merges)
    try:
        model = models.BPE(ids, pairs, ignore_merges=kind.ignore_merges)
    except Exception as error:  # tokenizers raises plain Exception
        raise TokenizerError(
            _merge_fault(pairs, ids) or f"tokenizer.ggml.merges: {error}"
        ) from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), "isolated") for p in kind.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )

    def encode(text: str) -> list[int]:
        if len(text) < _LONG:
            found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        else:
            found = tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
        return [i for i in found if i < n_vocab]

    return encode


def _split_merges(merges: list[str]) -> list[tuple[str, str]]:
    """Cut each merge at its first space that is not its first character, as llama.cpp does.

    Of equal merges the first counts.
    """
    pairs = []
    for merge in dict.fromkeys(merges):
        left, space, right = merge.partition(" ")
        if not left:  # the first space is the first character
            left, space, right = merge[1:].partition(" ")
            left = " " + left
        if not space:
            raise TokenizerError(f"tokenizer.ggml.merges holds {merge!r}, which has no space")
        pairs.append((left, right))
    return pairs


def _merge_fault(pairs: list[tuple[str, str]], ids: dict[str, int]) -> str | None:
    for left, right in pairs:
        for text in (left, right, left + right):
            if text not in ids:
                return (
                    f"the merge {left!r} {right!r} in tokenizer.ggml.merges needs the token "
                    f"{text!r}, which is no normal token of the vocabulary"
                )
    return None
