"""Token ids to text, one at a time."""

from __future__ import annotations

import codecs

from headrace.text.tokenizer import Tokenizer


class IncrementalDecoder:
    """Decodes a stream of token ids into pieces that are safe to show.

    A character spread over several tokens is held back until it is whole; bytes that are not UTF-8
    become U+FFFD exactly as in :meth:`Tokenizer.decode`. All pieces, with :meth:`flush` last,
    concatenate to ``tokenizer.decode(ids, special=special, continuing=continuing)``.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, special: bool = False, continuing: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._strip = tokenizer.add_space_prefix and not continuing
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; often "" in the middle of a character.

        Raises TokenizerError for an id outside the vocabulary.
        """
        piece = self._tokenizer.piece_bytes(token_id, special=self._special, strip=self._strip)
        self._strip = False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """The end of the text: what was held back, as U+FFFD."""
        return self._utf8.decode(b"", final=True)
