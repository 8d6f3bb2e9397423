"""Text to token ids and back, exactly as llama.cpp does it, from a GGUF file's metadata.

Encoding is two steps. First the text is cut at the tokens that stand for themselves: user-defined
ones always, control tokens only where they are allowed; longer ones first. Then each plain run in
between goes to the vocabulary's own model (byte-level BPE or SentencePiece), which is never able
to make a control token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from headrace.errors import TokenizerError
from headrace.text import bpe, spm
from headrace.text.pretokenizer import pre_tokenizer
from headrace.text.vocabulary import (
    TokenType,
    Vocabulary,
    byte_value,
    number_array,
    read_vocabulary,
    string_list,
)

_Part = int | tuple[int, int]  # a token id, or a run of text still to be encoded
_MODELS = ("gpt2", "llama")


class _Verbatim:
    """Tokens that stand for themselves in text: of one kind, one length and one ``prefix``."""

    def __init__(self, ids: dict[str, int], is_control: bool, prefix: str) -> None:
        self.ids = ids
        self.is_control = is_control
        first = next(iter(ids))
        self.prefix = prefix if len(ids) > 1 else first
        self.length = len(first)

    def cut(self, source: str, start: int, end: int, out: list[_Part]) -> None:
        """Append ``source[start:end]`` to ``out``, cut at every one of these tokens."""
        search = start
        while (at := source.find(self.prefix, search, end)) >= 0:
            stop = at + self.length
            token = self.ids.get(source[at:stop]) if stop <= end else None
            if token is None:
                search = at + 1
                continue
            if at > start:
                out.append((start, at))
            out.append(token)
            start = search = stop
        if start < end:
            out.append((start, end))


class Tokenizer:
    """A vocabulary and its encoder. Safe to share between threads.

    Reading the metadata checks it; the encoder itself is built on first use, or by
    :meth:`prepare` (in a thread, while weights load).
    """

    def __init__(
        self, vocabulary: Vocabulary, build: Callable[[], Callable[[str], list[int]]]
    ) -> None:
        self._vocabulary = vocabulary
        self._types = bytes(vocabulary.types.tolist())
        self._build = build
        self._build_lock = threading.Lock()
        self._encode_run: Callable[[str], list[int]] | None = None
        self._text_bytes = (
            bpe.token_text_bytes if vocabulary.model == "gpt2" else spm.token_text_bytes
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokeniser of a GGUF file. Raises TokenizerError naming the key that is wrong."""
        model = metadata.get("tokenizer.ggml.model")
        if model not in _MODELS:
            raise TokenizerError(
                f"tokenizer.ggml.model is {model!r}; headrace knows {' and '.join(_MODELS)}"
            )
        if model == "llama":
            vocabulary = read_vocabulary(metadata, pre="", adds_bos=True)
            key = "tokenizer.ggml.scores"
            scores = number_array(metadata, key, len(vocabulary.tokens), np.float32)
            if scores is None:
                raise TokenizerError(f"{key} is missing: a SentencePiece vocabulary needs scores")
            return cls(vocabulary, lambda: spm.build_sentencepiece(vocabulary, scores))
        pre = metadata.get("tokenizer.ggml.pre")
        if not isinstance(pre, str):
            raise TokenizerError(
                "tokenizer.ggml.pre is missing: the file does not say how to cut text into words. "
                "Convert the model again with a current converter"
            )
        vocabulary = read_vocabulary(metadata, pre=pre, adds_bos=pre_tokenizer(pre).adds_bos)
        merges = string_list(metadata, "tokenizer.ggml.merges")
        return cls(vocabulary, lambda: bpe.build_bpe(vocabulary, merges))

    @property
    def n_vocab(self) -> int:
        return len(self._vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        return self._vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        return self._vocabulary.eos_id

    @property
    def end_ids(self) -> frozenset[int]:
        """Every id that ends a generation: EOS, end of turn, and their well-known kin."""
        return self._vocabulary.end_ids

    @property
    def add_bos(self) -> bool:
        """Whether the file asks for BOS before a text."""
        return self._vocabulary.add_bos

    @property
    def add_space_prefix(self) -> bool:
        """Whether a text begins with a space of its own (Llama 2)."""
        return self._vocabulary.add_space_prefix

    @cached_property
    def control_characters(self) -> frozenset[str]:
        """Characters that control tokens are written with; without them none can be spelt.

        White space, quotes and backslashes are left out unless a token has nothing else.
        """
        plain = frozenset(" \t\r\n\"\\'")
        found: set[str] = set()
        for text in self._control_texts:
            found |= set(text) - plain or set(text)
        return frozenset(found)

    @property
    def _control_texts(self) -> list[str]:
        vocabulary = self._vocabulary
        ids = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
        return [text for i in ids if (text := vocabulary.tokens[i])]

    def prepare(self) -> None:
        """Build the encoder now. Raises TokenizerError if the vocabulary does not make one."""
        self._run_encoder()
        _ = self._verbatim

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Token ids of ``text``.

        special: control tokens written out in the text become those tokens; otherwise they are
        ordinary text. bos: put BOS first if the file asks for it (:attr:`add_bos`) and it is not
        there already. Raises TokenizerError for a lone surrogate, which no encoding can carry.
        """
        return self.encode_guarded(text, text if special else None, bos=bos)

    def encode_guarded(self, text: str, guarded: str | None, *, bos: bool = False) -> list[int]:
        """As :meth:`encode`, but control tokens are looked for in ``guarded``.

        ``guarded`` is ``text`` with any character that must not be part of a control token
        replaced by another; None forbids them everywhere.
        """
        _check_surrogates(text)
        if guarded is not None and len(guarded) != len(text):
            raise ValueError("guarded text must have the length of the text")
        ids: list[int] = []
        encode_run = self._run_encoder()
        after_token = True
        for part in self._cut(text, guarded):
            if isinstance(part, int):
                ids.append(part)
                after_token = True
                continue
            run = text[slice(*part)]
            # llama.cpp puts the extra space after every verbatim token, not only at the start.
            prefix = " " if after_token and self._vocabulary.add_space_prefix else ""
            ids += encode_run(prefix + run)
            after_token = False
        if bos and self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False, continuing: bool = False) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        special: show control tokens. continuing: the ids follow others, so the space that a
        Llama 2 vocabulary adds to the beginning of a text is not taken away.
        """
        pieces = []
        strip = self.add_space_prefix and not continuing
        for i in ids:
            pieces.append(self.piece_bytes(i, special=special, strip=strip))
            strip = False
        return b"".join(pieces).decode("utf-8", errors="replace")

    def piece_bytes(self, token_id: int, *, special: bool, strip: bool) -> bytes:
        """What one token adds to a text: nothing for a hidden control token; ``strip`` takes one
        leading space."""
        if not special and self.is_control(token_id):
            return b""
        piece = self.token_bytes(token_id)
        return piece.removeprefix(b" ") if strip else piece

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for (part of a character, perhaps); a control token's name."""
        text = self.token_text(token_id)
        match self._types[token_id]:
            case TokenType.NORMAL:
                return self._text_bytes(text)
            case TokenType.BYTE:
                return bytes([byte_value(text, token_id)])
            case TokenType.UNUSED | TokenType.UNDEFINED:
                return b""
        return text.encode()

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary spells it (``Ġthe``, ``▁the``, ``<0x0A>``)."""
        self._check_id(token_id)
        return self._vocabulary.tokens[token_id]

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary spells ``text``, if there is one."""
        return self._vocabulary.ids.get(text)

    def is_control(self, token_id: int) -> bool:
        """Whether a token is a mark for the model, hidden from readers."""
        self._check_id(token_id)
        return self._types[token_id] in (TokenType.CONTROL, TokenType.UNKNOWN)

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.n_vocab:
            raise TokenizerError(
                f"token id {token_id} is outside the vocabulary of {self.n_vocab} tokens"
            )

    def _run_encoder(self) -> Callable[[str], list[int]]:
        with self._build_lock:
            if self._encode_run is None:
                self._encode_run = self._build()
            return self._encode_run

    @cached_property
    def _verbatim(self) -> list[_Verbatim]:
        """Tokens that stand for themselves, longest first, grouped so that a vocabulary's six
        thousand ``<unusedN>`` cost one search of the text."""
        vocabulary = self._vocabulary
        groups: dict[tuple[int, int, bool, str], dict[str, int]] = {}
        kinds = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        for i in vocabulary.of_type(*kinds):
            if text := vocabulary.tokens[i]:
                is_control = self._types[i] != TokenType.USER_DEFINED
                key = (-len(text.encode()), len(text), is_control, text[:8])
                groups.setdefault(key, {})[text] = i
        return [_Verbatim(groups[key], *key[2:]) for key in sorted(groups)]

    def _cut(self, text: str, guarded: str | None) -> list[_Part]:
        parts: list[_Part] = [(0, len(text))] if text else []
        for group in self._verbatim:
            source = guarded if group.is_control else text
            if source is None or group.prefix not in source:
                continue
            whole, parts = parts, []
            for part in whole:
                if isinstance(part, int):
                    parts.append(part)
                else:
                    group.cut(source, *part, parts)
        return parts


def _check_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text holds the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which is no character: remove it or replace it by U+FFFD"
        ) from None
